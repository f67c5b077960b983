"""A compressed layer of fixed capacity, for ``torch.compile`` and CUDA graphs.

How many tokens there are is known on the device (`FixedStore`). In a compiled region nothing of
this layer but tensors changes, so the region is traced once. Outside of one the layer also counts
on the host, which makes it behave as the growing `CompressedLayer` does, errors included; after a
compiled step it reads the count back when it needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor

from turboquant_cpp.fixed_store import FixedStore
from turboquant_cpp.hf.context import CacheContext
from turboquant_cpp.hf.fixed_chunk import CompiledChunk, FixedChunk
from turboquant_cpp.hf.layer import CompressedLayer
from turboquant_cpp.layer_store import LayerStore
from turboquant_cpp.spec import LayerSpec
from turboquant_cpp.store_checks import checked_device
from turboquant_cpp.store_state import StoreState

__all__ = ["MASK_OFFSET", "FixedLayer", "recount"]

#: What a fixed layer gives masks as the offset of its keys. No other cache has a negative one, so
#: the mask function of the fused attention knows by it that the layer itself knows its tokens.
MASK_OFFSET: Final = -1


class FixedLayer(CompressedLayer):
    """Keys and values of one layer, at most ``context.max_cache_len`` positions.

    Parameters
    ----------
    context, layer_idx
        As in `CompressedLayer`.
    """

    def __init__(self, context: CacheContext, layer_idx: int) -> None:
        assert context.max_cache_len is not None
        self.max_cache_len = context.max_cache_len
        self._host_tokens: int | None = 0
        self._host_padding: list[int] = []
        super().__init__(context, layer_idx)

    def _forget(self) -> None:
        self._saved: StoreState | None = None
        super()._forget()

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether a step can be compiled: with the fused attention."""
        return self.context.is_fused

    def _missing_store(self) -> LayerStore:
        """The storage of a layer that was loaded: it takes its memory at the first use."""
        if self._saved is None:
            return super()._missing_store()
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"layer {self.layer_idx} was loaded and has taken no memory yet: run one step, or "
                "call the cache's memory(), outside of the compiled region"
            )
        store = FixedStore.from_state(
            self._saved, cast(torch.device, self.device), max_tokens=self.max_cache_len
        )
        store.place(self._host_padding, cast(int, self._host_tokens))
        self._saved = None
        return store

    @property
    def fixed_store(self) -> FixedStore:
        """`store`, which is one of fixed capacity."""
        return cast(FixedStore, self.store)

    def new_store(
        self, spec: LayerSpec, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> LayerStore:
        """Storage for `max_cache_len` tokens a row, all of it."""
        return FixedStore(
            spec, batch_size=batch_size, max_tokens=self.max_cache_len, dtype=dtype, device=device
        )

    @property
    def committed_tokens(self) -> int:
        """Positions stored, padding included; read from the device after compiled steps."""
        if self._host_tokens is None:
            lost = sum(self.fixed_store.refused_tokens)
            if lost:
                raise RuntimeError(
                    f"layer {self.layer_idx}: {lost} tokens came in compiled steps after the cache "
                    f"was full (max_cache_len={self.max_cache_len}) and were not stored"
                )
            self._host_tokens = int(self.fixed_store.seen_positions)
        return self._host_tokens

    @committed_tokens.setter
    def committed_tokens(self, tokens: int) -> None:
        self._host_tokens = tokens

    @property
    def left_padding(self) -> list[int]:
        """Padding of each row; assigning it tells the store."""
        return self._host_padding

    @left_padding.setter
    def left_padding(self, padding: list[int]) -> None:
        has_store = self._store is not None or self._saved is not None
        if has_store and padding != self._host_padding:
            self.fixed_store.place(padding, self.committed_tokens)
        self._host_padding = padding

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; see `CompressedLayer.update`.

        Raises
        ------
        ValueError
            When the chunk does not fit, in shape or in number; the layer is as it was.
        RuntimeError
            In a compiled region, when the storage is not there yet or attention is not fused.
        """
        if torch.compiler.is_compiling():
            self._check_compiled()
            return CompiledChunk(self, key_states, value_states).tagged_keys(), value_states
        if self.is_initialized and self.get_host_length() == 0 and self._is_other(key_states):
            self._forget()
        return super().update(key_states, value_states, *args, **kwargs)

    def new_chunk(self, key_states: Tensor, value_states: Tensor) -> FixedChunk:
        """The tokens that attention is to read next."""
        return FixedChunk(self, key_states, value_states)

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Encode and store a chunk, each row's real tokens only."""
        tokens = key_states.shape[2]
        plan = self.fixed_store.plan(tokens)
        self.fixed_store.append_planned(key_states.detach(), value_states.detach(), plan)
        if torch.compiler.is_compiling():
            self.lose_count()
        else:
            self.committed_tokens += tokens

    def lose_count(self) -> None:
        """Take note that tokens were stored in a compiled region, which is not counted here."""
        self._host_tokens = None

    def trust(self, tokens: int) -> None:
        """Lose a count that is not the device's."""
        if self._host_tokens != tokens:
            self.lose_count()

    def get_seq_length(self) -> Any:
        """Tokens seen, padding included; with the fused attention a scalar on the device.

        So a compiled model reads it without waiting, as transformers' static caches give it.
        """
        if not self.context.is_fused or not self.is_initialized:
            return self.get_host_length()
        pending = 0 if self._pending is None else self._pending.tokens
        return self.fixed_store.seen_positions + pending

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset for a mask; see `MASK_OFFSET`."""
        if self.context.is_fused:
            return self.max_cache_len, MASK_OFFSET
        return self.get_host_length() + query_length, 0

    def get_max_length(self) -> int:
        """The capacity."""
        return self.max_cache_len

    def reset(self) -> None:
        """Forget everything, the padding given for the first prompt too; keep the storage."""
        self._given_padding = None
        self._pending = None
        self._host_tokens = 0
        self._host_padding = [0] * len(self._host_padding)
        if self._saved is not None:
            self._forget()
        elif self._store is not None:
            self.store.reset()

    def _crop_store(self, lengths: list[int], kept: int) -> None:
        self.fixed_store.crop(lengths, seen_positions=kept)

    def _note_padding(self, padding: list[int]) -> None:
        self._host_padding = padding  # the store's tables have it

    @property
    def is_counted_on_device(self) -> bool:
        """Whether a compiled step may have stored tokens that the host does not know of."""
        return self._store is not None and self.is_compileable

    def export_state(self) -> StoreState:
        """What a file is to hold; see `CompressedLayer.export_state`."""
        return self._saved or super().export_state()

    def hold(
        self,
        state: StoreState,
        committed_tokens: int,
        left_padding: Sequence[int],
        device: torch.device,
    ) -> None:
        """Go on with what a file holds, in a copy of it until `store` is used.

        So a file decides how much memory is taken no sooner than its capacity can be asked for.
        """
        self._saved = state.clone()
        self._host_tokens, self._host_padding = committed_tokens, list(left_padding)
        self.dtype = state.exact_keys.dtype
        self.device = checked_device(device, state.spec)
        self.is_initialized = True

    def _is_other(self, keys: Tensor) -> bool:
        """Whether an empty layer has to make new storage for such keys."""
        return keys.dim() == 4 and (
            (keys.shape[0], keys.shape[1], keys.shape[3], keys.dtype, keys.device)
            != (
                self.batch_size,
                self.store.spec.num_kv_heads,
                self.store.spec.head_dim,
                self.dtype,
                self.device,
            )
        )

    def _check_compiled(self) -> None:
        _note_trace()
        if not self.is_initialized:
            raise RuntimeError(
                f"layer {self.layer_idx} has no storage yet: run the first prompt outside of the "
                "compiled region, or call the cache's early_initialization()"
            )
        if self._pending is not None:
            raise RuntimeError(
                f"layer {self.layer_idx} holds tokens that update() took and no attention read: "
                "run the model over them, or call the layer's commit(), outside of the compiled "
                "region"
            )
        if not self.context.is_fused:
            raise RuntimeError(
                "a compressed cache is compiled with the fused attention only: call "
                'model.set_attn_implementation("turboquant") first'
            )

    def _check_chunk(self, keys: Tensor, values: Tensor) -> None:
        super()._check_chunk(keys, values)
        room = self.max_cache_len - self.get_host_length()
        if keys.shape[2] > room:
            raise ValueError(
                f"key_states: expected at most {room} more tokens (the cache was made with "
                f"max_cache_len={self.max_cache_len}), got {keys.shape[2]}"
            )


class _Replays:
    """Whether steps may run that this package's Python does not see: traced or captured ones."""

    are_possible = False


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _note_trace() -> None:
    """Take note of a step's trace: runs while it is made, not when it is run.

    What was traced for one cache is run for others like it, so this is no matter of one cache.
    """
    _Replays.are_possible = True


def recount(layers: Iterable[Any]) -> None:
    """Read back how many tokens layers hold, all at once.

    What the host counts is right after any step outside of compiled regions, and nothing is read as
    long as there was no other. One within tells the host when it has ended: if it failed, some
    layers hold its tokens and nobody knows.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _Replays.are_possible = True
        return  # what is captured cannot wait for the device
    if not _Replays.are_possible:
        return
    by_device: dict[torch.device, list[FixedLayer]] = {}
    for layer in layers:
        if isinstance(layer, FixedLayer) and layer.is_counted_on_device:
            by_device.setdefault(layer.store.device, []).append(layer)
    for counted in by_device.values():
        counts = torch.stack([layer.fixed_store.seen_positions for layer in counted]).tolist()
        for layer, count in zip(counted, counts, strict=True):
            layer.trust(count)
