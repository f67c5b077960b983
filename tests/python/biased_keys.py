"""A model whose keys have a large bias, as Qwen2.5's have, made of one whose keys have none."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["bias_keys"]

KEY_NORM = 15.0  # of SmolLM2-135M's keys, most layers
SCORE_SHARE = 4.0


@torch.no_grad()
def bias_keys(model: Any, factor: float, pairs: tuple[int, ...] = (2, 12, 30)) -> Any:
    """Add to every key a bias of `factor` key norms in each of some pairs of channels; in place.

    Pair p is what RoPE turns by ``theta**(-2 p / d)`` a token: with d = 64 and theta = 100,000 pair
    2 goes round within 13 tokens, pair 12 hardly turns within a block of 64, pair 30 not at all.

    A bias alone would add up to ``|q| factor |k| / sqrt(d)``, hundreds of nats, to scores, and
    there would be no language model left to compare with. So the pair's queries are divided by
    ``4 factor`` and its keys multiplied by as much, which changes no score; the bias then moves
    scores by less than a nat.
    """
    config = model.config
    dim, heads = config.head_dim, config.num_key_value_heads
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        attention = layer.self_attn
        keys, queries = attention.k_proj, attention.q_proj
        biased = nn.Linear(keys.in_features, keys.out_features, bias=True)
        biased.weight.copy_(keys.weight)
        biased.bias.zero_()
        bias = biased.bias.view(heads, dim)
        angles = 2 * torch.pi * torch.rand(heads, len(pairs), generator=generator)
        for index, pair in enumerate(pairs):
            channels = [pair, pair + dim // 2]
            gain = SCORE_SHARE * factor
            biased.weight.view(heads, dim, -1)[:, channels] *= gain
            queries.weight.view(-1, dim, queries.in_features)[:, channels] /= gain
            bias[:, pair] = factor * KEY_NORM * angles[:, index].cos()
            bias[:, pair + dim // 2] = factor * KEY_NORM * angles[:, index].sin()
        attention.k_proj = biased.requires_grad_(False)
    return model
