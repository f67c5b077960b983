"""Widths decided from the prompt: when, from what, and that nothing else changes."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from tiny_models import assert_same_tokens, generate, prompt
from transformers import DynamicCache
from turboquant_cpp import CompressedDynamicCache
from turboquant_cpp.hf.compat import CACHE_ARGUMENT
from turboquant_cpp.hf.dense import AttentionCall
from turboquant_cpp.hf.policy import DECISION_TOKENS, LatestQueries, _head_errors

TOKENS = DECISION_TOKENS + 40


@pytest.fixture(scope="module")
def llama():
    model = tiny_models.llama(num_hidden_layers=3)
    model.set_attn_implementation("turboquant")
    return model


def auto(model, **options):
    return CompressedDynamicCache(config=model.config, policy="auto", **({"bits": 4} | options))


@torch.no_grad()
def feed(model, cache, tokens, *chunks, **options):
    """Run the model over tokens cut into chunks; the rest in one piece."""
    sizes = [*chunks, tokens.shape[1] - sum(chunks)]
    for chunk in tokens.split(sizes, dim=1):
        output = model(chunk, **{CACHE_ARGUMENT: cache}, **options)
    return output.logits


def page_bytes(cache):
    return sum(layer.store._page_bytes for layer in cache.compressed_layers())


def states_of(cache):
    return [layer.store.export_state() for layer in cache.compressed_layers()]


def assert_same_storage(left, right):
    for one, other in zip(states_of(left), states_of(right), strict=True):
        assert one.spec == other.spec
        for name in ("pages", "exact_keys", "exact_values", "smoothing"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_a_step_after_the_prompt_decides_within_the_budget(llama):
    cache = auto(llama)
    feed(llama, cache, prompt(1, TOKENS))
    assert cache.policy_decisions == ()
    feed(llama, cache, prompt(1, 1))
    config = cache.context.config
    assert set(config.layer_bits) == {0, 1, 2}
    assert [(d.k_bits, d.v_bits) for d in cache.policy_decisions] == [
        config.bits_of(layer) for layer in range(3)
    ]
    assert all("times the mean layer's error" in d.reason for d in cache.policy_decisions)
    assert all(d.key_error > 0 and d.value_error > 0 for d in cache.policy_decisions)
    assert "policy='auto'" in repr(cache)
    assert cache.compression_stats()["settings"]["layer_bits"] == config.layer_bits
    uniform = CompressedDynamicCache(config=llama.config, bits=4)
    feed(llama, uniform, prompt(1, TOKENS))
    assert page_bytes(cache) <= page_bytes(uniform)


@pytest.mark.parametrize("chunks", [(), (8, 8, 200, 100), (500,)])
def test_tokens_are_exact_until_then(llama, chunks):
    tokens = prompt(1, DECISION_TOKENS - 1)
    cache, exact = auto(llama, bits=1), DynamicCache(config=llama.config)
    logits = [feed(llama, target, tokens, *chunks) for target in (cache, exact)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
    for layer, stock in zip(cache.layers, exact.layers, strict=True):
        # The layers before have rounded their attention otherwise.
        torch.testing.assert_close(layer.keys, stock.keys, rtol=0, atol=1e-5)
        assert layer.store.encoded_tokens == [0]


def test_what_is_encoded_is_what_one_append_encodes(llama):
    """The bytes are those of a cache that had the widths from the start."""
    cache, tokens = auto(llama), prompt(1, TOKENS)
    feed(llama, cache, tokens, 100, 100)
    exact = [(layer.keys, layer.values) for layer in cache.layers]
    feed(llama, cache, prompt(1, 1))
    given = CompressedDynamicCache(
        config=llama.config, bits=4, layer_bits=cache.context.config.layer_bits
    )
    for index, (keys, values) in enumerate(exact):
        given.update(keys, values, index)
        cache.layers[index].crop(-1)
        given.layers[index].commit()
    assert_same_storage(cache, given)


def test_a_cache_that_is_reset_keeps_its_widths(llama):
    cache = auto(llama)
    feed(llama, cache, prompt(1, TOKENS), TOKENS - 1)
    decided = cache.context.config.layer_bits
    cache.reset()
    feed(llama, cache, prompt(1, 200))
    assert [layer.store.encoded_tokens for layer in cache.layers] == [[128]] * 3
    assert {i: (s.spec.k_bits, s.spec.v_bits) for i, s in enumerate(states_of(cache))} == decided


def test_without_the_queries_the_widths_are_those_asked_for():
    model = tiny_models.llama()
    model.set_attn_implementation("sdpa")
    cache = auto(model)
    feed(model, cache, prompt(1, TOKENS), TOKENS - 1)
    assert cache.context.config.layer_bits == {0: (4, 4), 1: (4, 4)}
    assert all("turboquant" in d.reason for d in cache.policy_decisions)
    assert all(d.key_error is None for d in cache.policy_decisions)


def test_rows_padding_and_copies_do_not_change_the_decision(llama):
    tokens = prompt(1, TOKENS)
    alone = auto(llama)
    feed(llama, alone, tokens)
    twin = copy.deepcopy(alone)
    repeated = copy.deepcopy(alone)
    repeated.batch_repeat_interleave(3)
    repeated.batch_select_indices(torch.tensor([2, 0]))
    padded = auto(llama)
    mask = torch.ones(1, TOKENS + 24, dtype=torch.long)
    mask[:, :24] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        llama(
            torch.cat([torch.zeros_like(tokens[:, :24]), tokens], 1),
            attention_mask=mask,
            position_ids=positions,
            **{CACHE_ARGUMENT: padded},
        )
    assert padded.layers[0].left_padding == [24]
    for cache in (alone, twin, repeated, padded):
        rows = cache.layers[0].batch_size
        cache.update(*torch.zeros(2, rows, 2, 1, 16), 0)
    for cache in (twin, repeated, padded):
        assert cache.context.config.layer_bits == alone.context.config.layer_bits
        for one, other in zip(cache.policy_decisions, alone.policy_decisions, strict=True):
            assert one.key_error == pytest.approx(other.key_error, rel=1e-3)
            assert one.value_error == pytest.approx(other.value_error, rel=1e-3)


def test_generation_goes_through_the_decision(llama):
    tokens = prompt(1, TOKENS)
    exact = generate(llama, "turboquant", DynamicCache(config=llama.config), tokens)
    many_bits = auto(llama, bits=8)
    assert_same_tokens(exact, generate(llama, "turboquant", many_bits, tokens), 0)
    assert many_bits.context.config.layer_bits


@pytest.mark.parametrize("tokens", [200, TOKENS])
def test_a_saved_cache_has_decided(llama, tmp_path, tokens):
    cache = auto(llama, preset="max", bits=None)
    feed(llama, cache, prompt(1, tokens))
    cache.save(tmp_path / "cache.safetensors")
    loaded = CompressedDynamicCache.load(tmp_path / "cache.safetensors", config=llama.config)
    assert loaded.context.config == cache.context.config
    assert loaded.context.config.layer_bits
    assert (loaded.context.config.bits_of(0) == (3, 2)) or tokens == TOKENS
    assert_same_storage(loaded, cache)
    logits = [feed(llama, target, prompt(1, 20)) for target in (cache, loaded)]
    assert torch.equal(*logits)


def test_a_budget_in_bytes_is_kept_and_one_that_is_too_small_is_refused(llama):
    uniform = CompressedDynamicCache(config=llama.config, bits=3)
    feed(llama, uniform, prompt(1, 10))
    budget = page_bytes(uniform) // 64
    cache = auto(llama, bytes_per_token=budget)
    feed(llama, cache, prompt(1, TOKENS), TOKENS - 1)
    assert page_bytes(cache) / 64 <= budget
    small = auto(llama, bytes_per_token=1)
    feed(llama, small, prompt(1, TOKENS))
    before = states_of(small)
    with pytest.raises(ValueError, match="bytes_per_token: expected at least"):
        feed(llama, small, prompt(1, 1))
    for one, other in zip(before, states_of(small), strict=True):
        assert torch.equal(one.exact_keys, other.exact_keys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "best"}, "policy: expected one of 'uniform', 'auto'"),
        ({"policy": "auto", "recipe": "plain"}, "policy: expected 'uniform' without an exact"),
        ({"policy": "auto", "bytes_per_token": 0}, "bytes_per_token: expected an integer of at"),
        ({"bytes_per_token": 1000}, "bytes_per_token: expected None without policy='auto'"),
        ({"policy": "auto", "max_cache_len": 99}, "policy: expected 'uniform' with max_cache_len"),
    ],
)
def test_options_that_do_not_go_together(llama, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        CompressedDynamicCache(config=llama.config, bits=4, **options)


def test_the_wrapping_form_is_refused():
    with pytest.raises(ValueError, match=r"^policy: expected 'uniform' in the wrapping"):
        CompressedDynamicCache(DynamicCache(), head_dim=16, bits=4, policy="auto")


def test_the_expected_errors_are_those_of_random_codes():
    """First order in the error: 1 % noise, 400 draws; their mean is good to 5 %."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, keys, values = normal(2, 8, 16), normal(50, 16), normal(50, 16)
    seen = torch.arange(50) <= torch.arange(42, 50)[:, None]
    for softcap in (0.0, 3.0):
        call = AttentionCall(scaling=0.25, softcap=softcap)

        def attend(some_keys, some_values, call=call):
            scores = query @ some_keys.T * call.scaling
            if call.softcap:
                scores = call.softcap * torch.tanh(scores / call.softcap)
            return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ some_values

        exact, expected, measured = attend(keys, values), [], []
        for _ in range(400):
            k, v = keys + 0.01 * normal(50, 16), values + 0.01 * normal(50, 16)
            by_keys, by_values, energy = _head_errors(query, (keys, values), (k, v), seen, call)
            expected.append([by_keys, by_values])
            measured.append(
                [
                    (attend(k, values) - exact).square().sum(),
                    (attend(keys, v) - exact).square().sum(),
                ]
            )
            torch.testing.assert_close(energy, exact.square().sum())
        ratio = torch.tensor(expected).mean(0) / torch.tensor(measured).mean(0)
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=0.05)


def test_queries_of_short_steps_add_up():
    call = AttentionCall(scaling=1.0)
    query = torch.randn(1, 2, 100, 4)
    latest = None
    for start in range(0, 100, 10):
        latest = LatestQueries.after(latest, query[:, :, start : start + 10], call, start + 10)
    assert torch.equal(latest.query, query[:, :, 36:])
    # After a gap the earlier ones are somewhere else.
    assert LatestQueries.after(latest, query[:, :, :1], call, 120).query.shape[2] == 1
