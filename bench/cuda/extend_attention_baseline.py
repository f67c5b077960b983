"""Time torch's bf16 attention of a chunk of query tokens over a dense cache on a GPU.

    python extend_attention_baseline.py

Needs torch only. Every query sees every token: at most 1 % more work than causal at 32 K. CUDA
events around 10 calls that follow one another, the least of 5 such rounds, as
extend_attention_bench.cu has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# batch, query heads, KV heads, head_dim, query tokens, past tokens
SHAPES = [
    (1, 32, 8, 128, 512, 32768),
    (1, 32, 8, 128, 2048, 32768),
    (1, 32, 8, 128, 128, 32768),
    (1, 32, 8, 128, 32, 32768),
    (1, 32, 8, 128, 512, 8192),
    (1, 32, 8, 128, 512, 131072),
    (1, 28, 4, 128, 512, 32768),
    (1, 32, 32, 128, 512, 32768),
    (8, 32, 8, 128, 64, 8192),
    (1, 32, 8, 64, 512, 32768),
    (1, 8, 4, 256, 512, 32768),
    (1, 32, 8, 80, 512, 32768),
    (1, 32, 8, 96, 512, 32768),
]

RIVALS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def milliseconds(call: Callable[[], Any], calls: int = 10, rounds: int = 5) -> float:
    """Least time of one call."""
    call()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    least: float = min(times)
    return least


def rivals(query: Tensor, keys: Tensor, values: Tensor) -> dict[str, float]:
    """Milliseconds of torch's kernels by name."""
    result = {}
    for name, backend in RIVALS.items():
        with sdpa_kernel(backend):
            result[name] = milliseconds(
                lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=True)
            )
    return result


def main() -> None:
    """Print one line a shape."""
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    with torch.inference_mode():
        for shape in SHAPES:
            batch, heads, kv_heads, dim, tokens, past = shape
            query, keys, values = (
                torch.randn(batch, h, n, dim, device="cuda", dtype=torch.bfloat16)
                for h, n in ((heads, tokens), (kv_heads, past + tokens), (kv_heads, past + tokens))
            )
            times = rivals(query, keys, values)
            print(*shape, *(f"{k} {v:.3f} ms" for k, v in times.items()), flush=True)


if __name__ == "__main__":
    main()
