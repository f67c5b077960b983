"""One timed generation with a given cache."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from turboquant_cpp.evaluation import CacheSize, measure_cache
from turboquant_cpp.hf.compat import CACHE_ARGUMENT

__all__ = ["Generation", "run_generation"]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated, how fast and from how large a cache.

    Attributes
    ----------
    text : str
        The new text, without the prompt and without special tokens.
    token_ids : list of int
        Prompt and new tokens.
    new_tokens : int
        Tokens generated.
    elapsed_s : float
        Wall-clock time of the whole call.
    prefill_s : float
        Time until the first new token.
    tokens_per_s : float or None
        Decode speed: tokens after the first over the time they took; None with fewer than two.
    cache : CacheSize
        Bytes held by the cache at the end, measured from its tensors.
    vram_peak_mib : float or None
        Peak device memory; None without CUDA.
    """

    text: str
    token_ids: list[int]
    new_tokens: int
    elapsed_s: float
    prefill_s: float
    tokens_per_s: float | None
    cache: CacheSize
    vram_peak_mib: float | None


class _Clock:
    """A streamer of `generate()`: notes when tokens arrive and passes new text on."""

    def __init__(
        self,
        tokenizer: Any,
        on_text: Callable[[str], None] | None,
        on_token: Callable[[int], None],
    ) -> None:
        self.times: list[float] = []
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._on_token = on_token
        self._is_prompt = True
        self._line_ids: list[int] = []
        self._shown = 0  # characters of the current line already passed on

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self.times.append(time.perf_counter())
        self._on_token(len(self.times))
        if self._on_text:
            self._line_ids.extend(value.flatten().tolist())
            line = self._line()
            # Only whole words are passed on: the last token may be a part of a character.
            self._show(line, len(line) if line.endswith("\n") else line.rfind(" ") + 1)
            if line.endswith("\n"):
                self._line_ids, self._shown = [], 0

    def end(self) -> None:
        if self._on_text:
            line = self._line()
            self._show(line, len(line))

    def _line(self) -> str:
        return str(self._tokenizer.decode(self._line_ids, skip_special_tokens=True))

    def _show(self, line: str, stop: int) -> None:
        if self._on_text and stop > self._shown:
            self._on_text(line[self._shown : stop])
            self._shown = stop


def run_generation(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, torch.Tensor],
    cache: Any = None,
    *,
    max_new_tokens: int,
    on_text: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> Generation:
    """Generate greedily (unless `options` say otherwise) from one prompt.

    Parameters
    ----------
    model, tokenizer
        Model and tokenizer (or processor) of transformers.
    inputs : mapping of str to torch.Tensor
        What the tokenizer returned for one prompt.
    cache : optional
        An empty cache; None lets the model make its own exact one.
    max_new_tokens : int
        Length limit.
    on_text : callable, optional
        Receives the new text piece by piece.
    progress : callable, optional
        Called with (new tokens so far, `max_new_tokens`).
    **options
        Further options of ``generate()``.

    Returns
    -------
    Generation

    Examples
    --------
    >>> inputs = tokenizer("RAID is", return_tensors="pt")  # doctest: +SKIP
    >>> run_generation(model, tokenizer, inputs, max_new_tokens=8).new_tokens  # doctest: +SKIP
    8
    """
    clock = _Clock(tokenizer, on_text, lambda count: progress(count, max_new_tokens))
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    prompt_tokens = inputs["input_ids"].shape[1]
    is_cuda = model.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
        torch.cuda.synchronize(model.device)
    start = time.perf_counter()
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        streamer=clock,
        return_dict_in_generate=True,
        **{CACHE_ARGUMENT: cache, "do_sample": False, **options},
    )
    # The streamer copies every token to the host, so the device is done by now.
    elapsed = time.perf_counter() - start
    ids = output.sequences[0].tolist()
    decode = clock.times[-1] - clock.times[0] if len(clock.times) > 1 else None
    return Generation(
        text=tokenizer.decode(ids[prompt_tokens:], skip_special_tokens=True),
        token_ids=ids,
        new_tokens=len(ids) - prompt_tokens,
        elapsed_s=elapsed,
        prefill_s=clock.times[0] - start,
        tokens_per_s=(len(clock.times) - 1) / decode if decode else None,
        cache=measure_cache(output[CACHE_ARGUMENT]),
        vram_peak_mib=torch.cuda.max_memory_allocated(model.device) / 2**20 if is_cuda else None,
    )
