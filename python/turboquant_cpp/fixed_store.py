"""A `LayerStore` of fixed capacity, whose bookkeeping lives where its storage does.

What is stored is in `fixed_storage`: tables that the operators read and change in place. A step is
therefore the same sequence of operators on the same tensors however many tokens there are:
``torch.compile`` traces it once and a CUDA graph can replay it. `plan` and `attend_append_planned`
are that step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from turboquant_cpp import ops
from turboquant_cpp.fixed_storage import FixedStorage
from turboquant_cpp.layer_store import LayerStore
from turboquant_cpp.store_parts import without_grad

__all__ = ["FixedPlan", "FixedStore"]

_Result = TypeVar("_Result")


class FixedPlan(NamedTuple):
    """What one append will do: tables that `FixedStore.plan` made."""

    rows: Tensor
    jobs: Tensor


class FixedStore(FixedStorage, LayerStore):
    """Packed storage of one attention layer for at most `max_tokens` tokens a row.

    Parameters
    ----------
    spec, batch_size, dtype, device
        As in `LayerStore`.
    max_tokens : int
        Tokens that a row can hold.

    Raises
    ------
    ValueError
        When an argument is out of range or the dtype or device is not supported.

    Examples
    --------
    >>> import torch
    >>> from turboquant_cpp import CacheConfig, FixedStore
    >>> spec = CacheConfig(bits=4).layer_spec(0, head_dim=64, num_kv_heads=2)
    >>> store = FixedStore(spec, batch_size=1, max_tokens=500, dtype=torch.float32, device="cpu")
    >>> keys, values = torch.randn(2, 1, 2, 300, 64)
    >>> store.append(keys, values)
    >>> store.lengths, store.encoded_tokens
    ([300], [192])
    """

    @without_grad
    def plan(self, chunk_tokens: int) -> FixedPlan:
        """What appending `chunk_tokens` positions will take, worked out on the device."""
        step = self._step
        rows, jobs = ops.plan_append(
            step.rows,
            step.page_table,
            step.positions,
            step.spec,
            chunk_tokens=chunk_tokens,
            max_tokens=step.max_tokens,
        )
        return FixedPlan(rows, jobs)

    @without_grad
    def append_planned(self, key_states: Tensor, value_states: Tensor, plan: FixedPlan) -> None:
        """Carry out a plan for a chunk of its length and commit it, without the host's checks."""
        tokens = key_states.shape[2]

        def run() -> None:
            self._run_encode_append(
                key_states, value_states, self._dense, self._slabs, plan.rows, plan.jobs
            )
            self._commit_planned(tokens, plan)

        self._all_or_nothing(tokens, run)

    @without_grad
    def attend_append_planned(
        self,
        query: Tensor,
        key_states: Tensor,
        value_states: Tensor,
        plan: FixedPlan,
        *,
        scaling: float,
        softcap: float = 0.0,
        sliding_window: int = 0,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """`attend_append` by a plan for the chunk, without the host's checks.

        Parameters
        ----------
        query : Tensor
            Of any floating dtype.
        sink_logits : Tensor, optional
            ``[Hq]``, on the store's device.

        Returns
        -------
        Tensor
            ``[B, q, Hq, D]``.
        """
        tokens = key_states.shape[2]
        sinks = None if sink_logits is None else self._operands.sinks(sink_logits)
        step = self._step

        def run() -> Tensor:
            out = ops.attend_append(
                query.to(step.keys.dtype),
                key_states,
                value_states,
                step.keys,
                step.values,
                step.smoothing,
                [step.slab],
                step.counters,
                step.page_table,
                plan.rows,
                plan.jobs,
                sinks,
                step.spec,
                scaling,
                softcap,
                sliding_window,
            )
            self._commit_planned(tokens, plan)
            return out

        return self._all_or_nothing(tokens, run)

    @without_grad
    def attend_committed(
        self,
        query: Tensor,
        *,
        scaling: float,
        softcap: float = 0.0,
        sliding_window: int = 0,
        sink_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`attend` to what is committed, by a query of any dtype, without the host's checks."""
        nothing = query.new_empty((query.shape[0], self._spec.num_kv_heads, 0, query.shape[3]))
        return self._run_decode_attention(
            query.to(self._dtype),
            nothing,
            nothing,
            self._state,
            None if sink_logits is None else self._operands.sinks(sink_logits),
            scaling=scaling,
            softcap=softcap,
            sliding_window=sliding_window,
        )

    def _all_or_nothing(self, chunk_tokens: int, run: Callable[[], _Result]) -> _Result:
        """Carry out and commit a plan; if that fails, nothing has happened.

        A chunk's newest tokens take the exact ring's slots of those that leave it for pages, which
        they have left only when that is committed. One token always has a free slot: the ring has
        one more than tokens stay in it. So a decode step needs no copy.
        """
        if torch.compiler.is_compiling():
            return run()
        before = self._dense.clone() if chunk_tokens > 1 else None
        try:
            return run()
        except BaseException:
            if before is not None:
                self._dense.copy_(before)
            self._seen.copy_(self._positions[0, 1])
            raise

    def _commit_planned(self, chunk_tokens: int, plan: FixedPlan) -> None:
        """Count the positions, then change the tables: when that has happened, all has."""
        step = self._step
        step.seen.add_(chunk_tokens)
        ops.commit_append(
            plan.rows,
            step.rows,
            step.page_table,
            step.positions,
            step.spec,
            chunk_tokens=chunk_tokens,
            max_tokens=step.max_tokens,
        )

    def append(
        self, key_states: Tensor, value_states: Tensor, new_tokens: Sequence[int] | None = None
    ) -> None:
        """Commit a chunk; see `LayerStore.append`.

        Raises
        ------
        ValueError
            When the chunk does not fit, in shape or in number; the store is as it was.
        """
        counts = self._counts(key_states, value_states, new_tokens)
        plan = self._plan_of(key_states.shape[2], counts)
        self.append_planned(key_states, value_states, plan)

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
        """Attend to what is committed and a chunk, then commit it; see `LayerStore.attend_append`.

        Raises
        ------
        ValueError
            As `attend` and `append`; the store is as it was.
        """
        sinks = self._check_call(query, scaling, softcap, sliding_window, sink_logits)
        counts = self._counts(key_states, value_states, new_tokens, query)
        return self.attend_append_planned(
            query,
            key_states,
            value_states,
            self._plan_of(key_states.shape[2], counts),
            scaling=scaling,
            softcap=softcap,
            sliding_window=sliding_window,
            sink_logits=sinks,
        )

    def _plan_of(self, chunk_tokens: int, counts: list[int]) -> FixedPlan:
        """The plan for a chunk of which each row takes its last ``counts[b]`` tokens."""
        for row, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            if length + count > self._max_tokens:
                raise ValueError(
                    f"key_states: expected at most {self._max_tokens - length} more tokens in row "
                    f"{row} (the store was made for {self._max_tokens}), got {count}"
                )
        seen = int(self._seen)
        self.place([seen + chunk_tokens - count for count in counts], seen)
        return self.plan(chunk_tokens)
