import math

import pytest
import torch
from turboquant_cpp.evaluation.bootstrap import bootstrap_intervals


def gaussian(*shape, seed, mean=0.0):
    return mean + torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def kl_interval(kl):
    return bootstrap_intervals(kl, kl, kl).kl_mean


@pytest.mark.parametrize(
    ("windows", "resampled", "units"),
    [(6, "windows", 6), (5, "blocks of 64 positions", 5 * 3), (1, "blocks of 64 positions", 3)],
)
def test_few_windows_are_cut_into_blocks(windows, resampled, units):
    rows = torch.zeros(windows, 130)  # blocks of 64, 64 and 2 positions
    intervals = bootstrap_intervals(rows, rows, rows)
    assert (intervals.resampled, intervals.units) == (resampled, units)


def test_one_block_has_no_interval():
    rows = torch.ones(1, 64)
    intervals = bootstrap_intervals(rows, rows, rows)
    assert intervals.kl_mean is None
    assert intervals.perplexity_change_percent is None


def test_width_is_that_of_a_normal_mean():
    """Of n windows with means of variance v: 2 * 1.96 * sqrt(v / n)."""
    kl = gaussian(400, 1, seed=0)
    interval = kl_interval(kl)
    expected = 2 * 1.96 * kl.std().item() / math.sqrt(400)
    # A percentile of 2,000 draws has a relative error of 3 %, the quotient of two a bit more.
    assert interval.high - interval.low == pytest.approx(expected, rel=0.12)
    assert interval.low < kl.mean().item() < interval.high


def test_correlated_positions_widen_the_interval():
    """Blocks that each repeat one value are as good as one position each."""
    values = gaussian(1, 40, seed=1)
    repeated = kl_interval(values.repeat_interleave(64, dim=1))
    independent = kl_interval(gaussian(1, 40 * 64, seed=2))
    ratio = (repeated.high - repeated.low) / (independent.high - independent.low)
    assert ratio == pytest.approx(8.0, rel=0.5)  # sqrt(64); either std is good to 1 / sqrt(80)


@pytest.mark.parametrize("windows", [2, 30])
def test_coverage(windows):
    """The true mean lies inside in about 95 % of 200 cases (+-1.5 %), a bit less for small n."""
    inside = 0
    for seed in range(200):
        interval = kl_interval(gaussian(windows, 1024, seed=seed, mean=1.0))
        inside += interval.low <= 1.0 <= interval.high
    assert 0.88 <= inside / 200 <= 0.99


def test_perplexity_is_paired():
    """A cache worse by a constant has an interval of no width, however the text varies."""
    exact = gaussian(1, 1024, seed=3)
    change = bootstrap_intervals(exact, exact, exact + math.log(1.02)).perplexity_change_percent
    assert change.low == pytest.approx(2.0, abs=1e-9)
    assert change.high == pytest.approx(2.0, abs=1e-9)


def test_blocks_of_unequal_length_count_by_position():
    """Five blocks of 64 at 0, five of one position at 1; k of ten drawn: k / (64 (10 - k) + k).

    k is binomial, 2 to 8 between its 2.5 % and 97.5 % points.
    """
    kl = torch.cat([torch.zeros(5, 64), torch.ones(5, 1)], dim=1)
    interval = kl_interval(kl)
    assert interval.low == pytest.approx(2 / (64 * 8 + 2))
    assert interval.high == pytest.approx(8 / (64 * 2 + 8))


def test_same_input_gives_the_same_interval_whatever_the_global_seed():
    kl = gaussian(8, 100, seed=4)
    torch.manual_seed(1)
    first = kl_interval(kl)
    torch.manual_seed(2)
    assert kl_interval(kl) == first


def test_nan_is_not_hidden():
    kl = torch.ones(8, 10)
    kl[3, 3] = math.nan
    interval = kl_interval(kl)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_a_lost_text_is_infinitely_worse():
    exact = torch.ones(8, 10)
    change = bootstrap_intervals(exact, exact, 1e4 * exact).perplexity_change_percent
    assert (change.low, change.high) == (math.inf, math.inf)
