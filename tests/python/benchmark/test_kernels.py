import pytest
from gpu import require_fused_attention
from turboquant_cpp.benchmark.kernels import (
    Shape,
    measure_read_bandwidth,
    time_decode,
    time_encode,
)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr("turboquant_cpp.benchmark.kernels._ROTATION_BYTES", 1 << 16)
    monkeypatch.setattr("turboquant_cpp.benchmark.kernels._BANDWIDTH_BYTES", 1 << 20)


def test_every_contender_is_timed_and_its_bytes_are_counted():
    turns = []
    timings = time_decode(
        Shape(4, 2, 64, 500), [(4, 4), (8, 3)], turns=2, progress=lambda *at: turns.append(at)
    )
    assert turns == [(0, 2), (1, 2), (2, 2)]
    assert all(timing.microseconds > 0 for timing in timings)
    sizes = {timing.kernel: timing.bytes_read for timing in timings}
    numbers = 2 * 2 * 500 * 64
    assert sizes["torch fp32"] == 4 * numbers
    assert sizes["torch bf16"] == 2 * numbers
    # Six blocks of 64 tokens and two heads (means, codes, fp16 scales), 132 exact slots.
    exact = 2 * 2 * 132 * 64 * 4
    blocks = 6 * 2 * (2 * 64 + 64 * (64 + 2 * 2)) + exact
    assert blocks <= sizes["4+4"] <= blocks + 4 * 2 * (2 * 64 + 64 * 68)  # or one slab
    assert sizes["8+3"] > sizes["4+4"]
    fastest = timings[2]
    assert fastest.gigabytes_per_second == fastest.bytes_read / fastest.microseconds / 1e3


def test_rates_are_numbers():
    assert measure_read_bandwidth() > 0
    assert time_encode(64, 4, 4, turns=1) > 0


def test_a_gpu_is_timed_by_graphs():
    device = require_fused_attention()
    timings = time_decode(Shape(8, 2, 128, 700, batch=2), [(4, 4)], device=device, turns=2)
    assert [timing.kernel for timing in timings] == ["cuDNN bf16", "flash bf16", "4+4"]
    assert all(0 < timing.microseconds < 1e5 for timing in timings)
    assert timings[0].bytes_read == 2 * 2 * 2 * 2 * 700 * 128
    # Reading cannot be faster than the memory (and L2) of any GPU.
    assert 100 < measure_read_bandwidth(device) < 20000
    assert time_encode(128, 4, 4, device=device, turns=1) > 0
