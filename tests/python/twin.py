"""A second, independent implementation of the cache's recipe, kept as dense tensors.

`TwinCache` fake-quantises keys and values and stores the result unpacked, row by row and block by
block, in float64. It shares with the package the codebook levels and the rotations (taken as
explicit matrices), nothing else: no packing, no pages, no fused attention. `generate()` over it
must give the tokens that the packed cache gives.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)
from turboquant_cpp import CacheConfig, LayerSpec
from turboquant_cpp._core import Codebook, VectorCodebook, rotation_matrix

BLOCK = 64


@dataclass
class TwinRecipe:
    """One layer: nearest decoded rows at unit variance, rotations as [H, D, D] matrices."""

    key_code: Callable[[Tensor], Tensor]
    value_code: Callable[[Tensor], Tensor]
    key_rotation: Tensor
    value_rotation: Tensor
    key_rule: str = "unbiased"
    value_rule: str = "norm_preserving"
    center: bool = True
    smooth: bool = True
    sinks: int = 4
    window: int = 64
    half_scales: bool = False


def make_recipe(spec: LayerSpec) -> TwinRecipe:
    """The recipe of a real layer."""

    def rotations(kind: str) -> Tensor:
        matrices = [rotation_matrix(spec, head, kind) for head in range(spec.num_kv_heads)]
        return torch.stack([torch.as_tensor(matrix).double() for matrix in matrices])

    def code(bits: int) -> Callable[[Tensor], Tensor]:
        if spec.codebook == "vector":
            levels = torch.as_tensor(VectorCodebook(bits).levels).double()
            return functools.partial(nearest_pairs, bits=bits, levels=levels)
        levels = torch.as_tensor(Codebook(spec.head_dim, bits).levels).double()
        return functools.partial(nearest_levels, levels=levels)

    return TwinRecipe(
        key_code=code(spec.k_bits),
        value_code=code(spec.v_bits),
        key_rotation=rotations("k"),
        value_rotation=rotations("v"),
        key_rule=spec.k_rule,
        value_rule=spec.v_rule,
        center=spec.center_keys,
        smooth=spec.smooth_keys,
        sinks=spec.sink_tokens,
        window=spec.window_tokens,
        half_scales=spec.scale_type == "float16",
    )


def nearest_levels(rows: Tensor, levels: Tensor) -> Tensor:
    """Nearest level of every coordinate."""
    return levels[torch.bucketize(rows.contiguous(), (levels[1:] + levels[:-1]) / 2)]


def nearest_pairs(rows: Tensor, bits: int, levels: Tensor) -> Tensor:
    """Nearest row that a vector codebook's bytes can hold, rows [..., D], levels [256, 2]."""
    pairs = rows.unflatten(-1, (-1, 2))
    errors = (pairs[..., None, :] - levels).square().sum(-1)  # [..., D / 2, 256]
    if bits == 4:
        best = errors.argmin(-1)
    elif bits == 3:
        best = _nearest_planes(errors)
    else:
        words = [_nearest_word(word) for word in errors.split(8, dim=-2)]
        best = torch.cat(words, -1)
    return levels[best].flatten(-2)


def _nearest_planes(errors: Tensor) -> Tensor:
    """Quarters of pairs: the last one's bits j and 4 + j are bits 3 and 7 of quarter j."""
    *whole, last = errors.unflatten(-2, (4, -1)).unbind(-3)  # [..., D / 8, 256]
    index = torch.arange(256)
    total = last.masked_fill((index & 0x88) != 0, torch.inf)
    bound = []
    for j, quarter in enumerate(whole):
        spare = (index >> j & 0x11) << 3  # of a quarter's byte, for every index of the last pair
        fits = (index & 0x88) == spare[:, None]  # [256 of the last pair, 256 of the quarter]
        least = quarter[..., None, :].masked_fill(~fits, torch.inf).min(-1)
        total = total + least.values
        bound.append(least.indices)
    best = total.argmin(-1, keepdim=True)
    return torch.cat([byte.gather(-1, best)[..., 0] for byte in bound] + [best[..., 0]], -1)


def _nearest_word(errors: Tensor) -> Tensor:
    """The way through a word's nibbles [..., pairs, 256]: index k is nibble k + 16 nibble k + 1."""
    steps = errors.unflatten(-1, (16, 16)).unbind(-3)  # [..., next nibble, nibble]
    best, ways = torch.zeros_like(steps[0][..., 0]), []
    for step in steps:
        least = (best[..., None, :] + step).min(-1)
        best = least.values
        ways.append(least.indices)
    following = torch.zeros_like(ways[0][..., :1])
    indices = []
    for way in reversed(ways):
        nibble = way.gather(-1, following)
        indices.append((nibble + 16 * following)[..., 0])
        following = nibble
    return torch.stack(indices[::-1], -1)


def fake_quantise(
    rows: Tensor, code: Callable[[Tensor], Tensor], rule: str, half_scales: bool
) -> Tensor:
    """The code of rows [..., D] at unit variance, times the rule's scale."""
    dim = rows.shape[-1]
    norm = rows.norm(dim=-1, keepdim=True)
    unit = torch.where(norm > 0, rows * dim**0.5 / norm, torch.zeros_like(rows))
    codes = code(unit)
    energy = codes.square().sum(-1, keepdim=True)
    overlap = (rows * codes).sum(-1, keepdim=True)
    scale = {
        "norm": norm / dim**0.5,
        "norm_preserving": norm / energy.sqrt(),
        "least_squares": overlap / energy,
        "unbiased": norm.square() / overlap,
    }[rule]
    scale = torch.where(norm > 0, scale, torch.zeros_like(scale))
    scale = (scale.half() if half_scales else scale.float()).to(rows.dtype)
    return scale * codes


def fit_smoothing(keys: Tensor) -> Tensor:
    """Smoothing of the centred channels of one block, keys [H, n, D]: see smoothing_rule.hpp."""
    rms = (keys - keys.mean(1, keepdim=True)).square().mean(1).sqrt()
    ratio = rms / rms.sort(-1).values[:, rms.shape[-1] // 2 :][:, :1]
    smoothing = (ratio * (1 + ratio / 4)).sqrt().clamp(2.0**-4, 2.0**8)
    return smoothing.nan_to_num(nan=1.0)


@dataclass
class TwinRow:
    """One sequence: what was appended and what a reader sees, both [H, length, D]."""

    recipe: TwinRecipe
    keys: Tensor
    values: Tensor
    read_keys: Tensor
    read_values: Tensor
    blocks: list[int] = field(default_factory=list)
    smoothing: Tensor | None = None

    @property
    def length(self) -> int:
        return self.keys.shape[1]

    @property
    def exact_begin(self) -> int:
        return min(self.length, self.recipe.sinks) + sum(self.blocks)

    def append(self, keys: Tensor, values: Tensor) -> None:
        keys, values = keys.double(), values.double()
        self.keys = torch.cat([self.keys, keys], 1)
        self.values = torch.cat([self.values, values], 1)
        self.read_keys = torch.cat([self.read_keys, keys], 1)
        self.read_values = torch.cat([self.read_values, values], 1)
        if self.recipe.window == 0:
            if self.length > self.exact_begin:
                self._encode(self.length - self.exact_begin)
        else:
            while self.length - self.exact_begin >= self.recipe.window + BLOCK:
                self._encode(BLOCK)

    def crop(self, length: int) -> None:
        excess = self.exact_begin - max(length, min(length, self.recipe.sinks))
        while excess > 0 and self.blocks:
            taken = min(excess, self.blocks[-1])
            self.blocks[-1] -= taken
            excess -= taken
            if self.blocks[-1] == 0:
                self.blocks.pop()
        for name in ("keys", "values", "read_keys", "read_values"):
            setattr(self, name, getattr(self, name)[:, :length])

    def _encode(self, tokens: int) -> None:
        recipe, begin = self.recipe, self.exact_begin
        span = slice(begin, begin + tokens)
        if not self.blocks:
            self.smoothing = fit_smoothing(self.keys[:, span]) if recipe.smooth else None
        spread = 1.0 if self.smoothing is None else self.smoothing[:, None]
        rotated = (self.keys[:, span] / spread) @ recipe.key_rotation.mT
        mean = rotated.mean(1, keepdim=True).half().double() if recipe.center else 0.0
        coded = fake_quantise(rotated - mean, recipe.key_code, recipe.key_rule, recipe.half_scales)
        self.read_keys[:, span] = spread * ((mean + coded) @ recipe.key_rotation)
        rotated = self.values[:, span] @ recipe.value_rotation.mT
        coded = fake_quantise(rotated, recipe.value_code, recipe.value_rule, recipe.half_scales)
        self.read_values[:, span] = coded @ recipe.value_rotation
        self.blocks.append(tokens)


class TwinLayer(DynamicLayer):
    """Rows of dense fake-quantised keys and values behind transformers' layer interface."""

    def __init__(
        self,
        make_spec: Callable[[int, int], LayerSpec],
        left_padding: Sequence[int] | None = None,
        quantized_prefill: bool = False,
    ) -> None:
        super().__init__()
        self.make_spec = make_spec
        self.left_padding = left_padding
        self.quantized_prefill = quantized_prefill
        self.forget()

    def forget(self) -> None:
        self.rows: list[TwinRow] = []
        self.starts: list[int] = []
        self.seen = 0
        self.is_initialized = False

    @property
    def keys(self) -> Tensor | None:
        return self.dense(self.dtype)[0] if self.is_initialized else None

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        assert states is None

    @property
    def values(self) -> Tensor | None:
        return self.dense(self.dtype)[1] if self.is_initialized else None

    @values.setter
    def values(self, states: Tensor | None) -> None:
        assert states is None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        batch, heads, _, dim = key_states.shape
        recipe = make_recipe(self.make_spec(dim, heads))
        empty = key_states.new_zeros(heads, 0, dim, dtype=torch.float64)
        self.rows = [TwinRow(recipe, empty, empty, empty, empty) for _ in range(batch)]
        starts = list(self.left_padding or [0] * batch)
        self.starts = [start for start in starts for _ in range(batch // len(starts))]

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        past = self.dense(key_states.dtype)
        for index, row in enumerate(self.rows):
            skip = min(max(self.starts[index] - self.seen, 0), tokens)
            row.append(key_states[index, :, skip:], value_states[index, :, skip:])
        self.seen += tokens
        if self.quantized_prefill:
            return self.dense(key_states.dtype)
        return torch.cat([past[0], key_states], 2), torch.cat([past[1], value_states], 2)

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Every row's readable tokens, right-aligned in [B, H, seen, D]."""

        def padded(rows: list[Tensor]) -> Tensor:
            return torch.stack(
                [torch.nn.functional.pad(row, (0, 0, self.seen - row.shape[1], 0)) for row in rows]
            ).to(dtype)

        return padded([row.read_keys for row in self.rows]), padded(
            [row.read_values for row in self.rows]
        )

    def get_seq_length(self) -> int:
        return self.seen

    def reset(self) -> None:
        self.forget()

    def crop(self, tokens_to_remove: int) -> None:
        keep = tokens_to_remove if tokens_to_remove > 0 else self.seen + tokens_to_remove
        self.seen = min(keep, self.seen)
        for row, start in zip(self.rows, self.starts, strict=True):
            row.crop(min(row.length, max(self.seen - start, 0)))

    def _select(self, indices: list[int]) -> None:
        self.rows = [copy.deepcopy(self.rows[index]) for index in indices]
        self.starts = [self.starts[index] for index in indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([index for index in range(len(self.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices.tolist())


class TwinHybridLayer(LinearAttentionLayer, TwinLayer):
    """A stock linear-attention state beside a `TwinLayer`."""

    is_compileable = False

    def __init__(self, number_of_states: int, *args, **options) -> None:
        TwinLayer.__init__(self, *args, **options)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args, **kwargs) -> None:
        half = TwinLayer if args else LinearAttentionLayer
        half.lazy_initialization(self, *args, **kwargs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        TwinLayer.reorder_cache(self, beam_idx)


class TwinCache(DynamicCache):
    """`DynamicCache` whose full-attention layers are `TwinLayer`s."""

    def __init__(self, config, cache_config: CacheConfig, **options) -> None:
        super().__init__(config=config)
        for index, layer in enumerate(self.layers):
            make_spec = functools.partial(cache_config.layer_spec, index)
            if type(layer) is DynamicLayer:
                self.layers[index] = TwinLayer(make_spec, **options)
            elif type(layer) is LinearAttentionAndFullAttentionLayer:
                self.layers[index] = TwinHybridLayer(layer.number_of_states, make_spec, **options)
