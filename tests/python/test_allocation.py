import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from turboquant_cpp._core import Codebook
from turboquant_cpp.allocation import LayerDemand, allocate, page_bytes, widths_of
from turboquant_cpp.spec import CacheConfig

DIM = 64
errors = st.floats(1e-7, 1e-1)
demand_lists = st.lists(st.tuples(errors, errors), min_size=1, max_size=6).map(
    lambda pairs: [LayerDemand(i, DIM, 2, k, v) for i, (k, v) in enumerate(pairs)]
)


def cost(config, demands, widths):
    return sum(page_bytes(config, demand, widths[demand.layer]) for demand in demands)


def loss(config, demands, widths):
    """Summed error with the floor that `allocate` puts under a layer's."""
    distortion = {bits: Codebook(DIM, bits).distortion for bits in range(1, 9)}
    k_floor = sum(demand.key_error for demand in demands) / len(demands) / 16
    v_floor = sum(demand.value_error for demand in demands) / len(demands) / 16
    return sum(
        max(demand.key_error, k_floor) * distortion[k] / distortion[config.k_bits]
        + max(demand.value_error, v_floor) * distortion[v] / distortion[config.v_bits]
        for demand, (k, v) in ((demand, widths[demand.layer]) for demand in demands)
    )


@given(demands=demand_lists, bits=st.sampled_from([3, 4, (5, 4), (3, 2), 6]))
def test_it_keeps_the_budget_and_is_never_worse_than_uniform_widths(demands, bits):
    k_bits, v_bits = bits if isinstance(bits, tuple) else (bits, bits)
    config = CacheConfig(k_bits=k_bits, v_bits=v_bits)
    uniform = {demand.layer: (k_bits, v_bits) for demand in demands}
    budget = cost(config, demands, uniform)
    widths = allocate(config, demands, budget)
    assert cost(config, demands, widths) <= budget
    assert loss(config, demands, widths) <= loss(config, demands, uniform) * (1 + 1e-12)
    assert widths == allocate(config, demands, budget)


@given(demands=demand_lists.filter(lambda demands: len(demands) == 2), share=st.floats(0, 1))
def test_only_the_last_step_keeps_it_from_the_optimum(demands, share):
    """Greedy steps on the convex hull: as good as any choice that has a step's bytes less."""
    config = CacheConfig(bits=4)
    pairs = widths_of(config)
    choices = [dict(enumerate(pair)) for pair in itertools.product(pairs, repeat=2)]
    costs = [cost(config, demands, choice) for choice in choices]
    budget = int(min(costs) + share * (max(costs) - min(costs)))
    loss_found = loss(config, demands, allocate(config, demands, budget))
    page = [page_bytes(config, demands[0], pair) for pair in pairs]
    step = max(page) - min(page)
    affordable = [
        loss(config, demands, choice)
        for choice, bytes_taken in zip(choices, costs, strict=True)
        if bytes_taken <= budget - step
    ]
    assert loss_found <= min(affordable, default=float("inf")) * (1 + 1e-12)


def test_what_hurts_more_gets_more_bits():
    config = CacheConfig(bits=4)
    demands = [LayerDemand(0, DIM, 1, 4e-4, 1e-5), LayerDemand(1, DIM, 1, 1e-5, 1e-5)]
    widths = allocate(config, demands, cost(config, demands, {0: (4, 4), 1: (4, 4)}))
    assert widths[0][0] > widths[1][0]
    assert widths[0][0] > widths[0][1]


def test_equal_layers_that_weigh_keys_and_values_alike_stay_uniform():
    config = CacheConfig(bits=4)
    demands = [LayerDemand(i, DIM, 2, 1e-4, 1e-4) for i in range(4)]
    budget = cost(config, demands, dict.fromkeys(range(4), (4, 4)))
    assert allocate(config, demands, budget) == dict.fromkeys(range(4), (4, 4))


def test_a_layer_that_shows_no_error_is_not_starved():
    config = CacheConfig(k_bits=6, v_bits=4)
    demands = [LayerDemand(i, DIM, 1, 0.0 if i == 1 else 1e-4, 1e-4) for i in range(3)]
    widths = allocate(config, demands, cost(config, demands, dict.fromkeys(range(3), (6, 4))))
    assert widths[1][0] >= 4  # a sixteenth of the mean: three bits less than the others at most


def test_a_budget_below_the_narrowest_widths_is_refused():
    config = CacheConfig(bits=4)
    demands = [LayerDemand(0, DIM, 1, 1e-4, 1e-4)]
    least = page_bytes(config, demands[0], (2, 2))
    assert allocate(config, demands, least) == {0: (2, 2)}
    with pytest.raises(ValueError, match=rf"bytes_per_token: expected at least {least / 64:g}"):
        allocate(config, demands, least - 64)


def test_widths_are_those_that_attention_reads_from_codes():
    assert (8, 4) in widths_of(CacheConfig(bits=4))
    assert (5, 2) not in widths_of(CacheConfig(bits=4))  # no GPU kernel reads it
    assert max(v for _, v in widths_of(CacheConfig(bits=4))) == 4
    assert (8, 8) in widths_of(CacheConfig(bits=8))  # asked for
    assert set(widths_of(CacheConfig(bits=4, codebook="vector"))) == set(
        itertools.product((2, 3, 4), repeat=2)
    )
