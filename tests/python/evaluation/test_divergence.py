import math

import pytest
import torch
from turboquant_cpp.evaluation.divergence import DivergenceAccumulator


def log_probs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def test_known_distributions():
    accumulator = DivergenceAccumulator()
    exact = log_probs([0.5, 0.25, 0.25], [0.1, 0.8, 0.1])
    cache = log_probs([0.25, 0.5, 0.25], [0.1, 0.8, 0.1])
    accumulator.add(exact, cache, torch.tensor([0, 1]), compare=True)
    summary = accumulator.summary()
    first = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert summary.kl_mean == pytest.approx(first / 2)
    assert summary.kl_max == pytest.approx(first)
    assert summary.top1_agreement == 0.5
    assert summary.perplexity_exact == pytest.approx((1 / (0.5 * 0.8)) ** 0.5)
    assert summary.perplexity == pytest.approx((1 / (0.25 * 0.8)) ** 0.5)
    assert summary.perplexity_change_percent == pytest.approx(100 * (2**0.5 - 1))


def test_first_chunk_counts_for_the_perplexity_only():
    accumulator = DivergenceAccumulator()
    exact = log_probs([0.5, 0.5])
    accumulator.add(exact, log_probs([0.9, 0.1]), torch.tensor([0]), compare=False)
    accumulator.add(exact, exact, torch.tensor([0]), compare=True)
    summary = accumulator.summary()
    assert summary.positions == 1
    assert summary.kl_mean == 0.0
    assert summary.perplexity == pytest.approx((1 / (0.9 * 0.5)) ** 0.5)


def test_tokens_that_both_exclude_add_nothing():
    accumulator = DivergenceAccumulator()
    rows = log_probs([0.5, 0.5, 0.0])
    accumulator.add(rows, rows, torch.tensor([0]), compare=True)
    assert accumulator.summary().kl_mean == 0.0


def test_a_token_only_the_cache_excludes_is_infinite():
    accumulator = DivergenceAccumulator()
    accumulator.add(log_probs([0.5, 0.5]), log_probs([1.0, 0.0]), torch.tensor([0]), compare=True)
    assert accumulator.summary().kl_mean == math.inf


def test_last_position_has_no_target():
    accumulator = DivergenceAccumulator()
    rows = log_probs([0.5, 0.5], [0.5, 0.5])
    accumulator.add(rows, rows, torch.tensor([0]), compare=True)
    assert accumulator.summary().positions == 2


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ValueError, match="no position to compare"):
        DivergenceAccumulator().summary()
