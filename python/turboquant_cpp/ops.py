"""The torch operators ``torch.ops.turboquant.*`` and their typed wrappers.

The operators come from the compiled ``_torch_ops`` library, which speaks torch's stable ABI and so
serves every torch of 2.11 and newer. Shapes, all `int32` tables being the ones that
`turboquant_cpp._core.PageTable` exports: B rows, H key/value heads, Hq query heads, D head_dim,
S sinks, R ring tokens, T new tokens, P entries.

- `page_table` ``[B, P, 2]``: page, tokens in it.
- `rows` ``[B, 4]``: committed length, entries, first ring position, new tokens.
- `jobs` ``[N, 6]``: row, first token, tokens, page, offset in the page, fit smoothing; jobs of 0
  tokens are skipped.
- `positions` ``[B, 3]``: first position that is no padding, positions seen, tokens refused.
- `exact_keys`, `exact_values` ``[B, H, S + R, D]`` in the model's dtype.
- `smoothing` ``[B, H, D]`` float32; a slab is uint8 ``[pages_per_slab, page_bytes]``.
- `spec`: ``LayerSpec.to_ints()``.

Tensors are on the CPU or, where the package was built with CUDA kernels, all on one CUDA device.
There the tables' contents are not checked (that would wait for the device) and attention takes what
``turboquant/cuda/supported.hpp`` lists.

None of the operators is differentiable: the outputs carry no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from turboquant_cpp._core import LayerSpec, max_append_jobs

__all__ = [
    "attend_append",
    "commit_append",
    "decode_attention",
    "dequantize",
    "device_types",
    "encode_append",
    "library_path",
    "plan_append",
]


def library_path() -> Path:
    """Where the compiled operators are.

    Raises
    ------
    ImportError
        When the package was built without them.
    """
    found = sorted(Path(__file__).parent.glob("_torch_ops*.so"))
    if not found:
        raise ImportError(
            "turboquant_cpp was built without its torch operators (no _torch_ops library beside "
            f"{Path(__file__).name}): install torch 2.11 or newer and build the package again"
        )
    return found[0]


def device_types() -> tuple[str, ...]:
    """Device types that this build of the operators has kernels for."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return tuple(
        key.lower() for key in ("CPU", "CUDA") if has_kernel("turboquant::encode_append", key)
    )


torch.ops.load_library(str(library_path()))
# A decode step calls it once a layer: looked up once.
_attend_append = torch.ops.turboquant.attend_append.default


# What tracing needs to know of each operator: the tensors it gives, and that it changes only those
# its schema marks.


@torch.library.register_fake("turboquant::encode_append")
@torch.library.register_fake("turboquant::dequantize")
@torch.library.register_fake("turboquant::commit_append")
def _nothing(*arguments: object) -> None:
    return None


@torch.library.register_fake("turboquant::decode_attention")
def _decode_attention_fake(query: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("turboquant::attend_append")
def _attend_append_fake(query: Tensor, *others: object) -> Tensor:
    return query.new_empty(query.transpose(1, 2).shape)


@torch.library.register_fake("turboquant::plan_append")
def _plan_append_fake(
    rows: Tensor,
    page_table: Tensor,
    positions: Tensor,
    spec: Sequence[int],
    chunk_tokens: int,
    max_tokens: int,
) -> tuple[Tensor, Tensor]:
    jobs = max_append_jobs(LayerSpec.from_ints(spec), chunk_tokens)
    return rows.new_empty(rows.shape), rows.new_empty((rows.shape[0] * jobs, 6))


def encode_append(
    key_states: Tensor,
    value_states: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    smoothing: Tensor,
    slabs: Sequence[Tensor],
    counters: Tensor,
    rows: Tensor,
    jobs: Tensor,
    spec: Sequence[int],
) -> None:
    """Encode the tokens that `jobs` names into their pages, then store the new exact tokens.

    Parameters
    ----------
    key_states, value_states : Tensor
        New chunk ``[B, H, T, D]``, any strides; a row's real tokens are its last ones.
    exact_keys, exact_values, smoothing, slabs, counters : Tensor
        The layer's storage, changed in place. `counters` is int64 ``[2]``: float16 scales that
        saturated, tokens that held NaN or infinity.
    rows, jobs : Tensor
        Tables as they were before the append.
    spec : sequence of int
        ``LayerSpec.to_ints()``.
    """
    torch.ops.turboquant.encode_append(
        key_states,
        value_states,
        exact_keys,
        exact_values,
        smoothing,
        slabs,
        counters,
        rows,
        jobs,
        spec,
    )


def dequantize(
    exact_keys: Tensor,
    exact_values: Tensor,
    smoothing: Tensor,
    slabs: Sequence[Tensor],
    page_table: Tensor,
    rows: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
    spec: Sequence[int],
    *,
    past_tokens: int,
    first_position: int = 0,
) -> None:
    """Write committed tokens back as dense keys and values.

    Rows end together: of `past_tokens` positions, a row's tokens are the last ones, and what is
    before a shorter row is 0.

    Parameters
    ----------
    out_keys, out_values : Tensor
        ``[B, H, n, D]``, any strides: positions `first_position` to ``first_position + n``.
    past_tokens : int
        At least the longest row.
    first_position : int
        At most ``past_tokens - n``.
    """
    torch.ops.turboquant.dequantize(
        exact_keys,
        exact_values,
        smoothing,
        slabs,
        page_table,
        rows,
        out_keys,
        out_values,
        spec,
        past_tokens,
        first_position,
    )


def decode_attention(
    query: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    smoothing: Tensor,
    slabs: Sequence[Tensor],
    page_table: Tensor,
    rows: Tensor,
    sink_logits: Tensor | None,
    spec: Sequence[int],
    *,
    scaling: float,
    softcap: float = 0.0,
    sliding_window: int = 0,
) -> tuple[Tensor, Tensor]:
    """Causal attention over the packed past and the exact new chunk.

    Parameters
    ----------
    query : Tensor
        ``[B, Hq, q, D]``; query j of a row sits at position ``length + new_tokens - q + j``.
    key_states, value_states : Tensor
        New chunk ``[B, H, T, D]`` with T = q, or T = 0 when everything is committed.
    sink_logits : Tensor or None
        Learned sink logits, float32 ``[Hq]``.
    scaling, softcap, sliding_window : float, float, int
        Softmax scale; score cap and window (0: none).

    Returns
    -------
    out : Tensor
        ``[B, Hq, q, D]`` in the query's dtype; 0 where a query sees nothing.
    lse : Tensor
        Natural log-sum-exp of the scores, float32 ``[B, Hq, q]``; -inf where a query sees nothing.
    """
    out, lse = torch.ops.turboquant.decode_attention(
        query,
        key_states,
        value_states,
        exact_keys,
        exact_values,
        smoothing,
        slabs,
        page_table,
        rows,
        sink_logits,
        spec,
        scaling,
        softcap,
        sliding_window,
    )
    return out, lse


def attend_append(
    query: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    exact_keys: Tensor,
    exact_values: Tensor,
    smoothing: Tensor,
    slabs: Sequence[Tensor],
    counters: Tensor,
    page_table: Tensor,
    rows: Tensor,
    jobs: Tensor,
    sink_logits: Tensor | None,
    spec: Sequence[int],
    scaling: float,
    softcap: float,
    sliding_window: int,
) -> Tensor:
    """`decode_attention`, then `encode_append` of its chunk, in one call: a decode step.

    Arguments are theirs. `slabs` may have more slabs than `page_table` names, for the pages that
    `jobs` fills.

    Returns
    -------
    Tensor
        The output alone, as models go on with it: ``[B, q, Hq, D]``.
    """
    out: Tensor = _attend_append(
        query,
        key_states,
        value_states,
        exact_keys,
        exact_values,
        smoothing,
        slabs,
        counters,
        page_table,
        rows,
        jobs,
        sink_logits,
        spec,
        scaling,
        softcap,
        sliding_window,
    )
    return out


def plan_append(
    rows: Tensor,
    page_table: Tensor,
    positions: Tensor,
    spec: Sequence[int],
    *,
    chunk_tokens: int,
    max_tokens: int,
) -> tuple[Tensor, Tensor]:
    """What appending a chunk to a cache of fixed capacity takes, worked out where the tables are.

    Nothing is changed: `encode_append` carries the plan out, `commit_append` makes it the state.

    Parameters
    ----------
    rows, page_table, positions : Tensor
        Tables of rows that own their pages: entry e of a row keeps its page, only its tokens
        change. The page table has a column for every page that `max_tokens` tokens can fill.
    chunk_tokens : int
        Positions that come; a row's real tokens are the last ones, behind its padding.
    max_tokens : int
        What a row can hold.

    Returns
    -------
    planned : Tensor
        `rows` with the chunk's new tokens.
    jobs : Tensor
        Room for every job that such a chunk can take; the unused ones have 0 tokens.

    Raises
    ------
    ValueError
        On the CPU, when a row has no room for its tokens. On a GPU, which nobody waits for, the
        row takes the latest tokens that it has room for, and `commit_append` counts the others.
    """
    planned, jobs = torch.ops.turboquant.plan_append(
        rows, page_table, positions, spec, chunk_tokens, max_tokens
    )
    return planned, jobs


def commit_append(
    planned: Tensor,
    rows: Tensor,
    page_table: Tensor,
    positions: Tensor,
    spec: Sequence[int],
    *,
    chunk_tokens: int,
    max_tokens: int,
) -> None:
    """Make a plan of `plan_append` the state of its tables, in place, after it was carried out.

    Parameters
    ----------
    planned : Tensor
        As `plan_append` returned it, for the same other arguments.
    rows, page_table, positions : Tensor
        Changed in place.
    """
    torch.ops.turboquant.commit_append(
        planned, rows, page_table, positions, spec, chunk_tokens, max_tokens
    )
