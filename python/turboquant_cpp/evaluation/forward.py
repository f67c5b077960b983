"""Forward passes over a part of a text, which compute no more logits than are looked at."""

from __future__ import annotations

import inspect
from typing import Any, Final

import torch

from turboquant_cpp.hf.compat import CACHE_ARGUMENT

__all__ = ["read_chunk"]

_LIMIT: Final = "logits_to_keep"  # what transformers calls it; 0 would be all of them


@torch.inference_mode()
def read_chunk(
    model: Any, chunk: torch.Tensor, cache: Any, last_logits: int | None = None
) -> tuple[torch.Tensor, Any]:
    """Feed tokens to a model that has read what is in a cache.

    Logits of 64 tokens and 128 K words are 33 MB a row, and a large part of a small model's work.

    Parameters
    ----------
    model
        A causal language model of transformers.
    chunk : torch.Tensor
        Token ids ``[batch, tokens]``.
    cache
        What the model has read so far; None: nothing, the model makes a cache of its own.
    last_logits : int, optional
        Of how many of the last tokens logits are wanted, at most those of the chunk; all of them
        by default. A model whose ``forward`` cannot leave any out computes them all.

    Returns
    -------
    logits : torch.Tensor
        ``[batch, last_logits, vocabulary]``.
    cache
        The cache, with the chunk.
    """
    wanted = chunk.shape[1] if last_logits is None else last_logits
    options = {}
    if wanted < chunk.shape[1] and _LIMIT in inspect.signature(model.forward).parameters:
        options[_LIMIT] = max(wanted, 1)
    output = model(input_ids=chunk, use_cache=True, **{CACHE_ARGUMENT: cache}, **options)
    logits: torch.Tensor = output.logits
    return logits[:, logits.shape[1] - wanted :], output[CACHE_ARGUMENT]
