"""Every way through `generate()`, beside the dense twin; what cannot work says so."""

from __future__ import annotations

import copy
import functools

import architectures
import pytest
import tiny_models
import torch
from accelerate import dispatch_model
from tiny_models import assert_same_tokens, generate, left_padded, prompt
from transformers import DynamicCache, EncoderDecoderCache
from turboquant_cpp import CacheConfig, CompressedDynamicCache
from turboquant_cpp.hf.compat import CACHE_ARGUMENT
from twin import TwinCache

BITS = 3
implementations = pytest.mark.parametrize("implementation", ["turboquant", "sdpa"])


@functools.cache
def llama():
    return tiny_models.llama()


def both(model, implementation, tokens, *, reference="sdpa", seed=0, **options):
    """What the twin and the packed cache generate."""
    results = []
    for name, cache in (
        (reference, TwinCache(model.config, CacheConfig(bits=BITS))),
        (implementation, CompressedDynamicCache(config=model.config, bits=BITS)),
    ):
        torch.manual_seed(seed)
        results.append(generate(model, name, cache, tokens, **options))
    return results


@implementations
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 20},
        {"do_sample": True, "top_p": 0.9, "temperature": 0.7, "num_return_sequences": 3},
        {"num_beams": 4, "num_return_sequences": 4, "early_stopping": True},
        {"num_beams": 3, "do_sample": True, "top_k": 20},
        {"num_beams": 2, "length_penalty": 2.0, "no_repeat_ngram_size": 2},
        {"guidance_scale": 1.5},
        {"prefill_chunk_size": 38},
        {"prompt_lookup_num_tokens": 4},
        {"assistant_early_exit": 1},
        {"repetition_penalty": 1.3, "min_new_tokens": 4},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_give_the_tokens_of_the_twin(implementation, options):
    rows = 1 if {"prompt_lookup_num_tokens", "assistant_early_exit"} & set(options) else 2
    expected, actual = both(llama(), implementation, prompt(rows, 150), **options)
    assert torch.equal(expected[0], actual[0])


def test_sampled_sequences_differ_from_each_other():
    """Or the sampled tokens above would be greedy ones."""
    _, (ids, _) = both(
        llama(), "turboquant", prompt(1, 150), do_sample=True, num_return_sequences=3
    )
    assert len({tuple(row.tolist()) for row in ids}) == 3


@implementations
def test_beams_are_reordered_within_the_run(implementation):
    """Some hypothesis has changed its row, or beam search above would test no reordering."""
    model = llama()
    model.set_attn_implementation(implementation)
    cache = CompressedDynamicCache(config=model.config, bits=BITS)
    options = {"num_beams": 4, "num_return_sequences": 4, "do_sample": False, CACHE_ARGUMENT: cache}
    output = model.generate(
        prompt(1, 150), max_new_tokens=12, return_dict_in_generate=True, **options
    )
    assert any(len(set(row.tolist()) - {-1}) > 1 for row in output.beam_indices)


@implementations
def test_guessed_tokens_are_taken_back_from_sliding_layers_too(implementation):
    model = tiny_models.gemma3()
    expected, actual = both(
        model, implementation, prompt(1, 40).repeat(1, 4), prompt_lookup_num_tokens=4, new_tokens=30
    )
    assert torch.equal(expected[0], actual[0])


@implementations
def test_guessed_tokens_are_taken_back_from_convolutions_too(implementation):
    model = architectures.causal("lfm2", layer_types=["conv", "full_attention"])()
    expected, actual = both(
        model, implementation, prompt(1, 40).repeat(1, 4), prompt_lookup_num_tokens=4, new_tokens=30
    )
    assert torch.equal(expected[0], actual[0])


@implementations
def test_prompt_lookup_continues_a_conversation(implementation):
    """A second turn after guessed and refused tokens: what was cropped is really gone."""
    model, results = llama(), []
    for name, cache in (
        ("sdpa", TwinCache(model.config, CacheConfig(bits=BITS))),
        (implementation, CompressedDynamicCache(config=model.config, bits=BITS)),
    ):
        reply, _ = generate(model, name, cache, prompt(1, 150), prompt_lookup_num_tokens=4)
        longer = torch.cat([reply, prompt(1, 30, seed=1)], 1)
        results.append(generate(model, name, cache, longer))
    assert_same_tokens(*results)


@implementations
def test_one_prompt_serves_many_continuations(implementation):
    """A filled cache is copied for each of two questions, and remains as it was."""
    model, common = llama(), prompt(1, 150)
    questions = [torch.cat([common, prompt(1, 20, seed=seed)], 1) for seed in (1, 2)]
    results = []
    for name, cache in (
        ("sdpa", TwinCache(model.config, CacheConfig(bits=BITS))),
        (implementation, CompressedDynamicCache(config=model.config, bits=BITS)),
    ):
        model.set_attn_implementation(name)
        with torch.no_grad():
            model(common, **{CACHE_ARGUMENT: cache})
        answers = [generate(model, name, copy.deepcopy(cache), tokens) for tokens in questions]
        assert cache.get_seq_length() == 150
        results.append(answers)
    for expected, actual in zip(*results, strict=True):
        assert_same_tokens(expected, actual)


@implementations
def test_chunked_prefill_of_a_padded_batch(implementation):
    model = llama()
    tokens, mask = left_padded(prompt(2, 170), [45, 0])
    told = {"attention_mask": mask}
    cache = TwinCache(model.config, CacheConfig(bits=BITS), left_padding=[45, 0])
    expected = generate(model, "sdpa", cache, tokens, prefill_chunk_size=40, **told)
    cache = CompressedDynamicCache(config=model.config, bits=BITS, **told)
    actual = generate(model, implementation, cache, tokens, prefill_chunk_size=40, **told)
    assert_same_tokens(expected, actual)


@implementations
def test_embeddings_instead_of_tokens(implementation):
    model, results = llama(), []
    embeddings = model.get_input_embeddings()(prompt(2, 150)).detach()
    for name, cache in (
        ("sdpa", TwinCache(model.config, CacheConfig(bits=BITS))),
        (implementation, CompressedDynamicCache(config=model.config, bits=BITS)),
    ):
        model.set_attn_implementation(name)
        results.append(
            model.generate(
                inputs_embeds=embeddings,
                max_new_tokens=8,
                do_sample=False,
                **{CACHE_ARGUMENT: cache},
            )
        )
    assert torch.equal(*results)


@implementations
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("compresses_cross_attention", [False, True])
def test_encoder_decoder(implementation, num_beams, compresses_cross_attention):
    model = architectures.bart()
    inputs = architectures.decoder_inputs()
    results = []
    for name in ("sdpa", implementation):
        is_twin = not results
        make = (
            functools.partial(TwinCache, model.config, CacheConfig(bits=BITS))
            if is_twin
            else functools.partial(CompressedDynamicCache, config=model.config, bits=BITS)
        )
        cross = make() if compresses_cross_attention else DynamicCache()
        cache = EncoderDecoderCache(make(), cross)
        options = {"decoder_input_ids": inputs["decoder_input_ids"], "num_beams": num_beams}
        results.append(generate(model, name, cache, inputs["input_ids"], **options))
    assert_same_tokens(*results)


@implementations
def test_a_model_whose_layers_come_and_go(implementation, tmp_path):
    """`device_map` with a layer on disk: accelerate's hooks move weights and arguments."""
    expected, _ = both(llama(), "sdpa", prompt(2, 150))
    model = tiny_models.llama()
    devices = {"model.layers.1": "disk", "": "cpu"}
    model = dispatch_model(model, devices, main_device="cpu", offload_dir=str(tmp_path))
    cache = CompressedDynamicCache(config=model.config, bits=BITS)
    assert_same_tokens(expected, generate(model, implementation, cache, prompt(2, 150)))


def test_a_model_that_cannot_take_tokens_back_refuses_to_guess():
    """Recurrent states have no past to return to; transformers says so."""
    model = architectures.causal("falcon_h1", **architectures.MAMBA)()
    cache = CompressedDynamicCache(config=model.config, bits=BITS)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generate(model, "turboquant", cache, prompt(1, 150), prompt_lookup_num_tokens=4)


def test_two_caches_at_once_are_refused():
    cache = CompressedDynamicCache(config=llama().config, bits=BITS)
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(llama(), "turboquant", cache, prompt(1, 8), cache_implementation="static")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("doge", "doge makes attention masks of its own"),  # from the causal one and the values
        ("diffllama", "diffllama changes keys or values"),  # joins the heads of its values
        ("jetmoe", "jetmoe changes keys or values"),  # repeats the heads of both
    ],
)
def test_a_model_that_works_with_the_keys_itself_is_refused(kind, message):
    model = architectures.causal(kind, **architectures.JETMOE if kind == "jetmoe" else {})()
    cache = CompressedDynamicCache(config=model.config, bits=BITS)
    with pytest.raises(ValueError, match=message) as refusal:
        generate(model, "turboquant", cache, prompt(1, 150))
    assert "model.set_attn_implementation('sdpa') or 'eager'" in str(refusal.value)
    # While the traceback keeps the refused keys, as a notebook does, other caches are served.
    expected = generate(model, "eager", DynamicCache(config=model.config), prompt(1, 150))
    stock = DynamicCache(config=model.config)
    if kind == "doge":  # without the causal mask its own would show the future
        with pytest.raises(ValueError, match=message):
            generate(model, "turboquant", stock, prompt(1, 150))
    else:
        assert_same_tokens(expected, generate(model, "turboquant", stock, prompt(1, 150)))
    expected, actual = both(model, "eager", prompt(1, 150), reference="eager")
    assert_same_tokens(expected, actual)
