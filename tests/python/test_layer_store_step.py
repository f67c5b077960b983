"""`LayerStore.attend_append`: a decode step in one call."""

from __future__ import annotations

import pytest
import torch
from turboquant_cpp import LayerStore, ops
from turboquant_cpp.spec import CacheConfig

HEADS, QUERY_HEADS, DIM = 2, 6, 64


def make_store(batch=1, dtype=torch.float32, **options):
    spec = CacheConfig(**{"bits": 4, **options}).layer_spec(0, DIM, HEADS)
    return LayerStore(spec, batch_size=batch, dtype=dtype, device="cpu")


def random_step(tokens, batch=1, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, QUERY_HEADS, tokens, DIM, generator=generator)
    keys, values = torch.randn(2, batch, HEADS, tokens, DIM, generator=generator)
    return query.to(dtype), keys.to(dtype), values.to(dtype)


def content(store):
    return [*store.dequantize(), *store.codes(), torch.tensor(store.lengths)]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"recipe": "plain"}, {"window_tokens": 128}], ids=str)
def test_a_step_is_attend_then_append(options, dtype):
    once, twice = (make_store(batch=2, dtype=dtype, **options) for _ in range(2))
    sinks = torch.linspace(-1, 1, QUERY_HEADS)
    # Tokens of each row: padding, single tokens across the edge of a block, a chunk.
    steps = [[130, 64], *([1, 1] for _ in range(70)), [0, 3], [5, 5], [1, 1]]
    for seed, counts in enumerate(steps):
        query, keys, values = random_step(max(counts), 2, seed, dtype)
        call = {"new_tokens": counts, "scaling": 0.125, "sliding_window": 100 * (seed % 2)}
        call |= {"softcap": 3.0} if seed % 3 == 0 else {}
        call |= {"sink_logits": sinks} if seed % 5 == 0 else {}
        expected, _ = twice.attend(query, keys, values, **call)
        twice.append(keys, values, counts)
        out = once.attend_append(query, keys, values, **call)
        assert out.is_contiguous()
        assert torch.equal(out.transpose(1, 2), expected)
    assert_same(content(once), content(twice))
    assert once.nbytes() == twice.nbytes()


@pytest.mark.parametrize("failing", ["_new_slab", "_attend_append", "_new_dense"])
def test_a_failed_step_changes_nothing(monkeypatch, failing):
    store = make_store(recipe="plain", sink_tokens=2, batch=2)
    if failing != "_new_dense":
        _, keys, values = random_step(100, 2)
        store.append(keys, values, new_tokens=[100, 40])
        store.select([1, 1])  # a shared page: the step has to copy it
    before, held = content(store), store.nbytes()

    def fail(*args, **kwargs):
        raise RuntimeError("injected")

    step = random_step(5000, 2, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(ops if failing == "_attend_append" else LayerStore, failing, fail)
        with pytest.raises(RuntimeError, match="injected"):
            store.attend_append(*step, scaling=0.125)
    assert_same(content(store), before)
    assert store.nbytes() == held
    lengths = store.lengths
    store.attend_append(*step, scaling=0.125)
    assert store.lengths == [length + 5000 for length in lengths]


WRONG = {
    "query": ({"query": torch.zeros(1, 5, 1, DIM)}, ValueError),
    "query: expected dtype": ({"query": torch.zeros(1, QUERY_HEADS, 1, DIM).half()}, ValueError),
    "query: expected a dense": ({"query": None}, TypeError),
    "key_states": (
        dict.fromkeys(["key_states", "value_states"], torch.zeros(1, HEADS, 2, DIM)),
        ValueError,
    ),
    "value_states": ({"value_states": torch.zeros(1, HEADS, 1, DIM).double()}, ValueError),
    "new_tokens": ({"new_tokens": [2]}, ValueError),
    "scaling": ({"scaling": float("nan")}, ValueError),
    "softcap": ({"softcap": -1.0}, ValueError),
    "sliding_window": ({"sliding_window": -1}, ValueError),
    "sink_logits": ({"sink_logits": torch.zeros(3)}, ValueError),
}


@pytest.mark.parametrize(("message", "wrong"), list(WRONG.items()), ids=list(WRONG))
def test_a_wrong_step_is_refused_after_right_ones_too(message, wrong):
    change, error = wrong
    store = make_store()
    query, keys, values = random_step(1)
    call = {"query": query, "key_states": keys, "value_states": values, "new_tokens": [1]}
    call |= {"scaling": 0.125, "softcap": 0.0, "sliding_window": 0}
    store.attend_append(**call)
    store.attend_append(**call)
    before = content(store)
    with pytest.raises(error, match=message):
        store.attend_append(**call | change)
    assert_same(content(store), before)
    store.attend_append(**call)
    assert store.lengths == [3]


def test_counts_that_changed_in_place_are_checked_again():
    store = make_store()
    query, keys, values = random_step(1)
    counts = [1]
    for _ in range(2):
        store.attend_append(query, keys, values, new_tokens=counts, scaling=0.125)
    counts[0] = 5
    with pytest.raises(ValueError, match=r"new_tokens\[0\]: expected 0 to 1, got 5"):
        store.attend_append(query, keys, values, new_tokens=counts, scaling=0.125)
    assert store.lengths == [2]


def test_a_step_of_another_batch_is_refused():
    store = make_store()
    query, keys, values = random_step(1)
    for _ in range(2):
        store.attend_append(query, keys, values, new_tokens=[1], scaling=0.125)
    store.repeat(2)
    with pytest.raises(ValueError, match="query: expected shape"):
        store.attend_append(query, keys, values, new_tokens=[1], scaling=0.125)
    assert store.lengths == [2, 2]


def test_autograd_is_left_alone():
    store = make_store()
    query, keys, values = (tensor.requires_grad_() for tensor in random_step(5))
    assert not store.attend_append(query, keys, values, scaling=0.125).requires_grad
    assert not store.dequantize()[0].requires_grad
