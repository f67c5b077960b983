"""The benchmark: the same prompt with the exact cache and with the compressed one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from turboquant_cpp import CompressedDynamicCache, TurboQuantKVCache
from turboquant_cpp.benchmark.generation import Generation, run_generation
from turboquant_cpp.evaluation import Protocol, compare_caches
from turboquant_cpp.hf.attention import stock_attention
from turboquant_cpp.hf.loading import exact_cache

__all__ = ["BenchmarkOptions", "run_benchmark"]

_PREVIEW_CHARACTERS = 200
_CHUNK_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
    """What to run.

    Attributes
    ----------
    prompt : str
        Text of the user's turn, for the report.
    cache_options : mapping
        Options of `CompressedDynamicCache`, ``bits`` among them.
    compressed : bool
        True: a cache that holds packed codes. False: the accuracy-only mode, keys and values pass
        through the quantiser and stay dense; of the options ``bits`` and ``seed`` count then.
    max_new_tokens : int
        Length limit of both generations.
    image_path, video_path : str, optional
        Image and video that belong to the prompt, for the report.
    """

    prompt: str
    cache_options: Mapping[str, Any]
    compressed: bool
    max_new_tokens: int = 256
    image_path: str | None = None
    video_path: str | None = None


def run_benchmark(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, torch.Tensor],
    options: BenchmarkOptions,
    *,
    model_id: str,
    report: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Run both generations and compare them.

    Parameters
    ----------
    model, tokenizer
        Model and tokenizer (or processor) of transformers.
    inputs : mapping of str to torch.Tensor
        The tokenised prompt.
    options : BenchmarkOptions
        Cache and length.
    model_id : str
        Name for the report.
    report : callable, optional
        Receives a line before each slow step.

    Returns
    -------
    dict
        JSON-ready, with the keys of the original package's benchmark and ``kv_cache_mib``,
        ``tokens_per_s``, ``kld`` and ``top1_agreement``. Figures that do not exist on this machine
        or for this input are None: device memory without CUDA, divergence for a prompt with an
        image or a video (``image_path``, ``video_path``).
    """
    config = model.config.get_text_config(decoder=True)
    num_heads = config.num_attention_heads

    cache = _make_cache(model, options)  # first: what does not fit the model is refused at once
    report("Generating with the exact cache")
    with stock_attention(model):
        baseline = run_generation(model, tokenizer, inputs, max_new_tokens=options.max_new_tokens)
    report("Generating with the quantised cache")
    quantised = run_generation(
        model, tokenizer, inputs, cache, max_new_tokens=options.max_new_tokens
    )
    divergence = None
    is_text = options.image_path is None and options.video_path is None
    if is_text and len(baseline.token_ids) > _CHUNK_TOKENS:
        report("Comparing next-token distributions")
        tokens = torch.tensor(baseline.token_ids)
        divergence = (
            compare_caches(
                model,
                tokens,
                {"quantised": lambda: _make_cache(model, options, prefill="quantized")},
                Protocol(1, len(tokens), _CHUNK_TOKENS),
            )
            .caches["quantised"]
            .divergence
        )
    stats = cache.compression_stats() if options.compressed else None
    return {
        "model_id": model_id,
        "bits": options.cache_options.get("bits"),
        "k_bits": options.cache_options.get("k_bits"),
        "v_bits": options.cache_options.get("v_bits"),
        "mode": "compressed" if options.compressed else "accuracy-only",
        "head_dim": _head_dim(model),
        "num_heads": num_heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or num_heads,
        "num_layers": config.num_hidden_layers,
        "prompt": options.prompt,
        "image_path": options.image_path,
        "video_path": options.video_path,
        "baseline": _side(baseline),
        "turboquant": {**_side(quantised), "compression_stats": stats},
        "comparison": {
            "texts_identical": baseline.text == quantised.text,
            "time_ratio": quantised.elapsed_s / baseline.elapsed_s,
            "vram_delta_mib": _difference(quantised.vram_peak_mib, baseline.vram_peak_mib),
            "kv_cache_ratio": baseline.cache.total_bytes / quantised.cache.total_bytes,
            "kld": divergence and divergence.kl_mean,
            "top1_agreement": divergence and divergence.top1_agreement,
            "baseline_text_preview": baseline.text[:_PREVIEW_CHARACTERS],
            "turboquant_text_preview": quantised.text[:_PREVIEW_CHARACTERS],
        },
    }


def _make_cache(model: Any, options: BenchmarkOptions, **extra: Any) -> Any:
    if options.compressed:
        return CompressedDynamicCache(config=model.config, **options.cache_options, **extra)
    cache = exact_cache(model.config)
    TurboQuantKVCache(
        cache,
        _head_dim(model),
        bits=options.cache_options["bits"],
        seed=options.cache_options.get("seed", 42),
    )
    return cache


def _head_dim(model: Any) -> int:
    config = model.config.get_text_config(decoder=True)
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _side(generation: Generation) -> dict[str, Any]:
    return {
        "output_text": generation.text,
        "vram_peak_mib": generation.vram_peak_mib,
        "elapsed_s": generation.elapsed_s,
        "tokens_per_s": generation.tokens_per_s,
        "new_tokens": generation.new_tokens,
        "kv_cache_mib": generation.cache.total_bytes / 2**20,
    }


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
