"""How many bits each layer gets, when a budget of bytes is to do as little harm as possible."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from turboquant_cpp._core import BlockLayout, Codebook, VectorCodebook
from turboquant_cpp.spec import MAX_BITS, MIN_BITS, CacheConfig

__all__ = ["LayerDecision", "LayerDemand", "allocate", "page_bytes", "widths_of"]

Widths = tuple[int, int]

_KEY_BITS: Final = (2, 3, 4, 5, 6, 8)
_VALUE_BITS: Final = (2, 3, 4)  # wider ones are for caches that asked for them: no GPU reads them
_VECTOR_BITS: Final = tuple(
    bits for bits in range(MIN_BITS, MAX_BITS + 1) if VectorCodebook.exists(bits)
)
#: A layer that hardly reads its codes at the prompt's end may read them later: its error counts as
#: this share of the mean layer's at least.
_LEAST_SHARE: Final = 1 / 16


@dataclass(frozen=True)
class LayerDemand:
    """What a layer loses through its codes at the widths that the cache was made with.

    Attributes
    ----------
    layer : int
        Index in the model.
    head_dim, num_kv_heads : int
        Shape of its keys.
    key_error, value_error : float
        Expected squared error of the attention's output through the codes of keys and of values,
        as shares of the output's squared norm.
    """

    layer: int
    head_dim: int
    num_kv_heads: int
    key_error: float
    value_error: float


@dataclass(frozen=True)
class LayerDecision:
    """What was decided for one layer, and why.

    Attributes
    ----------
    layer : int
        Index in the model.
    key_error, value_error : float or None
        See `LayerDemand`; None where nothing was measured.
    strongest_smoothing : float or None
        Largest factor that a key channel of the layer is divided by.
    k_bits, v_bits : int
        The widths.
    reason : str
        In words.
    """

    layer: int
    key_error: float | None
    value_error: float | None
    strongest_smoothing: float | None
    k_bits: int
    v_bits: int
    reason: str


def widths_of(config: CacheConfig) -> list[Widths]:
    """Pairs of key and value bits that a layer may get, cheapest first.

    Those that attention reads from codes on every device; with a vector codebook, those it has.
    """
    if config.codebook == "vector":
        return [(k, v) for k in _VECTOR_BITS for v in _VECTOR_BITS]
    values = (*_VALUE_BITS, *range(5, config.v_bits + 1))
    return [(k, v) for k in _KEY_BITS for v in values if k <= 4 or v > 2]


def page_bytes(config: CacheConfig, demand: LayerDemand, widths: Widths) -> int:
    """Bytes of a page (64 tokens) of a layer with these widths."""
    own = dataclasses.replace(config, layer_bits={demand.layer: widths})
    spec = own.layer_spec(demand.layer, demand.head_dim, demand.num_kv_heads)
    return BlockLayout(spec).page_bytes(demand.num_kv_heads)


def allocate(
    config: CacheConfig, demands: Sequence[LayerDemand], budget_bytes: int
) -> dict[int, Widths]:
    """Widths of every layer, least in summed error among those that fit the budget.

    Errors follow the codebooks' distortions. From the cheapest widths of all layers, the step that
    takes most error away per byte comes first (so Lagrange's multiplier of the bytes falls), until
    nothing fits. Ties go to the earlier layer: the same demands give the same widths.

    Parameters
    ----------
    config : CacheConfig
        Widths and codebook that the demands were measured with.
    demands : sequence of LayerDemand
        One for each layer.
    budget_bytes : int
        Bytes of a page of every layer together.

    Returns
    -------
    dict
        ``{layer: (k_bits, v_bits)}``. The widths of `config` where no others are better.

    Raises
    ------
    ValueError
        When the cheapest widths do not fit.

    Examples
    --------
    >>> config = CacheConfig(bits=4)
    >>> demands = [LayerDemand(0, 64, 1, 4e-4, 1e-4), LayerDemand(1, 64, 1, 1e-5, 1e-5)]
    >>> budget = sum(page_bytes(config, demand, (4, 4)) for demand in demands)
    >>> allocate(config, demands, budget)
    {0: (6, 4), 1: (3, 3)}
    """
    asked = (config.k_bits, config.v_bits)
    distortions = {demand.head_dim: _distortions(config, demand.head_dim) for demand in demands}
    key_least, value_least = (
        _LEAST_SHARE * sum(errors) / max(len(demands), 1)
        for errors in (
            [demand.key_error for demand in demands],
            [demand.value_error for demand in demands],
        )
    )
    options: list[list[tuple[int, float, Widths]]] = []
    for demand in demands:
        by_bits = distortions[demand.head_dim]
        keys = max(demand.key_error, key_least) / by_bits[asked[0]]
        values = max(demand.value_error, value_least) / by_bits[asked[1]]
        options.append(
            [
                (
                    page_bytes(config, demand, (k, v)),
                    keys * by_bits[k] + values * by_bits[v],
                    (k, v),
                )
                for k, v in {**dict.fromkeys(widths_of(config)), asked: None}
            ]
        )
    chosen = [min(layer) for layer in options]
    free = budget_bytes - sum(cost for cost, _, _ in chosen)
    if free < 0:
        raise ValueError(
            f"bytes_per_token: expected at least {(budget_bytes - free) / 64:g} (the narrowest "
            f"widths of all layers), got {budget_bytes / 64:g}"
        )
    while True:
        steps = [
            ((error - other[1]) / (other[0] - cost), -index, other)
            for index, (cost, error, _) in enumerate(chosen)
            for other in options[index]
            if 0 < other[0] - cost <= free and other[1] < error
        ]
        if not steps:
            break
        _, negative, best = max(steps)
        free -= best[0] - chosen[-negative][0]
        chosen[-negative] = best
    uniform = [next(option for option in layer if option[2] == asked) for layer in options]
    if sum(cost for cost, _, _ in uniform) <= budget_bytes and sum(
        error for _, error, _ in uniform
    ) <= sum(error for _, error, _ in chosen):
        chosen = uniform
    return {demand.layer: widths for demand, (_, _, widths) in zip(demands, chosen, strict=True)}


def _distortions(config: CacheConfig, head_dim: int) -> dict[int, float]:
    """Squared error of a coordinate by width, in units of its variance."""
    if config.codebook == "vector":
        return {bits: VectorCodebook(bits).distortion for bits in _VECTOR_BITS}
    return {bits: Codebook(head_dim, bits).distortion for bits in range(1, 9)}
