from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from turboquant_cpp.hf.padding import (
    checked_left_padding,
    expanded_rows,
    left_padding_of_mask,
    tokens_after,
)

counts = st.lists(st.integers(0, 12), min_size=1, max_size=4)


@given(counts)
def test_left_padding_is_read_back(padding):
    mask = torch.arange(12)[None] >= torch.tensor(padding)[:, None]
    assert left_padding_of_mask(mask) == padding
    assert checked_left_padding(None, mask.long()) == tuple(padding)


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_any_other_pattern_is_none(row):
    is_left_padding = row == sorted(row)
    assert (left_padding_of_mask(torch.tensor([row])) is not None) == is_left_padding


@given(counts, st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_chunks_add_up_to_the_real_tokens(padding, chunks):
    stored, seen = [0] * len(padding), 0
    for tokens in chunks:
        new = tokens_after(padding, seen, tokens)
        assert all(0 <= count <= tokens for count in new)
        stored = [old + count for old, count in zip(stored, new, strict=True)]
        seen += tokens
    assert stored == [max(seen - start, 0) for start in padding]


def test_rows_repeat_for_beams():
    assert expanded_rows(None, 3) == [0, 0, 0]
    assert expanded_rows([1, 2], 4) == [1, 1, 2, 2]
    with pytest.raises(ValueError, match="multiple of 2 rows"):
        expanded_rows([1, 2], 3)


def test_both_forms_at_once_are_refused():
    with pytest.raises(ValueError, match="at most one"):
        checked_left_padding([0], torch.ones(1, 2))
    with pytest.raises(ValueError, match="2-D mask"):
        checked_left_padding(None, torch.ones(1, 1, 2, 2))
