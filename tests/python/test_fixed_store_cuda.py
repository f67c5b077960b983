"""A store of fixed capacity on a GPU: the growing store's bits, in one CUDA graph."""

from __future__ import annotations

import pytest
import torch
from gpu import require_fused_attention
from turboquant_cpp import CacheConfig, FixedStore, LayerStore

HEADS, DIM, CAPACITY = 2, 128, 420
SCALING = DIM**-0.5


@pytest.fixture(autouse=True)
def gpu():
    return require_fused_attention()


def make_stores(batch=2, dtype=torch.bfloat16):
    spec = CacheConfig(bits=4).layer_spec(0, DIM, HEADS)
    common = {"batch_size": batch, "dtype": dtype, "device": "cuda"}
    return LayerStore(spec, **common), FixedStore(spec, max_tokens=CAPACITY, **common)


def random_chunk(tokens, seed, heads=HEADS):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, heads, tokens, DIM, generator=generator).to("cuda", torch.bfloat16)


def assert_same(growing, fixed):
    assert fixed.lengths == growing.lengths
    for mine, theirs in zip(fixed.codes(), growing.codes(), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(fixed.dequantize(), growing.dequantize(), strict=True):
        assert torch.equal(mine, theirs)


def test_one_graph_replays_as_rows_grow_until_they_are_full():
    growing, fixed = make_stores()
    prompt = random_chunk(200, seed=0)
    for store in (growing, fixed):
        store.append(*prompt, [200, 150])
    query, _ = random_chunk(1, seed=1, heads=4)
    keys, values = random_chunk(1, seed=2)

    def step():
        plan = fixed.plan(1)
        return fixed.attend_append_planned(query, keys, values, plan, scaling=SCALING)

    saved = fixed.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # first uses cannot be captured
        step()
    torch.cuda.current_stream().wait_stream(stream)
    for tensor, before in zip(fixed._tensors(), saved._tensors(), strict=True):
        tensor.copy_(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for i in range(300):
        for tensor, new in zip(
            (query, keys, values),
            (random_chunk(1, 10 + i, heads=4)[0], *random_chunk(1, 500 + i)),
            strict=True,
        ):
            tensor.copy_(new)
        graph.replay()
        if growing.max_length < CAPACITY:
            expected = growing.attend_append(query, keys, values, scaling=SCALING)
            assert torch.equal(out, expected)
        elif growing.lengths[1] < CAPACITY:
            growing.append(keys, values, [0, 1])
    assert_same(growing, fixed)
    assert fixed.lengths == [CAPACITY, CAPACITY]
    assert fixed.refused_tokens == [80, 30]
