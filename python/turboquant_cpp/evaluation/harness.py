"""A model for lm-evaluation-harness that reads every prompt and every answer from a given cache.

The harness's own wrapper scores a text in a single pass, which attends exactly whatever cache the
model would use later: a quantised cache then seems to cost nothing. Here texts are fed in small
chunks, so that earlier tokens are read from the cache, and ``generate()`` gets the cache too.

Needs ``pip install lm-eval``; nothing else in the package imports this module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from turboquant_cpp.hf.compat import CACHE_ARGUMENT

try:
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        f"turboquant_cpp.evaluation.harness needs lm-eval (pip install lm-eval): {error}",
        name=error.name,
    ) from error

__all__ = ["CachedLM"]


class CachedLM(HFLM):
    """The harness's transformers model with a cache of one's choice.

    Multiple choice, perplexity and generation tasks all go through the cache::

        lm = CachedLM(
            model,
            lambda: CompressedDynamicCache(config=model.config, bits=4, prefill="quantized"),
            tokenizer=tokenizer,
        )
        results = lm_eval.simple_evaluate(lm, tasks=["lambada_openai", "gsm8k"])

    Parameters
    ----------
    pretrained
        A causal language model of transformers, or what ``HFLM`` takes in its place.
    make_cache : callable
        Returns a fresh, empty cache; called once per batch. It should read its own codes even for
        the tokens that it has just been given (``prefill="quantized"``), as generation feeds the
        whole prompt at once.
    chunk_tokens : int
        Tokens per forward pass when a text is scored.
    **options
        Anything else that ``HFLM`` takes, such as ``tokenizer=`` and ``batch_size=``.

    Raises
    ------
    ValueError
        ``chunk_tokens`` is not positive, or the model is no decoder-only one.

    Notes
    -----
    The harness pads the texts of a batch on the right when it scores them. Padding enters the cache
    after all that is scored, so it changes no score.
    """

    def __init__(
        self,
        pretrained: Any,
        make_cache: Callable[[], Any],
        *,
        chunk_tokens: int = 8,
        **options: Any,
    ) -> None:
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens: expected a positive number, got {chunk_tokens}")
        super().__init__(pretrained, **options)
        if self.backend != "causal":
            raise ValueError(f"pretrained: expected a decoder-only model, got a {self.backend} one")
        self._make_cache = make_cache
        self._chunk_tokens = chunk_tokens

    def _model_call(
        self,
        inps: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits ``[batch, tokens, vocabulary]`` of a batch of texts, read chunk by chunk."""
        dtype = self.mixed_precision_dtype
        cache = self._make_cache()
        logits = []
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None),
        ):
            for chunk in inps.split(self._chunk_tokens, dim=1):
                output = self.model(input_ids=chunk, use_cache=True, **{CACHE_ARGUMENT: cache})
                logits.append(output.logits)
        return torch.cat(logits, dim=1)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """Tokens of prompts and answers, generated from the cache."""
        cache = {CACHE_ARGUMENT: self._make_cache()}
        tokens: torch.Tensor = super()._model_generate(
            context, max_length, stop, **cache, **generation_kwargs
        )
        return tokens
