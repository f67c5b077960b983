import itertools
import math

import numpy as np
import pytest
import torch
from transformers import DynamicCache
from turboquant_cpp.evaluation import Protocol, compare_caches, select_windows
from turboquant_cpp.hf.compat import CACHE_ARGUMENT


def test_windows_start_as_the_protocol_says():
    windows = select_windows(torch.arange(154_877), Protocol(2, 1024, 8))
    assert [int(window[0]) for window in windows] == [0, (154_877 - 1024) // 2]
    assert all(len(window) == 1024 for window in windows)


def test_a_text_of_exactly_one_window_is_enough():
    assert len(select_windows(torch.arange(16), Protocol(1, 16, 8))) == 1


@pytest.mark.parametrize(("windows", "text"), [(1, 15), (2, 16), (2, 17)])
def test_short_text_is_refused(windows, text):
    with pytest.raises(ValueError, match=f"text: expected at least .* got {text}"):
        select_windows(torch.arange(text), Protocol(windows, 16, 8))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, 16, 8), "windows"),
        ((1, 8, 8), "window_tokens"),
        ((1, 16, 0), "chunk_tokens"),
        ((1, 16, 8, 0), "batch_windows"),
        ((1, 16, 8, 1, 16), "lead_tokens"),
        ((1, 16, 8, 1, -1), "lead_tokens"),
    ],
)
def test_impossible_protocol_is_refused(arguments, name):
    with pytest.raises(ValueError, match=name):
        Protocol(*arguments)


def test_exact_cache_against_itself_is_zero(model, tokens):
    report = compare_caches(
        model, tokens, {"same": lambda: DynamicCache(config=model.config)}, Protocol(2, 64, 8)
    )
    divergence = report.caches["same"].divergence
    assert divergence.kl_max == 0.0
    assert divergence.top1_agreement == 1.0
    assert divergence.perplexity_change_percent == 0.0
    assert divergence.positions == 2 * (64 - 8)
    assert report.caches["same"].size == report.exact_size


def test_exact_perplexity_is_that_of_single_passes(model, tokens):
    protocol = Protocol(2, 64, 8)
    report = compare_caches(
        model, tokens, {"same": lambda: DynamicCache(config=model.config)}, protocol
    )
    nll = []
    for window in select_windows(tokens, protocol):
        with torch.inference_mode():
            log_probs = model(window[None]).logits[0].double().log_softmax(-1)
        nll += [-float(log_probs[i, window[i + 1]]) for i in range(63)]
    expected = math.exp(sum(nll) / len(nll))
    assert report.caches["same"].divergence.perplexity_exact == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("length", [64, 61])  # the last chunk may be short
def test_figures_equal_a_direct_computation(model, tokens, rounding_cache, length):
    step, chunk = 0.25, 8
    protocol = Protocol(1, length, chunk)
    report = compare_caches(model, tokens, {"toy": lambda: rounding_cache(step)}, protocol)

    window = tokens[:length]
    cache = rounding_cache(step)
    with torch.inference_mode():
        exact = model(window[None]).logits[0].double().numpy()
        pieces = [
            model(window[None, i : i + chunk], **{CACHE_ARGUMENT: cache}).logits[0].double().numpy()
            for i in range(0, length, chunk)
        ]
    p, q = _softmax(exact)[chunk:], _softmax(np.concatenate(pieces))[chunk:]
    kl = (p * np.log(p / q)).sum(-1)
    divergence = report.caches["toy"].divergence
    assert kl.mean() > 1e-3  # the toy cache really differs
    assert divergence.kl_mean == pytest.approx(kl.mean(), rel=1e-4)
    assert divergence.kl_max == pytest.approx(kl.max(), rel=1e-4)
    assert divergence.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    assert divergence.top1_agreement == (p.argmax(-1) == q.argmax(-1)).mean()
    np.testing.assert_allclose(report.caches["toy"].kl, kl[None], rtol=1e-3, atol=1e-7)


def test_a_lead_is_read_in_larger_chunks_and_not_compared(model, tokens, rounding_cache):
    """Its tokens are read through the cache too: a cache made of the same passes says so."""
    protocol = Protocol(1, 100, 8, lead_tokens=72)
    report = compare_caches(model, tokens, {"toy": lambda: rounding_cache(0.25)}, protocol)

    window, cache = tokens[:100], rounding_cache(0.25)
    ends = [0, 64, 72, 80, 88, 96, 100]
    with torch.inference_mode():
        exact = model(window[None]).logits[0].double().numpy()
        pieces = [
            model(window[None, a:b], **{CACHE_ARGUMENT: cache}).logits[0].double().numpy()
            for a, b in itertools.pairwise(ends)
        ]
    p, q = _softmax(exact)[72:], _softmax(np.concatenate(pieces))[72:]
    kl = (p * np.log(p / q)).sum(-1)
    divergence = report.caches["toy"].divergence
    assert divergence.positions == 28
    assert divergence.kl_mean == pytest.approx(kl.mean(), rel=1e-4)
    targets = window[73:]
    nll = -np.log(p[np.arange(27), targets])
    assert divergence.perplexity_exact == pytest.approx(math.exp(nll.mean()), rel=1e-5)


def test_coarser_codes_diverge_more(model, tokens, rounding_cache):
    steps = (0.05, 0.2, 0.8)
    report = compare_caches(
        model,
        tokens,
        {str(step): lambda step=step: rounding_cache(step) for step in steps},
        Protocol(1, 96, 8),
    )
    kl = [report.caches[str(step)].divergence.kl_mean for step in steps]
    assert kl == sorted(kl)
    assert kl[0] < 0.2 * kl[-1]


def test_nan_in_a_cache_is_not_hidden(model, tokens, rounding_cache):
    report = compare_caches(
        model, tokens, {"nan": lambda: rounding_cache(math.nan)}, Protocol(1, 32, 8)
    )
    assert math.isnan(report.caches["nan"].divergence.kl_mean)


def test_windows_read_in_a_batch_give_the_figures_of_those_read_alone(
    model, tokens, rounding_cache
):
    calls = []
    alone, batched = (
        compare_caches(
            model,
            tokens,
            {"toy": lambda: rounding_cache(0.25)},
            Protocol(5, 61, 8, batch),
            progress=lambda done, total: calls.append((done, total)),
        )
        for batch in (1, 3)  # of five, so the last batch is smaller
    )
    assert calls[5 * 8 :] == [(done + 1, 16) for done in range(16)]
    single, figures = alone.caches["toy"], batched.caches["toy"]
    assert figures.size == single.size
    assert batched.exact_size == alone.exact_size
    # fp32 sums in another order; the toy's KL is 0.01 and more at nearly every position.
    np.testing.assert_allclose(figures.kl, single.kl, rtol=1e-3, atol=1e-6)
    for name in ("kl_mean", "kl_p99", "perplexity", "perplexity_exact"):
        assert getattr(figures.divergence, name) == pytest.approx(
            getattr(single.divergence, name), rel=1e-4
        )
    assert figures.divergence.top1_agreement == single.divergence.top1_agreement
    assert figures.intervals.units == single.intervals.units


def test_bytes_per_token_are_the_mean_over_a_sawtooth(model, tokens):
    class Sawtooth(DynamicCache):
        """Says that a row takes 100 bytes a token since the last multiple of 48, and 3 for each."""

        def memory(self):
            length = self.get_seq_length()
            return {"pages": 2 * 3 * length, "exact": 2 * 100 * (length % 48), "total": -1}

    report = compare_caches(
        model, tokens, {"saw": lambda: Sawtooth(config=model.config)}, Protocol(2, 200, 8, 2)
    ).caches["saw"]
    ends = range(80, 201, 8)  # the 16 chunks that end in the last 128 tokens
    mean = sum(3 + 100 * (end % 48) / end for end in ends) / 16
    assert report.bytes_per_token == pytest.approx(mean)
    assert report.size.parts == {"pages": 3 * 200, "exact": 100 * (200 % 48)}


def test_progress_counts_every_chunk(model, tokens):
    calls = []
    compare_caches(
        model,
        tokens,
        {"same": lambda: DynamicCache(config=model.config)},
        Protocol(2, 32, 8),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(i + 1, 8) for i in range(8)]


def _softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)
