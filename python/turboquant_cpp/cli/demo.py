"""``turboquant-cpp demo``: a real model on a real passage, exact cache beside compressed ones."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
from typing import Any

from turboquant_cpp.cli import arguments as options
from turboquant_cpp.cli.exit_codes import SUCCESS, as_user_error
from turboquant_cpp.cli.measured import quality_fields, size_fields, width_label

__all__ = ["add_arguments", "run"]

_QUESTION = "\n\nQuestion: What does RAID protect against, and what does it not? Answer briefly."
_CUSTOM_QUESTION = "\n\nSummarise the text above in three sentences."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--widths",
        type=options.widths,
        nargs="+",
        default=[(4, 4), (3, 3), (2, 2)],
        metavar="K+V",
        help="key and value bits of each compressed cache",
    )
    parser.add_argument("--question", help="what to ask about the text")
    parser.add_argument(
        "--max-new-tokens", type=options.positive_int, default=64, help="length of each answer"
    )
    parser.add_argument(
        "--output-dir",
        type=pathlib.Path,
        default=pathlib.Path("demo-output"),
        help="where demo.json, demo.png and demo.svg go",
    )
    options.add_text_argument(parser)
    options.add_attention_argument(parser)
    options.add_model_arguments(parser)
    options.add_recipe_arguments(parser)
    options.add_protocol_arguments(parser, windows=1, length=768)


def run(arguments: argparse.Namespace) -> int:
    """Generate with every cache, compare distributions, print and save."""
    caches: dict[str, dict[str, Any] | None] = {"exact": None}
    for k_bits, v_bits in arguments.widths:
        arguments.k_bits, arguments.v_bits = k_bits, v_bits
        caches[width_label(k_bits, v_bits)] = options.cache_options(arguments)

    from turboquant_cpp.cli import console, plots, report, session
    from turboquant_cpp.evaluation import Protocol, compare_caches, read_text

    with as_user_error():
        protocol = Protocol(arguments.windows, arguments.length, arguments.chunk)
        text = read_text(arguments.text)
    loaded = session.load(arguments)
    question = arguments.question or (_CUSTOM_QUESTION if arguments.text else _QUESTION)
    inputs = session.chat_inputs(loaded, text.strip() + question)
    rows = _generate(loaded, inputs, caches, arguments.max_new_tokens)

    makers = {
        label: session.cache_maker(loaded, {**cache_options, "prefill": "quantized"})
        for label, cache_options in caches.items()
        if cache_options is not None
    }
    tokens = session.text_tokens(loaded, arguments.text)
    with as_user_error(), console.progress_bar("Comparing next-token distributions") as progress:
        quality = compare_caches(loaded.model, tokens, makers, protocol, progress=progress)
    for label, cache in quality.caches.items():
        rows[label].update(quality_fields(cache))

    dtype = str(loaded.model.dtype).removeprefix("torch.")
    _print(console, loaded.name, dtype, rows)
    result = {
        "kind": "demo",
        "model": loaded.name,
        "dtype": dtype,
        "attention": arguments.attention,
        "question": question.strip(),
        "prompt_tokens": inputs["input_ids"].shape[1],
        "protocol": protocol,
        "caches": list(rows.values()),
        "environment": report.environment(),
    }
    report.write_json(arguments.output_dir / "demo.json", result)
    written = plots.save(plots.draw(result), arguments.output_dir / "demo")
    files = ", ".join(map(str, [arguments.output_dir / "demo.json", *written]))
    console.output.print(f"Written: {files}", highlight=False, soft_wrap=True)
    return SUCCESS


def _generate(
    loaded: Any,
    inputs: dict[str, Any],
    caches: dict[str, dict[str, Any] | None],
    max_new_tokens: int,
) -> dict[str, dict[str, Any]]:
    from turboquant_cpp.benchmark import run_generation
    from turboquant_cpp.cli import console, session
    from turboquant_cpp.hf.attention import stock_attention

    rows: dict[str, dict[str, Any]] = {}
    prompt_tokens = inputs["input_ids"].shape[1]
    for label, cache_options in caches.items():
        cache = session.cache_maker(loaded, cache_options)() if cache_options else None
        attention = contextlib.nullcontext() if cache_options else stock_attention(loaded.model)
        title = f"Generating after {prompt_tokens} tokens, cache {label}"
        with attention, console.progress_bar(title) as progress:
            generation = run_generation(
                loaded.model,
                loaded.tokenizer,
                inputs,
                cache,
                max_new_tokens=max_new_tokens,
                progress=progress,
            )
        console.output.print(f"[bold]{label}[/]: ", end="")
        console.output.print(generation.text.strip(), markup=False, highlight=False)
        rows[label] = {
            "label": label,
            **(cache_options or {}),
            "text": generation.text,
            "new_tokens": generation.new_tokens,
            "prefill_s": generation.prefill_s,
            "elapsed_s": generation.elapsed_s,
            "tokens_per_s": generation.tokens_per_s,
            **size_fields(generation.cache),
        }
    return rows


def _print(console: Any, name: str, dtype: str, rows: dict[str, dict[str, Any]]) -> None:
    exact = rows["exact"]
    table = console.new_table(
        f"{name}: exact and compressed caches",
        *("cache", "MiB", "smaller", "tokens/s", "KL, nats", "top-1", "perplexity"),
    )
    for label, row in rows.items():
        speed = "-" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.1f}"
        size = f"{row['cache_bytes'] / 2**20:.2f}"
        if row is exact:
            table.add_row(label, size, "1.0x", speed, "-", "-", f"{_perplexity(rows):.2f}")
            continue
        table.add_row(
            label,
            size,
            f"{exact['cache_bytes'] / row['cache_bytes']:.1f}x",
            speed,
            f"{row['kl']:.4f}",
            f"{100 * row['top1_agreement']:.1f} %",
            f"{row['perplexity_change_percent']:+.2f} %",
        )
    console.output.print(table)
    compressed = next((row for row in rows.values() if row is not exact), None)
    if compressed:
        window = compressed["cache_bytes_by_part"].get("exact", 0)
        console.output.print(
            f"Sizes are measured from the caches' tensors after the answer, the model computing in "
            f"{dtype}. {window / 2**20:.2f} MiB of each compressed cache are recent and first "
            "tokens kept exact, whatever the length of the text.",
            highlight=False,
        )


def _perplexity(rows: dict[str, dict[str, Any]]) -> float:
    figures = (row["perplexity_exact"] for row in rows.values() if "perplexity_exact" in row)
    return float(next(figures, float("nan")))
