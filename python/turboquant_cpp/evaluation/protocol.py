"""The evaluation protocol: an exact cache and compressed caches over the same text, in lockstep."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from turboquant_cpp.evaluation.bootstrap import Intervals, bootstrap_intervals
from turboquant_cpp.evaluation.cache_size import CacheSize, measure_cache
from turboquant_cpp.evaluation.divergence import DivergenceAccumulator, DivergenceSummary
from turboquant_cpp.evaluation.forward import read_chunk

__all__ = ["CacheReport", "Protocol", "QualityReport", "compare_caches", "select_windows"]

#: Bytes per token are a mean over the last so many tokens: a cache that keeps up to 128 exact ones
#: before it codes them together (transformers' quantised caches do) grows in a sawtooth.
_SIZE_TOKENS = 128
#: Tokens per forward pass of the part that is not compared.
_LEAD_CHUNK_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Which parts of a text are read and how.

    Attributes
    ----------
    windows : int
        Number of windows, spread evenly over the text.
    window_tokens : int
        Length of each window.
    chunk_tokens : int
        Tokens per forward pass. Small chunks make the model read every earlier token from the
        cache; a single pass would attend exactly and measure nothing.
    batch_windows : int
        Windows read at once, as rows of one batch: the figures are those of one by one up to
        rounding (of caches that quantise rows apart: ours, quanto and hqq; transformers' ``fp8``
        scales the batch as one tensor), in less time where a small batch leaves the processor idle.
    lead_tokens : int
        First tokens of each window that are read, 64 a pass, but not compared: what a long context
        does to its end, in a part of the time.
    """

    windows: int = 2
    window_tokens: int = 1024
    chunk_tokens: int = 8
    batch_windows: int = 1
    lead_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("windows", "window_tokens", "chunk_tokens", "batch_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.window_tokens <= self.chunk_tokens:
            raise ValueError(
                f"window_tokens: expected more than chunk_tokens ({self.chunk_tokens}), "
                f"got {self.window_tokens}: the first chunk reads nothing from the cache"
            )
        if not 0 <= self.lead_tokens < self.window_tokens:
            raise ValueError(
                f"lead_tokens: expected 0 to {self.window_tokens - 1}, fewer than a window has, "
                f"got {self.lead_tokens}"
            )

    @property
    def steps(self) -> list[tuple[int, int]]:
        """Begin and end of every forward pass over a window.

        Examples
        --------
        >>> Protocol(window_tokens=100, chunk_tokens=16, lead_tokens=72).steps
        [(0, 64), (64, 72), (72, 88), (88, 100)]
        """
        lead = range(0, self.lead_tokens, _LEAD_CHUNK_TOKENS)
        begins = [*lead, *range(self.lead_tokens, self.window_tokens, self.chunk_tokens)]
        return list(zip(begins, [*begins[1:], self.window_tokens], strict=True))


@dataclasses.dataclass(frozen=True)
class CacheReport:
    """Result of one cache.

    Attributes
    ----------
    divergence : DivergenceSummary
        Figures over all windows.
    size : CacheSize
        Bytes the cache held at the end of the last window, measured from its tensors; of a batch,
        a window's share.
    bytes_per_token : float
        Bytes a token, as the mean over the chunks that end in the last 128 tokens of that window.
    kl : list of list of float
        KL divergence of every compared position of every window.
    intervals : Intervals
        95 % confidence intervals of the mean KL divergence and the change of perplexity.
    """

    divergence: DivergenceSummary
    size: CacheSize
    bytes_per_token: float
    kl: list[list[float]]
    intervals: Intervals


@dataclasses.dataclass(frozen=True)
class QualityReport:
    """Result of `compare_caches`: the exact cache's size and one report per candidate."""

    protocol: Protocol
    text_tokens: int
    exact_size: CacheSize
    caches: dict[str, CacheReport]


def select_windows(tokens: torch.Tensor, protocol: Protocol) -> list[torch.Tensor]:
    """Cut the protocol's windows out of a tokenised text.

    Window ``i`` starts at ``i * ((n - L) // W)`` for a text of ``n`` tokens, ``W`` windows of ``L``
    tokens.

    Parameters
    ----------
    tokens : torch.Tensor
        The whole text, one dimension.
    protocol : Protocol
        Number and length of the windows.

    Returns
    -------
    list of torch.Tensor
        ``[window_tokens]`` each.

    Examples
    --------
    >>> windows = select_windows(torch.arange(100), Protocol(2, 20, 8))
    >>> [int(window[0]) for window in windows]
    [0, 40]
    """
    count, length = protocol.windows, protocol.window_tokens
    stride = (len(tokens) - length) // count
    if len(tokens) < length or (count > 1 and stride == 0):
        raise ValueError(
            f"text: expected at least {length if count == 1 else length + count} tokens for "
            f"{count} window(s) of {length}, got {len(tokens)}; use fewer or shorter windows"
        )
    return [tokens[i * stride : i * stride + length] for i in range(count)]


def compare_caches(
    model: Any,
    tokens: torch.Tensor,
    caches: Mapping[str, Callable[[], Any]],
    protocol: Protocol | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> QualityReport:
    """Compare compressed caches with the exact cache on a text.

    The exact pass and every candidate advance together, one chunk at a time, so that only one
    chunk of logits per cache is alive and nothing is rounded in between. Probabilities are compared
    in double precision (single where the device has no double).

    Parameters
    ----------
    model
        A causal language model of transformers, in evaluation mode.
    tokens : torch.Tensor
        The whole tokenised text, one dimension.
    caches : mapping of str to callable
        Name of each candidate and a function returning a fresh, empty cache. A cache must read its
        own codes even for the chunk it has just been given (``prefill="quantized"``).
    protocol : Protocol, optional
        Windows and chunks.
    progress : callable, optional
        Called with (chunks done, chunks in total).

    Returns
    -------
    QualityReport

    Examples
    --------
    >>> from turboquant_cpp import CompressedDynamicCache  # doctest: +SKIP
    >>> report = compare_caches(  # doctest: +SKIP
    ...     model,
    ...     tokens,
    ...     {
    ...         "4+4": lambda: CompressedDynamicCache(
    ...             config=model.config, bits=4, prefill="quantized"
    ...         )
    ...     },
    ... )
    >>> report.caches["4+4"].divergence.kl_mean  # doctest: +SKIP
    0.0015
    """
    protocol = protocol or Protocol()
    windows = torch.stack(select_windows(tokens, protocol))
    batches = windows.split(protocol.batch_windows)
    steps = protocol.steps
    accumulators = {name: [DivergenceAccumulator() for _ in windows] for name in caches}
    sizes: dict[str, CacheSize] = {}
    bytes_per_token: dict[str, list[float]] = {}
    exact_size = CacheSize({})
    done, total, first_row = 0, len(batches) * len(steps), 0
    for batch in batches:
        ids = batch.to(model.device)
        exact_cache: Any = None  # the model makes its own
        candidates = {name: make() for name, make in caches.items()}
        bytes_per_token = {name: [] for name in caches}
        for start, end in steps:
            chunk, targets = ids[:, start:end], ids[:, start + 1 : end + 1]
            last_logits = 0 if start < protocol.lead_tokens else None
            exact, exact_cache = read_chunk(model, chunk, exact_cache, last_logits)
            rows_exact = _log_probs(exact)
            for name, cache in candidates.items():
                rows = _log_probs(read_chunk(model, chunk, cache, last_logits)[0])
                if last_logits is None:
                    pairs = zip(rows_exact, rows, targets, strict=True)
                    for row, (log_probs_exact, log_probs, row_targets) in enumerate(pairs):
                        accumulators[name][first_row + row].add(
                            log_probs_exact, log_probs, row_targets, compare=start > 0
                        )
                if end > protocol.window_tokens - _SIZE_TOKENS:
                    held = measure_cache(cache).total_bytes
                    bytes_per_token[name].append(held / (len(batch) * end))
            done += 1
            if progress:
                progress(done, total)
        exact_size = measure_cache(exact_cache).share(len(batch))
        sizes = {name: measure_cache(cache).share(len(batch)) for name, cache in candidates.items()}
        first_row += len(batch)
    return QualityReport(
        protocol=protocol,
        text_tokens=len(tokens),
        exact_size=exact_size,
        caches={
            name: _report(by_window, sizes[name], statistics.fmean(bytes_per_token[name]))
            for name, by_window in accumulators.items()
        },
    )


def _report(
    by_window: list[DivergenceAccumulator], size: CacheSize, bytes_per_token: float
) -> CacheReport:
    """Figures of one cache over all windows."""
    kl = torch.stack([accumulator.kl for accumulator in by_window])
    nll_exact, nll_cache = (
        torch.stack(rows) for rows in zip(*(window.nll for window in by_window), strict=True)
    )
    whole = DivergenceAccumulator.joined(by_window)
    intervals = bootstrap_intervals(kl, nll_exact, nll_cache)
    return CacheReport(whole.summary(), size, bytes_per_token, kl.tolist(), intervals)


def _log_probs(logits: torch.Tensor) -> torch.Tensor:
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    return torch.log_softmax(logits, dim=-1, dtype=wide)
