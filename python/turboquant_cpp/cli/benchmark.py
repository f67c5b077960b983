"""``turboquant-cpp benchmark``, also ``python -m turboquant_cpp.benchmark``."""

from __future__ import annotations

import argparse
import pathlib

from turboquant_cpp.cli import arguments as options
from turboquant_cpp.cli import decode_steps, kernels
from turboquant_cpp.cli.exit_codes import SUCCESS, UserError, as_user_error

__all__ = ["add_arguments", "run"]

_DEFAULT_PROMPT = "Explain in a few sentences what RAID is and which levels are common."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options; --model to --output are the original package's."""
    parser.add_argument(
        "what",
        nargs="?",
        default="generation",
        choices=("generation", "decode", "kernels"),
        help="generation: a prompt with the exact and the compressed cache; decode: single steps "
        "over a cache of given length; kernels: decode attention beside torch's, and encoding",
    )
    parser.add_argument("--prompt", default=_DEFAULT_PROMPT, help="text of the user's turn")
    for name in ("image", "video"):
        parser.add_argument(
            f"--{name}",
            type=pathlib.Path,
            metavar="FILE",
            help=f"{name} for a vision-language --model",
        )
    parser.add_argument(
        "--frames", type=options.positive_int, default=8, help="frames taken from --video"
    )
    parser.add_argument(
        "--compressed",
        action="store_true",
        help="hold packed codes; without it keys and values pass through the quantiser and stay "
        "dense (accuracy only)",
    )
    parser.add_argument(
        "--max-new-tokens", type=options.positive_int, default=256, help="length limit"
    )
    options.add_attention_argument(parser)
    options.add_model_arguments(parser)
    options.add_width_arguments(parser)
    options.add_recipe_arguments(parser)
    options.add_output_argument(parser)
    decode_steps.add_arguments(parser)
    kernels.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run both generations, or time the kernels, and print the comparison."""
    if arguments.what == "kernels":
        return kernels.run(arguments)
    if arguments.what == "decode":
        return decode_steps.run(arguments)
    for name in ("image", "video"):
        path = getattr(arguments, name)
        if path and not arguments.model:
            raise UserError(f"--{name} needs a vision-language model: name one with --model")
        if path and not path.is_file():
            raise UserError(f"--{name}: there is no file {path}")
    if not arguments.compressed and (arguments.k_bits or arguments.v_bits or arguments.preset):
        raise UserError(
            "--k-bits, --v-bits and --preset need --compressed: accuracy only has one width"
        )
    cache_options = options.cache_options(arguments)

    from turboquant_cpp.benchmark import BenchmarkOptions, run_benchmark
    from turboquant_cpp.cli import console, report, session

    pictures = session.pictures(arguments)
    loaded = session.load(arguments, with_vision=bool(pictures))
    inputs = (
        session.vision_inputs(loaded, arguments, pictures)
        if pictures
        else session.chat_inputs(loaded, arguments.prompt)
    )
    with as_user_error():
        result = run_benchmark(
            loaded.model,
            loaded.tokenizer,
            inputs,
            BenchmarkOptions(
                prompt=arguments.prompt,
                cache_options=cache_options,
                compressed=arguments.compressed,
                max_new_tokens=arguments.max_new_tokens,
                image_path=str(arguments.image) if arguments.image else None,
                video_path=str(arguments.video) if arguments.video else None,
            ),
            model_id=loaded.name,
            report=console.remark,
        )
    table = console.new_table(loaded.name, "", "exact", result["mode"])
    rows = (
        ("time, s", "elapsed_s", "{:.2f}"),
        ("tokens/s", "tokens_per_s", "{:.1f}"),
        ("KV cache, MiB", "kv_cache_mib", "{:.2f}"),
        ("peak device memory, MiB", "vram_peak_mib", "{:.0f}"),
    )
    for title, key, form in rows:
        cells = (result[side][key] for side in ("baseline", "turboquant"))
        table.add_row(title, *("-" if cell is None else form.format(cell) for cell in cells))
    comparison = result["comparison"]
    table.add_row("same text", "", "yes" if comparison["texts_identical"] else "no")
    if comparison["kld"] is not None:
        table.add_row("KL divergence, nats", "", f"{comparison['kld']:.5f}")
        table.add_row("top-1 agreement", "", f"{100 * comparison['top1_agreement']:.1f} %")
    console.output.print(table)
    if arguments.output:
        report.write_json(arguments.output, {**result, "environment": report.environment()})
    return SUCCESS
