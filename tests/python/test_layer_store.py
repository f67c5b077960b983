from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distortion import EXACT_DISTORTION
from hypothesis import given, settings
from hypothesis import strategies as st
from turboquant_cpp import _core, ops
from turboquant_cpp._core import BlockLayout, Codebook
from turboquant_cpp.layer_store import LayerStore
from turboquant_cpp.spec import CacheConfig

HEADS = 2
DIM = 64
DISTORTION = EXACT_DISTORTION[DIM]


def make_spec(**options):
    return CacheConfig(**{"bits": 4, **options}).layer_spec(0, DIM, HEADS)


def make_store(batch=1, dtype=torch.float32, **options):
    return LayerStore(make_spec(**options), batch_size=batch, dtype=dtype, device="cpu")


def random_chunk(tokens, batch=1, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    chunk = torch.randn(2, batch, HEADS, tokens, DIM, generator=generator)
    return chunk[0].to(dtype), chunk[1].to(dtype)


def relative_error(approximate, exact):
    return float((approximate - exact).square().sum() / exact.square().sum())


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def causal_attention(query, keys, values, positions, scaling, softcap=0.0, window=0, sinks=None):
    """Plain float64 attention of `query` at `positions` over all of `keys`."""
    group = query.shape[1] // keys.shape[1]
    keys = keys.double().repeat_interleave(group, 1)
    values = values.double().repeat_interleave(group, 1)
    scores = query.double() @ keys.transpose(-1, -2) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = positions[:, None] - torch.arange(keys.shape[2])[None]
    hidden = (distance < 0) | ((distance >= window) if window else torch.zeros_like(distance > 0))
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
        values = torch.cat([values, torch.zeros_like(values[:, :, :1])], 2)
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def test_a_new_store_is_empty():
    store = make_store(batch=3)
    assert store.lengths == [0, 0, 0]
    assert store.max_length == 0
    assert sum(store.nbytes().values()) == 0
    keys, values = store.dequantize()
    assert keys.shape == values.shape == (3, HEADS, 0, DIM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_tokens_come_back_within_the_quantisers_error(bits, dtype):
    store = make_store(bits=bits, dtype=dtype)
    keys, values = random_chunk(400, dtype=dtype)
    store.append(keys, values)
    assert store.lengths == [400]
    # 4 sinks, then blocks of 64 while more than 127 exact tokens would remain.
    assert store.encoded_tokens == [320]
    got_keys, got_values = store.dequantize()
    assert got_keys.dtype == dtype
    exact = [*range(4), *range(324, 400)]
    assert torch.equal(got_keys[:, :, exact], keys[:, :, exact])
    assert torch.equal(got_values[:, :, exact], values[:, :, exact])
    rest = slice(4, 324)
    # The unbiased rule's error is D / (1 - D), the norm-preserving one's below it. Rounding to
    # half precision adds less than 2^-16; 320 * 2 vectors estimate it to a few percent.
    expected = DISTORTION[bits] / (1 - DISTORTION[bits])
    for got, true in ((got_keys, keys), (got_values, values)):
        error = relative_error(got[:, :, rest].float(), true[:, :, rest].float())
        assert error < 1.15 * expected + 2**-16


def test_the_plain_recipe_encodes_every_token_at_once():
    store = make_store(recipe="plain")
    store.append(*random_chunk(5))
    assert store.encoded_tokens == [5]
    assert store.nbytes()["exact"] == 0


@pytest.mark.parametrize("options", [{}, {"recipe": "plain"}, {"window_tokens": 128}])
@pytest.mark.parametrize("steps", [[1] * 150, [64] * 4 + [7], [300], [129, 1, 130]])
def test_how_tokens_arrive_does_not_matter(options, steps):
    keys, values = random_chunk(sum(steps))
    whole, parts = make_store(**options), make_store(**options)
    whole.append(keys, values)
    at = 0
    for step in steps:
        parts.append(keys[:, :, at : at + step], values[:, :, at : at + step])
        at += step
    assert parts.encoded_tokens == whole.encoded_tokens
    assert same_bits(parts.dequantize(), whole.dequantize())


@pytest.mark.parametrize("options", [{}, {"recipe": "plain"}, {"sink_tokens": 0}])
def test_rows_do_not_depend_on_each_other(options):
    lengths = [0, 3, 70, 131, 300]
    keys, values = random_chunk(300, batch=5)
    store = make_store(batch=5, **options)
    store.append(keys, values, new_tokens=lengths)
    assert store.lengths == lengths
    got = store.dequantize()
    query = torch.randn(5, 4, 2, DIM)
    out, lse = store.attend(query, scaling=0.125)
    for row, length in enumerate(lengths):
        alone = make_store(**options)
        own = slice(row, row + 1)
        if length:
            alone.append(keys[own, :, 300 - length :], values[own, :, 300 - length :])
        for mine, theirs in zip(got, alone.dequantize(), strict=True):
            assert torch.equal(mine[own, :, 300 - length :], theirs)
            assert not mine[row, :, : 300 - length].any()
        assert same_bits((out[own], lse[own]), alone.attend(query[own], scaling=0.125))


@pytest.mark.parametrize(
    ("options", "attention"),
    [
        ({}, {}),
        ({}, {"softcap": 2.0}),
        ({}, {"sliding_window": 100}),
        ({}, {"sinks": True}),
        ({"recipe": "plain"}, {}),
        ({"bits": 3}, {}),
        ({"scale_dtype": "float16"}, {}),
        ({"k_bits": 3, "v_bits": 2, "codebook": "vector"}, {}),
        ({"codebook": "vector"}, {}),
    ],
)
@pytest.mark.parametrize("past", [0, 2, 130, 400])
@pytest.mark.parametrize("tokens", [1, 5])
def test_attention_equals_attention_over_the_dequantised_tokens(options, past, tokens, attention):
    store = make_store(**options)
    keys, values = random_chunk(past + tokens, seed=past)
    if past:
        store.append(keys[:, :, :past], values[:, :, :past])
    query = torch.randn(1, 6, tokens, DIM, generator=torch.Generator().manual_seed(1))
    sinks = torch.linspace(-1, 1, 6) if attention.get("sinks") else None
    softcap, window = attention.get("softcap", 0.0), attention.get("sliding_window", 0)
    out, lse = store.attend(
        query,
        keys[:, :, past:],
        values[:, :, past:],
        scaling=DIM**-0.5,
        softcap=softcap,
        sliding_window=window,
        sink_logits=sinks,
    )
    past_keys, past_values = store.dequantize()
    expected, expected_lse = causal_attention(
        query,
        torch.cat([past_keys, keys[:, :, past:]], 2),
        torch.cat([past_values, values[:, :, past:]], 2),
        torch.arange(past, past + tokens),
        DIM**-0.5,
        softcap,
        window,
        sinks,
    )
    assert store.lengths == [past]
    # float32 sums of a few hundred terms of size one, in two orders; where products are of 16-bit
    # integers, they are off by up to 4e-4 of the output (docs/experiments/cpu-decode-attention.md).
    tolerance = 5e-4 if _core.simd_level() == "avx512vnni" else 2e-5
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_in_half_precision(dtype):
    store = make_store(dtype=dtype)
    keys, values = random_chunk(300, dtype=dtype)
    store.append(keys, values)
    query = torch.randn(1, 4, 1, DIM).to(dtype)
    out, _ = store.attend(query, scaling=DIM**-0.5)
    expected, _ = causal_attention(query, *store.dequantize(), torch.tensor([299]), DIM**-0.5)
    assert out.dtype == dtype
    # Dequantised values are rounded to the dtype and so is the result.
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_queries_of_padding_give_zero_and_minus_infinity():
    store = make_store(batch=2)
    keys, values = random_chunk(4, batch=2)
    query = torch.randn(2, 4, 4, DIM)
    out, lse = store.attend(query, keys, values, new_tokens=[4, 1], scaling=0.125)
    assert not out[1, :, :3].any()
    assert torch.isneginf(lse[1, :, :3]).all()
    # The one real token sees itself alone.
    expected = values[1, :, 3].repeat_interleave(2, 0)
    torch.testing.assert_close(out[1, :, 3], expected)
    assert torch.isfinite(lse[0]).all()


def test_views_are_taken_as_they_are():
    store, other = make_store(batch=2), make_store(batch=2)
    keys, values = random_chunk(150, batch=2)
    query = torch.randn(2, 4, 3, DIM)

    def transposed(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def strided(x):
        return torch.stack([x, x], -1)[..., 0]

    store.append(keys, values)
    other.append(transposed(keys), strided(values))
    assert same_bits(store.dequantize(), other.dequantize())
    chunk = random_chunk(3, batch=2, seed=5)
    assert same_bits(
        store.attend(query, *chunk, scaling=1.0),
        other.attend(strided(query), transposed(chunk[0]), strided(chunk[1]), scaling=1.0),
    )


@pytest.mark.parametrize("options", [{}, {"recipe": "plain"}, {"sink_tokens": 0}])
@pytest.mark.parametrize("kept", [0, 1, 4, 100, 290, 299, 300])
def test_crop_keeps_the_oldest_tokens_as_they_were(options, kept):
    store = make_store(**options)
    store.append(*random_chunk(300))
    before = store.dequantize()
    store.crop(kept)
    assert store.lengths == [kept]
    assert same_bits(store.dequantize(), [part[:, :, :kept] for part in before])
    # What is in pages stays there; what is in the ring may be encoded later.
    encoded = store.spec.sink_tokens + store.encoded_tokens[0]
    more = random_chunk(200, seed=9)
    store.append(*more)
    after = store.dequantize()
    assert store.lengths == [kept + 200]
    settled = slice(min(kept, encoded))
    for got, old, new in zip(after, before, more, strict=True):
        assert torch.equal(got[:, :, settled], old[:, :, settled])
        assert relative_error(got, torch.cat([old[:, :, :kept], new], 2)) < 0.012


def test_crop_to_one_length_for_all_and_to_one_per_row():
    store = make_store(batch=3)
    keys, values = random_chunk(200, batch=3)
    store.append(keys, values, new_tokens=[200, 150, 10])
    store.crop(160)
    assert store.lengths == [160, 150, 10]
    store.crop([0, 149, 10])
    assert store.lengths == [0, 149, 10]


def test_after_a_crop_the_same_tokens_give_the_same_bits_again():
    keys, values = random_chunk(100)
    store, straight = make_store(recipe="plain"), make_store(recipe="plain")
    straight.append(keys, values)
    store.append(keys, values)
    store.crop(30)
    store.append(keys[:, :, 30:], values[:, :, 30:])
    assert same_bits(store.dequantize(), straight.dequantize())


@pytest.mark.parametrize("options", [{}, {"recipe": "plain"}])
def test_select_reorders_repeats_and_drops_rows(options):
    store = make_store(batch=3, **options)
    keys, values = random_chunk(200, batch=3)
    store.append(keys, values, new_tokens=[200, 140, 5])
    before = store.dequantize()
    store.select(torch.tensor([2, 0, 0, 1]))
    assert store.batch_size == 4
    assert store.lengths == [5, 200, 200, 140]
    assert same_bits(store.dequantize(), [part[[2, 0, 0, 1]] for part in before])


@pytest.mark.parametrize("options", [{}, {"recipe": "plain"}])
def test_rows_that_share_pages_do_not_disturb_each_other(options):
    store = make_store(**options)
    prompt = random_chunk(230)
    store.append(*prompt)
    pages = store.nbytes()["pages"]
    store.repeat(3)
    assert store.nbytes()["pages"] == pages
    chunk = random_chunk(200, batch=3, seed=3)
    store.append(*chunk)
    store.crop([430, 231, 100])
    store.append(*(part[:, :, :70] for part in chunk), new_tokens=[0, 70, 70])
    got = store.dequantize()
    for row, (kept, extra) in enumerate([(430, 0), (231, 70), (100, 70)]):
        alone = make_store(**options)
        alone.append(*prompt)
        alone.append(*(part[row : row + 1] for part in chunk))
        alone.crop(kept)
        if extra:
            alone.append(*(part[row : row + 1, :, :70] for part in chunk))
        for mine, theirs in zip(got, alone.dequantize(), strict=True):
            assert torch.equal(mine[row : row + 1, :, 430 - kept - extra :], theirs)


def test_reset_releases_everything():
    store = make_store()
    store.append(*random_chunk(300))
    store.reset()
    assert store.lengths == [0]
    assert sum(store.nbytes().values()) == 0
    store.append(*random_chunk(300))
    fresh = make_store()
    fresh.append(*random_chunk(300))
    assert same_bits(store.dequantize(), fresh.dequantize())


@pytest.mark.parametrize("how", [LayerStore.clone, copy.deepcopy])
def test_copies_are_independent(how):
    store = make_store()
    store.append(*random_chunk(300))
    before = [part.clone() for part in store.dequantize()]
    other = how(store)
    other.append(*random_chunk(200, seed=4))
    other.crop(10)
    assert store.lengths == [300]
    assert same_bits(store.dequantize(), before)


def test_pickling_is_refused():
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(make_store())


@pytest.mark.parametrize("failing", ["_new_slab", "encode_append", "_new_dense"])
def test_a_failed_append_changes_nothing(monkeypatch, failing):
    store = make_store(recipe="plain", sink_tokens=2, batch=2)
    store.append(*random_chunk(100, batch=2), new_tokens=[100, 40])
    store.select([0, 0, 1])  # a shared page: the next append has to copy it
    before, lengths, held = store.dequantize(), store.lengths, store.nbytes()

    def fail(*args, **kwargs):
        raise RuntimeError("injected")

    if failing == "_new_dense":
        store.reset()
        before, lengths, held = store.dequantize(), store.lengths, store.nbytes()
    chunk = random_chunk(5000, batch=3, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(ops if failing == "encode_append" else LayerStore, failing, fail)
        with pytest.raises(RuntimeError, match="injected"):
            store.append(*chunk)
    assert store.lengths == lengths
    assert store.nbytes() == held
    assert same_bits(store.dequantize(), before)
    store.append(*chunk)
    assert store.lengths == [length + 5000 for length in lengths]


def test_pages_are_measured_and_close_to_what_is_used():
    store = make_store(recipe="plain")
    layout = BlockLayout(store.spec)
    keys, values = random_chunk(8192)
    slab = None
    for start in range(0, 8192, 512):
        store.append(keys[:, :, start : start + 512], values[:, :, start : start + 512])
        held = store.nbytes()["pages"]
        slab = slab or held
        used = (start + 512) // 64 * layout.page_bytes(HEADS)
        assert used <= held <= used + max(0.05 * used, slab)
    # 4 + 4 bits and two float32 scales: 72 bytes per token and head against 256 in bfloat16.
    assert layout.block_bytes == 64 * (DIM // 2 * 2 + 8)
    assert 8192 * HEADS * 2 * DIM * 2 / store.nbytes()["pages"] == pytest.approx(256 / 72)
    one_go = make_store(recipe="plain")
    one_go.append(keys, values)
    assert one_go.nbytes()["pages"] == store.nbytes()["pages"]


def test_unused_slabs_are_given_back():
    store = make_store(recipe="plain")
    store.append(*random_chunk(1000))
    first = [slab.data_ptr() for slab in store._slabs]
    store.append(*random_chunk(4000))
    assert [slab.data_ptr() for slab in store._slabs][: len(first)] == first
    one_slab = store.nbytes()["pages"] // len(store._slabs)
    store.crop(1000)
    assert store.nbytes()["pages"] == len(first) * one_slab
    assert [slab.data_ptr() for slab in store._slabs] == first
    store.crop(0)
    assert store.nbytes()["pages"] == 0


# Every slab costs every step some time, so a sequence that grows for long may not leave many.
def test_many_slabs_are_merged():
    store, one_go = make_store(recipe="plain", bits=1), make_store(recipe="plain", bits=1)
    page_bytes = BlockLayout(store.spec).page_bytes(HEADS)
    keys, values = random_chunk(64 * 700)
    for start in range(0, 64 * 700, 64 * 7):
        chunk = slice(start, start + 64 * 7)
        store.append(keys[:, :, chunk], values[:, :, chunk])
        used = chunk.stop // 64 * page_bytes
        assert len(store._slabs) <= 40
        assert used <= store.nbytes()["pages"] <= used + max(0.05 * used, 4 * page_bytes)
    one_go.append(keys, values)
    assert same_bits(store.dequantize(), one_go.dequantize())
    store.crop(0)
    store.append(keys[:, :, :128], values[:, :, :128])
    assert store.nbytes()["pages"] == 4 * page_bytes


# 40 slabs of 4 pages become 20 of 8, and one more is needed.
@pytest.mark.parametrize("made", [0, 1, 12, 19, 20])
def test_memory_that_ends_while_slabs_are_merged_changes_nothing(monkeypatch, made):
    store = make_store(recipe="plain", bits=1)
    store.append(*random_chunk(64 * 160))
    before, held = store.dequantize(), store.nbytes()["pages"]
    new_slab, calls = store._new_slab, iter(range(made))

    def fails_at_last(pages):
        if next(calls, None) is None:
            raise torch.OutOfMemoryError("injected")
        return new_slab(pages)

    chunk = random_chunk(64, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_new_slab", fails_at_last)
        with pytest.raises(torch.OutOfMemoryError, match="injected"):
            store.append(*chunk)
    assert store.lengths == [64 * 160]
    assert store.nbytes()["pages"] == held
    assert same_bits(store.dequantize(), before)
    store.append(*chunk)
    assert len(store._slabs) == 21
    assert same_bits([part[:, :, : 64 * 160] for part in store.dequantize()], before)


def test_a_short_sequence_holds_little_more_than_it_would_dense():
    store = make_store(dtype=torch.bfloat16)
    store.append(*random_chunk(200, dtype=torch.bfloat16))
    dense = 2 * 200 * HEADS * DIM * 2
    assert sum(store.nbytes().values()) < 1.2 * dense


def test_a_large_prefill_gets_few_slabs():
    store = make_store(recipe="plain", bits=1)
    store.append(*random_chunk(64 * 1000))
    assert len(store._slabs) <= 40
    assert store.nbytes()["pages"] <= 1.05 * 1000 * BlockLayout(store.spec).page_bytes(HEADS)


def test_moving_to_another_device():
    store = make_store()
    store.append(*random_chunk(200))
    before = store.dequantize()
    assert same_bits(store.to("cpu").dequantize(), before)
    with pytest.raises(ValueError, match=r"device: expected one of cpu.*got meta"):
        store.to("meta")
    assert store.device.type == "cpu"


def test_the_exact_buffers_hold_sinks_and_ring_only():
    store = make_store(dtype=torch.bfloat16)
    store.append(*random_chunk(1000, dtype=torch.bfloat16))
    assert store.nbytes()["exact"] == 2 * HEADS * (4 + 128) * DIM * 2
    assert store.nbytes()["smoothing"] == HEADS * DIM * 4


def test_codes_are_in_the_documented_order():
    store = make_store(recipe="plain", k_bits=4, v_bits=3, batch=2)
    keys, values = random_chunk(70, batch=2)
    store.append(keys, values, new_tokens=[70, 20])
    k_codes, k_scales, v_codes, v_scales = store.codes()
    assert k_codes.dtype == torch.uint8
    assert k_codes.shape == (2, HEADS, 70, DIM // 2)
    assert v_codes.shape == (2, HEADS, 70, DIM * 3 // 8)
    assert k_scales.shape == v_scales.shape == (2, HEADS, 70, 1)
    assert not k_codes[1, :, :50].any()
    assert not v_scales[1, :, :50].any()
    high, low = k_codes >> 4, k_codes & 15
    nibbles = torch.stack([high, low], -1).flatten(-2)
    bits = torch.from_numpy(np.unpackbits(v_codes.numpy(), axis=-1)).unflatten(-1, (DIM, 3))
    thirds = (bits * torch.tensor([4, 2, 1])).sum(-1)
    # A rotation keeps products: levels times scale have the Gram matrix of what is read back.
    for codes, scales, width, dense in (
        (nibbles, k_scales, 4, store.dequantize()[0]),
        (thirds, v_scales, 3, store.dequantize()[1]),
    ):
        levels = torch.from_numpy(Codebook(DIM, width).levels)
        rotated = levels[codes.long()] * scales
        torch.testing.assert_close(
            rotated @ rotated.transpose(-1, -2),
            dense @ dense.transpose(-1, -2),
            atol=1e-3,
            rtol=1e-4,
        )


def test_codes_leave_exact_tokens_out():
    store = make_store()
    assert store.codes()[0].shape == (1, HEADS, 0, DIM // 2)
    store.append(*random_chunk(200))
    assert store.codes()[0].shape[2] == store.encoded_tokens[0] == 128


def test_a_token_with_nan_poisons_itself_alone():
    store, clean = make_store(recipe="plain"), make_store(recipe="plain")
    keys, values = random_chunk(100)
    clean.append(keys, values)
    keys[0, 1, 50, 3] = torch.nan
    values[0, 0, 7, 0] = torch.inf
    store.append(keys, values)
    got_keys, got_values = store.dequantize()
    true_keys, true_values = clean.dequantize()
    assert got_keys[0, 1, 50].isnan().all()
    assert got_values[0, 0, 7].isnan().all()
    got_keys[0, 1, 50] = true_keys[0, 1, 50]
    got_values[0, 0, 7] = true_values[0, 0, 7]
    assert torch.equal(got_keys, true_keys)
    assert torch.equal(got_values, true_values)
    assert store.non_finite_tokens == 2
    assert clean.non_finite_tokens == 0


def test_scales_out_of_float16_saturate_and_are_counted():
    store = make_store(recipe="plain", scale_dtype="float16")
    keys, values = random_chunk(3)
    keys[0, 0, 1] *= 1e6
    store.append(keys, values)
    assert store.saturated_scales == 1
    assert store.dequantize()[0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_states": torch.zeros(1, HEADS, 3, DIM, dtype=torch.float64)}, "dtype torch.float32"),
        ({"key_states": torch.zeros(1, HEADS, 3, DIM, dtype=torch.int32)}, "dtype torch.float32"),
        ({"value_states": torch.zeros(1, HEADS, 3, DIM).half()}, "dtype torch.float32"),
        ({"key_states": torch.zeros(2, HEADS, 3, DIM)}, "shape"),
        ({"key_states": torch.zeros(1, HEADS + 1, 3, DIM)}, "shape"),
        ({"key_states": torch.zeros(1, HEADS, 3, DIM + 8)}, "shape"),
        ({"key_states": torch.zeros(HEADS, 3, DIM)}, "4 dimensions"),
        ({"value_states": torch.zeros(1, HEADS, 4, DIM)}, "shape"),
        ({"key_states": torch.zeros(1, HEADS, 0, DIM)}, "at least one token"),
        ({"key_states": torch.zeros(1, HEADS, 3, DIM, device="meta")}, "device"),
        ({"new_tokens": [1, 2]}, "new_tokens"),
        ({"new_tokens": [4]}, r"new_tokens\[0\]: expected 0 to 3, got 4"),
        ({"new_tokens": [-1]}, r"new_tokens\[0\]"),
    ],
)
def test_wrong_chunks_are_refused_and_leave_the_store_as_it_was(change, message):
    store = make_store()
    store.append(*random_chunk(200))
    before = store.dequantize()
    key_states, value_states = random_chunk(3)
    chunk = {"key_states": key_states, "value_states": value_states, **change}
    if "at least" in message:
        chunk["value_states"] = chunk["key_states"]
    with pytest.raises(ValueError, match=message):
        store.append(**chunk)
    with pytest.raises(ValueError, match=message):
        store.attend(torch.zeros(1, HEADS, 3, DIM), **chunk, scaling=1.0)
    assert store.lengths == [200]
    assert same_bits(store.dequantize(), before)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (torch.zeros(1, 3, 1, DIM), "query"),
        (torch.zeros(2, 4, 1, DIM), "query"),
        (torch.zeros(1, 4, 1, DIM * 2), "query"),
        (torch.zeros(1, 4, DIM), "query"),
        (torch.zeros(1, 4, 1, DIM).double(), "query"),
    ],
)
def test_wrong_queries_are_refused(query, message):
    store = make_store()
    store.append(*random_chunk(10))
    with pytest.raises(ValueError, match=message):
        store.attend(query, scaling=1.0)


def test_other_wrong_arguments_are_named():
    store = make_store(batch=2)
    store.append(*random_chunk(10, batch=2), new_tokens=[10, 4])
    query = torch.zeros(2, 4, 1, DIM)
    with pytest.raises(ValueError, match="expected both or neither"):
        store.attend(query, torch.zeros(2, HEADS, 1, DIM), scaling=1.0)
    with pytest.raises(ValueError, match="new_tokens"):
        store.attend(query, new_tokens=[1, 1], scaling=1.0)
    with pytest.raises(ValueError, match="sink_logits"):
        store.attend(query, scaling=1.0, sink_logits=torch.zeros(3))
    with pytest.raises(ValueError, match="past_tokens: expected at least 10"):
        store.dequantize(9)
    with pytest.raises(ValueError, match="out_values: expected shape"):
        store.dequantize(12, torch.empty(2, HEADS, 12, DIM), torch.empty(2, HEADS, 11, DIM))
    with pytest.raises(ValueError, match="out_keys: expected shape"):
        store.dequantize(12, torch.empty(2, HEADS, 12, DIM), positions=(2, 12))
    with pytest.raises(ValueError, match="out_keys: expected dtype"):
        store.dequantize(12, torch.empty(2, HEADS, 12, DIM).half())
    for positions in ((-1, 3), (3, 2), (0, 13)):
        with pytest.raises(ValueError, match="positions: expected a range within 0 to 12"):
            store.dequantize(12, positions=positions)
    with pytest.raises(ValueError, match=r"new_lengths\[1\]: expected 0 to 4, got 5"):
        store.crop([5, 5])
    with pytest.raises(ValueError, match="new_lengths: expected 2 lengths"):
        store.crop([5])
    with pytest.raises(ValueError, match="new_lengths"):
        store.crop(-1)
    with pytest.raises(ValueError, match=r"indices\[1\]: expected a row of 0 to 1, got 2"):
        store.select([0, 2])
    with pytest.raises(ValueError, match="indices"):
        store.select([])
    with pytest.raises(ValueError, match="repeats"):
        store.repeat(0)
    assert store.lengths == [10, 4]
    with pytest.raises(ValueError, match="batch_size"):
        make_store(batch=0)
    for dtype in (torch.float64, torch.int8):
        with pytest.raises(ValueError, match="dtype: expected .*got " + str(dtype)):
            make_store(dtype=dtype)
    with pytest.raises(ValueError, match=r"device: expected one of cpu.*got meta"):
        LayerStore(make_spec(), batch_size=1, dtype=torch.float32, device="meta")


def attend(store, query=None, *chunk, **options):
    query = torch.zeros(1, 4, 1, DIM) if query is None else query
    return store.attend(query, *chunk, **{"scaling": 1.0, **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.append(None, None), TypeError, "key_states: .*dense torch tensor, got None"),
        (lambda s: s.append(*[np.zeros((1, 2, 3, 64))] * 2), TypeError, "got ndarray"),
        (lambda s: s.append(*random_chunk(9), [2.5]), ValueError, r"new_tokens\[0\].* got 2.5"),
        (lambda s: s.append(*random_chunk(9), 5), ValueError, "new_tokens: expected a sequence"),
        (lambda s: attend(s, [1.0]), TypeError, "query: .*got list"),
        (lambda s: attend(s, torch.zeros(1, 4, 0, DIM)), ValueError, "query: expected shape"),
        (lambda s: attend(s, None, *random_chunk(2)), ValueError, "key_states: expected 1 tokens"),
        (lambda s: attend(s, scaling=float("nan")), ValueError, "scaling: .*finite.*got nan"),
        (lambda s: attend(s, softcap=-1.0), ValueError, "softcap: expected 0"),
        (lambda s: attend(s, sliding_window=-1), ValueError, "sliding_window: expected 0"),
        (lambda s: attend(s, sliding_window=1.5), ValueError, "sliding_window: .*integer"),
        (lambda s: attend(s, sink_logits=[0.0]), TypeError, "sink_logits: .*got list"),
        (lambda s: s.dequantize(200.5), ValueError, "past_tokens: expected an integer"),
        (
            lambda s: s.dequantize(150, torch.zeros(1, 1, 1, 1).expand(1, HEADS, 150, DIM)),
            ValueError,
            "out_keys: expected memory of its own",
        ),
        (lambda s: s.crop([1.5]), ValueError, r"new_lengths\[0\]: expected an integer, got 1.5"),
        (lambda s: s.crop(1.5), ValueError, "new_lengths: expected a sequence"),
        (lambda s: s.select([0.7]), ValueError, r"indices\[0\]: expected an integer"),
        (lambda s: s.select(torch.tensor([True])), ValueError, r"indices\[0\].*got True"),
        (lambda s: s.repeat(1.5), ValueError, "repeats: expected an integer"),
    ],
)
def test_arguments_of_the_wrong_kind_change_nothing(call, error, message):
    store = make_store()
    store.append(*random_chunk(150))
    before, lengths = store.dequantize(), store.lengths
    with pytest.raises(error, match=message):
        call(store)
    assert store.lengths == lengths
    assert same_bits(store.dequantize(), before)


def test_a_store_is_made_of_a_layer_spec():
    with pytest.raises(TypeError, match=r"spec: .*CacheConfig.layer_spec.*got CacheConfig"):
        LayerStore(CacheConfig(bits=4), batch_size=1, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="batch_size: expected an integer"):
        make_store(batch=1.5)


def test_numpy_integers_and_strided_sink_logits_are_taken():
    store = make_store()
    store.append(*random_chunk(150), np.array([150]))
    sinks = torch.randn(8)
    query = torch.randn(1, 4, 1, DIM)
    strided = attend(store, query, sink_logits=sinks[::2])
    assert same_bits(strided, attend(store, query, sink_logits=sinks[::2].contiguous()))
    store.crop(np.int64(20))
    assert store.lengths == [20]


def test_autograd_is_left_alone():
    store = make_store()
    keys, values = random_chunk(150)
    keys.requires_grad_()
    store.append(keys, values)
    out, lse = store.attend(torch.randn(1, 4, 1, DIM, requires_grad=True), scaling=1.0)
    assert not out.requires_grad
    assert not lse.requires_grad


def test_writing_into_given_buffers():
    store = make_store()
    store.append(*random_chunk(100))
    buffers = [torch.full((1, HEADS, 120, DIM), torch.nan) for _ in range(2)]
    got = store.dequantize(120, *buffers)
    assert got[0] is buffers[0]
    assert got[1] is buffers[1]
    assert not buffers[0][:, :, :20].any()
    assert same_bits([part[:, :, 20:] for part in buffers], store.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_strides_and_ranges_are_written_in_place(dtype):
    store = make_store(batch=2, dtype=dtype)
    store.append(*random_chunk(300, batch=2, dtype=dtype), new_tokens=[300, 170])
    whole = store.dequantize(310)
    for first, end in ((0, 310), (0, 150), (14, 15), (100, 290), (7, 7)):
        tokens = end - first
        larger = torch.full((2, HEADS, tokens + 9, DIM), 7.0, dtype=dtype)
        turned = torch.full((2, tokens, HEADS, 2 * DIM), 7.0, dtype=dtype)
        buffers = larger[:, :, 4 : 4 + tokens], turned.transpose(1, 2)[..., ::2]
        got = store.dequantize(310, *buffers, positions=(first, end))
        assert same_bits(got, [part[:, :, first:end] for part in whole])
        assert bool((larger[:, :, :4] == 7).all() and (larger[:, :, 4 + tokens :] == 7).all())
        assert bool((turned[..., 1::2] == 7).all())


class _Twin:
    """What a store should do, on lists of dense rows."""

    def __init__(self, batch):
        empty = torch.zeros(2, HEADS, 0, DIM)
        self.rows = [empty] * batch

    def append(self, chunk, counts):
        tokens = chunk.shape[3]
        self.rows = [
            torch.cat([row, chunk[:, i, :, tokens - counts[i] :]], 2)
            for i, row in enumerate(self.rows)
        ]


@st.composite
def _programs(draw):
    operation = st.one_of(
        st.tuples(st.just("append"), st.integers(1, 150), st.integers(0, 2**31)),
        st.tuples(st.just("crop"), st.floats(0, 1), st.integers(0, 2**31)),
        st.tuples(st.just("select"), st.integers(1, 3), st.integers(0, 2**31)),
    )
    recipe = draw(st.sampled_from(["recommended", "plain"]))
    sinks = draw(st.integers(0, 5))
    return recipe, sinks, draw(st.lists(operation, max_size=8))


@settings(max_examples=40, deadline=None)
@given(_programs())
def test_any_sequence_of_operations_keeps_every_row(program):
    recipe, sinks, operations = program
    store = make_store(batch=2, recipe=recipe, sink_tokens=sinks, bits=8)
    twin = _Twin(2)
    for name, amount, seed in operations:
        random = np.random.default_rng(seed)
        if name == "append":
            counts = [int(n) for n in random.integers(0, amount + 1, store.batch_size)]
            chunk = torch.stack(random_chunk(amount, batch=store.batch_size, seed=seed))
            store.append(chunk[0], chunk[1], new_tokens=counts)
            twin.append(chunk, counts)
        elif name == "crop":
            kept = [int(amount * n) for n in store.lengths]
            store.crop(kept)
            twin.rows = [row[:, :, :n] for row, n in zip(twin.rows, kept, strict=True)]
        else:
            indices = random.integers(0, store.batch_size, amount).tolist()
            store.select(indices)
            twin.rows = [twin.rows[i] for i in indices]
    assert store.lengths == [row.shape[2] for row in twin.rows]
    keys, values = store.dequantize()
    for i, row in enumerate(twin.rows):
        at = store.max_length - row.shape[2]
        for got, true in ((keys, row[0]), (values, row[1])):
            mine = got[i, :, at:]
            assert torch.equal(mine[:, :sinks], true[:, :sinks])
            error = (mine - true).square().sum(-1)
            # The mean error is 4e-5 of the square; a coordinate 2 beyond the last level adds 4 / 64
            # (8 bits: a chance of 1e-9). Another token's vector would err by 2.
            assert (error <= 4 / DIM * true.square().sum(-1)).all()
            assert not got[i, :, :at].any()


def test_matches_sdpa_when_everything_is_exact():
    store = make_store()
    keys, values = random_chunk(100)
    store.append(keys[:, :, :99], values[:, :, :99])
    query = torch.randn(1, HEADS, 1, DIM)
    out, _ = store.attend(query, keys[:, :, 99:], values[:, :, 99:], scaling=DIM**-0.5)
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(query, keys, values), atol=1e-5, rtol=1e-5
    )
