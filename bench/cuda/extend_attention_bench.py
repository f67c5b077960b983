"""Time attention of a chunk of query tokens over a packed past on a GPU, beside torch's own.

    python extend_attention_bench.py [--quick] [--output RESULTS.json]

Four contenders on the same lengths, all with the chunk's own keys and values: `ours` from the
codes; torch's flash attention and cuDNN's over a bf16 cache (every query sees every token: at most
1 % more work than causal at 32 K); and `dequantised`, the path for what the codes cannot answer:
dense keys and values made for this call, then `dense_attention`. CUDA events around 10 calls that
follow one another, the least of 5 such rounds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from extend_attention_baseline import SHAPES, milliseconds, rivals
from torch import Tensor
from turboquant_cpp import CacheConfig, LayerStore
from turboquant_cpp.hf.dense import AttentionCall, dense_attention


def kernel_times(call: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of each kernel of one call."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            call()
        torch.cuda.synchronize()
    return {
        event.key[:60]: event.device_time_total / 5
        for event in profile.key_averages()
        if event.device_time_total > 0
    }


def measure(shape: tuple[int, ...], bits: int, with_rivals: bool) -> dict[str, Any]:
    """Times and the error of ours relative to fp32 attention over the same dequantised numbers."""
    batch, heads, kv_heads, dim, tokens, past = shape
    spec = CacheConfig(bits=bits, scale_dtype="float16").layer_spec(0, dim, kv_heads)
    store = LayerStore(spec, batch_size=batch, dtype=torch.bfloat16, device="cuda")

    def make(heads: int, tokens: int) -> Tensor:
        return torch.randn(batch, heads, tokens, dim, device="cuda", dtype=torch.bfloat16)

    for _ in range(past // 8192):
        store.append(make(kv_heads, 8192), make(kv_heads, 8192))
    query, keys, values = make(heads, tokens), make(kv_heads, tokens), make(kv_heads, tokens)
    call = AttentionCall(scaling=dim**-0.5)
    counts = [tokens] * batch

    def ours() -> Tensor:
        out: Tensor = store.attend(query, keys, values, new_tokens=counts, scaling=call.scaling)[0]
        return out

    def dense() -> tuple[Tensor, Tensor]:
        old_keys, old_values = store.dequantize()
        return torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)

    result: dict[str, Any] = {"shape": shape, "bits": bits, "ours": milliseconds(ours)}
    all_keys, all_values = dense()
    sample = query[:, : heads // kv_heads, -16:].float()
    expected = dense_attention(
        sample, all_keys[:, :1].float(), all_values[:, :1].float(), None, call
    ).transpose(1, 2)
    got = ours()[:, : heads // kv_heads, -16:].float()
    result["error"] = float((got - expected).norm() / expected.norm())
    if with_rivals:
        result.update(rivals(query, all_keys, all_values))
        del all_keys, all_values
        try:
            result["dequantised"] = milliseconds(
                lambda: dense_attention(query, *dense(), None, call), calls=2, rounds=3
            )
        except torch.cuda.OutOfMemoryError:
            result["dequantised"] = float("nan")
        result["kernels"] = kernel_times(ours)
    return result


def main() -> None:
    """Print one line a shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first shapes only")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    results = []
    with torch.inference_mode():
        for shape in SHAPES[:4] if arguments.quick else SHAPES:
            for bits in (4, 3, 2) if shape == SHAPES[0] else (4,):
                result = measure(shape, bits, with_rivals=bits == 4)
                results.append(result)
                print(
                    shape,
                    f"{bits}+{bits} bits, ms:",
                    *(f"{k} {v:.3f}" for k, v in result.items() if isinstance(v, float)),
                    flush=True,
                )
                for name, time in result.get("kernels", {}).items():
                    print(f"    {time:9.1f} us  {name}")
                torch.cuda.empty_cache()
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
