"""Writing a cache to a file and reading it back; docs/cache_format.md describes the file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
    StaticSlidingWindowLayer,
)

from turboquant_cpp._core import __version__
from turboquant_cpp.container import Container, open_container, write_container
from turboquant_cpp.fields import (
    Fields,
    FormatError,
    naming,
    objects_of,
    parse_json,
    refused,
)
from turboquant_cpp.hf import compat, steps
from turboquant_cpp.hf.context import CacheContext
from turboquant_cpp.hf.fixed_layer import FixedLayer
from turboquant_cpp.hf.hybrid import CompressedHybridLayer
from turboquant_cpp.hf.layer import CompressedLayer
from turboquant_cpp.hf.layer_state import STATES_OF, CompressedState, LayerState
from turboquant_cpp.hf.takeover import attention_half
from turboquant_cpp.spec import CacheConfig

if TYPE_CHECKING:
    from turboquant_cpp.hf.cache import CompressedDynamicCache

__all__ = ["FORMAT", "VERSION", "load", "save"]

FORMAT: Final = "turboquant-cpp cache"
VERSION: Final = "1"
_MAX_CAPACITY: Final = (1 << 31) - 1


def save(cache: CompressedDynamicCache, path: str | os.PathLike[str]) -> None:
    """See `CompressedDynamicCache.save`."""
    if not cache.enabled:
        raise ValueError("the cache is disabled: enable() it, then save it")
    tensors: dict[str, Tensor] = {}
    layers = [
        _describe(layer, f"layers.{i}", cache.context, tensors)
        for i, layer in enumerate(cache.layers)
    ]
    if not tensors:
        raise ValueError("the cache holds no tokens: there is nothing to save")
    metadata = {
        "format": FORMAT,
        "format_version": VERSION,
        "written_by": __version__,
        "config": json.dumps(_plain(cache.context.config)),
        "prefill": cache.context.prefill,
        "layers": json.dumps(layers),
    }
    if cache.context.max_cache_len is not None:
        metadata["max_cache_len"] = str(cache.context.max_cache_len)
    write_container(path, metadata, tensors)


def load(
    cache_type: type[CompressedDynamicCache],
    path: str | os.PathLike[str],
    *,
    config: Any,
    device: torch.device | str | Sequence[torch.device | str],
    **options: Any,
) -> CompressedDynamicCache:
    """See `CompressedDynamicCache.load`; `options` are those that no file holds."""
    with open_container(path) as container:
        saved_options, parts = _read(container)
        cache = _empty_cache(cache_type, config, saved_options | options)
        if config is not None:
            _check_model(cache.layers, parts)
        layers = _make_layers(parts, cache, _devices(device, max(len(parts), len(cache.layers))))
    try:
        steps.check_level(layers)
    except RuntimeError as error:
        raise FormatError(f"layers: {error}") from error
    cache.adopt_layers(layers)
    return cache


def _devices(
    device: torch.device | str | Sequence[torch.device | str], layers: int
) -> list[torch.device]:
    """The device of each layer."""
    if isinstance(device, (torch.device, str)):
        return [torch.device(device)] * layers
    if len(device) != layers:
        raise ValueError(f"device: expected one, or {layers} (one a layer), got {len(device)}")
    return [torch.device(each) for each in device]


def _make_layers(
    parts: list[_Part], cache: CompressedDynamicCache, devices: list[torch.device]
) -> list[Any]:
    """The file's layers, on their devices; of a cache that offloads, all but the first on the host.

    So a device holds one such layer at a time, as between steps: each begins with the first.
    """
    layers: list[Any] = []
    is_first = True
    for index, (part, device) in enumerate(zip(parts, devices, strict=False)):
        layer = part.make(index, cache.context, device)
        layers.append(layer)
        if cache.offloading and isinstance(layer, CacheLayerMixin):
            if layer.is_sliding and cache.only_non_sliding:
                continue
            if not is_first:
                layer.offload()
            is_first = False
    return layers


@dataclass(frozen=True)
class _Part:
    """One layer as a file describes it."""

    kind: str
    states: tuple[LayerState, ...]

    @property
    def detail(self) -> int:
        return sum(state.detail for state in self.states)

    def make(self, index: int, context: CacheContext, device: torch.device) -> Any:
        layer = _NEW[self.kind](context, index, self.detail)
        for state in self.states:
            state.fill(layer, device)
        return layer


# An empty layer of each kind, of its detail: sliding window or number of states.
_NEW: Final[Mapping[str, Callable[[CacheContext, int, int], Any]]] = {
    "compressed": lambda context, index, _: (
        CompressedLayer if context.max_cache_len is None else FixedLayer
    )(context, index),
    "compressed hybrid": CompressedHybridLayer,
    "exact": lambda context, index, _: DynamicLayer(),
    "exact hybrid": lambda context, index, states: LinearAttentionAndFullAttentionLayer(states),
    "sliding": lambda context, index, window: DynamicSlidingWindowLayer(window),
    "fixed sliding": lambda context, index, window: StaticSlidingWindowLayer(
        context.max_cache_len, window
    ),
    "linear": lambda context, index, states: LinearAttentionLayer(states),
    "nothing": lambda context, index, _: compat.placeholder_layer(),
}


def _kind_and_detail(layer: Any) -> tuple[str, int]:
    """The inverse of `_NEW`; a layer that no file holds has its class's name as its kind."""
    states = getattr(layer, "number_of_states", 0)
    kinds = {
        CompressedHybridLayer: ("compressed hybrid", states),
        CompressedLayer: ("compressed", 0),
        FixedLayer: ("compressed", 0),
        DynamicLayer: ("exact", 0),
        LinearAttentionAndFullAttentionLayer: ("exact hybrid", states),
        DynamicSlidingWindowLayer: ("sliding", getattr(layer, "sliding_window", 0)),
        StaticSlidingWindowLayer: ("fixed sliding", getattr(layer, "max_cache_len", 0)),
        LinearAttentionLayer: ("linear", states),
    }
    if compat.is_placeholder(layer):
        return "nothing", 0
    return kinds.get(type(layer), (type(layer).__name__, 0))


def _describe(
    layer: Any, path: str, context: CacheContext, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    kind, _ = _kind_and_detail(layer)
    if kind not in STATES_OF:
        raise ValueError(f"{path}: expected a layer that a file can hold, got a {kind}")
    half = attention_half(layer)
    if half is not None and half.context.config != context.config:
        raise ValueError(
            f"{path}: expected a layer with this cache's options, got one of another cache: save "
            "that one"
        )
    described: dict[str, Any] = {"kind": kind}
    for state in STATES_OF[kind]:
        described |= state.describe(layer, path, tensors)
    return described


def _read(container: Container) -> tuple[dict[str, Any], list[_Part]]:
    """Options of the cache, and its layers."""
    metadata = container.metadata
    metadata.choice("format", [FORMAT])
    version = metadata.take("format_version")
    if version != VERSION:
        expected = f"{VERSION!r} (another version needs another release)"
        raise refused(f"{metadata.path}.format_version", expected, version)
    metadata.take("written_by")
    options = _read_config(Fields("config", parse_json("config", metadata.take("config"))))
    prefill = metadata.choice("prefill", ("exact", "quantized"))
    given = objects_of("layers", parse_json("layers", metadata.take("layers")))
    config = CacheConfig.from_options(options)
    capacity = _read_capacity(metadata, config)
    parts = [
        _read_layer(fields, container.take, config, capacity, index, len(given))
        for index, fields in enumerate(given)
    ]
    container.finish()
    batch_sizes = {size for part in parts for state in part.states for size in state.batch_sizes}
    if len(batch_sizes) != 1:
        raise refused("layers", "one number of rows in all of them", sorted(batch_sizes))
    while parts[-1].kind == "nothing":  # a model that shares keys goes on without them
        parts.pop()
    return {**options, "prefill": prefill, "max_cache_len": capacity}, parts


def _read_capacity(metadata: Fields, config: CacheConfig) -> int | None:
    """`max_cache_len` of a cache of fixed capacity; a growing one has no such field."""
    if not metadata.has("max_cache_len"):
        return None
    path = f"{metadata.path}.max_cache_len"
    number = parse_json(path, metadata.take("max_cache_len"))
    capacity = Fields(metadata.path, {"max_cache_len": number}).integer(
        "max_cache_len", 1, _MAX_CAPACITY
    )
    for name in ("exact_first_layers", "exact_last_layers"):
        layers = getattr(config, name)
        if layers:
            raise refused(f"config.{name}", "0 with max_cache_len", layers)
    return capacity


def _read_layer(
    fields: Fields,
    take: Callable[[str], Tensor],
    config: CacheConfig,
    capacity: int | None,
    index: int,
    number: int,
) -> _Part:
    if capacity is None:
        full = "exact" if config.is_exact(index, number) else "compressed"
        kinds = [full, f"{full} hybrid", "sliding"]
    else:
        kinds = ["compressed", "fixed sliding"]
    kind = fields.choice("kind", (*kinds, "linear", "nothing"))
    states = tuple(state.read(fields, take) for state in STATES_OF[kind])
    fields.finish()
    for state in states:
        if capacity is not None and state.capacity_needed > capacity:
            most = f"at most {capacity} positions (max_cache_len)"
            raise refused(fields.path, most, state.capacity_needed)
        if isinstance(state, CompressedState) and state.store is not None:
            spec = state.store.spec
            expected = config.layer_spec(index, spec.head_dim, spec.num_kv_heads)
            if spec != expected:
                raise FormatError(
                    f"{fields.path}.store.spec: expected what config says, {expected}, got {spec}"
                )
    return _Part(kind, states)


def _plain(config: CacheConfig) -> dict[str, Any]:
    """A configuration as JSON, with nothing left to a default."""
    options = asdict(config)
    options["layer_bits"] = [[layer, *bits] for layer, bits in sorted(config.layer_bits.items())]
    return options


def _read_config(fields: Fields) -> dict[str, Any]:
    """The options of a `CacheConfig` that `_plain` wrote."""
    given = {name: fields.take(name) for name in _plain(CacheConfig(bits=4))}
    fields.finish()
    with naming(fields.path):
        triples = given["layer_bits"]
        if not isinstance(triples, list) or not all(
            isinstance(triple, list) and len(triple) == 3 for triple in triples
        ):
            raise ValueError("layer_bits: expected a list of [layer, k_bits, v_bits]")
        layer_bits = {layer: (k_bits, v_bits) for layer, k_bits, v_bits in triples}
        options = {**given, "layer_bits": layer_bits}
        config = CacheConfig.from_options(options)
    for name, value in _plain(config).items():
        if given[name] != value:
            raise refused(f"{fields.path}.{name}", repr(value), given[name])
    return options


def _empty_cache(
    cache_type: type[CompressedDynamicCache], config: Any, options: dict[str, Any]
) -> CompressedDynamicCache:
    if config is not None:
        return cache_type(config=config, **options)
    if options["max_cache_len"] is not None:
        raise ValueError(
            "config: expected the model's configuration, which a cache of fixed capacity "
            f"(max_cache_len={options['max_cache_len']}) needs, got None"
        )
    stock = DynamicCache()
    stock.layer_class_to_replicate = None  # the file says which layers there are
    cache = cache_type(stock, **options)
    cache.wrapped = None
    return cache


def _check_model(layers: list[Any], parts: list[_Part]) -> None:
    """Refuse a model whose layers are not the file's."""
    kinds = [_kind_and_detail(layer) for layer in layers]
    while kinds and kinds[-1][0] == "nothing":
        kinds.pop()
    if len(kinds) != len(parts):
        raise ValueError(
            f"config: expected a model of {len(parts)} layers like the file's, got {len(kinds)}"
        )
    for index, (part, given) in enumerate(zip(parts, kinds, strict=True)):
        if (part.kind, part.detail) != given:
            raise ValueError(
                f"config: expected layer {index} to be {part.kind} ({part.detail}) like the "
                f"file's, got {given[0]} ({given[1]})"
            )
