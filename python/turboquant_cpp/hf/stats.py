"""What a cache holds, in bytes and in the terms of the original package."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from turboquant_cpp._core import (
    BLOCK_TOKENS,
    BlockLayout,
    Codebook,
    VectorCodebook,
    rotation_matrix,
)
from turboquant_cpp.hf.model_checks import config_head_dim
from turboquant_cpp.hf.takeover import attention_half

if TYPE_CHECKING:
    from turboquant_cpp.hf.cache import CompressedDynamicCache
    from turboquant_cpp.hf.layer import CompressedLayer

__all__ = ["baseline_bytes", "centroids", "compression_stats", "head_dim", "memory", "rotation"]

_PARTS: Final = ("pages", "exact", "smoothing", "tables")
_MIB: Final = 2.0**20
_ESTIMATE_TOKENS: Final = 32768


def memory(cache: CompressedDynamicCache) -> dict[str, int]:
    """See `CompressedDynamicCache.memory`."""
    parts: Counter[str] = Counter(dict.fromkeys((*_PARTS, "uncompressed"), 0))
    for layer in cache.layers:
        half = attention_half(layer)
        if half is not None:
            parts.update(half.nbytes())
        parts["uncompressed"] += sum(
            tensor.untyped_storage().nbytes() for tensor in _own_tensors(layer)
        )
    return {**parts, "total": sum(parts.values())}


def baseline_bytes(cache: CompressedDynamicCache) -> int:
    """See `CompressedDynamicCache.baseline_vram_bytes`."""
    total = memory(cache)["uncompressed"]
    for layer in cache.compressed_layers():
        if layer.is_initialized:
            total += layer.batch_size * int(layer.get_seq_length()) * _dense_token_bytes(layer)
    return total


def compression_stats(cache: CompressedDynamicCache) -> dict[str, Any]:
    """Shape and size of a cache under the original package's names.

    ``vram_estimate`` is what one sequence of 32,768 tokens would take, from the layout:
    ``{tokens, compressed_mib, baseline_mib}``; ``settings`` every option of the cache's
    `CacheConfig` with its value.
    """
    layers = [layer for layer in cache.compressed_layers() if layer.is_initialized]
    compressed, baseline = cache.vram_bytes(), cache.baseline_vram_bytes()
    shape = {"seq_len": 0, "batch_size": 0, "num_heads": 0, "head_dim": cache.context.head_dim or 0}
    if layers:
        spec = layers[0].store.spec
        shape = {
            "seq_len": int(layers[0].get_seq_length()),
            "batch_size": layers[0].batch_size,
            "num_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
        }
    return {
        "num_layers": len(layers),
        **shape,
        "bits": cache.bits,
        "k_bits": cache.k_bits,
        "v_bits": cache.v_bits,
        "codebook": cache.context.config.codebook,
        "nibble_packed": cache.k_bits == 4 and cache.v_bits == 4,
        "compressed_mib": compressed / _MIB,
        "baseline_mib": baseline / _MIB,
        "compression_ratio": baseline / compressed if compressed else 0.0,
        "savings_mib": (baseline - compressed) / _MIB,
        "vram_estimate": _estimate(layers),
        "settings": asdict(cache.context.config),
    }


def head_dim(cache: CompressedDynamicCache) -> int:
    """See `CompressedDynamicCache.head_dim`."""
    for layer in cache.compressed_layers():
        if layer.is_initialized:
            return layer.store.spec.head_dim
    known = cache.context.head_dim or config_head_dim(cache.context.model_config)
    if known is None:
        raise RuntimeError("head_dim is not known before the first token")
    return known


def rotation(cache: CompressedDynamicCache) -> Tensor:
    """See `CompressedDynamicCache.rotation`."""
    spec = cache.context.config.layer_spec(0, head_dim(cache), 1)
    return torch.from_numpy(rotation_matrix(spec, 0, "k"))


def centroids(cache: CompressedDynamicCache) -> Tensor:
    """See `CompressedDynamicCache.centroids`."""
    dim = head_dim(cache)
    vector = cache.context.config.codebook == "vector"
    codebook = VectorCodebook(cache.k_bits) if vector else Codebook(dim, cache.k_bits)
    levels = torch.from_numpy(codebook.levels)
    return levels / math.sqrt(dim)


def _own_tensors(layer: Any) -> list[Tensor]:
    """Tensors that a stock layer, or the stock half of a hybrid one, keeps as attributes."""
    found = []
    for value in vars(layer).values():
        parts = value.values() if isinstance(value, dict) else [value]
        found += [part for part in parts if isinstance(part, Tensor)]
    return list({part.untyped_storage().data_ptr(): part for part in found}.values())


def _dense_token_bytes(layer: CompressedLayer) -> int:
    spec = layer.store.spec
    return 2 * spec.num_kv_heads * spec.head_dim * layer.store.dtype.itemsize


def _estimate(layers: list[CompressedLayer]) -> dict[str, float]:
    tokens = _ESTIMATE_TOKENS
    compressed = baseline = 0
    for layer in layers:
        spec = layer.store.spec
        exact = spec.exact_capacity
        blocks = -(-max(tokens - exact, 0) // BLOCK_TOKENS)
        compressed += blocks * BlockLayout(spec).page_bytes(spec.num_kv_heads)
        compressed += exact * _dense_token_bytes(layer)
        baseline += tokens * _dense_token_bytes(layer)
    return {
        "tokens": tokens,
        "compressed_mib": compressed / _MIB,
        "baseline_mib": baseline / _MIB,
    }
