"""`StoreState`: what `LayerStore.export_state` leaves out, and what fits together."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from turboquant_cpp import CacheConfig, LayerStore
from turboquant_cpp._core import BlockLayout

HEADS, DIM = 2, 16


def make_store(tokens, batch=2, **options):
    spec = CacheConfig(**{"bits": 4, **options}).layer_spec(0, DIM, HEADS)
    store = LayerStore(spec, batch_size=batch, dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(0)
    store.append(*torch.randn(2, batch, HEADS, tokens, DIM, generator=generator))
    return store


def shown(store):
    return [*store.dequantize(), *store.codes(), torch.tensor(store.lengths)]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("options", [{}, {"recipe": "plain"}, {"window_tokens": 128}], ids=str)
@pytest.mark.parametrize("tokens", [1, 100, 3000])
def test_there_and_back(options, tokens):
    store = make_store(tokens, **options)
    state = store.export_state()
    twin = LayerStore.from_state(state, "cpu")
    assert_same(shown(twin), shown(store))
    # Two stores of one state are independent of each other and of it.
    other = LayerStore.from_state(state, "cpu")
    for each in (twin, store):
        each.append(*torch.ones(2, 2, HEADS, 150, DIM))
    assert_same(shown(twin), shown(store))
    assert other.lengths == [tokens] * 2
    assert_same(shown(other), shown(LayerStore.from_state(state, "cpu")))


def test_a_store_that_holds_nothing():
    store = make_store(100)
    store.reset()
    twin = LayerStore.from_state(store.export_state(), "cpu")
    twin.append(*torch.ones(2, 2, HEADS, 150, DIM))
    store.append(*torch.ones(2, 2, HEADS, 150, DIM))
    assert_same(shown(twin), shown(store))


def test_nothing_dead_is_exported():
    """Stale pages, slots and smoothing are poisoned; none of it shows."""
    store = make_store(1000, batch=3)
    store.crop([1000, 3, 500])
    store.select([2, 1, 2])
    live = torch.from_numpy(store._table.live_slots())[:, None, :, None]
    for buffer in (store._dense.keys, store._dense.values):
        buffer[~live.expand_as(buffer)] = float("nan")
    store._dense.smoothing[1] = float("nan")
    used = set(store._table.page_table()[:, :, 0].flatten().tolist())
    for page in range(len(store._slabs) * store._pages_per_slab):
        if page not in used:
            store._slabs[page // store._pages_per_slab][page % store._pages_per_slab] = 255
    state = store.export_state()
    assert len(state.pages) == 8  # 496 tokens behind the sinks; two rows share them
    assert state.exact_keys.isfinite().all()
    assert state.exact_values.isfinite().all()
    assert torch.equal(state.smoothing[1], torch.ones(HEADS, DIM))
    assert_same(shown(LayerStore.from_state(state, "cpu")), shown(store))


def test_slabs_of_what_was_read_are_not_larger_than_it():
    store = make_store(70, batch=1, recipe="plain", sink_tokens=0)
    store.select([0] * 100)
    twin = LayerStore.from_state(store.export_state(), "cpu")
    assert twin.nbytes()["pages"] == 2 * BlockLayout(store.spec).page_bytes(HEADS)
    twin.append(*torch.ones(2, 100, HEADS, 150, DIM))
    store.append(*torch.ones(2, 100, HEADS, 150, DIM))
    assert_same(shown(twin), shown(store))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pages": torch.zeros(1, 3, dtype=torch.uint8)}, r"pages: expected shape \(2, "),
        ({"exact_keys": torch.zeros(1)}, r"exact_keys: expected shape \(1, 2, 132, 16\)"),
        ({"exact_values": torch.zeros(1).half()}, r"exact_values: expected torch.float32, got"),
        ({"smoothing": torch.zeros(1, HEADS, DIM)}, "smoothing: expected numbers of 1/16 to 256"),
        ({"smoothing": torch.ones(1, HEADS)}, r"smoothing: expected shape \(1, 2, 16\)"),
    ],
)
def test_parts_that_do_not_fit(change, message):
    state = make_store(250, batch=1).export_state()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(state, **change)
