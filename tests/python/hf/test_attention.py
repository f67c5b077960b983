"""The attention function "turboquant": masks, kwargs and layers without a compressed cache."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from tiny_models import assert_same_tokens, generate, left_padded, prompt
from transformers import BertConfig, BertModel, DynamicCache, StaticCache
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_causal_mask_function,
)
from turboquant_cpp import CompressedDynamicCache, LayerStore
from turboquant_cpp.hf import chunk
from turboquant_cpp.hf.attention import stock_attention, turboquant_attention, turboquant_mask
from turboquant_cpp.hf.compat import CACHE_ARGUMENT

# The reference of each model: SDPA knows neither sink logits nor score caps.
MODELS = [
    (tiny_models.llama, "sdpa"),
    (tiny_models.gemma3, "sdpa"),
    (tiny_models.gemma2, "eager"),
    (tiny_models.gpt_oss, "eager"),
]
MODEL_IDS = ["llama", "gemma3", "gemma2", "gpt_oss"]


def logits_of(model, implementation, tokens, **options):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(tokens, **options).logits


@pytest.fixture(scope="module")
def llama():
    return tiny_models.llama()


@pytest.mark.parametrize(("make", "reference"), MODELS, ids=MODEL_IDS)
def test_without_a_cache_it_is_exact_attention(make, reference):
    model = make()
    tokens, mask = left_padded(prompt(2, 60), [17, 0])
    for options in ({"use_cache": False}, {"use_cache": False, "attention_mask": mask}):
        expected = logits_of(model, reference, tokens, **options)
        actual = logits_of(model, "turboquant", tokens, **options)
        real = options.get("attention_mask", torch.ones_like(tokens)).bool()
        torch.testing.assert_close(actual[real], expected[real], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("make", "reference"), MODELS, ids=MODEL_IDS)
def test_with_a_stock_cache_it_is_exact_attention(make, reference):
    model = make()
    tokens, mask = left_padded(prompt(2, 60), [17, 0])
    expected = generate(
        model, reference, DynamicCache(config=model.config), tokens, attention_mask=mask
    )
    actual = generate(
        model, "turboquant", DynamicCache(config=model.config), tokens, attention_mask=mask
    )
    assert_same_tokens(expected, actual)


@pytest.mark.parametrize(("make", "reference"), MODELS, ids=MODEL_IDS)
def test_chunks_after_a_stock_past_stay_causal(make, reference):
    model, tokens = make(), prompt(2, 60)
    logits = []
    for implementation in (reference, "turboquant"):
        cache = DynamicCache(config=model.config)
        logits_of(model, implementation, tokens[:, :40], **{CACHE_ARGUMENT: cache})
        logits.append(logits_of(model, implementation, tokens[:, 40:], **{CACHE_ARGUMENT: cache}))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-3, rtol=1e-4)


def test_with_a_static_cache(llama):
    tokens = prompt(2, 30)
    outputs = []
    for implementation in ("sdpa", "turboquant"):
        cache = StaticCache(config=llama.config, max_cache_len=64)
        outputs.append(generate(llama, implementation, cache, tokens))
    assert_same_tokens(*outputs)


@pytest.mark.parametrize(("make", "reference"), MODELS, ids=MODEL_IDS)
def test_fused_equals_the_fallback(make, reference):
    """Several queries at once over a packed past, with window, cap and sink logits."""
    model, tokens = make(), prompt(2, 190)
    logits = []
    for implementation in (reference, "turboquant"):
        cache = CompressedDynamicCache(config=model.config, bits=3)
        for begin, end in ((0, 150), (150, 151), (151, 190)):
            chunk = tokens[:, begin:end]
            logits.append(logits_of(model, implementation, chunk, **{CACHE_ARGUMENT: cache}))
    for expected, actual in zip(logits[:3], logits[3:], strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-3, rtol=1e-3)


def test_mask_with_holes_is_not_dropped(llama):
    """Tokens masked in the middle of a row: no row start says that."""
    tokens = prompt(2, 160)
    mask = torch.ones(2, 160, dtype=torch.long)
    mask[0, 30:50] = 0
    logits = []
    for implementation in ("sdpa", "turboquant"):
        cache = CompressedDynamicCache(config=llama.config, bits=4)
        first = {"attention_mask": mask[:, :150], CACHE_ARGUMENT: cache}
        logits_of(llama, implementation, tokens[:, :150], **first)
        second = {"attention_mask": mask, CACHE_ARGUMENT: cache}
        logits.append(logits_of(llama, implementation, tokens[:, 150:], **second))
    torch.testing.assert_close(logits[1], logits[0], atol=2e-3, rtol=1e-3)
    unmasked = CompressedDynamicCache(config=llama.config, bits=4)
    logits_of(llama, "turboquant", tokens[:, :150], **{CACHE_ARGUMENT: unmasked})
    without = logits_of(llama, "turboquant", tokens[:, 150:], **{CACHE_ARGUMENT: unmasked})
    assert (without - logits[1])[0].abs().max() > 0.05


@pytest.mark.parametrize("is_additive", [False, True])
def test_custom_4d_mask_is_not_dropped(llama, is_additive):
    tokens = prompt(1, 160)
    mask = torch.ones(160, 160, dtype=torch.bool).tril()
    mask[:, 5:60] = False
    mask |= torch.eye(160, dtype=torch.bool)
    mask = mask[None, None]
    if is_additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    logits = []
    for implementation in ("sdpa", "turboquant"):
        cache = CompressedDynamicCache(config=llama.config, bits=4)
        first = {"attention_mask": mask[:, :, :150, :150], CACHE_ARGUMENT: cache}
        logits_of(llama, implementation, tokens[:, :150], **first)
        second = {"attention_mask": mask[:, :, 150:], CACHE_ARGUMENT: cache}
        logits.append(logits_of(llama, implementation, tokens[:, 150:], **second))
    torch.testing.assert_close(logits[1], logits[0], atol=2e-3, rtol=1e-3)


def test_padding_learned_late_is_not_dropped(llama):
    """Padding that was stored as tokens (no mask was seen) is masked when one comes."""
    tokens, mask = left_padded(prompt(2, 160), [37, 0])
    logits = []
    for implementation in ("sdpa", "turboquant"):
        cache = CompressedDynamicCache(config=llama.config, bits=4)
        first = {"attention_mask": mask[:, :150], CACHE_ARGUMENT: cache}
        logits_of(llama, "sdpa", tokens[:, :150], **first)
        options = {"attention_mask": mask, CACHE_ARGUMENT: cache}
        logits.append(logits_of(llama, implementation, tokens[:, 150:], **options))
    torch.testing.assert_close(logits[1], logits[0], atol=2e-3, rtol=1e-3)


def test_gradients_reach_queries_and_new_keys(llama):
    llama.set_attn_implementation("turboquant")
    llama.train()
    try:
        cache = CompressedDynamicCache(config=llama.config, bits=4)
        with torch.no_grad():
            llama(prompt(1, 140), **{CACHE_ARGUMENT: cache})
        llama(prompt(1, 8, seed=1), **{CACHE_ARGUMENT: cache}).logits.square().mean().backward()
        attention = llama.model.layers[0].self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            assert projection.weight.grad.abs().max() > 0
    finally:
        llama.eval()
        llama.zero_grad()


def test_an_encoder_attends_in_both_directions():
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = BertModel(config).eval()
    tokens, mask = left_padded(prompt(2, 20), [5, 0])
    outputs = []
    for implementation in ("sdpa", "turboquant"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            outputs.append(model(tokens, attention_mask=mask).last_hidden_state[mask.bool()])
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)


def test_compact_mask_only_where_it_says_everything():
    sizes = {"batch_size": 2, "q_length": 4, "kv_length": 10, "q_offset": 6, "kv_offset": 0}
    mask = torch.ones(2, 10, dtype=torch.bool)
    assert turboquant_mask(**sizes, mask_function=causal_mask_function) is None
    assert turboquant_mask(**sizes, attention_mask=mask) is None
    mask[0, :3] = False
    assert turboquant_mask(**sizes, attention_mask=mask).shape == (2, 10)
    for mask_function in (sliding_window_causal_mask_function(4), bidirectional_mask_function):
        full = turboquant_mask(**sizes, mask_function=mask_function, attention_mask=mask)
        assert full.shape[0] == 2
        assert full.shape[2:] == (4, 10)
        assert not full[0, 0, :, :3].any()
    fixed_size = turboquant_mask(**{**sizes, "kv_length": 32})
    assert fixed_size.shape[-2:] == (4, 32)
    assert not fixed_size[..., 10:].any()


def test_unread_chunk_is_reported(llama):
    """Whatever read keys without the attention function saw the newest tokens only."""
    llama.set_attn_implementation("turboquant")
    cache = CompressedDynamicCache(config=llama.config, bits=4)
    states = torch.randn(1, 2, 3, 16)
    for layer in (0, 1, 0, 1):
        cache.update(states, states, layer)
    with pytest.warns(UserWarning, match="never reached the attention function"):
        assert cache.layers[0].keys.shape[2] == 6


def test_a_bias_for_the_newest_keys_alone_is_refused(llama):
    """And the chunk is stored all the same: the next step goes on from it."""
    llama.set_attn_implementation("turboquant")
    cache = CompressedDynamicCache(config=llama.config, bits=4)
    states, query = torch.randn(2, 1, 2, 150, 16), torch.randn(1, 4, 1, 16)
    turboquant_attention(llama, query, *cache.update(*states, 0), None)
    cache.update(*states, 1)
    keys, values = cache.update(*states[:, :, :, :1], 0)
    with pytest.raises(ValueError, match=r"position_bias: expected 151 keys .* got 1\. .*llama"):
        turboquant_attention(
            llama, query, keys, values, None, position_bias=torch.zeros(1, 4, 1, 1)
        )
    whole = torch.zeros(1, 4, 1, 151)
    without, _ = turboquant_attention(llama, query, keys, values, None)
    biased, _ = turboquant_attention(llama, query, keys, values, None, position_bias=whole)
    torch.testing.assert_close(biased, without, atol=1e-3, rtol=0)
    assert cache.get_seq_length() == 151


def test_values_that_are_not_the_caches_are_refused(llama):
    llama.set_attn_implementation("turboquant")
    cache = CompressedDynamicCache(config=llama.config, bits=4)
    states, query = torch.randn(2, 1, 2, 9, 16), torch.randn(1, 4, 9, 16)
    keys, values = cache.update(*states, 0)
    with pytest.raises(ValueError, match="llama changes keys or values"):
        turboquant_attention(llama, query, keys, values.clone(), None)
    turboquant_attention(llama, query, keys, values.view_as(values), None)


def test_stock_attention_is_lent_to_fused_models_only(llama):
    for implementation, lent in (("turboquant", "sdpa"), ("eager", "eager")):
        llama.set_attn_implementation(implementation)
        with stock_attention(llama):
            assert llama.config._attn_implementation == lent
        assert llama.config._attn_implementation == implementation


def test_what_a_device_cannot_attend_is_dequantised_with_one_warning(llama, monkeypatch):
    tokens = prompt(2, 300)
    expected = generate(
        llama, "sdpa", CompressedDynamicCache(config=llama.config, bits=4), tokens, new_tokens=6
    )
    chunk._warn_of_dequantising.cache_clear()
    monkeypatch.setattr(LayerStore, "attention_problem", lambda self: "not on this device")
    cache = CompressedDynamicCache(config=llama.config, bits=4)
    with pytest.warns(UserWarning, match="not on this device; every step deq") as warned:
        actual = generate(llama, "turboquant", cache, tokens, new_tokens=6)
    assert len(warned) == 1
    assert_same_tokens(expected, actual, margin=1e-3)
