"""``turboquant-cpp benchmark kernels``: decode attention beside torch's, and encoding."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from typing import Any

from turboquant_cpp.cli import arguments as options
from turboquant_cpp.cli.exit_codes import SUCCESS, UserError, as_user_error
from turboquant_cpp.cli.measured import width_label

__all__ = ["add_arguments", "heads", "run"]


def heads(text: str) -> tuple[int, int]:
    """Parse ``32/8``: query heads and key/value heads.

    Examples
    --------
    >>> heads("32/8")
    (32, 8)
    """
    query, slash, kv = text.partition("/")
    if not (slash and query.isdecimal() and kv.isdecimal() and int(kv) > 0):
        raise argparse.ArgumentTypeError(f"expected QUERY/KV such as 32/8, got {text!r}")
    if int(query) == 0 or int(query) % int(kv):
        raise argparse.ArgumentTypeError(
            f"expected a multiple of {kv} query heads for {kv} key/value heads, got {text!r}"
        )
    return int(query), int(kv)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``benchmark kernels``."""
    group = parser.add_argument_group("benchmark kernels")
    group.add_argument(
        "--heads",
        type=heads,
        nargs="+",
        default=[(8, 2), (32, 8)],
        metavar="QUERY/KV",
        help="query and key/value heads of each shape",
    )
    group.add_argument(
        "--head-dim", type=options.positive_int, default=128, help="channels of a head"
    )
    group.add_argument(
        "--tokens",
        type=options.positive_int,
        nargs="+",
        default=[4096, 65536],
        help="cached tokens of each shape",
    )
    group.add_argument(
        "--batch", type=options.positive_int, nargs="+", default=[1], help="rows of each shape"
    )
    group.add_argument(
        "--widths",
        type=options.widths,
        nargs="+",
        default=[(4, 4), (3, 3), (2, 2), (8, 4)],
        metavar="K+V",
        help="key and value bits of our caches",
    )
    group.add_argument("--threads", type=options.positive_int, help="default: torch's")
    group.add_argument(
        "--turns", type=options.positive_int, default=15, help="rounds whose median is reported"
    )
    group.add_argument(
        "--controls",
        action="store_true",
        help="instead: what each control of the cache costs, switched on and off",
    )


def run(arguments: argparse.Namespace) -> int:
    """Time every shape, print ratios and shares of the memory bandwidth; or the controls."""
    for k_bits, v_bits in arguments.widths:
        options.checked_options({"k_bits": k_bits, "v_bits": v_bits})

    import torch

    from turboquant_cpp.benchmark.kernels import (
        Shape,
        baselines,
        measure_read_bandwidth,
        time_decode,
        time_encode,
    )
    from turboquant_cpp.cli import console, controls, report
    from turboquant_cpp.cli.devices import usable_device

    device = usable_device(arguments.device or "cpu")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: kernels are timed on cpu and cuda, got {arguments.device}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{threads} threads"
    if arguments.controls:
        return controls.run(arguments, device, place)
    # First: what the large caches below give back to the system comes back slowly.
    with as_user_error():
        encode = {
            width_label(k_bits, v_bits): time_encode(
                arguments.head_dim, k_bits, v_bits, device=device
            )
            for k_bits, v_bits in arguments.widths
        }
    bandwidth = measure_read_bandwidth(device)
    names = baselines(device)
    table = console.new_table(
        f"One query token, d={arguments.head_dim}, {place}, {bandwidth:.0f} GB/s read bandwidth",
        *("rows", "heads", "tokens", "kernel", "us", "GB/s", "% of it"),
        *(f"x {name.removeprefix('torch ')}" for name in names),
    )
    rows: list[dict[str, Any]] = []
    for batch, (query_heads, kv_heads), tokens in itertools.product(
        arguments.batch, arguments.heads, arguments.tokens
    ):
        shape = Shape(query_heads, kv_heads, arguments.head_dim, tokens, batch)
        with as_user_error(), console.progress_bar(shape.label) as progress:
            timings = time_decode(
                shape,
                arguments.widths,
                device=device,
                turns=arguments.turns,
                progress=progress,
            )
        by_name = {timing.kernel: timing.microseconds for timing in timings}
        for timing in timings:
            times = {name: by_name[name] / timing.microseconds for name in names}
            row = {
                **dataclasses.asdict(shape),
                **dataclasses.asdict(timing),
                "label": shape.label,
                "gigabytes_per_second": timing.gigabytes_per_second,
                "percent_of_bandwidth": 100 * timing.gigabytes_per_second / bandwidth,
                "times": times,
            }
            rows.append(row)
            table.add_row(
                str(batch),
                f"{query_heads}/{kv_heads}",
                str(tokens),
                timing.kernel,
                f"{timing.microseconds:.1f}",
                f"{timing.gigabytes_per_second:.1f}",
                f"{row['percent_of_bandwidth']:.0f}",
                *(f"{ratio:.2f}" for ratio in times.values()),
            )
    console.output.print(table)
    speeds = ", ".join(f"{widths}: {rate / threads / 1e6:.0f}" for widths, rate in encode.items())
    per = " and thread" if device.type == "cpu" else ""
    console.output.print(
        f"Encoding, million coordinates per second{per}: {speeds}", highlight=False
    )
    if arguments.output:
        report.write_json(
            arguments.output,
            {
                "kind": "kernels",
                "device": str(device),
                "threads": threads,
                "read_gigabytes_per_second": bandwidth,
                "baselines": list(names),
                "decode": rows,
                "encode_coordinates_per_second": encode,
                "environment": report.environment(),
            },
        )
    return SUCCESS
