"""Widths by layer, decided from what the prompt's own attention loses through codes.

A cache with ``policy="auto"`` keeps its tokens exact until a step begins with `DECISION_TOKENS` of
them. Then every layer encodes its keys and values for trial, and the attention of the latest
queries tells what the codes' errors do to the layer's output:

    keys     sum over t of p_t^2 (scale q.(k'_t - k_t))^2 |v_t - o|^2
    values   sum over t of p_t^2 |v'_t - v_t|^2

(first order in the errors, which are independent between tokens), as shares of ``|o|^2``. Both
count what nothing else shows: where heads look (at a sink, at recent tokens: codes do no harm) and
how their softmax amplifies. docs/experiments/automatic-policy.md compares them with measured
divergences. `allocation.allocate` then spends the bytes, and every layer is encoded once.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from turboquant_cpp._core import BLOCK_TOKENS, LayerSpec
from turboquant_cpp.allocation import LayerDecision, LayerDemand, Widths, allocate, page_bytes
from turboquant_cpp.hf.dense import AttentionCall, causal_mask
from turboquant_cpp.layer_store import LayerStore
from turboquant_cpp.spec import CacheConfig

if TYPE_CHECKING:
    from turboquant_cpp.hf.cache import CompressedDynamicCache
    from turboquant_cpp.hf.layer import CompressedLayer

__all__ = ["DECISION_TOKENS", "LatestQueries", "decide", "exact_spec"]

#: Enough to tell layers apart. With 256 tokens, of which 128 are codes, a third of the gain is
#: left, with the 132 at which a first block could be encoded a fifth.
DECISION_TOKENS: Final = 512
_QUERY_TOKENS: Final = 64
#: Scores of queries and keys that a head looks at at once.
_MAX_SCORES: Final = 1 << 24


@dataclass(frozen=True)
class LatestQueries:
    """The queries of a layer's latest positions and how they attend.

    Attributes
    ----------
    query : Tensor
        ``[B, Hq, n, D]``.
    call : AttentionCall
        The latest call.
    end : int
        Position after the last one.
    """

    query: Tensor
    call: AttentionCall
    end: int

    @classmethod
    def after(
        cls, earlier: LatestQueries | None, query: Tensor, call: AttentionCall, end: int
    ) -> LatestQueries:
        """The latest queries after a call whose last position is ``end - 1``."""
        latest = query[:, :, -_QUERY_TOKENS:].detach()
        is_continued = earlier is not None and earlier.end == end - query.shape[2]
        if earlier is not None and is_continued and earlier.query.shape[0] == query.shape[0]:
            latest = torch.cat([earlier.query, latest], dim=2)[:, :, -_QUERY_TOKENS:]
        return cls(latest.clone(), call, end)

    def select(self, rows: list[int]) -> LatestQueries:
        """Those of some rows."""
        return dataclasses.replace(self, query=self.query[rows])


def exact_spec(
    config: CacheConfig, layer: int, head_dim: int, num_kv_heads: int, tokens: int
) -> LayerSpec:
    """The spec of a store that keeps `tokens` tokens exact: its window holds them all."""
    window = -(-max(tokens, DECISION_TOKENS) // BLOCK_TOKENS) * BLOCK_TOKENS
    wide = dataclasses.replace(config, window_tokens=window)
    return wide.layer_spec(layer, head_dim, num_kv_heads)


def decide(cache: CompressedDynamicCache, *, at_once: bool = False) -> None:
    """Decide the widths of all layers if it is time to, and encode what they hold.

    Parameters
    ----------
    cache : CompressedDynamicCache
        One that has not decided yet.
    at_once : bool
        Decide although there are too few tokens: the widths are those that were asked for.

    Raises
    ------
    ValueError
        When the budget does not hold the narrowest widths; the cache is as it was.
    """
    layers = [layer for layer in cache.compressed_layers() if layer.is_initialized]
    is_ready = bool(layers) and all(layer.get_host_length() >= DECISION_TOKENS for layer in layers)
    if not (is_ready or at_once):
        return
    for layer in layers:
        layer.commit()
    config = cache.context.config
    asked = (config.k_bits, config.v_bits)
    trials = [_trial(layer) for layer in layers]
    problem = _problem(layers, trials, is_ready=is_ready)
    demands = [trial.demand for trial in trials]
    widths = {layer.layer_idx: asked for layer in cache.compressed_layers()}
    if not problem:
        budget = (
            sum(page_bytes(config, demand, asked) for demand in demands)
            if config.bytes_per_token is None
            else config.bytes_per_token * BLOCK_TOKENS
        )
        widths |= allocate(config, demands, budget)
    _adopt(cache, layers, widths)
    cache.policy_decisions = tuple(
        _decision(trial, trials, widths[trial.demand.layer], problem) for trial in trials
    )


@dataclass(frozen=True)
class _Trial:
    """What encoding a layer for trial has shown."""

    demand: LayerDemand
    strongest_smoothing: float


def _problem(layers: list[CompressedLayer], trials: list[_Trial], *, is_ready: bool) -> str:
    """Why the layers cannot be told apart; "" when they can."""
    if not is_ready:
        return f"fewer than {DECISION_TOKENS} tokens"
    if not all(_has_queries(layer) for layer in layers):
        return 'no queries seen: only the attention "turboquant" shows them'
    errors = [(trial.demand.key_error, trial.demand.value_error) for trial in trials]
    if not all(math.isfinite(error) for pair in errors for error in pair):
        return "keys, values or queries are not finite"
    if not any(error > 0 for pair in errors for error in pair):
        return "codes do no harm"
    return ""


def _adopt(
    cache: CompressedDynamicCache, layers: list[CompressedLayer], widths: dict[int, Widths]
) -> None:
    """Give cache and layers the widths; nothing changes unless every layer can be encoded."""
    context = dataclasses.replace(
        cache.context, config=dataclasses.replace(cache.context.config, layer_bits=widths)
    )
    stores = []
    for layer in layers:
        spec = layer.store.spec
        new = context.config.layer_spec(layer.layer_idx, spec.head_dim, spec.num_kv_heads)
        stores.append(layer.restored(new))
    cache.context = context
    for layer in cache.compressed_layers():
        layer.context = context
        layer.latest_queries = None
    for layer, store in zip(layers, stores, strict=True):
        layer.replace_store(store)


def _decision(trial: _Trial, trials: list[_Trial], widths: Widths, problem: str) -> LayerDecision:
    demand = trial.demand
    reason = problem
    if not problem:
        parts = []
        for name in ("key_error", "value_error"):
            mean = sum(getattr(other.demand, name) for other in trials) / len(trials)
            share = getattr(demand, name) / mean if mean > 0 else 0.0
            parts.append(f"{name.partition('_')[0]}s {share:.2g}")
        reason = f"{', '.join(parts)} times the mean layer's error"
    return LayerDecision(
        layer=demand.layer,
        key_error=None if problem else demand.key_error,
        value_error=None if problem else demand.value_error,
        strongest_smoothing=trial.strongest_smoothing,
        k_bits=widths[0],
        v_bits=widths[1],
        reason=reason,
    )


@torch.no_grad()
def _trial(layer: CompressedLayer) -> _Trial:
    """Encode a layer with the widths asked for and see what its latest queries lose."""
    spec = layer.store.spec
    config = layer.context.config
    trial = layer.restored(config.layer_spec(layer.layer_idx, spec.head_dim, spec.num_kv_heads))
    smoothing = trial.smoothing
    strongest = 1.0 if smoothing is None else float(smoothing.max())
    key_error, value_error = _output_errors(layer, trial)
    demand = LayerDemand(layer.layer_idx, spec.head_dim, spec.num_kv_heads, key_error, value_error)
    return _Trial(demand, strongest)


def _has_queries(layer: CompressedLayer) -> bool:
    """Whether the layer knows the queries of its newest positions."""
    latest = layer.latest_queries
    return latest is not None and latest.end == layer.committed_tokens


def _output_errors(layer: CompressedLayer, trial: LayerStore) -> tuple[float, float]:
    """Expected squared errors of the output, of keys' and of values' codes, over its energy."""
    latest = layer.latest_queries
    if latest is None or not _has_queries(layer):
        return math.nan, math.nan
    keys, values = layer.dequantized()
    coded_keys, coded_values = trial.dequantize(layer.committed_tokens)
    most = max(1, _MAX_SCORES // keys.shape[2])
    group = latest.query.shape[1] // keys.shape[1]
    query = latest.query[:, :, -min(_QUERY_TOKENS, max(1, most // group)) :]
    mask = causal_mask(query, keys.shape[2], latest.call.sliding_window)
    sums = torch.zeros(3, dtype=torch.float64)
    for row, start in enumerate(layer.left_padding):
        seen = mask.clone()
        seen[:, :start] = False
        for head in range(keys.shape[1]):
            queries = query[row, head * group : (head + 1) * group].float()
            errors = _head_errors(
                queries,
                (keys[row, head].float(), values[row, head].float()),
                (coded_keys[row, head].float(), coded_values[row, head].float()),
                seen,
                latest.call,
            )
            sums += errors.double().cpu()
    keys_sum, values_sum, energy = sums.tolist()
    return (keys_sum / energy, values_sum / energy) if energy > 0 else (0.0, 0.0)


def _head_errors(
    query: Tensor,
    exact: tuple[Tensor, Tensor],
    coded: tuple[Tensor, Tensor],
    seen: Tensor,
    call: AttentionCall,
) -> Tensor:
    """Errors by keys and by values and the output's energy, of ``query [G, n, D]`` of one head.

    `exact` and `coded` are its keys and values ``[T, D]``, `seen` says who sees whom ``[n, T]``.
    """
    (keys, values), (coded_keys, coded_values) = exact, coded
    scores = query @ keys.T * call.scaling
    errors = query @ (coded_keys - keys).T * call.scaling
    if call.softcap > 0:
        capped = torch.tanh(scores / call.softcap)
        scores, errors = call.softcap * capped, errors * (1 - capped.square())
    # A query before its row's first token sees nothing: its row of NaN counts nothing.
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    weights = weights.masked_fill(~seen.any(-1)[:, None], 0)
    out = weights @ values
    norms = values.square().sum(-1)
    distances = norms - 2 * out @ values.T + out.square().sum(-1, keepdim=True)
    squares = weights.square()
    return torch.stack(
        [
            (squares * errors.square() * distances).sum(),
            (squares * (coded_values - values).square().sum(-1)).sum(),
            out.square().sum(),
        ]
    )
