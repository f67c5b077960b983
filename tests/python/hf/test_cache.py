"""`CompressedDynamicCache`: both forms, what stays stock, compatibility members, wrong input."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import tiny_models
import torch
from tiny_models import assert_same_tokens, bart_config, falcon_h1, generate, prompt
from transformers import (
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    LlamaConfig,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from turboquant_cpp import CompressedDynamicCache
from turboquant_cpp._core import VectorCodebook
from turboquant_cpp.hf import CompressedLayer, takeover
from turboquant_cpp.hf.hybrid import CompressedHybridLayer


@pytest.fixture(scope="module")
def llama():
    return tiny_models.llama()


def states(tokens: int, batch: int = 1, heads: int = 2, dim: int = 16):
    return torch.randn(2, batch, heads, tokens, dim, generator=torch.Generator().manual_seed(0))


def filled(tokens: int = 150, **options) -> CompressedDynamicCache:
    cache = CompressedDynamicCache(DynamicCache(), head_dim=16, bits=4, **options)
    for layer in range(2):
        cache.update(*states(tokens), layer)
    return cache


def test_native_and_wrapping_form_give_the_same_tokens(llama):
    tokens = prompt(1, 150)
    native = CompressedDynamicCache(config=llama.config, bits=3)
    expected = generate(llama, "turboquant", native, tokens)
    wrapped = DynamicCache(config=llama.config)
    wrapper = CompressedDynamicCache(wrapped, 16, 3, model_config=llama.config)
    assert_same_tokens(expected, generate(llama, "turboquant", wrapper, tokens), 0)
    assert wrapped.get_seq_length() == wrapper.get_seq_length() == native.get_seq_length()


@pytest.mark.parametrize("is_lazy", [False, True])
def test_either_object_works_after_wrapping(llama, is_lazy):
    tokens, results = prompt(1, 150), []
    for use_wrapper in (False, True):
        wrapped = DynamicCache() if is_lazy else DynamicCache(config=llama.config)
        wrapper = CompressedDynamicCache(wrapped, head_dim=16, bits=3)
        used = wrapper if use_wrapper else wrapped
        results.append(generate(llama, "sdpa", used, tokens))
        assert len(wrapped.layers) == len(wrapper.layers) == 2
        assert all(isinstance(layer, CompressedLayer) for layer in wrapped.layers)
    assert_same_tokens(*results, 0)


def test_wrapping_takes_over_the_tokens_held(llama):
    tokens = prompt(1, 150)
    cache = DynamicCache(config=llama.config)
    generate(llama, "sdpa", cache, tokens, new_tokens=2)
    keys = cache.layers[1].keys
    CompressedDynamicCache(cache, head_dim=16, bits=8)
    assert cache.get_seq_length() == 151
    torch.testing.assert_close(cache.layers[1].keys, keys, atol=0.05, rtol=0)


def test_members_that_generate_and_its_users_call():
    cache = CompressedDynamicCache(config=tiny_models.llama().config, bits=4)
    assert len(cache) == 2
    assert cache.batch_size == -1
    assert not cache.is_initialized
    assert cache.get_mask_sizes(5, 0) == (5, 0)
    for layer in range(2):
        cache.update(*states(150, batch=2), layer)
    assert cache.batch_size == 2
    assert cache.is_initialized
    assert cache.get_seq_length() == cache.get_query_offset() == 150
    assert cache.get_max_length() == -1
    assert not cache.is_compileable
    assert cache.is_sliding == [False, False]
    cache.activate_past_recording()
    assert [keys.shape for keys, _, _ in cache] == [(2, 2, 150, 16)] * 2
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 1]))
    cache.batch_select_indices(torch.tensor([0, 1]))
    cache.crop(-50)
    assert (cache.batch_size, cache.get_seq_length()) == (2, 100)
    cache.reset()
    assert (cache.batch_size, cache.get_seq_length()) == (-1, 0)


def test_sliding_layers_stay_stock_and_the_reason_is_told_once(caplog):
    takeover._reported.clear()
    config = tiny_models.gemma3().config
    with caplog.at_level(logging.WARNING, logger="turboquant_cpp"):
        caches = [CompressedDynamicCache(config=config, bits=4) for _ in range(2)]
    assert [type(layer) for layer in caches[0].layers] == [
        DynamicSlidingWindowLayer,
        CompressedLayer,
    ] * 2
    assert sorted(caches[0].uncompressed_layers) == [0, 2]
    assert len(caplog.records) == 1
    assert "sliding-window" in caplog.text


def test_exact_layers_stay_stock(llama):
    options = {"bits": 4, "exact_first_layers": 1}
    native = CompressedDynamicCache(config=llama.config, **options)
    assert [type(layer) for layer in native.layers] == [DynamicLayer, CompressedLayer]
    lazy = CompressedDynamicCache(DynamicCache(), 16, **options)
    for layer in range(2):
        lazy.update(*states(10), layer)
    assert [type(layer) for layer in lazy.layers] == [DynamicLayer, CompressedLayer]
    with pytest.raises(ValueError, match="exact_last_layers"):
        CompressedDynamicCache(DynamicCache(), 16, 4, exact_last_layers=1)


def test_layers_that_share_keys():
    """Gemma3n's last layers read the keys of earlier ones in the same step."""
    config = Gemma3nTextConfig(
        vocab_size=128,
        vocab_size_per_layer_input=128,
        hidden_size=64,
        hidden_size_per_layer_input=16,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=24,
        activation_sparsity_pattern=[0.0] * 4,
        laurel_rank=8,
        altup_num_inputs=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Gemma3nForCausalLM(config).eval()
    tokens = prompt(1, 150)
    results = []
    for implementation in ("sdpa", "turboquant"):
        cache = CompressedDynamicCache(config=config, bits=3)
        results.append(generate(model, implementation, cache, tokens, eos_token_id=None))
        assert sum(isinstance(layer, CompressedLayer) for layer in cache.layers) == 1
    assert_same_tokens(*results)


def test_hybrid_layers_compress_their_attention_half():
    model = falcon_h1()
    results = []
    for implementation in ("sdpa", "turboquant"):
        cache = CompressedDynamicCache(config=model.config, bits=4)
        assert all(isinstance(layer, CompressedHybridLayer) for layer in cache.layers)
        results.append(generate(model, implementation, cache, prompt(2, 150), num_beams=2))
        assert cache.memory()["uncompressed"] > 0
    assert_same_tokens(*results)
    cache.disable()
    assert cache.get_seq_length() == 161


@pytest.mark.parametrize("implementation", ["sdpa", "turboquant"])
def test_encoder_decoder(implementation):
    config = bart_config()
    torch.manual_seed(0)
    model = BartForConditionalGeneration(config).eval()
    tokens, start = prompt(2, 30), prompt(2, 150, seed=1)
    results = []
    for compressed in (False, True):
        caches = [
            CompressedDynamicCache(config=config, bits=8) if compressed else DynamicCache()
            for _ in range(2)
        ]
        name = implementation if compressed else "sdpa"
        cache = EncoderDecoderCache(*caches)
        options = {"decoder_input_ids": start, "num_beams": 2, "eos_token_id": None}
        results.append(generate(model, name, cache, tokens, new_tokens=6, **options))
    assert_same_tokens(*results)


def test_deepcopy_continues_like_the_original(llama):
    tokens = prompt(1, 150)
    cache = CompressedDynamicCache(config=llama.config, bits=4)
    reply, _ = generate(llama, "turboquant", cache, tokens)
    twin = copy.deepcopy(cache)
    assert twin.context.model_config is llama.config
    longer = torch.cat([reply, prompt(1, 9, seed=1)], 1)
    expected = generate(llama, "turboquant", cache, longer)
    assert_same_tokens(expected, generate(llama, "turboquant", twin, longer), 0)


def test_deepcopy_of_a_wrapped_cache_keeps_the_pair_together():
    wrapper = filled()
    wrapped, twin = copy.deepcopy((wrapper.wrapped, wrapper))
    wrapped.update(*states(1), 2)
    assert len(twin.layers) == 3
    assert len(wrapper.layers) == 2


def test_deepcopy_after_a_reset_has_forgotten_the_padding_too():
    cache = filled(left_padding=[3])
    cache.reset()
    twin = copy.deepcopy(cache)
    for one in (cache, twin):
        one.update(*states(10), 0)
        assert one.layers[0].store.lengths == [10]


def test_deepcopy_shares_no_memory():
    cache = filled()
    twin = copy.deepcopy(cache)
    before = twin.layers[0].keys
    for layer in cache.compressed_layers():
        for tensor in (*layer.store._slabs, layer.store._dense.keys, layer.store._dense.smoothing):
            tensor.fill_(255)
    assert torch.equal(twin.layers[0].keys, before)


@pytest.mark.parametrize(
    "write",
    [pickle.dumps, copy.copy, lambda thing: torch.save(thing, io.BytesIO())],
    ids=["pickle", "copy", "torch.save"],
)
@pytest.mark.parametrize("part", ["cache", "layer", "store"])
def test_pickling_is_refused_and_names_what_to_use(write, part):
    cache = filled()
    thing = {"cache": cache, "layer": cache.layers[0], "store": cache.layers[0].store}[part]
    with pytest.raises(TypeError, match=r"cannot be pickled: .*(save\(\) and load\(\)|to a file)"):
        write(thing)


def test_get_compressed_returns_codes_and_scales():
    cache = filled(recipe="plain")
    k_codes, k_scales, v_codes, v_scales = cache.get_compressed(1)
    assert k_codes.shape == v_codes.shape == (1, 2, 150, 8)
    assert k_codes.dtype == torch.uint8
    assert k_scales.shape == v_scales.shape == (1, 2, 150, 1)
    # High nibble first: rebuilt from the documented order, a key is rotation^T levels scale.
    nibbles = torch.stack([k_codes[0, 0] >> 4, k_codes[0, 0] & 15], -1).flatten(1).long()
    layer = cache.layers[0]
    k_codes, k_scales, _, _ = cache.get_compressed(0)
    nibbles = torch.stack([k_codes[0, 0] >> 4, k_codes[0, 0] & 15], -1).flatten(1).long()
    rotated = cache.centroids[nibbles] * 4 * k_scales[0, 0]
    torch.testing.assert_close(rotated @ cache.rotation, layer.keys[0, 0], atol=1e-5, rtol=1e-4)


def test_rotation_and_centroids():
    cache = filled()
    identity = cache.rotation @ cache.rotation.T
    torch.testing.assert_close(identity, torch.eye(16), atol=1e-5, rtol=0)
    assert cache.centroids.shape == (16,)
    torch.testing.assert_close(cache.centroids, -cache.centroids.flip(0))


def test_centroids_of_a_vector_codebook_are_pairs():
    cache = CompressedDynamicCache(DynamicCache(), head_dim=64, bits=3, codebook="vector")
    pairs = torch.from_numpy(VectorCodebook(3).levels)
    torch.testing.assert_close(cache.centroids, pairs / 8)
    assert cache.compression_stats()["codebook"] == "vector"


def test_disable_and_enable():
    cache = filled()
    keys = cache.layers[0].keys
    cache.disable()
    assert not cache.enabled
    assert [type(layer) for layer in cache.wrapped.layers] == [DynamicLayer] * 2
    torch.testing.assert_close(cache.layers[0].keys, keys)
    cache.update(*states(3), 0)
    cache.update(*states(153), 2)
    assert type(cache.layers[2]) is DynamicLayer
    cache.enable()
    assert cache.enabled
    assert all(isinstance(layer, CompressedLayer) for layer in cache.layers)
    assert cache.get_seq_length() == 153


def test_restore_by_the_context_manager():
    wrapped = DynamicCache()
    with CompressedDynamicCache(wrapped, head_dim=16, bits=4) as cache:
        cache.update(*states(150), 0)
        assert isinstance(wrapped.layers[0], CompressedLayer)
    wrapped.update(*states(1), 0)
    wrapped.update(*states(1), 1)
    assert [type(layer) for layer in wrapped.layers] == [DynamicLayer] * 2
    assert wrapped.get_seq_length() == 151


def test_what_was_chosen_shows():
    cache = CompressedDynamicCache(DynamicCache(), preset="quality", layer_bits={1: (8, 6)})
    assert "preset='quality'" in repr(cache)
    assert "layer_bits={1: (8, 6)}" in repr(cache)
    assert cache.compression_stats()["settings"]["preset"] == "quality"


def test_compression_stats_keys():
    stats = filled(2000).compression_stats()
    assert list(stats) == [
        "num_layers",
        "seq_len",
        "batch_size",
        "num_heads",
        "head_dim",
        "bits",
        "k_bits",
        "v_bits",
        "codebook",
        "nibble_packed",
        "compressed_mib",
        "baseline_mib",
        "compression_ratio",
        "savings_mib",
        "vram_estimate",
        "settings",
    ]
    assert (stats["num_layers"], stats["seq_len"], stats["num_heads"]) == (2, 2000, 2)
    assert stats["baseline_mib"] * 2**20 == 2 * 2 * 2000 * 2 * 16 * 4
    assert 1 < stats["compression_ratio"] < 8
    assert (stats["settings"]["k_bits"], stats["settings"]["recipe"]) == (4, "recommended")
    empty = CompressedDynamicCache(DynamicCache(), head_dim=16, bits=4).compression_stats()
    assert list(empty) == list(stats)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "k_bits: expected a width"),
        ({"k_bits": 4}, "v_bits: expected a width"),
        ({"bits": 0}, "bits: expected an integer of 1 to 8, got 0"),
        ({"bits": 9}, "bits: expected an integer of 1 to 8, got 9"),
        ({"bits": 4, "head_dim": 15}, "head_dim"),
        ({"bits": 4, "head_dim": 72}, "head_dim"),
        ({"bits": 4, "prefill": "fast"}, "prefill: expected one of 'exact', 'quantized'"),
        ({"bits": 4, "dequantize": "never"}, "dequantize: expected one of"),
        ({"bits": 4, "window_tokens": 1 << 40}, "window_tokens: expected an integer of 0 to 1048"),
        ({"bits": 4, "sink_tokens": 1 << 40}, "sink_tokens: expected an integer of 0 to 1048"),
        ({"bits": 4, "head_dim": "16"}, "head_dim: expected an integer, got '16'"),
        ({"bits": 4, "left_padding": 3}, "left_padding: expected one count"),
        ({"bits": 4, "left_padding": [0.5]}, "left_padding: expected one count"),
        ({"bits": 4, "window_tokens": 10}, "window_tokens"),
        ({"bits": 4, "left_padding": [-1]}, "left_padding"),
        ({"bits": 4, "attention_mask": torch.tensor([[1, 0, 1]])}, "attention_mask"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_and_the_cache_stays_stock(options, message):
    wrapped = DynamicCache()
    wrapped.update(*states(10), 0)
    before = dict(vars(wrapped)), list(wrapped.layers)
    with pytest.raises(ValueError, match=message):
        CompressedDynamicCache(wrapped, **{"head_dim": 16, **options})
    assert (dict(vars(wrapped)), list(wrapped.layers)) == before


def test_unknown_option_and_missing_cache_are_type_errors(llama):
    with pytest.raises(TypeError, match="did you mean 'window_tokens'"):
        CompressedDynamicCache(config=llama.config, bits=4, window_token=64)
    with pytest.raises(TypeError, match="got neither"):
        CompressedDynamicCache(bits=4)
    with pytest.raises(TypeError, match="got both"):
        CompressedDynamicCache(DynamicCache(), config=llama.config, bits=4)
    for wrong in (llama.config, llama):
        message = (
            rf"a DynamicCache to take over .* config=model.config\), got {type(wrong).__name__}"
        )
        with pytest.raises(TypeError, match=message):
            CompressedDynamicCache(wrong, bits=4)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="layers can leave it")
def test_offloading_needs_an_accelerator(llama, tmp_path):
    with pytest.raises(ValueError, match="offloading: expected False, as torch finds no accel"):
        CompressedDynamicCache(config=llama.config, bits=4, offloading=True)
    filled().save(tmp_path / "cache")
    with pytest.raises(ValueError, match="offloading: expected False, as torch finds no accel"):
        CompressedDynamicCache.load(tmp_path / "cache", offloading=True)


def test_a_model_with_more_layers_than_the_caches(llama):
    """Its tokens are in the layers there are: the message says how to be rid of them."""
    cache = CompressedDynamicCache(config=llama.config, bits=4)
    other = tiny_models.llama(num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"the cache has 2 layers\), got 2.* more layers .*reset"):
        generate(other, "turboquant", cache, prompt(1, 150))
    cache.reset()
    expected = generate(
        llama, "turboquant", CompressedDynamicCache(config=llama.config, bits=4), prompt(1, 90)
    )
    assert_same_tokens(expected, generate(llama, "turboquant", cache, prompt(1, 90)), 0)


@pytest.mark.parametrize("config", ["some/model", {"hidden_size": 4}])
def test_a_config_is_a_models_configuration(config):
    with pytest.raises(TypeError, match=r"config: .*\(model.config\), got (str|dict)"):
        CompressedDynamicCache(config=config, bits=4)


def test_widths_of_layers_that_the_model_has_not(llama):
    with pytest.raises(ValueError, match=r"layer_bits: expected layers of 0 to 1 .*got 7"):
        CompressedDynamicCache(config=llama.config, bits=4, layer_bits={7: (4, 4)})


def test_a_refused_first_chunk_leaves_the_cache_without_layers():
    cache = CompressedDynamicCache(DynamicCache(), head_dim=16, bits=4)
    with pytest.raises(ValueError, match="expected head_dim 16"):
        cache.update(*torch.randn(2, 1, 2, 5, 32), 1)
    assert len(cache) == 0
    cache.update(*torch.randn(2, 1, 2, 5, 16), 0)
    assert cache.get_seq_length() == 5


def test_head_dim_that_the_keys_do_not_have():
    cache = CompressedDynamicCache(DynamicCache(), head_dim=32, bits=4)
    with pytest.raises(ValueError, match="expected head_dim 32"):
        cache.update(*states(5), 0)


def test_wrapping_twice_warns_and_shares_the_layers():
    first = filled()
    keys = first.layers[0].keys
    with pytest.warns(UserWarning, match="compressed already"):
        second = CompressedDynamicCache(first.wrapped, head_dim=16, bits=2)
    assert second.layers is first.layers
    assert torch.equal(first.layers[0].keys, keys)
    second.update(*states(150), 2)
    assert first.layers[2].store.spec.k_bits == 4


def test_sliding_model_without_sliding_layers_warns():
    model = tiny_models.gemma3()
    with pytest.warns(UserWarning, match="sliding-window"):
        cache = CompressedDynamicCache(DynamicCache(), 16, 4, model_config=model.config)
    expected = generate(
        model, "sdpa", CompressedDynamicCache(DynamicCache(), 16, 4), prompt(1, 150)
    )
    assert_same_tokens(expected, generate(model, "turboquant", cache, prompt(1, 150)))


def test_unsupported_head_dim_of_a_model_is_refused_at_once():
    config = LlamaConfig(hidden_size=72, num_attention_heads=1, num_hidden_layers=1)
    with pytest.raises(ValueError, match="head_dim"):
        CompressedDynamicCache(config=config, bits=4)


@pytest.mark.parametrize("layer_idx", [-1, 2])
def test_unknown_layer(layer_idx):
    with pytest.raises(ValueError, match="layer_idx: expected 0 to 1"):
        filled().get_compressed(layer_idx)


def test_stock_layer_has_no_codes():
    cache = CompressedDynamicCache(config=tiny_models.gemma3().config, bits=4)
    with pytest.raises(ValueError, match="layer 0 is not compressed: a sliding-window"):
        cache.get_compressed(0)
    with pytest.raises(ValueError, match="holds no tokens"):
        cache.get_compressed(1)
