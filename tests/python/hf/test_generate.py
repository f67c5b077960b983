"""`generate()` over packed codes gives the tokens of the dense fake-quantised twin."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from tiny_models import assert_same_tokens, generate, left_padded, prompt
from transformers import DynamicCache
from turboquant_cpp import CacheConfig, CompressedDynamicCache
from turboquant_cpp.hf.compat import CACHE_ARGUMENT
from twin import TwinCache

IMPLEMENTATIONS = ["turboquant", "sdpa", "eager"]
PADDING = [37, 0]


@pytest.fixture(scope="module")
def llama():
    return tiny_models.llama()


def packed(model, implementation, tokens, *, cache_options=None, **options):
    cache = CompressedDynamicCache(config=model.config, **(cache_options or {"bits": 4}))
    return generate(model, implementation, cache, tokens, **options)


_twin_results = {}


def twin(model, tokens, *, cache_options=None, left_padding=None, **options):
    """What the dense twin generates; the same for every implementation, so computed once."""
    key = repr((tokens.tolist(), cache_options, left_padding, options.keys(), options.values()))
    if key not in _twin_results:
        config = CacheConfig(**(cache_options or {"bits": 4}))
        cache = TwinCache(
            model.config,
            config,
            left_padding=left_padding,
            quantized_prefill=config.recipe == "plain",
        )
        _twin_results[key] = generate(model, "sdpa", cache, tokens, **options)
    return _twin_results[key]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "cache_options",
    [
        {"bits": 4},
        {"bits": 2},
        {"k_bits": 5, "v_bits": 3, "window_tokens": 128, "sink_tokens": 0},
        {"bits": 3, "recipe": "plain"},
        {"bits": 4, "smooth_keys": False, "scale_dtype": "float16"},
        {"bits": 4, "window_tokens": 0},
        {"bits": 4, "codebook": "vector"},
        {"k_bits": 3, "v_bits": 2, "codebook": "vector"},
    ],
    ids=str,
)
def test_greedy_equals_the_twin(llama, implementation, cache_options):
    tokens = prompt(2, 150)
    expected = twin(llama, tokens, cache_options=cache_options)
    assert_same_tokens(expected, packed(llama, implementation, tokens, cache_options=cache_options))


def test_codes_are_what_is_read(llama):
    """The twin's tokens are not the exact cache's, or the tests here could not fail."""
    tokens = prompt(2, 150)
    exact = generate(llama, "sdpa", DynamicCache(), tokens)
    assert not torch.equal(exact[0], twin(llama, tokens, cache_options={"bits": 2})[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_beam_search_equals_the_twin(llama, implementation):
    tokens, options = prompt(2, 150), {"num_beams": 3, "num_return_sequences": 2}
    expected, _ = twin(llama, tokens, **options)
    assert torch.equal(packed(llama, implementation, tokens, **options)[0], expected)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_left_padding_equals_the_twin(llama, num_beams):
    """The fused attention learns the padding from the mask, the fallback is told."""
    tokens, mask = left_padded(prompt(2, 170), PADDING)
    options = {"attention_mask": mask, "num_beams": num_beams}
    expected, _ = twin(llama, tokens, left_padding=PADDING, **options)
    fused, _ = packed(llama, "turboquant", tokens, **options)
    told = {"bits": 4, "attention_mask": mask}
    fallback, _ = packed(llama, "sdpa", tokens, cache_options=told, **options)
    assert torch.equal(fused, expected)
    assert torch.equal(fallback, expected)


def test_unknown_padding_counts_as_tokens(llama):
    tokens, mask = left_padded(prompt(2, 170), PADDING)
    expected = twin(llama, tokens, attention_mask=mask)
    assert_same_tokens(expected, packed(llama, "sdpa", tokens, attention_mask=mask))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padded_row_equals_the_row_alone(llama, implementation):
    tokens, mask = left_padded(prompt(2, 170), PADDING)
    options = {"bits": 4, "attention_mask": mask}
    together, logits = packed(
        llama, implementation, tokens, cache_options=options, attention_mask=mask
    )
    for row, padding in enumerate(PADDING):
        alone = packed(llama, implementation, tokens[row : row + 1, padding:])
        assert_same_tokens(alone, (together[row : row + 1, padding:], logits[row : row + 1]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_turns_with_one_cache_equal_the_twin(llama, implementation):
    first, second = prompt(1, 100), prompt(1, 60, seed=1)
    results = []
    for cache, name in (
        (TwinCache(llama.config, CacheConfig(bits=4)), "sdpa"),
        (CompressedDynamicCache(config=llama.config, bits=4), implementation),
    ):
        reply, _ = generate(llama, name, cache, first)
        results.append(generate(llama, name, cache, torch.cat([reply, second], 1)))
    assert_same_tokens(*results)


def test_two_turns_of_a_padded_batch(llama):
    tokens, mask = left_padded(prompt(2, 100), PADDING)
    turn = prompt(2, 70, seed=1)
    results = []
    for cache, name in (
        (TwinCache(llama.config, CacheConfig(bits=4), left_padding=PADDING), "sdpa"),
        (CompressedDynamicCache(config=llama.config, bits=4), "turboquant"),
    ):
        reply, _ = generate(llama, name, cache, tokens, attention_mask=mask)
        longer = torch.nn.functional.pad(mask, (0, reply.shape[1] - 100 + 70), value=1)
        tokens_so_far = torch.cat([reply, turn], 1)
        results.append(generate(llama, name, cache, tokens_so_far, attention_mask=longer))
    assert_same_tokens(*results)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_prompt_lookup_equals_the_twin(llama, implementation):
    """Guessed tokens are appended and cropped away again when they are refused."""
    tokens = prompt(1, 40).repeat(1, 4)
    options = {"prompt_lookup_num_tokens": 6, "new_tokens": 40}
    expected = twin(llama, tokens, **options)
    assert torch.equal(packed(llama, implementation, tokens, **options)[0], expected[0])


def test_assisted_decoding_equals_the_twin(llama):
    assistant = tiny_models.llama(num_hidden_layers=1)
    tokens = prompt(1, 150)
    expected = twin(llama, tokens, assistant_model=assistant)
    fused = packed(llama, "turboquant", tokens, assistant_model=assistant)
    assert torch.equal(fused[0], expected[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_chunked_prefill_equals_the_twin(llama, implementation):
    tokens = prompt(1, 190)
    llama.set_attn_implementation(implementation)
    cache = CompressedDynamicCache(config=llama.config, bits=4)
    twin_cache = TwinCache(llama.config, CacheConfig(bits=4))
    with torch.no_grad():
        for begin in range(0, 190, 38):
            chunk = tokens[:, begin : begin + 38]
            logits = llama(chunk, **{CACHE_ARGUMENT: cache}).logits
            llama.set_attn_implementation("sdpa")
            expected = llama(chunk, **{CACHE_ARGUMENT: twin_cache}).logits
            llama.set_attn_implementation(implementation)
            torch.testing.assert_close(logits, expected, atol=2e-3, rtol=0)


def test_quantized_prefill_reads_the_prompt_through_the_codes(llama):
    tokens = prompt(2, 190)
    llama.set_attn_implementation("sdpa")
    twin_cache = TwinCache(llama.config, CacheConfig(bits=2), quantized_prefill=True)
    with torch.no_grad():
        expected = llama(tokens, **{CACHE_ARGUMENT: twin_cache}).logits
        exact = llama(tokens, **{CACHE_ARGUMENT: DynamicCache()}).logits
        for implementation in IMPLEMENTATIONS:
            llama.set_attn_implementation(implementation)
            cache = CompressedDynamicCache(config=llama.config, bits=2, prefill="quantized")
            logits = llama(tokens, **{CACHE_ARGUMENT: cache}).logits
            torch.testing.assert_close(logits, expected, atol=2e-3, rtol=0)
            assert (logits - exact).abs().max() > 0.05


@pytest.mark.parametrize("make", [tiny_models.qwen2, tiny_models.gemma3, tiny_models.gpt_oss])
def test_other_models_equal_the_twin(make):
    model = make()
    tokens, mask = left_padded(prompt(2, 150), PADDING)
    reference = "eager" if make is tiny_models.gpt_oss else "sdpa"
    cache = TwinCache(model.config, CacheConfig(bits=3), left_padding=PADDING)
    expected = generate(model, reference, cache, tokens, attention_mask=mask)
    options = {"bits": 3, "attention_mask": mask}
    for implementation in (reference, "turboquant"):
        actual = packed(model, implementation, tokens, cache_options=options, attention_mask=mask)
        assert_same_tokens(expected, actual)


def test_incremental_dequantisation_gives_the_same_tokens(llama):
    tokens = prompt(2, 150)
    options = {"num_beams": 2}
    expected, _ = packed(llama, "sdpa", tokens, **options)
    cache_options = {"bits": 4, "dequantize": "incremental"}
    actual, _ = packed(llama, "sdpa", tokens, cache_options=cache_options, **options)
    assert torch.equal(actual, expected)
