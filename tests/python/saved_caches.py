"""Caches to write to files, filled without a model."""

from __future__ import annotations

import tiny_models
import torch
from transformers import DynamicCache
from turboquant_cpp import CompressedDynamicCache


def states(tokens: int, batch: int = 1, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, 2, tokens, 16, generator=generator)


def filled(tokens: int = 300, batch: int = 2, layers: int = 2, **options) -> CompressedDynamicCache:
    cache = CompressedDynamicCache(DynamicCache(), head_dim=16, **{"bits": 4, **options})
    for layer in range(layers):
        cache.update(*states(tokens, batch, layer), layer)
    return cache


def fixed_config():
    config = tiny_models.gemma2().config
    config.layer_types = sorted(tiny_models.MIXED_LAYERS)
    return config


def fixed_and_filled(tokens: int = 300) -> CompressedDynamicCache:
    """Of fixed capacity: two layers as in `filled`, with sliding ones behind them."""
    cache = CompressedDynamicCache(config=fixed_config(), bits=4, max_cache_len=tokens + 100)
    for layer in range(4):
        cache.update(*states(tokens, 2, layer), layer)
    return cache
