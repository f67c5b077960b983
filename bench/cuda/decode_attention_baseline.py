"""Time cuDNN bf16 attention through torch on the shapes of decode_attention_bench, and compare.

    python decode_attention_baseline.py [RESULTS.json] [--output TABLE.json]

RESULTS.json is what ``turboquant_cuda_decode_attention_bench --json`` wrote in the same session on
the same card. CUDA-graph replays over rotating caches larger than twice the L2, medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = [
    (1, 32, 8, 128, 2048),
    (1, 32, 8, 128, 4096),
    (8, 32, 8, 128, 2048),
    (1, 32, 8, 128, 8192),
    (1, 32, 8, 128, 32768),
    (1, 32, 8, 128, 131072),
    (4, 32, 8, 128, 131072),
    (32, 32, 8, 128, 8192),
    (1, 28, 4, 128, 11264),
    (64, 64, 8, 128, 4096),
    (1, 32, 32, 128, 32768),
]


def time_cudnn(shape: tuple[int, int, int, int, int], replays: int = 15) -> float:
    """Return the median microseconds of one call."""
    batch, heads, kv_heads, dim, tokens = shape
    cache_bytes = 2 * 2 * batch * kv_heads * dim * tokens
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(2, -(-5 * l2_bytes // (2 * cache_bytes)))

    def make(*dims: int) -> torch.Tensor:
        return torch.randn(*dims, device="cuda", dtype=torch.bfloat16)

    query = make(batch, heads, 1, dim)
    keys = [make(batch, kv_heads, tokens, dim) for _ in range(copies)]
    values = [make(batch, kv_heads, tokens, dim) for _ in range(copies)]

    def call(i: int) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys[i], values[i], enable_gqa=True
        )

    rounds = max(1, -(-16 // copies))
    stream = torch.cuda.Stream()
    with torch.inference_mode(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        with torch.cuda.stream(stream):
            for i in range(copies):
                call(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for i in range(copies):
                    call(i)
    times = []
    for i in range(replays + 3):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end))
    return statistics.median(times) * 1e3 / (rounds * copies)


def main() -> None:
    """Print one line a shape and recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="?", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(args.results.read_text()) if args.results else {}
    table = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(
        f"{'batch, heads, kv, dim, tokens':32} {'codes':16} {'cuDNN us':>9} {'us':>9} {'ratio':>6}"
    )
    for shape in SHAPES:
        baseline = time_cudnn(shape)
        torch.cuda.empty_cache()
        ours = [
            r
            for r in results.get("results", [])
            if (r["batch"], r["heads"], r["kv_heads"], r["head_dim"], r["tokens"]) == shape
        ]
        for r in ours or [{"codes": "-", "us": float("nan")}]:
            ratio = baseline / r["us"]
            print(f"{shape!s:32} {r['codes']:16} {baseline:9.2f} {r['us']:9.2f} {ratio:6.2f}")
            table.append({"shape": shape, "cudnn_us": baseline, **r, "ratio": ratio})
    if args.output:
        args.output.write_text(json.dumps({**results, "table": table}, indent=1))


if __name__ == "__main__":
    main()
