"""Decode steps of a model over caches of a given length, the caches taking turns."""

from __future__ import annotations

import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from turboquant_cpp import CompressedDynamicCache
from turboquant_cpp.evaluation import CacheSize, measure_cache
from turboquant_cpp.hf.compat import CACHE_ARGUMENT, attention_implementation, text_config
from turboquant_cpp.hf.model_checks import config_head_dim

__all__ = ["Contender", "StepTiming", "fill", "longest_context", "time_decode_steps"]

#: Steps a cache makes in a row, the first of them not timed: it meets another cache's leftovers in
#: the processor's caches.
_STEPS_A_TURN = 4
#: Tokens of the past that are made at a time: bounds the memory of random numbers.
_FILL_TOKENS = 8192


@dataclasses.dataclass(frozen=True)
class Contender:
    """A cache to time.

    Attributes
    ----------
    make : callable
        Makes an empty one, given how many tokens it will have to hold.
    attention : str
        The attention implementation it needs.
    is_compiled : bool
        Whether the step is one compiled graph, on CUDA replayed as a CUDA graph; for caches of
        fixed capacity.
    """

    make: Callable[[int], Any]
    attention: str
    is_compiled: bool = False


@dataclasses.dataclass(frozen=True)
class StepTiming:
    """Time of one decode step with one cache.

    Attributes
    ----------
    cache : str
        Name of the contender.
    past_tokens : int
        Tokens in the cache before the first step.
    median_ms, least_ms : float
        Median and least time of a step, milliseconds.
    size : CacheSize
        Bytes held by the cache at the end, measured from its tensors.
    peak_bytes : int or None
        Device memory that a step took above what was held before it; None without CUDA.
    """

    cache: str
    past_tokens: int
    median_ms: float
    least_ms: float
    size: CacheSize
    peak_bytes: int | None


def longest_context(timings: Sequence[StepTiming], memory_bytes: int) -> int:
    """Tokens of one sequence whose cache fits in `memory_bytes`, by the bytes of two lengths.

    Parameters
    ----------
    timings : sequence of StepTiming
        Of one cache, at two lengths or more; the shortest and the longest count.
    memory_bytes : int
        Bytes that weights leave free; what a step needs beside the cache is taken off.

    Raises
    ------
    ValueError
        When there are not two lengths.
    """
    by_length = sorted(timings, key=lambda timing: timing.past_tokens)
    short, long = by_length[0], by_length[-1]
    if short.past_tokens == long.past_tokens:
        raise ValueError("timings: expected two lengths, got one")
    bytes_a_token = (long.size.total_bytes - short.size.total_bytes + _peak_growth(short, long)) / (
        long.past_tokens - short.past_tokens
    )
    free = memory_bytes - long.size.total_bytes - (long.peak_bytes or 0)
    return int(long.past_tokens + free / bytes_a_token)


def _peak_growth(short: StepTiming, long: StepTiming) -> int:
    return max(0, (long.peak_bytes or 0) - (short.peak_bytes or 0))


@torch.no_grad()
def fill(cache: Any, model: Any, tokens: int) -> None:
    """Put `tokens` random keys and values ``[1, H, tokens, D]`` into every layer of a cache.

    Raises
    ------
    ValueError
        When a layer of the model is no full-attention layer, or the configuration gives no
        head_dim: its cache cannot be filled so.
    """
    config = text_config(model.config)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(
            f"model: expected full-attention layers alone, got {', '.join(sorted(kinds))}"
        )
    head_dim = config_head_dim(config)
    if head_dim is None:
        raise ValueError("model: expected a configuration with one head_dim, got none")
    for start in range(0, tokens, _FILL_TOKENS):
        shape = (1, config.num_key_value_heads, min(_FILL_TOKENS, tokens - start), head_dim)
        for layer in range(config.num_hidden_layers):
            keys, values = torch.randn((2, *shape), device=model.device, dtype=model.dtype)
            # Copies: a stock cache keeps what it is given, and both are views of one tensor.
            cache.update(keys.clone(), values.clone(), layer)
        if isinstance(cache, CompressedDynamicCache):
            _store(cache)


def _store(cache: CompressedDynamicCache) -> None:
    """Encode what update() took: no attention comes, for which fused layers would wait."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*never reached the attention function")
        for layer in cache.compressed_layers():
            layer.commit()


def time_decode_steps(
    model: Any,
    past_tokens: int,
    contenders: Mapping[str, Contender],
    *,
    steps: int = 24,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[StepTiming]:
    """Time forward passes of one token, greedily continued, after `past_tokens` random ones.

    The contenders take turns of a few steps, so that what else the machine does meets all of
    them. The model's attention implementation is restored at the end.

    Parameters
    ----------
    model
        A causal language model of transformers with full-attention layers, in evaluation mode.
    past_tokens : int
        Length of every cache before the first step.
    contenders : mapping of str to Contender
        Name, cache and attention implementation of each.
    steps : int
        Timed steps of each, rounded up to whole turns.
    progress : callable
        Called with (turns done, turns in total).

    Returns
    -------
    list of StepTiming
        One for each contender whose cache the device's memory holds, in order.
    """
    before = attention_implementation(text_config(model.config))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, int | None] = dict.fromkeys(contenders)
    turns = -(-steps // (_STEPS_A_TURN - 1))
    caches, run_step = {}, {}
    try:
        for name, contender in contenders.items():
            model.set_attn_implementation(contender.attention)
            cache = _filled(contender, model, past_tokens, (turns + 1) * _STEPS_A_TURN)
            if cache is None:
                continue
            caches[name], run_step[name] = cache, _step_of(model, contender.is_compiled)
            if contender.is_compiled:
                _turn(model, cache, run_step[name])  # compiles, and captures the graph
        for turn in range(turns):
            for name, cache in caches.items():
                model.set_attn_implementation(contenders[name].attention)
                taken, peak = _turn(model, cache, run_step[name])
                times[name] += taken
                if peak is not None:
                    peaks[name] = max(peaks[name] or 0, peak)
            progress(turn + 1, turns)
    finally:
        model.set_attn_implementation(before)
    return [
        StepTiming(
            cache=name,
            past_tokens=past_tokens,
            median_ms=1e3 * statistics.median(times[name]),
            least_ms=1e3 * min(times[name]),
            size=measure_cache(cache),
            peak_bytes=peaks[name],
        )
        for name, cache in caches.items()
    ]


def _filled(contender: Contender, model: Any, past_tokens: int, steps: int) -> Any:
    """A cache with its past, None where there is no memory for it."""
    try:
        cache = contender.make(past_tokens + steps)
        fill(cache, model, past_tokens)
    except torch.OutOfMemoryError:
        cache = None
    if cache is None:
        torch.cuda.empty_cache()
    return cache


def _step_of(model: Any, is_compiled: bool) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    def step(token: torch.Tensor, cache: Any) -> torch.Tensor:
        logits: torch.Tensor = model(token, use_cache=True, **{CACHE_ARGUMENT: cache}).logits
        return logits

    return torch.compile(step, mode="reduce-overhead", fullgraph=True) if is_compiled else step


@torch.no_grad()
def _turn(
    model: Any, cache: Any, run_step: Callable[[torch.Tensor, Any], torch.Tensor]
) -> tuple[list[float], int | None]:
    """Seconds of each timed step of a turn, and the peak of device memory above the start."""
    on_cuda = model.device.type == "cuda"
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    times = []
    held = 0
    for step in range(_STEPS_A_TURN):
        if on_cuda:
            torch.cuda.synchronize()
        if on_cuda and step == 1:
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        torch.compiler.cudagraph_mark_step_begin()
        token = run_step(token, cache)[:, -1].argmax(-1, keepdim=True)
        if on_cuda:
            torch.cuda.synchronize()
        if step > 0:
            times.append(time.perf_counter() - started)
    return times, torch.cuda.max_memory_allocated() - held if on_cuda else None
