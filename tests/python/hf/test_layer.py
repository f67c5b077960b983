"""`CompressedLayer`: pending chunks, crops, rows, devices, copies, wrong input."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from turboquant_cpp import CacheConfig
from turboquant_cpp.hf.chunk import pending_chunk
from turboquant_cpp.hf.context import CacheContext
from turboquant_cpp.hf.dense import AttentionCall
from turboquant_cpp.hf.fixed_layer import FixedLayer
from turboquant_cpp.hf.layer import CompressedLayer
from turboquant_cpp.layer_store import LayerStore
from twin import TwinLayer

HEADS, DIM = 2, 16


class ModelConfig:
    _attn_implementation = "sdpa"
    model_type = "tiny"


def make_layer(implementation: str = "sdpa", **options) -> CompressedLayer:
    model_config = ModelConfig()
    model_config._attn_implementation = implementation
    config = options.pop("config", CacheConfig(bits=4))
    kind = FixedLayer if "max_cache_len" in options else CompressedLayer
    return kind(CacheContext(config, model_config, **options), layer_idx=0)


def states(tokens: int, batch: int = 1, seed: int = 0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, batch, HEADS, tokens, DIM)
    return torch.randn(shape, generator=generator).to(dtype).unbind()


def fingerprint(layer: CompressedLayer):
    """Everything that an outsider can see of a layer."""
    keys, values = layer.dense()
    return layer.get_seq_length(), layer.store.lengths, keys, values


def assert_unchanged(layer: CompressedLayer, before) -> None:
    after = fingerprint(layer)
    assert after[:2] == before[:2]
    assert torch.equal(after[2], before[2])
    assert torch.equal(after[3], before[3])


def test_masks_are_asked_for_before_the_update():
    layer = make_layer()
    assert layer.get_mask_sizes(7) == (7, 0)
    layer.update(*states(7))
    assert layer.get_mask_sizes(1) == (8, 0)
    assert layer.get_max_length() == -1


def test_first_prefill_is_handed_back_unchanged():
    keys, values = states(200)
    read_keys, read_values = make_layer().update(keys, values)
    assert read_keys is keys
    assert read_values is values


def test_pending_chunk_counts_at_once_and_commits_at_the_next_access():
    layer = make_layer("turboquant")
    keys, values = states(70)
    tagged, _ = layer.update(keys, values)
    assert layer.get_seq_length() == 70
    assert layer.get_mask_sizes(1) == (71, 0)
    assert layer.store.lengths == [0]
    assert pending_chunk(tagged, values) is not None
    assert pending_chunk(keys, values) is None
    assert torch.equal(layer.keys[:, :, -64:], keys[:, :, -64:])
    assert layer.store.lengths == [70]


def test_attention_commits():
    layer = make_layer("turboquant")
    chunk = pending_chunk(*layer.update(*states(70)))
    chunk.attend(torch.randn(1, 4, 70, DIM), None, AttentionCall(scaling=0.25))
    assert layer.store.lengths == [70]


def test_shared_keys_are_read_again_before_they_are_encoded():
    """Layers that share keys (Gemma3n) get the same chunk, exact, in the same step."""
    outputs = []
    for is_shared in (False, True):
        layer = make_layer("turboquant", kv_source_layers=frozenset({0} if is_shared else ()))
        layer.update(*states(150))
        layer.commit()
        query = torch.ones(1, 4, 3, DIM)
        chunk = pending_chunk(*layer.update(*states(3, seed=1)))
        first = chunk.attend(query, None, AttentionCall(scaling=0.25))
        assert layer.store.lengths == [153 - 3 * is_shared]
        again = chunk.attend(query, None, AttentionCall(scaling=0.25))
        torch.testing.assert_close(again, first)
        outputs.append(first)
    torch.testing.assert_close(*outputs)


def test_keys_of_an_earlier_step_are_refused():
    layer = make_layer("turboquant")
    layer.update(*states(150))
    layer.commit()
    call, query = AttentionCall(scaling=0.25), torch.ones(1, 4, 1, DIM)
    old = pending_chunk(*layer.update(*states(1)))
    old.attend(query, None, call)
    pending_chunk(*layer.update(*states(1))).attend(query, None, call)
    with pytest.raises(RuntimeError, match="earlier step"):
        old.attend(query, None, call)


def test_crop_removes_or_keeps():
    keys, values = states(100)
    removing, keeping = make_layer(), make_layer()
    for layer in (removing, keeping):
        layer.update(keys, values)
    removing.crop(-30)
    keeping.crop(70)
    assert removing.get_seq_length() == keeping.get_seq_length() == 70
    torch.testing.assert_close(removing.keys, keeping.keys)
    keeping.crop(90)
    keeping.crop(0)
    assert keeping.get_seq_length() == 70
    removing.crop(-1000)
    assert removing.get_seq_length() == 0
    make_layer().crop(-3)


def assert_reads_alike(actual, expected):
    """Alike but where rounding decides.

    Float32 and the twin's float64 may choose another code for a coordinate on a boundary, for one
    vector in ten thousand, or round a scale to neighbouring float16 numbers, 2^-10 of a coordinate:
    one vector in two thousand, so more than 4 of 500 are one test in fifty thousand.
    """
    gap = actual - expected
    widest, largest = gap.abs().amax(-1), expected.abs().amax(-1)
    rows = expected.shape[0] if expected.dim() == 4 else 1  # which may be copies of one row
    vectors = widest.numel() // rows
    apart = widest > 1e-4 + 2**-10 * largest
    assert int(apart.sum()) <= rows * max(1, vectors // 500)
    rounded_apart = widest > 1e-4 + 1e-4 * largest
    assert int(rounded_apart.sum()) <= rows * max(4, vectors // 125)
    # The widest gap between levels at 3 bits is 0.8 of a coordinate's deviation, norm / sqrt(D).
    bound = expected.norm(dim=-1) * expected.shape[-1] ** -0.5
    assert bool((gap.norm(dim=-1) <= bound)[rounded_apart].all())


@settings(max_examples=25, deadline=None)
@given(
    padding=st.lists(st.integers(0, 40), min_size=2, max_size=2),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(1, 150)),
            st.tuples(st.just("crop"), st.integers(0, 150)),
            st.tuples(st.just("select"), st.lists(st.integers(0, 5), min_size=1, max_size=3)),
            st.tuples(st.just("repeat"), st.integers(1, 2)),
            st.tuples(st.sampled_from(["copy", "file"]), st.none()),
        ),
        min_size=1,
        max_size=8,
    ),
    window=st.sampled_from([0, 64, 128]),
    options=st.sampled_from([{}, {"dequantize": "incremental"}, {"max_cache_len": 2000}]),
    prefill=st.sampled_from(["exact", "quantized"]),
)
# Two scales of one row that round apart.
@example([0, 32], [("append", 56), ("append", 93), ("append", 110)], 64, {}, "quantized")
def test_any_history_reads_like_the_twin(padding, steps, window, options, prefill):
    config = CacheConfig(bits=3, window_tokens=window)
    layer = make_layer(config=config, left_padding=tuple(padding), prefill=prefill, **options)
    twin = TwinLayer(
        lambda dim, heads: config.layer_spec(0, dim, heads),
        left_padding=padding,
        quantized_prefill=prefill == "quantized",
    )
    for index, (action, argument) in enumerate([("append", 50), *steps]):
        if action == "append":
            chunk = states(argument, batch=len(twin.rows) or 2, seed=index)
            expected, actual = twin.update(*chunk), layer.update(*chunk)
            for one, other in zip(expected, actual, strict=True):
                for row, start in enumerate(layer.left_padding):  # padding is masked: anything
                    assert_reads_alike(other[row, :, start:], one[row, :, start:])
        elif action == "crop":
            twin.crop(-min(argument, twin.seen))
            layer.crop(-argument)
        elif action == "select":
            rows = torch.tensor(argument) % len(twin.rows)
            twin.batch_select_indices(rows)
            layer.batch_select_indices(rows)
        elif action == "repeat" and len(twin.rows) < 5:
            twin.batch_repeat_interleave(argument)
            layer.batch_repeat_interleave(argument)
        elif action == "copy":
            layer = copy.deepcopy(layer)
        elif action == "file":
            held = layer.export_state(), layer.committed_tokens, layer.left_padding
            layer = type(layer)(layer.context, 0)
            layer.hold(*held, torch.device("cpu"))
        assert layer.get_seq_length() == twin.get_seq_length()
        for one, other in zip(twin.dense(torch.float32), layer.dense(), strict=True):
            assert_reads_alike(other, one)


@pytest.mark.parametrize("prefill", ["exact", "quantized"])
def test_incremental_reading_dequantises_no_block_twice(monkeypatch, prefill):
    layer = make_layer(dequantize="incremental", prefill=prefill)
    layer.update(*states(300))
    layer.update(*states(1))
    ranges = []
    whole = LayerStore.dequantize

    def counted(store, past_tokens, *buffers, positions: tuple[int, int]):
        ranges.append(positions)
        return whole(store, past_tokens, *buffers, positions=positions)

    monkeypatch.setattr(LayerStore, "dequantize", counted)
    for _ in range(200):
        layer.update(*states(1))
    dequantised = sum(end - first for first, end in ranges)
    # Every token once as it is encoded; read through the codes, once more as it comes, and then
    # with the block that is encoded beside it.
    blocks = layer.store.encoded_tokens[0] - 192
    assert blocks == 192
    assert dequantised <= (blocks if prefill == "exact" else 200 + 3 * 128)


def test_a_crop_is_not_missed_by_the_incremental_copy():
    layer = make_layer(dequantize="incremental", prefill="quantized")
    layer.update(*states(100))
    layer.crop(-10)
    keys, values = states(10, seed=1)
    read_keys, read_values = layer.update(keys, values)
    assert torch.equal(read_keys[:, :, 90:], keys)
    assert torch.equal(read_values[:, :, 90:], values)


def test_rows_are_selected_and_repeated():
    layer = make_layer()
    layer.update(*states(150, batch=3))
    keys = layer.keys
    layer.batch_select_indices(torch.tensor([True, False, True]))
    torch.testing.assert_close(layer.keys, keys[[0, 2]])
    layer.batch_repeat_interleave(2)
    torch.testing.assert_close(layer.keys, keys[[0, 0, 2, 2]])
    layer.reorder_cache(torch.tensor([3, 1, 0, 0]))
    torch.testing.assert_close(layer.keys, keys[[2, 0, 0, 0]])
    assert layer.batch_size == 4


def test_contrastive_style_reorder_with_a_pending_chunk():
    """Repeat rows, try one candidate in each, keep the best: what contrastive search does."""
    layer = make_layer("turboquant")
    layer.update(*states(150, batch=2))
    layer.batch_repeat_interleave(3)
    candidates = states(1, batch=6, seed=1)
    layer.update(*candidates)
    with pytest.warns(UserWarning, match="never reached"):
        layer.batch_select_indices(torch.tensor([2, 3]))
    torch.testing.assert_close(layer.keys[:, :, -1:], candidates[0][[2, 3]])
    assert layer.get_seq_length() == 151


def test_reset_forgets_and_takes_another_batch():
    layer = make_layer(left_padding=(3,))
    layer.update(*states(150))
    layer.reset()
    assert layer.get_seq_length() == 0
    assert not layer.is_initialized
    assert sum(layer.nbytes().values()) == 0
    layer.update(*states(10, batch=4))
    assert layer.store.lengths == [10] * 4


def test_offload_and_prefetch_keep_the_contents():
    layer = make_layer()
    layer.update(*states(150))
    before = fingerprint(layer)
    layer.offload()
    layer.prefetch()
    assert_unchanged(layer, before)


def test_deepcopy_is_independent():
    layer = make_layer("turboquant", left_padding=(5,))
    layer.update(*states(150))
    layer.commit()
    twin = copy.deepcopy(layer)
    before = fingerprint(twin)
    layer.crop(-150)
    layer.update(*states(80, seed=1))
    layer.commit()
    assert_unchanged(twin, before)
    assert twin.store.lengths == [145]


def test_pickling_names_what_to_use():
    with pytest.raises(TypeError, match=r"save\(\) and load\(\)"):
        pickle.dumps(make_layer())


def test_left_padding_is_repeated_for_beams():
    layer = make_layer(left_padding=(4, 0))
    layer.update(*states(10, batch=6))
    assert layer.store.lengths == [6, 6, 6, 10, 10, 10]
    with pytest.raises(ValueError, match="multiple of 2 rows"):
        make_layer(left_padding=(4, 0)).update(*states(10, batch=3))


def test_padding_longer_than_the_first_chunk():
    layer = make_layer(left_padding=(15, 0))
    layer.update(*states(10, batch=2))
    assert layer.store.lengths == [0, 10]
    layer.update(*states(10, batch=2))
    assert layer.store.lengths == [5, 20]
    assert not layer.keys[0, :, :15].any()


@pytest.mark.parametrize("implementation", ["sdpa", "turboquant"])
@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (states(0), "at least one token"),
        (states(5, batch=2), r"expected shape \(1, 2, 5, 16\)"),
        (states(5, dtype=torch.float16), "expected dtype torch.float32"),
        ((states(5)[0][0], states(5)[1][0]), "4 dimensions"),
        ((states(5)[0], states(6)[1]), "like key_states"),
        ((states(5)[0], states(5)[1][..., :8]), r"\(MLA\) are not supported"),
        ((states(5)[0].repeat(1, 2, 1, 1), states(5)[1].repeat(1, 2, 1, 1)), "expected shape"),
        ([states(5)[0].to("meta")] * 2, "key_states: expected device cpu"),
        ((states(5)[0], states(5)[1].to("meta")), "value_states: expected .* on cpu like"),
    ],
    ids=["empty", "batch", "dtype", "rank", "lengths", "mla", "heads", "device", "devices"],
)
def test_wrong_chunk_is_refused_and_changes_nothing(implementation, chunk, message):
    layer = make_layer(implementation)
    layer.update(*states(150))
    before = fingerprint(layer)
    with pytest.raises(ValueError, match=message):
        layer.update(*chunk)
    assert_unchanged(layer, before)


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (states(5, dtype=torch.float64), "dtype"),
        ((states(5)[0][..., :7],) * 2, "head_dim"),
        (states(0), "at least one token"),
    ],
    ids=["dtype", "odd width", "empty"],
)
def test_wrong_first_chunk_leaves_the_layer_empty(chunk, message):
    layer = make_layer()
    with pytest.raises(ValueError, match=message):
        layer.update(*chunk)
    assert not layer.is_initialized
    assert layer.get_seq_length() == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda layer: layer.update(None, None), TypeError, "key_states: .*got NoneType"),
        (lambda layer: layer.update(states(3)[0], 3.0), TypeError, "value_states: .*got float"),
        (lambda layer: layer.crop(1.5), TypeError, "integer"),
        (lambda layer: layer.reorder_cache(torch.tensor([2])), ValueError, r"indices\[0\]"),
        (lambda layer: layer.batch_repeat_interleave(0), ValueError, "repeats: .*at least 1"),
        (
            lambda layer: layer.batch_select_indices(torch.tensor([True, False])),
            ValueError,
            "indices: expected a mask of 1 rows",
        ),
    ],
)
def test_wrong_arguments_change_nothing(call, error, message):
    layer = make_layer()
    layer.update(*states(150))
    before = fingerprint(layer)
    with pytest.raises(error, match=message):
        call(layer)
    assert_unchanged(layer, before)


def test_nan_poisons_its_own_token_only():
    keys, values = states(200)
    keys, values = keys.clone(), values.clone()
    keys[0, 0, 20, 3] = float("nan")
    values[0, 1, 30, 0] = float("inf")
    layer = make_layer()
    layer.update(keys, values)
    assert torch.isfinite(layer.keys).all(-1).nonzero().shape[0] == HEADS * 200 - 1
    assert torch.isfinite(layer.values).all(-1).nonzero().shape[0] == HEADS * 200 - 1
    assert layer.store.non_finite_tokens == 2


def test_keys_cannot_be_assigned():
    layer = make_layer()
    with pytest.raises(AttributeError, match="use update"):
        layer.keys = torch.zeros(1)
    assert layer.keys is None
    assert layer.values is None
