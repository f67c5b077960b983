"""``turboquant-cpp benchmark decode``: decode steps with the exact and the compressed cache."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from turboquant_cpp.cli import arguments as options
from turboquant_cpp.cli.exit_codes import SUCCESS, UserError, as_user_error
from turboquant_cpp.cli.measured import size_fields, width_label

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``benchmark decode``."""
    group = parser.add_argument_group("benchmark decode")
    group.add_argument(
        "--past",
        type=options.positive_int,
        nargs="+",
        default=[512, 4096],
        help="tokens in the cache, of random keys and values",
    )
    group.add_argument("--steps", type=options.positive_int, default=24, help="timed steps of each")
    group.add_argument(
        "--random-8b",
        action="store_true",
        help="time a model of Llama-3.1-8B's shape with random weights (CUDA, 16 GB) instead of "
        "--model",
    )
    group.add_argument(
        "--fallback", action="store_true", help="also the compressed cache without fused attention"
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="also compiled steps (CUDA graphs on a GPU) over caches of fixed capacity",
    )


def run(arguments: argparse.Namespace) -> int:
    """Time every length; print steps, ratios and bytes."""
    if arguments.random_8b and arguments.model:
        raise UserError("--random-8b, --model: expected at most one of the two, got both")
    cache_options = options.cache_options(arguments)

    import torch

    from turboquant_cpp import CacheConfig
    from turboquant_cpp.benchmark.decode_steps import (
        Contender,
        StepTiming,
        longest_context,
        time_decode_steps,
    )
    from turboquant_cpp.cli import console, report, session
    from turboquant_cpp.hf.loading import exact_cache, random_llama, static_cache

    if not arguments.random_8b:
        loaded = session.load(arguments)
    elif torch.cuda.is_available():
        loaded = random_llama()
    else:
        raise UserError("--random-8b: expected a CUDA device, found none")

    def compressed(tokens: int) -> Any:
        return session.cache_maker(loaded, cache_options)()

    def compressed_fixed(tokens: int) -> Any:
        return session.cache_maker(loaded, cache_options | {"max_cache_len": tokens})()

    config = CacheConfig.from_options(cache_options)
    label = width_label(config.k_bits, config.v_bits)
    contenders = {
        "exact": Contender(lambda tokens: exact_cache(loaded.model.config), "sdpa"),
        label: Contender(compressed, "turboquant"),
    }
    if arguments.fallback:
        contenders[f"{label}, sdpa"] = Contender(compressed, "sdpa")
    if arguments.compile:
        contenders["exact, compiled"] = Contender(
            lambda tokens: static_cache(loaded.model.config, tokens), "sdpa", is_compiled=True
        )
        contenders[f"{label}, compiled"] = Contender(
            compressed_fixed, "turboquant", is_compiled=True
        )
    table = console.new_table(
        f"{loaded.name}, {loaded.model.dtype}: one token a step".replace("torch.", ""),
        *("past", "cache", "ms", "least", "tokens/s", "x exact", "MiB", "peak MiB"),
    )
    rows: list[dict[str, Any]] = []
    of_cache: dict[str, list[StepTiming]] = {}
    for past in arguments.past:
        with as_user_error(), console.progress_bar(f"{past} tokens") as progress:
            timings = time_decode_steps(
                loaded.model, past, contenders, steps=arguments.steps, progress=progress
            )
        by_name = {timing.cache: timing for timing in timings}
        for name in contenders.keys() - by_name:
            console.remark(f"{past} tokens: no memory for the cache {name!r}")
        for timing in timings:
            of_cache.setdefault(timing.cache, []).append(timing)
            exact = by_name.get("exact, compiled" if "compiled" in timing.cache else "exact")
            ratio = None if exact is None else exact.median_ms / timing.median_ms
            fields = dataclasses.asdict(timing) | {"times_exact": ratio}
            fields.pop("size")
            rows.append(fields | size_fields(timing.size))
            table.add_row(
                str(past),
                timing.cache,
                f"{timing.median_ms:.2f}",
                f"{timing.least_ms:.2f}",
                f"{1e3 / timing.median_ms:.1f}",
                "-" if ratio is None else f"{ratio:.2f}",
                f"{timing.size.total_bytes / 2**20:.2f}",
                "-" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**20:.2f}",
            )
    console.output.print(table)
    longest: dict[str, int] = {}
    if loaded.model.device.type == "cuda" and len(set(arguments.past)) > 1:
        weights = sum(weight.nbytes for weight in loaded.model.parameters())
        free = torch.cuda.get_device_properties(loaded.model.device).total_memory - weights
        longest = {
            name: longest_context(timings, free)
            for name, timings in of_cache.items()
            if len(timings) > 1
        }
        console.output.print(
            "Tokens that fit beside the weights: "
            + ", ".join(f"{name}: {tokens}" for name, tokens in longest.items()),
            highlight=False,
        )
    if arguments.output:
        report.write_json(
            arguments.output,
            {
                "kind": "decode steps",
                "model": loaded.name,
                "steps": rows,
                "longest_context": longest,
                "environment": report.environment(),
            },
        )
    return SUCCESS
