"""``turboquant-cpp generate``: stream text from a compressed cache."""

from __future__ import annotations

import argparse

from turboquant_cpp.cli import arguments as options
from turboquant_cpp.cli.exit_codes import SUCCESS

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("prompt", help="text of the user's turn")
    parser.add_argument(
        "--max-new-tokens", type=options.positive_int, default=128, help="length limit"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy"
    )
    parser.add_argument("--exact", action="store_true", help="use the exact cache, to compare")
    options.add_attention_argument(parser)
    options.add_model_arguments(parser)
    options.add_width_arguments(parser)
    options.add_recipe_arguments(parser)
    options.add_output_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Generate, printing text as it comes and figures at the end."""
    cache_options = options.cache_options(arguments)

    from turboquant_cpp.benchmark import run_generation
    from turboquant_cpp.cli import console, report, session
    from turboquant_cpp.cli.measured import size_fields

    loaded = session.load(arguments)
    sampling = (
        {"do_sample": True, "temperature": arguments.temperature}
        if arguments.temperature > 0
        else {"do_sample": False}
    )
    generation = run_generation(
        loaded.model,
        loaded.tokenizer,
        session.chat_inputs(loaded, arguments.prompt),
        None if arguments.exact else session.cache_maker(loaded, cache_options)(),
        max_new_tokens=arguments.max_new_tokens,
        on_text=lambda text: print(text, end="", flush=True),
        **sampling,
    )
    print()
    speed = f", {generation.tokens_per_s:.1f} tokens/s" if generation.tokens_per_s else ""
    console.remark(
        f"{generation.new_tokens} tokens in {generation.elapsed_s:.1f} s{speed}; cache "
        f"{generation.cache.total_bytes / 2**20:.2f} MiB for {len(generation.token_ids)} tokens"
    )
    if arguments.output:
        report.write_json(
            arguments.output,
            {
                "kind": "generate",
                "model": loaded.name,
                "prompt": arguments.prompt,
                "cache": "exact" if arguments.exact else cache_options,
                "text": generation.text,
                "new_tokens": generation.new_tokens,
                "elapsed_s": generation.elapsed_s,
                "prefill_s": generation.prefill_s,
                "tokens_per_s": generation.tokens_per_s,
                **size_fields(generation.cache),
                "environment": report.environment(),
            },
        )
    return SUCCESS
