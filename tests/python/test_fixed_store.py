"""A store of fixed capacity holds and reads what the growing one does, bit for bit."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from faults import FailAt
from hypothesis import given, settings
from hypothesis import strategies as st
from turboquant_cpp import CacheConfig, FixedStore, LayerStore

HEADS, DIM, CAPACITY = 2, 32, 700
OPTIONS = [
    {},
    {"recipe": "plain"},
    {"k_bits": 3, "v_bits": 2, "window_tokens": 128, "sink_tokens": 0},
    {"bits": 2, "scale_dtype": "float16", "smooth_keys": False},
    {"k_bits": 2, "v_bits": 3, "codebook": "vector"},
]


def make_stores(batch=2, dtype=torch.float32, max_tokens=CAPACITY, **options):
    spec = CacheConfig(**{"bits": 4, **options}).layer_spec(0, DIM, HEADS)
    common = {"batch_size": batch, "dtype": dtype, "device": "cpu"}
    fixed = FixedStore(spec, max_tokens=max_tokens, **common)
    for tensor in fixed._tensors()[:2] + fixed._slabs:  # what holds no token must not matter
        tensor.fill_(255 if tensor.dtype == torch.uint8 else torch.nan)
    return LayerStore(spec, **common), fixed


def random_chunk(tokens, batch=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, HEADS, tokens, DIM, generator=generator).to(dtype)


def assert_same(growing, fixed):
    assert fixed.lengths == growing.lengths
    assert fixed.encoded_tokens == growing.encoded_tokens
    for mine, theirs in zip(fixed.codes(), growing.codes(), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(fixed.dequantize(), growing.dequantize(), strict=True):
        assert torch.equal(mine, theirs)
    query, keys, values = (
        random_chunk(3, growing.batch_size, seed=5),
        *random_chunk(3, growing.batch_size, seed=6),
    )
    for chunk in ((), (keys, values)):
        results = [
            store.attend(query[0].to(store.dtype), *(c.to(store.dtype) for c in chunk), scaling=0.2)
            for store in (fixed, growing)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_equals_the_growing_store(options, dtype):
    growing, fixed = make_stores(dtype=dtype, **options)
    assert_same(growing, fixed)
    for seed, (tokens, counts) in enumerate(
        [(150, [150, 113]), (1, None), (200, None), (3, [0, 3]), (64, None), (130, [130, 1])]
    ):
        chunk = random_chunk(tokens, seed=seed, dtype=dtype)
        growing.append(*chunk, counts)
        fixed.append(*chunk, counts)
        assert_same(growing, fixed)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_sequence_of_changes_equals_the_growing_store(data):
    growing, fixed = make_stores(**data.draw(st.sampled_from(OPTIONS)))
    for seed in range(data.draw(st.integers(1, 8))):
        batch = growing.batch_size
        change = data.draw(st.sampled_from(["append", "append", "crop", "select", "reset"]))
        if change == "append":
            room = CAPACITY - growing.max_length
            tokens = data.draw(st.integers(1, 300))
            if tokens > room:
                continue
            counts = data.draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
            chunk = random_chunk(tokens, batch, seed)
            growing.append(*chunk, counts)
            fixed.append(*chunk, counts)
        elif change == "crop":
            lengths = [data.draw(st.integers(0, length)) for length in growing.lengths]
            growing.crop(lengths)
            fixed.crop(lengths)
        elif change == "select":
            rows = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=3))
            growing.select(rows)
            fixed.select(rows)
        else:
            growing.reset()
            fixed.reset()
        assert_same(growing, fixed)
        assert_same(growing, copy.deepcopy(fixed))
        state = fixed.export_state()
        assert_same(growing, FixedStore.from_state(state, "cpu", max_tokens=CAPACITY))
        assert_same(growing, LayerStore.from_state(state, "cpu"))


@pytest.mark.parametrize("is_planned", [True, False])
def test_a_step_equals_the_growing_stores(is_planned):
    growing, fixed = make_stores()
    prompt = random_chunk(260)
    growing.append(*prompt)
    fixed.append(*prompt)
    for step in range(150):
        chunk = random_chunk(1, seed=100 + step)
        query = random_chunk(1, seed=300 + step)[0]
        expected = growing.attend_append(query, *chunk, scaling=0.2, softcap=3.0)
        if is_planned:
            plan = fixed.plan(1)
            result = fixed.attend_append_planned(query, *chunk, plan, scaling=0.2, softcap=3.0)
        else:
            result = fixed.attend_append(query, *chunk, scaling=0.2, softcap=3.0)
        assert torch.equal(result, expected)
        expected, _ = growing.attend(query, scaling=0.2)
        assert torch.equal(fixed.attend_committed(query, scaling=0.2)[0], expected)
    assert_same(growing, fixed)
    assert int(fixed.seen_positions) == 410


def test_padding_is_left_out_of_planned_steps():
    growing, fixed = make_stores()
    fixed.place([70, 0], 0)
    for at, counts in ((0, [0, 64]), (64, [58, 64]), (128, [64, 64])):
        chunk = random_chunk(64, seed=at)
        growing.append(*chunk, counts)
        fixed.append_planned(*chunk, fixed.plan(64))
    assert_same(growing, fixed)


def test_the_storage_stays_where_it_is():
    _, fixed = make_stores()
    places = [tensor.data_ptr() for tensor in fixed._tensors()]
    fixed.append(*random_chunk(400))
    fixed.crop(390)
    fixed.select([1, 0])
    fixed.reset()
    fixed.append(*random_chunk(CAPACITY))
    assert [tensor.data_ptr() for tensor in fixed._tensors()] == places


def test_crops_within_pages_find_room_for_every_token():
    """Each leaves a page that is not full; the rows still hold what they were made for."""
    growing, fixed = make_stores(max_tokens=400)
    for seed in range(5):
        chunk = random_chunk(400 - growing.max_length, seed=seed)
        growing.append(*chunk)
        fixed.append(*chunk)
        growing.crop(180 - 20 * seed)
        fixed.crop(180 - 20 * seed)
    chunk = random_chunk(300)
    growing.append(*chunk)
    fixed.append(*chunk)
    assert_same(growing, fixed)


def test_a_full_store_takes_no_more():
    growing, fixed = make_stores(max_tokens=300)
    chunk = random_chunk(299)
    growing.append(*chunk)
    fixed.append(*chunk)
    with pytest.raises(
        ValueError, match=r"at most 1 more tokens in row 0 .* made for 300\), got 2"
    ):
        fixed.append(*random_chunk(2))
    with pytest.raises((RuntimeError, ValueError), match="at most 1 more tokens in row 0"):
        fixed.plan(2)
    assert_same(growing, fixed)
    fixed.append(*random_chunk(1, seed=9))
    growing.append(*random_chunk(1, seed=9))
    assert_same(growing, fixed)
    assert fixed.refused_tokens == [0, 0]


@pytest.mark.parametrize("max_tokens", [0, -3, 2**31])
def test_an_impossible_capacity_is_refused(max_tokens):
    with pytest.raises(ValueError, match="max_tokens: expected 1 to"):
        make_stores(max_tokens=max_tokens)


@pytest.mark.parametrize("max_tokens", [1, 4, 131, 132, 133])
def test_a_small_capacity_can_be_filled(max_tokens):
    growing, fixed = make_stores(max_tokens=max_tokens)
    chunk = random_chunk(max_tokens)
    growing.append(*chunk)
    fixed.append(*chunk)
    assert_same(growing, fixed)


def test_memory_is_that_of_the_capacity():
    _, fixed = make_stores()
    empty = fixed.nbytes()
    fixed.append(*random_chunk(CAPACITY))
    assert fixed.nbytes() == empty
    entries = max(len(entries) for entries in fixed._entries())
    page_bytes = fixed._slabs[0].shape[1]
    assert empty["pages"] == 2 * entries * page_bytes


def test_a_state_is_of_what_is_held_and_of_any_store():
    """Pages, slots and smoothing that are not in use were poisoned; none of it shows."""
    growing, fixed = make_stores()
    fixed._dense.smoothing.fill_(torch.nan)
    for store in (growing, fixed):
        store.append(*random_chunk(300), [300, 30])
        store.crop([250, 30])
    state, expected = fixed.export_state(), growing.export_state()
    assert torch.equal(state.pages, expected.pages)
    assert torch.equal(state.exact_keys, expected.exact_keys)
    assert torch.equal(state.exact_values, expected.exact_values)
    assert torch.equal(state.smoothing, expected.smoothing)
    for mine, theirs in (
        (state.table.rows(), expected.table.rows()),
        (state.table.page_table(), expected.table.page_table()),
    ):
        assert (mine == theirs).all()
    # Rows that share pages, and rows of a store that grows.
    growing.select([0, 1, 0])
    assert_same(growing, FixedStore.from_state(growing.export_state(), "cpu", max_tokens=260))
    assert FixedStore.from_state(state, "cpu").max_tokens == 250
    with pytest.raises(ValueError, match=r"max_tokens: expected at least 250 .*, got 249"):
        FixedStore.from_state(state, "cpu", max_tokens=249)


def test_what_a_state_made_can_be_filled():
    growing, fixed = make_stores(max_tokens=400)
    for store in (growing, fixed):
        store.append(*random_chunk(400))
        store.crop(150)
    again = FixedStore.from_state(fixed.export_state(), "cpu", max_tokens=400)
    for store in (growing, again):
        store.append(*random_chunk(250, seed=1))
    assert_same(growing, again)
    with pytest.raises(ValueError, match="at most 0 more tokens in row 0"):
        again.append(*random_chunk(1))


def planned_step(store, tokens):
    query, chunk = random_chunk(tokens, seed=1)[0], random_chunk(tokens, seed=2)
    return store.attend_append_planned(query, *chunk, store.plan(tokens), scaling=0.2)


CHANGES = {
    "append 1": lambda store: store.append(*random_chunk(1, seed=1)),
    "append 200": lambda store: store.append(*random_chunk(200, seed=1), [200, 130]),
    "planned step 1": lambda store: planned_step(store, 1),
    "planned step 70": lambda store: planned_step(store, 70),
    "place": lambda store: store.place([7, 0], 300),
    "crop": lambda store: store.crop([250, 100]),
    "crop, counted": lambda store: store.crop(90, seen_positions=90),
    "reorder": lambda store: store.select([1, 0]),
    "repeat": lambda store: store.select([1, 0, 1]),
    "clone": lambda store: store.clone(),
}


def shown(store):
    counts = [*store.lengths, int(store.seen_positions), *store.refused_tokens]
    counts += [store.saturated_scales, store.non_finite_tokens, *store.encoded_tokens]
    buffers = [store.smoothing, store._positions[:, 1].clone()]
    return [torch.tensor(counts), *buffers, *store.dequantize(), *store.codes()]


@pytest.mark.parametrize("options", [{}, {"recipe": "plain"}], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_fails_anywhere_has_not_happened(change, options):
    """Every operation fails once, the copies in place too."""

    def make():
        _, store = make_stores(**options)
        store.append(*random_chunk(300), [300, 170])
        return store

    before, after = make(), make()
    CHANGES[change](after)
    failures = 0
    for nth in itertools.count(1):
        store, fault = make(), FailAt(nth)
        try:
            with fault:
                CHANGES[change](store)
        except torch.OutOfMemoryError:
            failures += 1
        else:
            assert nth > fault.calls
            break
        assert all(map(torch.equal, shown(store), shown(before))), nth
        CHANGES[change](store)
        assert all(map(torch.equal, shown(store), shown(after))), nth
    assert failures > 2
