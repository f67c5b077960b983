"""Relative error of a model's own keys and values after a trip through a compressed cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from turboquant_cpp.evaluation.forward import read_chunk

__all__ = ["LayerError", "layer_errors"]


@dataclasses.dataclass(frozen=True)
class LayerError:
    """Errors of one layer.

    Attributes
    ----------
    layer : int
        Index of the layer.
    key_error, value_error : float
        ``sum |x - x'|^2 / sum |x|^2`` over the tokens held as codes; tokens the cache keeps exact
        are left out. NaN when no token was encoded.
    encoded_tokens : int
        Tokens held as codes.
    """

    layer: int
    key_error: float
    value_error: float
    encoded_tokens: int


@torch.inference_mode()
def layer_errors(
    model: Any, tokens: torch.Tensor, make_cache: Callable[[], Any]
) -> list[LayerError]:
    """Run a model exactly over a text and push its keys and values through a compressed cache.

    Parameters
    ----------
    model
        A causal language model of transformers.
    tokens : torch.Tensor
        Text to run, one dimension; it is read in a single pass.
    make_cache : callable
        Returns an empty cache whose layers show what they hold as ``keys`` and ``values``.

    Returns
    -------
    list of LayerError
        One per layer whose exact keys and values are complete (a sliding-window layer that has
        dropped tokens is left out).
    """
    _, exact = read_chunk(model, tokens.to(model.device)[None], None, 0)
    cache = make_cache()
    errors = []
    for index, layer in enumerate(exact.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.shape[-2] != len(tokens):
            continue
        cache.update(keys, values, index)
        stored = cache.layers[index]
        key_error, encoded = _relative_error(keys, stored.keys)
        value_error, _ = _relative_error(values, stored.values)
        errors.append(LayerError(index, key_error, value_error, encoded))
    return errors


def _relative_error(exact: torch.Tensor, read: torch.Tensor) -> tuple[float, int]:
    """Error and number of tokens ([1, heads, tokens, dim]) that do not come back bit for bit."""
    encoded = (exact != read).any(dim=-1).any(dim=1)[0]
    if not encoded.any():
        return float("nan"), 0
    x = exact[:, :, encoded].double()
    difference = x - read[:, :, encoded].double()
    return (difference.square().sum() / x.square().sum()).item(), int(encoded.sum())
