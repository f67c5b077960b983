import dataclasses
import math
import random

import pytest
from turboquant_cpp import CacheConfig
from turboquant_cpp.benchmark.controls import CONTROLS, Control, median_ratio, time_control
from turboquant_cpp.benchmark.kernels import Shape

#: Fields of a config that are no control of decode attention's cost: widths are what they are,
#: exact layers are not ours, the rest chooses what other fields hold.
NO_CONTROLS = {
    *("bits", "k_bits", "v_bits", "preset", "recipe", "codebook", "seed"),
    *("exact_first_layers", "exact_last_layers", "policy", "bytes_per_token", "layer_bits"),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr("turboquant_cpp.benchmark.kernels._ROTATION_BYTES", 1 << 16)


def differing(control):
    on, off = (CacheConfig(bits=4, **options) for options in (control.on, control.off))
    return {
        field.name
        for field in dataclasses.fields(CacheConfig)
        if getattr(on, field.name) != getattr(off, field.name)
    }


def test_every_control_of_a_config_is_there():
    names = {field.name for field in dataclasses.fields(CacheConfig)} - NO_CONTROLS
    assert names <= {control.name for control in CONTROLS}


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.name)
def test_the_sides_differ_in_the_control_alone(control):
    alone = {other.name for other in CONTROLS if other.name != "all of these"}
    exact = {"sink_tokens", "window_tokens"}
    expected = alone - exact if control.name == "all of these" else {control.name}
    assert differing(control) == expected


def test_times_and_bytes_of_both_sides():
    shape, turns = Shape(4, 2, 64, 500), []
    control = Control("scale_dtype", {}, {"scale_dtype": "float32"})
    cost = time_control(control, shape, (4, 3), turns=3, progress=lambda *at: turns.append(at))
    assert turns == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert cost.on_microseconds > 0
    assert cost.off_microseconds > 0
    assert 0 < cost.low <= cost.ratio <= cost.high
    assert cost.on_bytes < cost.off_bytes


def test_the_interval_holds_the_true_median_in_95_of_100_cases():
    source = random.Random(0)
    cases, held, count = 2000, 0, 101
    for _ in range(cases):
        # Skewed, as times are: the median of exp(|noise|) is exp(0.6745).
        ratios = [math.exp(abs(source.gauss(0, 1))) for _ in range(count)]
        _, low, high = median_ratio(ratios, [1.0] * count)
        held += low <= math.exp(0.67449) <= high
    # Four standard deviations of a share of 95 % in 2,000 cases are 2 %.
    assert 0.93 <= held / cases <= 0.98


def test_few_turns_exclude_nothing():
    assert median_ratio([3.0, 1.0, 2.0], [1.0, 1.0, 1.0]) == (2.0, 1.0, 3.0)
