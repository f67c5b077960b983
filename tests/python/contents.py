"""What reading a cache shows, and whether two caches show the same."""

from __future__ import annotations

import torch
from turboquant_cpp import CompressedDynamicCache


def contents(cache: CompressedDynamicCache):
    """Everything that reading a cache shows, layer by layer."""
    shown = []
    for layer in cache.layers:
        keys = getattr(layer, "keys", None)
        tensors = [] if keys is None else [keys.clone(), layer.values.clone()]
        for name in ("conv_states", "recurrent_states"):
            held = getattr(layer, name, {})
            tensors += [state.clone() for state in held.values() if state is not None]
        length = layer.get_seq_length() if hasattr(layer, "get_seq_length") else 0
        shown.append((type(layer), length, getattr(layer, "left_padding", None), tensors))
    return shown


def assert_same(shown, expected) -> None:
    for one, other in zip(shown, expected, strict=True):
        assert one[:3] == other[:3]
        assert len(one[3]) == len(other[3])
        for actual, wanted in zip(one[3], other[3], strict=True):
            assert actual.dtype == wanted.dtype
            assert torch.equal(actual, wanted) or bool(wanted.isnan().any())
