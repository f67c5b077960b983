"""The paper's quantisers on torch tensors, under the names that turboquant-vllm gave them.

Everything is computed by the compiled core on the CPU; results come back on the input's device.
Vectors are the last dimension of a tensor, whatever its leading dimensions.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turboquant_cpp import _core

__all__ = [
    "CompressedKeys",
    "CompressedValues",
    "LloydMaxCodebook",
    "TurboQuantCompressorMSE",
    "TurboQuantCompressorV2",
    "TurboQuantMSE",
    "TurboQuantProd",
    "solve_lloyd_max",
]

_FLOAT_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def solve_lloyd_max(d: int, bits: int) -> tuple[Tensor, Tensor]:
    """Levels and boundaries of the optimal quantiser of a unit vector's coordinate in R^d.

    Parameters
    ----------
    d : int
        Dimension, at least 2. The exact density is used for every d.
    bits : int
        Width, 1 to 8.

    Returns
    -------
    centroids, boundaries : Tensor
        ``2**bits`` and ``2**bits - 1`` ascending float32 numbers.

    Raises
    ------
    ValueError
        When `d` or `bits` is out of range.

    Examples
    --------
    >>> from turboquant_cpp import solve_lloyd_max
    >>> centroids, boundaries = solve_lloyd_max(128, 2)
    >>> [round(x, 3) for x in (centroids * 128**0.5).tolist()]
    [-1.505, -0.452, 0.452, 1.505]
    >>> len(boundaries)
    3
    """
    centroids, boundaries = _solved(d, bits)
    return centroids.clone(), boundaries.clone()


@functools.cache
def _solved(d: int, bits: int) -> tuple[Tensor, Tensor]:
    # The core scales coordinates to unit variance; these are coordinates of unit vectors.
    solution = _core.solve_lloyd_max(d, bits)
    return (
        torch.from_numpy(solution["levels"] / math.sqrt(d)).float(),
        torch.from_numpy(solution["boundaries"] / math.sqrt(d)).float(),
    )


@dataclass(frozen=True, eq=False)
class LloydMaxCodebook:
    """A scalar quantiser: ascending levels and the boundaries between them.

    Examples
    --------
    >>> import torch
    >>> from turboquant_cpp import LloydMaxCodebook
    >>> codebook = LloydMaxCodebook.solve(64, 3)
    >>> codes = codebook.quantize(torch.tensor([-1.0, 0.0, 1.0]))
    >>> codes.tolist(), codebook.dequantize(codes).shape
    ([0, 3, 7], torch.Size([3]))
    """

    centroids: Tensor
    boundaries: Tensor
    bits: int
    dim: int

    @classmethod
    def solve(cls, dim: int, bits: int) -> LloydMaxCodebook:
        """Codebook of a unit vector's coordinate in R^dim."""
        centroids, boundaries = solve_lloyd_max(dim, bits)
        return cls(centroids, boundaries, bits, dim)

    def quantize(self, x: Tensor) -> Tensor:
        """Index of the level nearest to each element, int64."""
        return torch.bucketize(x.float(), self.boundaries.to(x.device))

    def dequantize(self, indices: Tensor) -> Tensor:
        """Level of each index, float32."""
        return self.centroids.to(indices.device)[indices.long()]


class TurboQuantMSE:
    """Random rotation and an optimal scalar quantiser per coordinate; the norm is stored apart.

    Parameters
    ----------
    dim : int
        Length of the vectors.
    bits : int
        Width, 1 to 8.
    seed : int
        Seed of the rotation.

    Raises
    ------
    ValueError
        When `dim` (the message lists what is supported) or `bits` is out of range.

    Examples
    --------
    >>> import torch
    >>> from turboquant_cpp import TurboQuantMSE
    >>> quantizer = TurboQuantMSE(64, bits=4)
    >>> x = torch.randn(8, 64)
    >>> indices, norms = quantizer.quantize(x)
    >>> error = (quantizer.dequantize(indices, norms) - x).square().sum() / x.square().sum()
    >>> bool(error < 0.02)
    True
    """

    def __init__(self, dim: int, bits: int, *, seed: int = 42) -> None:
        self.dim = dim
        self.bits = bits
        self._core = _core.TurboQuantMse(dim, bits, seed)

    @property
    def codebook(self) -> LloydMaxCodebook:
        """The scalar quantiser of the rotated coordinates of unit vectors."""
        return LloydMaxCodebook.solve(self.dim, self.bits)

    @functools.cached_property
    def rotation(self) -> Tensor:
        """The rotation R as a dense matrix ``[dim, dim]``: a row vector x becomes ``x @ R.T``."""
        return torch.from_numpy(self._core.rotate(np.eye(self.dim, dtype=np.float32)).T.copy())

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise vectors ``[..., dim]``.

        Returns
        -------
        indices : Tensor
            int64 ``[..., dim]``.
        norms : Tensor
            float32 ``[..., 1]``.

        Raises
        ------
        ValueError
            When the last dimension is not `dim` or `x` is not floating point.
        """
        encoded = self._core.encode(_rows("x", x, self.dim))
        indices = _core.unpack_rows(encoded["codes"], self.dim, self.bits)
        return _unrows(indices, x).long(), _norms(encoded["scales"], self.dim, x)

    def dequantize(self, indices: Tensor, norms: Tensor) -> Tensor:
        """Reconstruct float32 vectors ``[..., dim]``."""
        _check_last("indices", indices, self.dim)
        rows = self._core.decode(
            {
                "codes": _packed(indices, self.dim, self.bits),
                "scales": _scales(norms, self.dim, indices),
            }
        )
        return _unrows(rows, indices)


class TurboQuantProd:
    """`TurboQuantMSE` at one bit less and the signs of the projected residual: unbiased products.

    Parameters
    ----------
    dim : int
        Length of the vectors.
    bits : int
        Width in all, 2 to 8: one bit is the sign.
    seed : int
        Seed of rotation and projection.

    Raises
    ------
    ValueError
        When `dim` or `bits` is out of range.

    Examples
    --------
    >>> import torch
    >>> from turboquant_cpp import TurboQuantProd
    >>> quantizer = TurboQuantProd(64, bits=4)
    >>> keys, queries = torch.randn(2, 8, 64)
    >>> products = quantizer.estimate_inner_product(queries, *quantizer.quantize(keys))
    >>> products.shape
    torch.Size([8, 1])
    """

    def __init__(self, dim: int, bits: int, *, seed: int = 42) -> None:
        if not 2 <= bits <= 8:
            raise ValueError(f"bits: expected bits >= 2 and at most 8, got {bits}")
        self.dim = dim
        self.bits = bits
        self._core = _core.TurboQuantProd(dim, bits, seed)
        self._sign_bytes = -(-dim // 8)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantise vectors ``[..., dim]``.

        Returns
        -------
        indices : Tensor
            int64 ``[..., dim]``, below ``2**(bits - 1)``.
        norms : Tensor
            float32 ``[..., 1]``.
        qjl_signs : Tensor
            float32 ``[..., dim]``, each -1 or 1.
        residual_norms : Tensor
            float32 ``[..., 1]``.
        """
        encoded = self._core.encode(_rows("x", x, self.dim))
        codes, signs = np.split(encoded["codes"], [-self._sign_bytes], axis=1)
        indices = _core.unpack_rows(codes, self.dim, self.bits - 1)
        positive = _core.unpack_rows(signs, self.dim, 1)
        return (
            _unrows(indices, x).long(),
            _norms(encoded["scales"], self.dim, x),
            _unrows(positive, x).float() * 2 - 1,
            _unrows(encoded["residual_norms"][:, None], x),
        )

    def dequantize(
        self, indices: Tensor, norms: Tensor, qjl_signs: Tensor, residual_norms: Tensor
    ) -> Tensor:
        """Reconstruct float32 vectors ``[..., dim]``; their products are unbiased."""
        codes = self._codes(indices, norms, qjl_signs, residual_norms)
        return _unrows(self._core.decode(codes), indices)

    def estimate_inner_product(
        self,
        query: Tensor,
        indices: Tensor,
        norms: Tensor,
        qjl_signs: Tensor,
        residual_norms: Tensor,
    ) -> Tensor:
        """Unbiased estimate of each query's product with its vector, float32 ``[..., 1]``.

        `query` is ``[..., dim]`` and broadcasts against the vectors.
        """
        _check_last("query", query, self.dim)
        vectors = self.dequantize(indices, norms, qjl_signs, residual_norms)
        return (query.to(vectors.device, torch.float32) * vectors).sum(-1, keepdim=True)

    def scores(
        self,
        queries: Tensor,
        indices: Tensor,
        norms: Tensor,
        qjl_signs: Tensor,
        residual_norms: Tensor,
    ) -> Tensor:
        """Products of all `queries` ``[q, dim]`` with all vectors ``[n, dim]``, from the codes."""
        _check_last("queries", queries, self.dim)
        codes = self._codes(indices, norms, qjl_signs, residual_norms)
        scores = self._core.score(_rows("queries", queries, self.dim), codes)
        return torch.from_numpy(scores).to(queries.device)

    def _codes(
        self, indices: Tensor, norms: Tensor, qjl_signs: Tensor, residual_norms: Tensor
    ) -> _core.ProdCodes:
        _check_last("indices", indices, self.dim)
        _check_last("qjl_signs", qjl_signs, self.dim)
        return {
            "codes": np.concatenate(
                [
                    _packed(indices, self.dim, self.bits - 1),
                    _packed(qjl_signs > 0, self.dim, 1),
                ],
                axis=1,
            ),
            "scales": _scales(norms, self.dim, indices),
            "residual_norms": _flat(residual_norms),
        }


@dataclass(frozen=True, eq=False)
class CompressedValues:
    """What `TurboQuantCompressorMSE` makes of values ``[B, H, S, D]``."""

    indices: Tensor
    norms: Tensor
    original_dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class CompressedKeys:
    """What `TurboQuantCompressorV2` makes of keys ``[B, H, S, D]``."""

    indices: Tensor
    norms: Tensor
    qjl_signs: Tensor
    residual_norms: Tensor
    original_dtype: torch.dtype


class TurboQuantCompressorMSE:
    """Compressor of values ``[B, H, S, D]``: least reconstruction error.

    Examples
    --------
    >>> import torch
    >>> from turboquant_cpp import TurboQuantCompressorMSE
    >>> compressor = TurboQuantCompressorMSE(64, bits=3)
    >>> values = torch.randn(1, 2, 16, 64, dtype=torch.float16)
    >>> compressor.decompress(compressor.compress(values)).dtype
    torch.float16
    """

    def __init__(self, head_dim: int, bits: int = 3, *, seed: int = 42) -> None:
        self.head_dim = head_dim
        self.bits = bits
        self.quantizer = TurboQuantMSE(head_dim, bits, seed=seed)

    def compress(self, values: Tensor) -> CompressedValues:
        """Quantise values of any floating-point dtype."""
        return CompressedValues(*self.quantizer.quantize(values), original_dtype=values.dtype)

    def decompress(self, compressed: CompressedValues) -> Tensor:
        """Reconstruct the values in their original dtype."""
        values = self.quantizer.dequantize(compressed.indices, compressed.norms)
        return values.to(compressed.original_dtype)


class TurboQuantCompressorV2:
    """Compressor of keys ``[B, H, S, D]``: attention scores straight from the codes, unbiased.

    Examples
    --------
    >>> import torch
    >>> from turboquant_cpp import TurboQuantCompressorV2
    >>> compressor = TurboQuantCompressorV2(64, bits=4)
    >>> compressed = compressor.compress(torch.randn(1, 2, 16, 64))
    >>> compressor.asymmetric_attention_scores(torch.randn(1, 2, 3, 64), compressed).shape
    torch.Size([1, 2, 3, 16])
    """

    def __init__(self, head_dim: int, bits: int = 3, *, seed: int = 42) -> None:
        self.head_dim = head_dim
        self.bits = bits
        self.quantizer = TurboQuantProd(head_dim, bits, seed=seed)

    def compress(self, keys: Tensor) -> CompressedKeys:
        """Quantise keys of any floating-point dtype."""
        return CompressedKeys(*self.quantizer.quantize(keys), original_dtype=keys.dtype)

    def decompress(self, compressed: CompressedKeys) -> Tensor:
        """Reconstruct the keys from their codes without the signs, in their original dtype.

        The signs make products unbiased but a single vector worse: scores come from
        `asymmetric_attention_scores`.
        """
        keys = self.quantizer.dequantize(
            compressed.indices,
            compressed.norms,
            compressed.qjl_signs,
            torch.zeros_like(compressed.residual_norms),
        )
        return keys.to(compressed.original_dtype)

    def asymmetric_attention_scores(self, query: Tensor, compressed: CompressedKeys) -> Tensor:
        """Unscaled products of queries ``[B, H, q, D]`` with the keys: float32 ``[B, H, q, S]``."""
        leading = compressed.indices.shape[:-2]
        if query.shape[:-2] != leading:
            raise ValueError(
                f"query: expected leading dimensions {tuple(leading)}, "
                f"got {tuple(query.shape[:-2])}"
            )
        parts = (
            query,
            compressed.indices,
            compressed.norms,
            compressed.qjl_signs,
            compressed.residual_norms,
        )
        heads = zip(*(part.flatten(end_dim=-3) for part in parts), strict=True)
        scores = torch.stack([self.quantizer.scores(*operands) for operands in heads])
        return scores.reshape(*leading, *scores.shape[1:])


def _check_last(name: str, tensor: Tensor, dim: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch tensor, got {type(tensor).__name__}")
    if tensor.dim() < 1 or tensor.shape[-1] != dim:
        raise ValueError(
            f"{name}: expected {dim} as the last dimension, got shape {tuple(tensor.shape)}"
        )


def _rows(name: str, tensor: Tensor, dim: int) -> NDArray[np.float32]:
    """Vectors as float32 rows ``[n, dim]``."""
    _check_last(name, tensor, dim)
    if tensor.dtype not in _FLOAT_DTYPES:
        raise ValueError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
    return _numpy(tensor.detach().float().reshape(-1, dim))


def _unrows(rows: NDArray[Any], like: Tensor) -> Tensor:
    """Rows with the leading dimensions and the device of `like`."""
    tensor = torch.from_numpy(rows).to(like.device)
    return tensor.reshape(*like.shape[:-1], rows.shape[-1])


def _norms(scales: NDArray[np.float32], dim: int, like: Tensor) -> Tensor:
    """Norms of vectors whose rotated coordinates are `scales` times unit-variance levels."""
    return _unrows(scales[:, None], like) * math.sqrt(dim)


def _scales(norms: Tensor, dim: int, indices: Tensor) -> NDArray[np.float32]:
    if norms.shape != (*indices.shape[:-1], 1):
        raise ValueError(
            f"norms: expected shape {(*indices.shape[:-1], 1)}, got {tuple(norms.shape)}"
        )
    return _flat(norms / math.sqrt(dim))


def _flat(tensor: Tensor) -> NDArray[np.float32]:
    return _numpy(tensor.float().reshape(-1))


def _packed(indices: Tensor, dim: int, bits: int) -> NDArray[np.uint8]:
    return _core.pack_rows(_numpy(indices.to(torch.uint8).reshape(-1, dim)), bits)


def _numpy(tensor: Tensor) -> NDArray[Any]:
    return tensor.cpu().contiguous().numpy()
