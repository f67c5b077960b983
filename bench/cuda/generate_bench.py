"""A decode step of a Llama-3.1-8B-shaped model with the stock cache and with the compressed one.

Random weights and a random past, filled straight into the cache: times, bytes and memory do not
depend on their values. Needs one GPU with 40 GB.

    python bench/cuda/generate_bench.py [--past 2048 11264 32768] [--output result.json]
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from turboquant_cpp import CompressedDynamicCache
from turboquant_cpp.hf.compat import CACHE_ARGUMENT

WARM_UP_STEPS = 4
MIB = 2**20


def make_model(layers: int):
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        tie_word_embeddings=False,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.02)
    return model.eval()


def fill(cache, config, tokens: int) -> None:
    """Put `tokens` random keys and values into every layer."""
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    for layer in range(config.num_hidden_layers):
        keys, values = torch.randn((2, *shape), device="cuda", dtype=torch.bfloat16)
        if isinstance(cache, CompressedDynamicCache):
            cache.update(keys, values, layer)
            cache.layers[layer].commit()
        else:
            cache.update(keys.clone(), values.clone(), layer)


def cache_bytes(cache) -> int:
    if isinstance(cache, CompressedDynamicCache):
        return cache.vram_bytes()
    return sum(
        tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    )


@torch.no_grad()
def measure(model, name: str, past: int, steps: int, bits: int, profile: bool) -> dict:
    """One row of the table: median step of `steps`, bytes of the cache, peak memory above it."""
    compressed = name != "DynamicCache + sdpa"
    model.set_attn_implementation("turboquant" if name.endswith("turboquant") else "sdpa")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    cache = (
        CompressedDynamicCache(config=model.config, bits=bits)
        if compressed
        else DynamicCache(config=model.config)
    )
    started = time.perf_counter()
    fill(cache, model.config, past)
    torch.cuda.synchronize()
    filled = time.perf_counter() - started
    gc.collect()
    held = torch.cuda.memory_allocated() - before
    stored = cache_bytes(cache)
    token = torch.zeros((1, 1), dtype=torch.long, device="cuda")

    def step() -> None:
        logits = model(token, **{CACHE_ARGUMENT: cache}, use_cache=True).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    torch.cuda.reset_peak_memory_stats()
    times = []
    for i in range(WARM_UP_STEPS + steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if i >= WARM_UP_STEPS:
            times.append(time.perf_counter() - started)
    row = {
        "cache": name,
        "past_tokens": past,
        "step_ms": 1e3 * statistics.median(times),
        "step_ms_least": 1e3 * min(times),
        "cache_mib": stored / MIB,
        "held_mib": held / MIB,
        "peak_above_cache_mib": (torch.cuda.max_memory_allocated() - before - held) / MIB,
        "fill_s": filled,
    }
    if profile:
        row |= profiled(step)
    return row


def profiled(step, steps: int = 3) -> dict:
    """Milliseconds a step that the GPU is busy, in all and with what is not a matrix product."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    kernels = {
        event.key: event.self_device_time_total / 1e3 / steps for event in profile.key_averages()
    }
    ours = ("prepare_queries", "attend_splits", "combine_splits", "encode", "dequantize")
    return {
        "gpu_ms": sum(kernels.values()),
        "turboquant_gpu_ms": sum(
            time_ms
            for key, time_ms in kernels.items()
            if any(name in key for name in (*ours, "fit_smoothing", "write_addresses"))
        ),
        "top_kernels": dict(sorted(kernels.items(), key=lambda item: -item[1])[:8]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--past", type=int, nargs="+", default=[2048, 11264, 32768])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--fallback", action="store_true", help="also dequantise for sdpa")
    parser.add_argument("--profile", action="store_true", help="also the GPU's busy time")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("NOT RUN: no CUDA device")
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    torch.manual_seed(0)
    started = time.perf_counter()
    model = make_model(arguments.layers)
    torch.cuda.synchronize()
    print(f"model made in {time.perf_counter() - started:.1f} s", flush=True)
    names = ["DynamicCache + sdpa", f"{arguments.bits} bits + turboquant"]
    if arguments.fallback:
        names.append(f"{arguments.bits} bits + sdpa")
    columns = ["step_ms", "step_ms_least", "cache_mib", "held_mib", "peak_above_cache_mib"]
    columns += ["fill_s"] + (["gpu_ms", "turboquant_gpu_ms"] if arguments.profile else [])
    print(f"{'past':>7} {'cache':22}" + "".join(f" {column:>20}" for column in columns))
    rows = []
    for past in arguments.past:
        for name in names:
            row = measure(model, name, past, arguments.steps, arguments.bits, arguments.profile)
            rows.append(row)
            numbers = "".join(f" {row[column]:20.2f}" for column in columns)
            print(f"{past:7} {name:22}{numbers}", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "layers": arguments.layers,
        "rows": rows,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2))
    else:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
