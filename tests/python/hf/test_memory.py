"""Memory is real: what a cache holds after `generate()`, and that nothing dense survives."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from live_tensors import storages
from tiny_models import generate, prompt
from transformers import DynamicCache
from turboquant_cpp import CompressedDynamicCache
from turboquant_cpp._core import BlockLayout
from turboquant_cpp.hf.compat import CACHE_ARGUMENT

TOKENS = 600


@pytest.mark.parametrize("implementation", ["turboquant", "sdpa", "eager"])
def test_no_dense_tensor_survives_generate(implementation):
    model = tiny_models.llama()
    before = storages()
    cache = CompressedDynamicCache(config=model.config, bits=4)
    generate(model, implementation, cache, prompt(1, TOKENS), new_tokens=3)
    dense_layer_bytes = 2 * TOKENS * 16 * 4  # keys of one layer in float32
    new = [size for pointer, size in storages().items() if pointer not in before]
    assert max(new) < dense_layer_bytes, "a tensor as large as a dequantised layer survived"
    assert sum(new) < 1.1 * cache.vram_bytes() + 4096


@pytest.mark.parametrize("implementation", ["turboquant", "sdpa", "eager"])
def test_no_layer_is_dequantised_beside_another(implementation):
    """When a layer begins, nothing dense is left of those before; the fused attention has none."""
    model = tiny_models.llama(num_hidden_layers=4)
    cache = CompressedDynamicCache(config=model.config, bits=4)
    generate(model, implementation, cache, prompt(1, TOKENS), new_tokens=2)
    dense_layer_bytes = 2 * TOKENS * 16 * 4  # keys of one layer in float32
    before, largest = storages(), {}

    def largest_new():
        return max((s for pointer, s in storages().items() if pointer not in before), default=0)

    def begins(layer, *_):
        largest["before", layer.self_attn.layer_idx] = largest_new()

    def attends(attention, *_):
        largest["within", attention.layer_idx] = largest_new()

    for layer in model.model.layers:
        layer.register_forward_pre_hook(begins)
        layer.self_attn.o_proj.layer_idx = layer.self_attn.layer_idx
        layer.self_attn.o_proj.register_forward_pre_hook(attends)
    with torch.no_grad():
        model(prompt(1, 1, seed=1), **{CACHE_ARGUMENT: cache})
    assert len(largest) == 8
    for (when, _), size in largest.items():
        is_dense = when == "within" and implementation != "turboquant"
        assert (size >= dense_layer_bytes) == is_dense, largest


def test_the_scan_sees_a_dense_cache():
    model = tiny_models.llama()
    before = storages()
    cache = DynamicCache(config=model.config)
    generate(model, "sdpa", cache, prompt(1, TOKENS), new_tokens=3)
    new = [size for pointer, size in storages().items() if pointer not in before]
    assert max(new) >= 2 * TOKENS * 16 * 4


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "center_keys": False},
        {"bits": 4},
        {"bits": 4, "scale_dtype": "float16"},
        {"bits": 3},
        {"bits": 2, "scale_dtype": "float16"},
    ],
    ids=str,
)
def test_bytes_are_the_layouts(options):
    """Within 5 % or one slab; sinks and window are counted apart."""
    cache = CompressedDynamicCache(DynamicCache(), head_dim=128, **options)
    states = torch.randn(2, 1, 2, 4000, 128).bfloat16()
    cache.update(*states, 0)
    store = cache.layers[0].store
    encoded = store.encoded_tokens[0]
    layout_bytes = encoded // 64 * BlockLayout(store.spec).page_bytes(2)
    memory = cache.memory()
    slab_bytes = store._slabs[0].nbytes
    slack = max(0.05 * layout_bytes, slab_bytes)
    assert layout_bytes <= memory["pages"] <= layout_bytes + slack
    assert memory["exact"] == 2 * 2 * (4 + 128) * 128 * 2
    assert memory["smoothing"] == 2 * 128 * 4
    assert memory["total"] == sum(memory.values()) - memory["total"] == cache.vram_bytes()


def test_baseline_is_what_a_stock_cache_holds():
    model, tokens = tiny_models.gemma3(), prompt(2, 150)
    stock = DynamicCache(config=model.config)
    compressed = CompressedDynamicCache(config=model.config, bits=4)
    for cache in (stock, compressed):
        generate(model, "sdpa", cache, tokens, new_tokens=3)
    dense = sum(tensor.nbytes for layer in stock.layers for tensor in (layer.keys, layer.values))
    sliding = sum(
        tensor.untyped_storage().nbytes() - tensor.nbytes
        for layer in compressed.layers[::2]
        for tensor in (layer.keys, layer.values)
    )
    windows = sum(layer._sliding_window_tensor.nbytes for layer in compressed.layers[::2])
    assert compressed.baseline_vram_bytes() == dense + sliding + windows


def test_samples_share_the_pages_of_their_prompt():
    """Eight of a 4 K-token prompt: seven more rows of exact tokens and table entries, no page."""
    cache = CompressedDynamicCache(DynamicCache(), head_dim=128, bits=4)
    for layer in range(2):
        cache.update(*torch.randn(2, 1, 2, 4096, 128).bfloat16(), layer)
    before = cache.memory()
    cache.batch_repeat_interleave(8)
    after = cache.memory()
    assert after["pages"] == before["pages"]
    assert after["exact"] == 8 * before["exact"]
    for layer in cache.layers:
        keys = layer.keys  # makes the tables
        assert all(torch.equal(row, keys[0]) for row in keys)
    pages = -(-(4096 - 4 - 127) // 64)
    entry, row = 2 * 4, 4 * 4  # int32 {page, tokens}; {length, entries, exact_begin, new tokens}
    counters = 2 * 8
    assert cache.memory()["tables"] == 2 * (8 * (pages * entry + row) + counters)
    # The next token of each sample goes to its own row; the prompt's pages stay shared.
    cache.update(*torch.randn(2, 8, 2, 1, 128).bfloat16(), 0)
    assert cache.memory()["pages"] == before["pages"]


def test_incremental_mode_tells_of_its_dense_copy():
    cache = CompressedDynamicCache(DynamicCache(), 16, 4, dequantize="incremental")
    for _ in range(3):
        cache.update(*torch.randn(2, 1, 2, 100, 16), 0)
    assert cache.memory()["dense_copy"] >= cache.baseline_vram_bytes()


def test_reset_releases_everything():
    cache = CompressedDynamicCache(DynamicCache(), head_dim=16, bits=4)
    cache.update(*torch.randn(2, 1, 2, 2000, 16), 0)
    cache.reset()
    assert cache.vram_bytes() == 0
