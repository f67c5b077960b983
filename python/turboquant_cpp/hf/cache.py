"""The drop-in cache for ``generate()``."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from turboquant_cpp.allocation import LayerDecision
from turboquant_cpp.hf import compat, files, policy, stats
from turboquant_cpp.hf.context import CacheContext
from turboquant_cpp.hf.fixed_checks import check_fixed, fixed_layers
from turboquant_cpp.hf.guarded import GuardedCache
from turboquant_cpp.hf.layer import CompressedLayer
from turboquant_cpp.hf.model_checks import (
    check_forms,
    check_layer_bits,
    check_model,
    warn_of_full_layers,
)
from turboquant_cpp.hf.padding import checked_left_padding
from turboquant_cpp.hf.takeover import (
    attention_half,
    compress_layers,
    restore_layers,
    stock_reason,
)
from turboquant_cpp.spec import CacheConfig

__all__ = ["CompressedDynamicCache"]


class CompressedDynamicCache(GuardedCache):
    """A transformers cache that holds packed TurboQuant codes instead of keys and values.

    Two forms. The native one is given the model's configuration and makes its own layers. The
    wrapping one takes over the layers of a stock `DynamicCache`; both objects work afterwards.

    With ``model.set_attn_implementation("turboquant")`` attention reads the codes. With any other
    implementation a layer's keys and values are dequantised for its attention call and dropped.

    Parameters
    ----------
    cache : DynamicCache, optional
        The cache to take over; the tokens it holds are compressed.
    head_dim : int, optional
        Width of the keys, checked against what comes (wrapping form).
    bits, k_bits, v_bits, seed, **controls
        The options of `CacheConfig`, `preset` among them.
    config : optional
        The model's configuration (native form).
    model_config : optional
        The same for the wrapping form; without it the fused attention stays off.
    left_padding, attention_mask : sequence of int or Tensor, optional
        Padding of the first prompt, one count a row or its 2-D mask. Padding is not stored then.
        Not needed with the fused attention, which sees the mask. Unknown padding counts as tokens.
    prefill : {"exact", "quantized"}, optional
        Whether new tokens are read exactly in the step that brings them, or through the codes as
        any later step does (what measuring quality needs). The default is exact, with
        ``recipe="plain"`` quantized.
    dequantize : {"full", "incremental"}
        Without the fused attention: dequantise all tokens each step and keep nothing, or keep a
        dense copy and dequantise when new blocks were encoded (faster; saves no memory).
    offloading, offload_only_non_sliding : bool
        As in `DynamicCache`.
    max_cache_len : int, optional
        Positions that the cache can hold, padding included (native form). All memory is taken at
        the first token, and a step runs under ``torch.compile`` and in CUDA graphs with the fused
        attention. More tokens are a `ValueError`; where only a compiled step on a GPU could
        notice, they are not stored and the next call that asks the cache for its length says so.

    Raises
    ------
    ValueError
        A missing or unsupported width or head_dim, an option out of range, an MLA model.
    TypeError
        An unknown option, or neither or both of `cache` and `config`.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from turboquant_cpp import CompressedDynamicCache
    >>> config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=1, vocab_size=100)
    >>> model = LlamaForCausalLM(config).eval()
    >>> model.set_attn_implementation("turboquant")
    >>> cache = CompressedDynamicCache(config=model.config, bits=4)
    >>> prompt = torch.arange(1, 9)[None]
    >>> # Before transformers 5.24 the argument is called past_key_values.
    >>> tokens = model.generate(prompt, cache=cache, max_new_tokens=4, do_sample=False,
    ...     eos_token_id=None)
    >>> tokens.shape, cache.get_seq_length()
    (torch.Size([1, 12]), 11)
    """

    def __init__(
        self,
        cache: DynamicCache | None = None,
        head_dim: int | None = None,
        bits: int | None = None,
        *,
        config: Any = None,
        model_config: Any = None,
        k_bits: int | None = None,
        v_bits: int | None = None,
        seed: int = 42,
        left_padding: Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        prefill: str | None = None,
        dequantize: str = "full",
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
        max_cache_len: int | None = None,
        **controls: Any,
    ) -> None:
        check_forms(cache, config, model_config)
        options = {"bits": bits, "k_bits": k_bits, "v_bits": v_bits, "seed": seed, **controls}
        cache_config = CacheConfig.from_options(options)
        whole_config = config if config is not None else model_config
        decoder_config = None if whole_config is None else compat.text_config(whole_config)
        is_offloaded = offloading or getattr(cache, "offloading", False)
        if prefill is None:
            prefill = "quantized" if cache_config.recipe == "plain" else "exact"
        context = CacheContext(
            config=cache_config,
            model_config=decoder_config,
            head_dim=head_dim,
            prefill=prefill,
            dequantize=dequantize,
            left_padding=checked_left_padding(left_padding, attention_mask),
            kv_source_layers=(
                frozenset() if decoder_config is None else compat.kv_source_layers(decoder_config)
            ),
            is_offloaded=is_offloaded,
            max_cache_len=max_cache_len,
        )
        if head_dim is not None:
            cache_config.layer_spec(0, head_dim, 1)
        if decoder_config is not None:
            check_model(context)
            check_layer_bits(context)
        if max_cache_len is not None:
            check_fixed(context, is_native=cache is None)
        if context.is_undecided and cache is not None:
            raise ValueError(
                "policy: expected 'uniform' in the wrapping form (the wrapped cache's steps do not "
                "come by here), got 'auto'"
            )
        super().__init__(
            config=config,
            offloading=is_offloaded,
            offload_only_non_sliding=getattr(cache, "only_non_sliding", offload_only_non_sliding),
        )
        self.context = context
        self.wrapped = cache
        self._is_enabled = True
        #: What ``policy="auto"`` decided, a layer each; empty before, and in a loaded cache.
        self.policy_decisions: tuple[LayerDecision, ...] = ()
        self.uncompressed_layers: dict[int, str] = {}
        if cache is None:
            if max_cache_len is not None:
                self.layers = fixed_layers(config, context)
            self.uncompressed_layers = compress_layers(self.layers, context)
        else:
            self._take_over(cache)
        self.find_first_layer()

    def _take_over(self, cache: DynamicCache) -> None:
        makes_layers = cache.layer_class_to_replicate is not None
        maker = getattr(cache.layer_class_to_replicate, "__self__", None)
        is_compressed = isinstance(maker, CompressedDynamicCache) or any(
            attention_half(layer) is not None for layer in cache.layers
        )
        if is_compressed:
            warnings.warn(
                "the cache is compressed already: its layers are shared, not wrapped twice",
                UserWarning,
                stacklevel=3,
            )
        elif self.context.model_config is not None:
            warn_of_full_layers(self.context.model_config, cache.layers, makes_layers)
        self.layers = cache.layers
        if cache.offloading:
            self.prefetch_stream = cache.prefetch_stream  # both wait for what either prefetches
            self.prefetch_stream.synchronize()  # for what is encoded below
        exact_last = self.context.config.exact_last_layers
        if makes_layers and exact_last and self.num_model_layers is None:
            raise ValueError(
                f"exact_last_layers: expected 0 or a model_config (the cache does not know the "
                f"number of layers), got {exact_last}"
            )
        self.uncompressed_layers = compress_layers(
            cache.layers, self.context, self.num_model_layers
        )
        if makes_layers and not is_compressed:
            cache.layer_class_to_replicate = self._new_layer
        self.layer_class_to_replicate = cache.layer_class_to_replicate

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add a layer's new keys and values; see `GuardedCache.update`."""
        if layer_idx == self._first_layer and self.context.is_undecided:
            self.check_usable()
            policy.decide(self)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def is_compileable(self) -> bool:
        """Whether a step can be compiled: with a fixed capacity and the fused attention.

        A compiled model asks in every step, before its compiled code runs, so no layer is asked.
        """
        fixed = self._is_enabled and self.context.max_cache_len is not None
        return fixed and self.context.is_fused

    @property
    def num_model_layers(self) -> int | None:
        """Layers of the model, None when nothing says how many."""
        number = getattr(self.context.model_config, "num_hidden_layers", None)
        if isinstance(number, int):
            return number
        return len(self.layers) if self.layer_class_to_replicate is None else None

    def _new_layer(self) -> Any:
        """Layer for the next index, for caches that make layers as tokens come."""
        index = len(self.layers)
        num_layers = max(self.num_model_layers or 0, index + 1)
        if self._is_enabled and not self.context.config.is_exact(index, num_layers):
            return CompressedLayer(self.context, index)
        return DynamicLayer()

    @property
    def batch_size(self) -> int:
        """Rows of the first layer that holds tokens, -1 when none does."""
        return next((layer.batch_size for layer in self.layers if hasattr(layer, "batch_size")), -1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that the cache holds to a file.

        The file takes the place of an older one when it is complete; a failure leaves that as it
        was. It is a safetensors file (docs/cache_format.md) and holds the pages in use, each once,
        and every setting that decides what they mean. The tokens' ids are not in it.

        Parameters
        ----------
        path : str or path-like
            Where to.

        Raises
        ------
        ValueError
            When the cache holds nothing, is disabled, or has a layer that no file holds.
        RuntimeError
            When an earlier step failed between two layers.
        OSError
            When the file cannot be written.

        Examples
        --------
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from transformers import DynamicCache
        >>> from turboquant_cpp import CompressedDynamicCache
        >>> cache = CompressedDynamicCache(DynamicCache(), head_dim=64, bits=4)
        >>> _ = cache.update(*torch.randn(2, 1, 2, 300, 64), layer_idx=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "prompt.safetensors")
        ...     cache.save(path)
        ...     loaded = CompressedDynamicCache.load(path)
        >>> loaded.get_seq_length(), loaded.k_bits
        (300, 4)
        """
        self.check_usable()
        if self.context.is_undecided:
            policy.decide(self, at_once=True)
        files.save(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        config: Any = None,
        device: torch.device | str | Sequence[torch.device | str] = "cpu",
        dequantize: str = "full",
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> CompressedDynamicCache:
        """Read a cache that `save` wrote; it goes on as the saved one would have.

        The file may come from anywhere: it is checked before it is used, and nothing in it is run.
        A cache of fixed capacity has the saved one's; it takes that memory when it is used first,
        so `get_max_length` can be asked before.

        Parameters
        ----------
        path : str or path-like
            The file.
        config : optional
            The model's configuration: the fused attention and a cache of fixed capacity need it,
            and a model with other layers than the file's is refused at once. Without it such a
            model is refused when its keys do not fit.
        device : torch.device or str, or a sequence of them
            Where the layers go, with `offloading` where they compute. A sequence has one device a
            layer, for models on several.
        dequantize, offloading, offload_only_non_sliding
            As for a new cache.

        Raises
        ------
        FormatError
            When the file is damaged, of a newer version or no cache; the message names the field.
        ValueError
            When `config`, `device` or another option do not fit.
        OSError
            When the file cannot be read.
        """
        return files.load(
            cls,
            path,
            config=config,
            device=device,
            dequantize=dequantize,
            offloading=offloading,
            offload_only_non_sliding=offload_only_non_sliding,
        )

    def adopt_layers(self, layers: Sequence[Any]) -> None:
        """Go on with the first layers of a file in the place of those there are."""
        self.layers[: len(layers)] = layers
        self.find_first_layer()
        self.uncompressed_layers = {
            index: str(stock_reason(layer, index, len(self.layers), self.context))
            for index, layer in enumerate(self.layers)
            if attention_half(layer) is None
        }

    def compressed_layer(self, layer_idx: int) -> CompressedLayer:
        """Return the compressed layer `layer_idx`.

        Raises
        ------
        ValueError
            When there is no such layer or it keeps the stock cache; the message says why.
        """
        if not 0 <= layer_idx < len(self.layers):
            raise ValueError(
                f"layer_idx: expected 0 to {len(self.layers) - 1} (the cache has "
                f"{len(self.layers)} layers), got {layer_idx}"
            )
        layer = attention_half(self.layers[layer_idx])
        if layer is None:
            reason = self.uncompressed_layers.get(layer_idx, "compression is disabled")
            raise ValueError(f"layer_idx: layer {layer_idx} is not compressed: {reason}")
        return layer

    def compressed_layers(self) -> list[CompressedLayer]:
        """Every compressed layer, in order."""
        halves = map(attention_half, self.layers)
        return [layer for layer in halves if layer is not None]

    def get_compressed(self, layer_idx: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Copies of a layer's codes and scales; see `LayerStore.codes`.

        Raises
        ------
        ValueError
            When there is no such compressed layer or it holds no tokens yet.
        """
        layer = self.compressed_layer(layer_idx)
        if not layer.is_initialized:
            raise ValueError(f"layer_idx: layer {layer_idx} holds no tokens yet")
        layer.commit()
        return layer.store.codes()

    def enable(self) -> None:
        """Compress again after `disable`, the tokens held dense meanwhile included."""
        if not self._is_enabled:
            self.uncompressed_layers = compress_layers(self.layers, self.context)
            self._is_enabled = True

    def disable(self) -> None:
        """Turn every layer into a stock one that holds the dequantised tokens."""
        if self._is_enabled:
            restore_layers(self.layers)
            self._is_enabled = False

    def restore(self) -> None:
        """`disable`, and let go of the wrapped cache: it is a stock cache again."""
        self.disable()
        if self.wrapped is not None and self.wrapped.layer_class_to_replicate is not None:
            self.wrapped.layer_class_to_replicate = DynamicLayer
            self.layer_class_to_replicate = DynamicLayer

    @property
    def enabled(self) -> bool:
        """Whether layers are compressed."""
        return self._is_enabled

    def __enter__(self) -> CompressedDynamicCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def memory(self) -> dict[str, int]:
        """Bytes held, by part, measured from the storages.

        Returns
        -------
        dict
            ``pages``, ``exact``, ``smoothing``, ``tables`` of the compressed layers (with
            ``dense_copy`` when ``dequantize="incremental"``), ``uncompressed`` of the stock
            layers, and their sum ``total``.
        """
        return stats.memory(self)

    def vram_bytes(self) -> int:
        """Bytes held by all layers, measured from the storages."""
        return stats.memory(self)["total"]

    def baseline_vram_bytes(self) -> int:
        """Bytes that the stock cache would hold for the same tokens in the model's dtype."""
        return stats.baseline_bytes(self)

    def compression_stats(self) -> dict[str, Any]:
        """Shape of the cache, measured size, size of the stock cache; see `stats`."""
        return stats.compression_stats(self)

    @property
    def k_bits(self) -> int:
        """Width of key codes."""
        return self.context.config.k_bits

    @property
    def v_bits(self) -> int:
        """Width of value codes."""
        return self.context.config.v_bits

    @property
    def bits(self) -> int:
        """The common width; of keys where keys and values differ."""
        return self.context.config.k_bits

    @property
    def head_dim(self) -> int:
        """Width of keys and values.

        Raises
        ------
        RuntimeError
            When neither an argument, the model's configuration nor a token has told it.
        """
        return stats.head_dim(self)

    @property
    def rotation(self) -> Tensor:
        """Key rotation of layer 0, head 0, float32 ``[D, D]``: ``rotated = rotation @ key``."""
        return stats.rotation(self)

    @property
    def centroids(self) -> Tensor:
        """Key codebook for coordinates of a unit vector, float32.

        ``[2^k_bits]``, ascending; with a vector codebook ``[256, 2]``, pairs of coordinates.
        """
        return stats.centroids(self)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.context.config!r}, layers={len(self.layers)}, "
            f"compressed_layers={len(self.compressed_layers())}, enabled={self._is_enabled})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedDynamicCache:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for name, value in vars(self).items():
            # The stream that offloading prefetches on holds nothing, and has no copy.
            is_stream = isinstance(value, torch.Stream)
            setattr(twin, name, value if is_stream else copy.deepcopy(value, memo))
        return twin

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a CompressedDynamicCache cannot be pickled: write it to a file with save() and "
            "load(). copy.deepcopy works."
        )
