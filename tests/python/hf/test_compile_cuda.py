"""Generation compiled on a GPU, with CUDA graphs, over a cache of fixed capacity."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from gpu import COMPILER_WARNINGS, require_fused_attention
from tiny_models import assert_same_tokens, generate, left_padded, prompt
from torch._dynamo.utils import counters
from turboquant_cpp import CompressedDynamicCache

# Decode attention rounds queries and weights to float16 (test_generate_cuda.py).
MARGIN = 0.05
pytestmark = COMPILER_WARNINGS


@pytest.fixture(autouse=True)
def gpu():
    torch._dynamo.reset()
    counters.clear()
    return require_fused_attention()


@pytest.mark.parametrize("padding", [[0, 0], [37, 0]], ids=str)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_generation_equals_the_growing_caches(padding, is_compiled):
    """transformers compiles by itself, for CUDA graphs, where the cache allows it."""
    model = tiny_models.llama(head_dim=64).cuda()
    tokens, mask = left_padded(prompt(2, 150), padding)
    tokens, mask = tokens.cuda(), mask.cuda()
    growing = CompressedDynamicCache(config=model.config, bits=4)
    fixed = CompressedDynamicCache(config=model.config, bits=4, max_cache_len=400)
    options = {"attention_mask": mask, "new_tokens": 100}
    expected = generate(model, "turboquant", growing, tokens, **options)
    actual = generate(
        model, "turboquant", fixed, tokens, disable_compile=not is_compiled, **options
    )
    if is_compiled:
        assert_same_tokens(expected, actual, margin=MARGIN)
        assert counters["stats"]["unique_graphs"] == 1
    else:
        assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    assert [layer.store.lengths for layer in fixed.compressed_layers()] == [
        layer.store.lengths for layer in growing.compressed_layers()
    ]


def test_what_a_compiled_step_could_not_store_is_reported():
    model = tiny_models.llama(head_dim=64).cuda()
    cache = CompressedDynamicCache(config=model.config, bits=4, max_cache_len=160)
    generate(model, "turboquant", cache, prompt(1, 150).cuda(), new_tokens=30)
    with pytest.raises(RuntimeError, match="tokens came in compiled steps after the cache was"):
        cache.crop(-1)


@torch.no_grad()
def test_replays_of_a_captured_step_are_counted():
    """A graph that was captured by hand tells the host nothing; the next eager step asks."""
    model = tiny_models.llama(head_dim=64).cuda()
    model.set_attn_implementation("turboquant")
    tokens = prompt(1, 150).cuda()
    cache = CompressedDynamicCache(config=model.config, bits=4, max_cache_len=400)
    growing = CompressedDynamicCache(config=model.config, bits=4)
    token = prompt(1, 1, seed=1).cuda()
    stream = torch.cuda.Stream()
    for each in (cache, growing):
        model(tokens, past_key_values=each)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # first uses cannot be captured
            model(token, past_key_values=each)
        torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(token, past_key_values=cache).logits
    for _ in range(3):
        graph.replay()
        expected = model(token, past_key_values=growing).logits
    assert torch.equal(out, expected)
    results = [model(token, past_key_values=each).logits for each in (cache, growing)]
    assert torch.equal(*results)
    assert [layer.get_host_length() for layer in cache.layers] == [155, 155]
    cache.crop(-5)
    assert int(cache.get_seq_length()) == 150
