"""What the cache holds of 8,000 tokens after `generate()`, against bytes counted by hand."""

from __future__ import annotations

import copy
import functools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable

import pytest
import tiny_models
import torch
from live_tensors import storages
from tiny_models import generate, prompt
from transformers import DynamicCache
from turboquant_cpp import CompressedDynamicCache
from turboquant_cpp.hf.compat import CACHE_ARGUMENT

DIM, HEADS, LAYERS = 128, 2, 1
PROMPT, NEW = 8000, 4
PREFIX = 7990
TOKENS = PROMPT + NEW - 1  # the last one generated is never fed back
SINKS, WINDOW, BLOCK = 4, 64, 64
# The oldest block leaves as soon as the exact window holds two.
BLOCKS = (TOKENS - SINKS - WINDOW) // BLOCK
BF16 = 2

# Keys' and values' width, bytes of a scale, whether blocks store their mean; the ratio to bf16.
LAYOUTS = {
    "4+4 fp32, no means": ((4, 4, 4, False), 3.76),
    "4+4 fp32": ((4, 4, 4, True), 3.66),
    "4+4 fp16": ((4, 4, 2, True), 3.76),
    "3+3 fp32": ((3, 3, 4, True), 4.74),
    "3+3 fp16": ((3, 3, 2, True), 4.92),
    "2+2 fp32": ((2, 2, 4, True), 6.7),
    "2+2 fp16": ((2, 2, 2, True), 7.1),
    "5+4 fp32": ((5, 4, 4, True), 3.28),
    "6+4 fp32": ((6, 4, 4, True), 2.98),
    "8+4 fp32": ((8, 4, 4, True), 2.51),
    "4+2 fp32": ((4, 2, 4, True), 4.74),
}


def options(layout: str) -> dict:
    k_bits, v_bits, scale_bytes, center = LAYOUTS[layout][0]
    return {
        "k_bits": k_bits,
        "v_bits": v_bits,
        "scale_dtype": {2: "float16", 4: "float32"}[scale_bytes],
        "center_keys": center,
    }


def token_bytes(layout: str) -> float:
    """Codes and scale of key and value, and a 64th of the block's float16 mean."""
    k_bits, v_bits, scale_bytes, center = LAYOUTS[layout][0]
    return DIM * (k_bits + v_bits) / 8 + 2 * scale_bytes + (2 * DIM / BLOCK if center else 0)


@functools.cache
def model():
    made = tiny_models.llama(
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        max_position_embeddings=2 * PROMPT,
    )
    return made.bfloat16()


@functools.cache
def prefix() -> DynamicCache:
    """The prompt's first tokens in a stock cache: the long prefill is run once for all layouts."""
    model().set_attn_implementation("sdpa")
    cache = DynamicCache(config=model().config)
    with torch.no_grad():
        model()(prompt(1, PROMPT)[:, :PREFIX], **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    return cache


@pytest.mark.parametrize("implementation", ["turboquant", "sdpa"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_after_generate_over_a_cache_taken_over(layout, implementation):
    def make() -> CompressedDynamicCache:
        stock = copy.deepcopy(prefix())
        return CompressedDynamicCache(stock, DIM, model_config=model().config, **options(layout))

    prefix()
    check_generate(layout, implementation, make)


@pytest.mark.parametrize("implementation", ["turboquant", "sdpa"])
def test_bytes_after_generate_from_the_first_token(implementation):
    layout = "4+4 fp32, no means"
    check_generate(
        layout,
        implementation,
        lambda: CompressedDynamicCache(config=model().config, **options(layout)),
    )


def check_generate(
    layout: str, implementation: str, make: Callable[[], CompressedDynamicCache]
) -> None:
    model()
    before = storages()
    cache = make()
    generate(model(), implementation, cache, prompt(1, PROMPT), new_tokens=NEW)
    alive = [size for pointer, size in storages().items() if pointer not in before]
    memory = cache.memory()
    assert [layer.store.lengths for layer in cache.layers] == [[TOKENS]] * LAYERS

    # Codes, scales and means.
    encoded = BLOCKS * BLOCK
    assert [layer.store.encoded_tokens for layer in cache.layers] == [[encoded]] * LAYERS
    ratio = 2 * DIM * BF16 * encoded * HEADS * LAYERS / memory["pages"]
    assert ratio == pytest.approx(2 * DIM * BF16 / token_bytes(layout), rel=0.01)
    assert ratio == pytest.approx(LAYOUTS[layout][1], rel=0.01)

    # What is exact: sinks and the ring of a window and a block. Smoothing in float32.
    vectors = HEADS * LAYERS * DIM
    assert memory["exact"] == 2 * (SINKS + WINDOW + BLOCK) * vectors * BF16
    assert memory["smoothing"] == vectors * 4
    # A page's number and fill, and two counters.
    assert memory["tables"] <= LAYERS * (BLOCKS * 8 + 16)
    assert memory["uncompressed"] == 0
    assert memory["total"] == cache.vram_bytes() == sum(memory.values()) - memory["total"]

    # Nothing else is alive: above all no dequantised layer.
    keys_of_a_layer = TOKENS * HEADS * DIM * BF16
    assert max(alive) < keys_of_a_layer / 4
    assert sum(alive) <= memory["total"] + 16 * 2**10


def test_the_scan_finds_a_dense_cache():
    prefix()
    before = storages()
    cache = copy.deepcopy(prefix())
    alive = [size for pointer, size in storages().items() if pointer not in before]
    assert cache.get_seq_length() == PREFIX
    assert sum(alive) >= 2 * PREFIX * HEADS * DIM * BF16 * LAYERS


# Runs in a process of its own, whose memory nothing else changes. Prints, in bytes: how much the
# resident set grew when the layers were filled and stepped, and how far above that a step went.
PROCESS = """
import ctypes, gc, json, sys, torch
from transformers import DynamicCache, LlamaConfig
from turboquant_cpp import CompressedDynamicCache

HEADS, TOKENS, DIM, LAYERS = 2, 8000, 128, 16

def give_back():
    # Free memory that malloc keeps between live blocks, for reuse, is nobody's.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)

def resident(field):
    # What grew is anonymous memory: pages of files come and go as others need the machine's memory.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(field + ":"))

def make(kind):
    if kind == "dense":
        return DynamicCache()
    return CompressedDynamicCache(DynamicCache(), DIM, 4)

def fill(cache, layers):
    for layer in range(layers):
        cache.update(*(part.clone() for part in states), layer)

def step(cache, layers):
    for layer in range(layers):
        cache.update(*token, layer)

states = torch.randn(2, 1, HEADS, TOKENS, DIM).bfloat16().unbind()
token = torch.randn(2, 1, HEADS, 1, DIM).bfloat16().unbind()
warm = make(sys.argv[1])
fill(warm, 2)
step(warm, 2)
del warm
give_back()
before = resident("RssAnon")
cache = make(sys.argv[1])
fill(cache, LAYERS)
step(cache, LAYERS)
give_back()
grown = resident("RssAnon") - before
with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")  # the peak starts anew
settled = resident("VmRSS")
step(cache, LAYERS)
measured = 0 if sys.argv[1] == "dense" else cache.vram_bytes()
print(json.dumps({"grown": grown, "peak": resident("VmHWM") - settled, "measured": measured}))
"""
needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="reads /proc and calls malloc_trim"
)
DENSE_LAYER_BYTES = 2 * 2 * 8000 * DIM * BF16


def process_memory(kind: str) -> dict[str, int]:
    # Large tensors straight from the system, as tensors of any real size are: what glibc keeps of
    # freed ones, which depends on what else was allocated, is not measured.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, kind],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return json.loads(done.stdout)


@pytest.mark.slow
@needs_glibc
def test_the_process_grows_by_compressed_bytes():
    compressed = process_memory("compressed")
    expected = 16 * DENSE_LAYER_BYTES / 3.76
    assert compressed["measured"] == pytest.approx(expected, rel=0.08)  # exact window included
    assert compressed["grown"] <= compressed["measured"] + DENSE_LAYER_BYTES / 2
    # A step holds one dequantised layer, not two (past and chunk are not joined by copying).
    assert compressed["peak"] <= 1.1 * DENSE_LAYER_BYTES


@pytest.mark.slow
@needs_glibc
def test_the_process_measure_sees_dense_layers():
    assert process_memory("dense")["grown"] >= 0.9 * 16 * DENSE_LAYER_BYTES
