"""Codes and scales of packed pages in a plain, documented order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turboquant_cpp._core import BlockLayout, LayerSpec, unpack_rows

__all__ = ["plain_codes"]


def plain_codes(
    spec: LayerSpec,
    layout: BlockLayout,
    kind: str,
    entries: Sequence[Sequence[Sequence[int]]],
    page: Callable[[int], Tensor],
) -> tuple[Tensor, Tensor]:
    """Codes uint8 ``[B, H, S, D * bits / 8]`` and scales float32 ``[B, H, S, 1]``, on the host.

    Parameters
    ----------
    spec, layout : LayerSpec, BlockLayout
        What the pages' bytes mean.
    kind : {"k", "v"}
        Keys or values.
    entries : sequence
        Page and tokens of each used entry of each row.
    page : callable
        The bytes of a page.
    """
    heads, dim = spec.num_kv_heads, spec.head_dim
    bits = {"k": spec.k_bits, "v": spec.v_bits}[kind]
    encoded = [sum(tokens for _, tokens in row) for row in entries]
    most = max(encoded)
    codes = np.zeros((len(entries), heads, most, dim * bits // 8), np.uint8)
    scales = np.zeros((len(entries), heads, most, 1), np.float32)
    for row, row_entries in enumerate(entries):
        at = most - encoded[row]
        for number, tokens in row_entries:
            block = page(number).cpu().numpy().reshape(heads, layout.block_bytes)
            packed, scale = layout.rows(block, kind, tokens)
            here = slice(at, at + tokens)
            codes[row, :, here] = _most_significant_first(
                unpack_rows(packed.reshape(heads * tokens, -1), dim, bits), bits
            ).reshape(heads, tokens, -1)
            scales[row, :, here, 0] = scale
            at += tokens
    return torch.from_numpy(codes), torch.from_numpy(scales)


def _most_significant_first(
    codes: np.ndarray[Any, np.dtype[np.uint8]], bits: int
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pack codes ``[n, D]`` into a bit stream that starts at the top bit of its first byte."""
    planes = np.unpackbits(codes[:, :, None], axis=2)[:, :, 8 - bits :]
    return np.packbits(planes.reshape(len(codes), -1), axis=1)
