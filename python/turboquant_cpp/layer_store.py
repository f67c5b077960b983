"""One layer's compressed keys and values with the operators that read and add to them.

What is stored and how it changes is in `packed_storage`. Every append is planned first, then the
operator runs, the commit comes last: whatever fails in between leaves the store as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from turboquant_cpp import ops
from turboquant_cpp._core import cuda_attention_problem
from turboquant_cpp.packed_storage import PackedStorage
from turboquant_cpp.spec import as_integer
from turboquant_cpp.store_checks import check_numbers, tensor_kind
from turboquant_cpp.store_parts import DenseBuffers, without_grad

__all__ = ["LayerStore"]


class LayerStore(PackedStorage):
    """Packed storage of one attention layer, with attention straight from the codes.

    Parameters
    ----------
    spec : LayerSpec
        What the layer's bytes mean; `CacheConfig.layer_spec` makes one.
    batch_size : int
        Rows; every row has its own length.
    dtype : torch.dtype
        The model's dtype: float32, float16 or bfloat16.
    device : torch.device or str
        Where the storage lives: "cpu", or "cuda" where the package was built with CUDA kernels.

    Raises
    ------
    ValueError
        When an argument is out of range or the dtype or device is not supported.

    Examples
    --------
    >>> import torch
    >>> from turboquant_cpp import CacheConfig, LayerStore
    >>> spec = CacheConfig(bits=4).layer_spec(0, head_dim=64, num_kv_heads=2)
    >>> store = LayerStore(spec, batch_size=1, dtype=torch.float32, device="cpu")
    >>> keys, values = torch.randn(2, 1, 2, 300, 64)
    >>> store.append(keys, values)
    >>> store.lengths, store.encoded_tokens
    ([300], [192])
    >>> out, lse = store.attend(torch.randn(1, 8, 1, 64), scaling=64**-0.5)
    >>> out.shape, lse.shape
    (torch.Size([1, 8, 1, 64]), torch.Size([1, 8, 1]))
    >>> store.crop(100)
    >>> store.lengths
    [100]
    """

    #: The last step that passed all checks: one like it passes them, too.
    _checked_step: tuple[Any, ...] | None = None

    def takes(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether a chunk has the shape, dtype and device that `append` and `attend` expect.

        Quick to ask: what does not fit is worth a closer look, for an error that names it.
        """
        return self._operands.fit(self.batch_size, key_states, value_states)

    @without_grad
    def append(
        self, key_states: Tensor, value_states: Tensor, new_tokens: Sequence[int] | None = None
    ) -> None:
        """Commit a chunk: encode what leaves the exact window, keep the rest exact.

        Parameters
        ----------
        key_states, value_states : Tensor
            ``[B, H, T, D]`` in the store's dtype, any strides.
        new_tokens : sequence of int, optional
            Real tokens of each row, its last ones of the T (left padding is not stored).
            All T when not given.

        Raises
        ------
        ValueError
            When shape, dtype, device or `new_tokens` do not fit; the store is as it was. So it is
            when storage cannot be allocated (then torch's own error is raised).
        """
        counts = self._counts(key_states, value_states, new_tokens)
        if not any(counts):
            return
        ready = self._prepare_append(counts)
        self._run_encode_append(
            key_states, value_states, ready.dense, ready.slabs, self._rows(counts), ready.jobs
        )
        self._commit_append(ready)

    def attention_problem(self) -> str:
        """Why `attend` does not answer from the codes; "" when it does.

        On the CPU it always does. On CUDA devices it depends on head_dim, the widths and the
        device. What cannot be attended can be dequantised.
        """
        if self._device.type != "cuda":
            return ""
        return cuda_attention_problem(self._spec, _capability_major(self._device))

    @without_grad
    def attend(
        self,
        query: Tensor,
        key_states: Tensor | None = None,
        value_states: Tensor | None = None,
        *,
        new_tokens: Sequence[int] | None = None,
        scaling: float,
        softcap: float = 0.0,
        sliding_window: int = 0,
        sink_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Causal attention of `query` over what is committed and a chunk that is not yet.

        Nothing is stored and the result carries no gradient.

        Parameters
        ----------
        query : Tensor
            ``[B, Hq, q, D]``, Hq a multiple of H. Its last position is the last token of the
            chunk, or the last committed token when no chunk is given.
        key_states, value_states : Tensor, optional
            The exact chunk ``[B, H, q, D]``; `append` it afterwards.
        new_tokens : sequence of int, optional
            Real tokens of each row in the chunk (its last ones).
        scaling : float
            Softmax scale.
        softcap : float
            ``softcap * tanh(score / softcap)`` when above 0.
        sliding_window : int
            How many positions back a query sees, itself included; 0: all.
        sink_logits : Tensor, optional
            Learned sink logit of each query head, ``[Hq]``.

        Returns
        -------
        out : Tensor
            ``[B, Hq, q, D]`` in the query's dtype. Padding queries get 0.
        lse : Tensor
            Natural log-sum-exp, float32 ``[B, Hq, q]``; -inf for padding queries.

        Raises
        ------
        ValueError
            When an argument does not fit or there is an `attention_problem`; the message names it.
        """
        sinks = self._check_call(query, scaling, softcap, sliding_window, sink_logits)
        if (key_states is None) != (value_states is None):
            raise ValueError("key_states, value_states: expected both or neither")
        if key_states is None or value_states is None:
            if new_tokens is not None:
                raise ValueError(
                    f"new_tokens: expected None without a chunk, got {list(new_tokens)}"
                )
            counts = [0] * self.batch_size
            key_states = value_states = query.new_empty(
                (self.batch_size, self._spec.num_kv_heads, 0, self._spec.head_dim)
            )
        else:
            counts = self._counts(key_states, value_states, new_tokens, query)
        return self._run_decode_attention(
            query,
            key_states,
            value_states,
            self._rows(counts),
            sinks,
            scaling=scaling,
            softcap=softcap,
            sliding_window=sliding_window,
        )

    @without_grad
    def attend_append(
        self,
        query: Tensor,
        key_states: Tensor,
        value_states: Tensor,
        *,
        new_tokens: Sequence[int] | None = None,
        scaling: float,
        softcap: float = 0.0,
        sliding_window: int = 0,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """`attend` to what is committed and a chunk, then `append` the chunk: a decode step.

        One operator call instead of two, which counts where a step is short.

        Returns
        -------
        Tensor
            The output of `attend`, as models go on with it: ``[B, q, Hq, D]``.

        Raises
        ------
        ValueError
            When an argument does not fit or there is an `attention_problem`; the store is as it
            was. So it is when storage cannot be allocated (then torch's own error is raised).
        """
        # A step repeats the one before but for what is in its tensors: such a call is checked once.
        step = (
            *tensor_kind(query),
            *tensor_kind(key_states),
            *tensor_kind(value_states),
            list(new_tokens) if type(new_tokens) is list else new_tokens,
            scaling,
            softcap,
            sliding_window,
            self.batch_size,
            self._device,
        )
        if sink_logits is None and type(new_tokens) is list and step == self._checked_step:
            sinks, counts = None, new_tokens
        else:
            sinks = self._check_call(query, scaling, softcap, sliding_window, sink_logits)
            counts = self._counts(key_states, value_states, new_tokens, query)
            self._checked_step = step
        page_table = self._tables()
        ready = self._prepare_append(counts)
        dense = ready.dense
        out = ops.attend_append(
            query,
            key_states,
            value_states,
            dense.keys,
            dense.values,
            dense.smoothing,
            ready.slabs,
            dense.counters,
            page_table,
            self._rows(counts),
            ready.jobs,
            sinks,
            self._spec_ints,
            scaling,
            softcap,
            sliding_window,
        )
        self._commit_append(ready)
        return out

    @without_grad
    def dequantize(
        self,
        past_tokens: int | None = None,
        out_keys: Tensor | None = None,
        out_values: Tensor | None = None,
        *,
        positions: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Committed tokens as dense keys and values ``[B, H, n, D]``.

        Parameters
        ----------
        past_tokens : int, optional
            Positions there are, at least the longest row (the default). Rows end at the last
            position; what is before a shorter row is 0.
        out_keys, out_values : Tensor, optional
            Buffers to write to and return, any strides (a part of a larger buffer, say).
        positions : (int, int), optional
            First and one past the last of the n positions wanted; all `past_tokens` by default.

        Raises
        ------
        ValueError
            When `past_tokens` is too small, `positions` are not among them or a buffer does not
            fit.
        """
        past = self.max_length if past_tokens is None else as_integer("past_tokens", past_tokens)
        if past < self.max_length:
            raise ValueError(
                f"past_tokens: expected at least {self.max_length} (the longest row), got {past}"
            )
        first, end = (0, past) if positions is None else positions
        if not 0 <= first <= end <= past:
            raise ValueError(
                f"positions: expected a range within 0 to {past}, got {first} to {end}"
            )
        shape = (self.batch_size, self._spec.num_kv_heads, end - first, self._spec.head_dim)
        for name, out in (("out_keys", out_keys), ("out_values", out_values)):
            if out is not None:
                self._operands.check_buffer(name, out, shape)
        keys, values = (
            torch.empty(shape, dtype=self._dtype, device=self._device) if out is None else out
            for out in (out_keys, out_values)
        )
        dense = self._dense or self._new_dense()
        ops.dequantize(
            dense.keys,
            dense.values,
            dense.smoothing,
            self._slabs,
            self._tables(),
            self._rows([0] * self.batch_size),
            keys,
            values,
            self._spec_ints,
            past_tokens=past,
            first_position=first,
        )
        return keys, values

    def _run_encode_append(
        self,
        key_states: Tensor,
        value_states: Tensor,
        dense: DenseBuffers,
        slabs: list[Tensor],
        rows: Tensor,
        jobs: Tensor,
    ) -> None:
        ops.encode_append(
            key_states,
            value_states,
            dense.keys,
            dense.values,
            dense.smoothing,
            slabs,
            dense.counters,
            rows,
            jobs,
            self._spec_ints,
        )

    def _run_decode_attention(
        self,
        query: Tensor,
        key_states: Tensor,
        value_states: Tensor,
        rows: Tensor,
        sinks: Tensor | None,
        **numbers: Any,
    ) -> tuple[Tensor, Tensor]:
        dense = self._dense or self._new_dense()
        return ops.decode_attention(
            query,
            key_states,
            value_states,
            dense.keys,
            dense.values,
            dense.smoothing,
            self._slabs,
            self._tables(),
            rows,
            sinks,
            self._spec_ints,
            **numbers,
        )

    def _check_call(
        self,
        query: Tensor,
        scaling: float,
        softcap: float,
        sliding_window: int,
        sink_logits: Tensor | None,
    ) -> Tensor | None:
        """The sink logits as the operators take them, after checking an attention call."""
        self._operands.check_query(self.batch_size, query)
        problem = self.attention_problem()
        if problem:
            raise ValueError(f"query: {problem}")
        check_numbers(scaling, softcap, sliding_window)
        return self._operands.checked_sinks(sink_logits, query)

    def _counts(
        self,
        key_states: Tensor,
        value_states: Tensor,
        new_tokens: Sequence[int] | None,
        query: Tensor | None = None,
    ) -> list[int]:
        """Real tokens of each row, after checking that a chunk fits the store and the query."""
        chunk = (key_states, value_states, new_tokens, query)
        return self._operands.chunk_counts(self.batch_size, *chunk)


@functools.lru_cache
def _capability_major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
