"""Outside of compiled regions a cache with `max_cache_len` gives the growing cache's bits."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
import transformers
from tiny_models import generate, left_padded, prompt
from transformers import DynamicCache
from turboquant_cpp import CompressedDynamicCache

IMPLEMENTATIONS = ["turboquant", "sdpa"]
PADDING = [37, 0]
CAPACITY = 400


@pytest.fixture(scope="module")
def llama():
    return tiny_models.llama()


def both(model, **options):
    """A growing cache and one of fixed capacity."""
    options = {"config": model.config, "bits": 4, **options}
    return CompressedDynamicCache(**options), CompressedDynamicCache(
        **options, max_cache_len=CAPACITY
    )


def assert_same(growing, fixed):
    """The same codes, scales and dense tokens in every compressed layer."""
    for mine, theirs in zip(fixed.compressed_layers(), growing.compressed_layers(), strict=True):
        assert mine.store.lengths == theirs.store.lengths
        for a, b in zip(
            (*mine.store.codes(), *mine.dense()),
            (*theirs.store.codes(), *theirs.dense()),
            strict=True,
        ):
            assert torch.equal(a, b)


def assert_same_generation(model, implementation, tokens, cache_options=None, **options):
    growing, fixed = both(model, **(cache_options or {}))
    expected = generate(model, implementation, growing, tokens, **options)
    actual = generate(model, implementation, fixed, tokens, **options)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    assert_same(growing, fixed)
    return fixed


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "cache_options",
    [
        {},
        {"bits": 2, "prefill": "quantized"},
        {"bits": None, "k_bits": 5, "v_bits": 3, "window_tokens": 128, "sink_tokens": 0},
        {"bits": 3, "recipe": "plain"},
        {"bits": 2, "codebook": "vector"},
    ],
    ids=str,
)
def test_generation(llama, implementation, cache_options):
    tokens = prompt(2, 150)
    fixed = assert_same_generation(llama, implementation, tokens, cache_options, new_tokens=80)
    assert int(fixed.get_seq_length()) == 229
    assert fixed.get_max_length() == CAPACITY


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    assert_same_generation(tiny_models.llama().to(dtype), "turboquant", prompt(2, 150))


@pytest.mark.parametrize(
    "make", [tiny_models.qwen2, tiny_models.gemma2, tiny_models.gemma3, tiny_models.gpt_oss]
)
def test_other_models(make):
    """Their sliding-window layers become stock static ones, whose sums are in another order."""
    model = make()
    tokens, mask = left_padded(prompt(2, 150), PADDING)
    growing, fixed = both(model)
    expected = generate(model, "turboquant", growing, tokens, attention_mask=mask)
    actual = generate(model, "turboquant", fixed, tokens, attention_mask=mask)
    tiny_models.assert_same_tokens(expected, actual)
    assert [type(layer).__name__.replace("Static", "Dynamic") for layer in growing.layers] == [
        type(layer).__name__.replace("FixedLayer", "CompressedLayer").replace("Static", "Dynamic")
        for layer in fixed.layers
    ]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_left_padding_and_beams(llama, implementation, num_beams):
    tokens, mask = left_padded(prompt(2, 170), PADDING)
    known = {} if implementation == "turboquant" else {"attention_mask": mask}
    options = {"num_beams": num_beams, "num_return_sequences": num_beams}
    assert_same_generation(
        llama, implementation, tokens, known, attention_mask=mask, new_tokens=40, **options
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_prompt_lookup(llama, implementation):
    """Guessed tokens are appended and cropped away again when they are refused."""
    options = {"prompt_lookup_num_tokens": 6, "new_tokens": 40}
    assert_same_generation(llama, implementation, prompt(1, 40).repeat(1, 4), **options)


def test_assisted_decoding(llama):
    assistant = tiny_models.llama(num_hidden_layers=1)
    assert_same_generation(llama, "turboquant", prompt(1, 150), assistant_model=assistant)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_turns_of_a_padded_batch(llama, implementation):
    tokens, mask = left_padded(prompt(2, 100), PADDING)
    turn = prompt(2, 70, seed=1)
    caches = both(llama, attention_mask=mask)
    results = []
    for cache in caches:
        reply, _ = generate(llama, implementation, cache, tokens, attention_mask=mask)
        longer = torch.nn.functional.pad(mask, (0, reply.shape[1] - 100 + 70), value=1)
        so_far = torch.cat([reply, turn], 1)
        results.append(generate(llama, implementation, cache, so_far, attention_mask=longer))
    assert torch.equal(results[0][1], results[1][1])
    assert_same(*caches)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_prompt_in_parts_whose_first_is_padding(llama, implementation):
    """Rows learn of their padding part by part; the fallback is told at once."""
    tokens, mask = left_padded(prompt(2, 190), [60, 0])
    llama.set_attn_implementation(implementation)
    caches = both(llama, **({} if implementation == "turboquant" else {"attention_mask": mask}))
    logits = []
    with torch.no_grad():
        for cache in caches:
            parts = []
            for begin in range(0, 190, 38):
                end = begin + 38
                step = llama(
                    tokens[:, begin:end], past_key_values=cache, attention_mask=mask[:, :end]
                )
                parts.append(step.logits)
            logits.append(torch.cat(parts, 1)[mask == 1])
    assert torch.equal(*logits)
    assert_same(*caches)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_changes_between_steps(llama, implementation):
    caches = both(llama)
    llama.set_attn_implementation(implementation)
    logits = []
    with torch.no_grad():
        for cache in caches:
            llama(prompt(2, 250), past_key_values=cache)
            cache.crop(-130)
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0, 3, 1]))
            twin = copy.deepcopy(cache)
            llama(prompt(3, 5, seed=4), past_key_values=twin)
            logits.append(llama(prompt(3, 140, seed=1), past_key_values=cache).logits)
    assert torch.equal(*logits)
    assert_same(*caches)
    assert int(caches[1].get_seq_length()) == 260


def test_a_copy_goes_on_by_itself(llama):
    """In the middle of a row's padding too."""
    tokens, mask = left_padded(prompt(2, 160), [90, 0])
    llama.set_attn_implementation("turboquant")
    _, original = both(llama, left_padding=[90, 0])
    with torch.no_grad():
        llama(tokens[:, :80], past_key_values=original, attention_mask=mask[:, :80])
        twin = copy.deepcopy(original)
        assert int(twin.get_seq_length()) == int(original.get_seq_length()) == 80
        logits = [
            llama(tokens[:, 80:], past_key_values=cache, attention_mask=mask).logits
            for cache in (twin, original)
        ]
    assert torch.equal(logits[0][mask[:, 80:] == 1], logits[1][mask[:, 80:] == 1])
    assert twin.layers[0].store.lengths == [70, 160]
    assert_same(original, twin)


def test_reset_keeps_the_storage_and_forgets_the_padding(llama):
    tokens, mask = left_padded(prompt(2, 170), PADDING)
    _, fixed = both(llama)
    generate(llama, "turboquant", fixed, tokens, attention_mask=mask)
    places = [tensor.data_ptr() for tensor in fixed.layers[0].store._tensors()]
    fixed.reset()
    assert int(fixed.get_seq_length()) == 0
    again, _ = both(llama)
    expected = generate(llama, "turboquant", again, prompt(2, 90, seed=3))
    actual = generate(llama, "turboquant", fixed, prompt(2, 90, seed=3))
    assert torch.equal(expected[1], actual[1])
    assert [tensor.data_ptr() for tensor in fixed.layers[0].store._tensors()] == places


def test_an_empty_cache_takes_another_batch(llama):
    growing, fixed = both(llama)
    generate(llama, "turboquant", fixed, prompt(2, 100))
    fixed.reset()
    expected = generate(llama, "turboquant", growing, prompt(3, 100))
    assert torch.equal(expected[1], generate(llama, "turboquant", fixed, prompt(3, 100))[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_full_cache_says_so_and_stays_as_it_was(llama, implementation):
    llama.set_attn_implementation(implementation)
    cache = CompressedDynamicCache(config=llama.config, bits=4, max_cache_len=100)
    with torch.no_grad():
        llama(prompt(2, 99), past_key_values=cache)
        before = [state.clone() for layer in cache.layers for state in layer.dense()]
        message = r"at most 1 more tokens \(the cache was made with max_cache_len=100\), got 2"
        with pytest.raises(ValueError, match=message):
            llama(prompt(2, 2), past_key_values=cache)
        after = [state for layer in cache.layers for state in layer.dense()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        llama(prompt(2, 1), past_key_values=cache)
    assert int(cache.get_seq_length()) == 100


def test_tokens_that_a_gpu_refused_are_reported(llama):
    """As after compiled steps on a GPU, where nothing could raise."""
    _, cache = both(llama)
    generate(llama, "turboquant", cache, prompt(1, 50))
    layer = cache.layers[0]
    layer.store._positions[0, 2] = 3
    layer._host_tokens = None
    with pytest.raises(RuntimeError, match="3 tokens came in compiled steps after the"):
        cache.crop(-1)
    cache.reset()
    generate(llama, "turboquant", cache, prompt(1, 50))


def test_a_mask_with_holes_is_refused(llama):
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[0, 20] = 0
    _, cache = both(llama)
    with pytest.raises(ValueError, match="attention_mask: expected zeros only before"):
        generate(llama, "turboquant", cache, prompt(2, 50), attention_mask=mask)


def test_memory_does_not_grow(llama):
    _, cache = both(llama)
    llama.set_attn_implementation("turboquant")
    with torch.no_grad():
        llama(prompt(1, 20), past_key_values=cache)
        memory = cache.memory()
        llama(prompt(1, 380), past_key_values=cache)
    assert cache.memory() == memory
    assert memory["uncompressed"] == 0
    assert cache.compression_stats()["seq_len"] == CAPACITY


def test_it_can_be_disabled_and_enabled(llama):
    _, cache = both(llama)
    first = prompt(1, 200)
    generate(llama, "turboquant", cache, first)
    cache.disable()
    assert not cache.is_compileable
    cache.enable()
    assert cache.is_compileable
    assert int(cache.get_seq_length()) == 211


def test_a_compiled_step_asks_no_layer_whether_it_is_compileable(llama, monkeypatch):
    """transformers asks in every step, of a compiled model before its compiled code runs."""
    _, cache = both(llama)
    generate(llama, "turboquant", cache, prompt(1, 20))
    layer_type = type(cache.layers[0])
    monkeypatch.setattr(layer_type, "is_compileable", property(lambda layer: pytest.fail("asked")))
    assert cache.is_compileable


def test_layers_of_other_kinds_are_refused():
    config = transformers.FalconH1Config(num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"max_cache_len: expected None for .*falcon_h1"):
        CompressedDynamicCache(config=config, bits=4, max_cache_len=100)
    config = transformers.Gemma3nTextConfig(num_hidden_layers=10, num_kv_shared_layers=5)
    with pytest.raises(ValueError, match="whose layers keep keys of their own with max_cache_len"):
        CompressedDynamicCache(config=config, bits=4, max_cache_len=100)


def test_what_it_cannot_be_combined_with_is_refused(llama):
    options = {"config": llama.config, "bits": 4, "max_cache_len": 100}
    for name, value in (
        ("offloading", True),
        ("dequantize", "incremental"),
        ("exact_first_layers", 1),
        ("exact_last_layers", 1),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected .* with max_cache_len"):
            CompressedDynamicCache(**options, **{name: value})
    with pytest.raises(ValueError, match=r"cache: expected config= .* with max_cache_len"):
        CompressedDynamicCache(DynamicCache(), bits=4, max_cache_len=100)
    for length in (0, -1, 2.5, 2**31):
        with pytest.raises(ValueError, match="max_cache_len"):
            CompressedDynamicCache(**{**options, "max_cache_len": length})
