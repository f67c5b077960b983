"""Where the rows of a left-padded batch begin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

__all__ = ["checked_left_padding", "expanded_rows", "left_padding_of_mask", "tokens_after"]


def left_padding_of_mask(mask: Tensor) -> list[int] | None:
    """Padding tokens at the start of each row of a 2-D mask; None for any other pattern.

    A row must be zeros, then ones up to its end. A row of zeros alone counts as padding only.

    Parameters
    ----------
    mask : Tensor
        ``[B, T]``, nonzero where there is a token.
    """
    real = mask != 0
    if bool((real[:, :-1] & ~real[:, 1:]).any()):
        return None
    return (mask.shape[1] - real.sum(dim=1)).tolist()


def checked_left_padding(
    left_padding: Sequence[int] | None, attention_mask: Tensor | None
) -> tuple[int, ...] | None:
    """The cache's ``left_padding=`` or ``attention_mask=`` as one count a row."""
    if left_padding is not None and attention_mask is not None:
        raise ValueError("left_padding, attention_mask: expected at most one of the two, got both")
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise ValueError(
                "attention_mask: expected a 2-D mask [batch, tokens], got shape "
                f"{tuple(attention_mask.shape)}"
            )
        counts = left_padding_of_mask(attention_mask)
        if counts is None:
            raise ValueError(
                "attention_mask: expected zeros only before a row's first token (left padding), "
                "got zeros after it"
            )
        return tuple(counts)
    if left_padding is None:
        return None
    counts = list(left_padding) if isinstance(left_padding, Iterable) else []
    if not counts or any(int(count) != count or count < 0 for count in counts):
        raise ValueError(
            f"left_padding: expected one count of at least 0 a row, got {left_padding!r}"
        )
    return tuple(int(count) for count in counts)


def expanded_rows(left_padding: Sequence[int] | None, batch_size: int) -> list[int]:
    """One count for each of `batch_size` rows.

    ``generate()`` repeats each prompt for beams and returned sequences before the first step, so
    a batch that is a multiple of the counts repeats each of them.

    Raises
    ------
    ValueError
        When the batch is no multiple of the counts.
    """
    if left_padding is None:
        return [0] * batch_size
    repeats, rest = divmod(batch_size, len(left_padding))
    if rest:
        raise ValueError(
            f"left_padding: expected a batch of a multiple of {len(left_padding)} rows (one count "
            f"a prompt), got {batch_size}"
        )
    return [count for count in left_padding for _ in range(repeats)]


def tokens_after(left_padding: Sequence[int], seen: int, new_tokens: int) -> list[int]:
    """How many of the positions ``seen .. seen + new_tokens`` of each row are real tokens."""
    return [new_tokens - min(max(start - seen, 0), new_tokens) for start in left_padding]
