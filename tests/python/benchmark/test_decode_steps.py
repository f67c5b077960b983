import pytest
import tiny_models
import torch
from transformers import DynamicCache, StaticCache
from turboquant_cpp import CompressedDynamicCache
from turboquant_cpp.benchmark.decode_steps import (
    Contender,
    StepTiming,
    fill,
    longest_context,
    time_decode_steps,
)
from turboquant_cpp.evaluation import CacheSize


def contenders(model):
    return {
        "exact": Contender(lambda tokens: DynamicCache(config=model.config), "sdpa"),
        "4+4": Contender(
            lambda tokens: CompressedDynamicCache(config=model.config, bits=4), "turboquant"
        ),
    }


def test_every_cache_makes_its_steps_over_the_given_past():
    model = tiny_models.llama()
    model.set_attn_implementation("eager")
    turns = []
    exact, ours = time_decode_steps(
        model, 300, contenders(model), steps=5, progress=lambda *at: turns.append(at)
    )
    assert turns == [(1, 2), (2, 2)]  # three timed steps a turn
    assert (exact.cache, ours.cache) == ("exact", "4+4")
    assert exact.past_tokens == ours.past_tokens == 300
    for timing in (exact, ours):
        assert 0 < timing.least_ms <= timing.median_ms
        assert timing.peak_bytes is None
    # 300 tokens and two turns of four steps, in 2 layers of 2 heads of 16 channels, float32.
    assert exact.size.total_bytes == 308 * 2 * 2 * 16 * 2 * 4
    assert ours.size.total_bytes < exact.size.total_bytes
    assert model.config._attn_implementation == "eager"


def test_compiled_steps_are_timed_over_caches_of_fixed_capacity():
    model = tiny_models.llama()

    def fixed(tokens):
        return CompressedDynamicCache(config=model.config, bits=4, max_cache_len=tokens)

    contenders = {
        "static": Contender(
            lambda tokens: StaticCache(config=model.config, max_cache_len=tokens), "sdpa", True
        ),
        "fixed": Contender(fixed, "turboquant", True),
    }
    static, ours = time_decode_steps(model, 70, contenders, steps=3)
    # One turn of four steps timed, one that compiles, in 2 layers of 2 heads of 16 channels.
    held = 78 * 2 * 2 * 16 * 2 * 4
    assert held <= static.size.total_bytes <= held + 2 * 8  # and a count of tokens
    assert 0 < ours.least_ms < static.median_ms + 1000


def test_a_cache_that_memory_does_not_hold_is_left_out():
    model = tiny_models.llama()

    def too_large(tokens):
        raise torch.OutOfMemoryError

    contenders = {"too large": Contender(too_large, "sdpa")}
    contenders["exact"] = Contender(lambda tokens: DynamicCache(config=model.config), "sdpa")
    timings = time_decode_steps(model, 70, contenders, steps=3)
    assert [timing.cache for timing in timings] == ["exact"]


def test_the_past_is_filled_in_pieces(monkeypatch):
    monkeypatch.setattr("turboquant_cpp.benchmark.decode_steps._FILL_TOKENS", 64)
    model = tiny_models.llama()
    cache = CompressedDynamicCache(config=model.config, bits=4)
    fill(cache, model, 150)
    assert cache.get_seq_length() == 150
    keys = cache.layers[1].keys
    assert keys.shape == (1, 2, 150, 16)
    assert 0.8 < float(keys.std()) < 1.2
    assert torch.isfinite(keys).all()


@pytest.mark.parametrize("capacity", [None, 200])
def test_no_layer_waits_for_attention_over_the_past(capacity):
    model = tiny_models.llama()
    model.set_attn_implementation("turboquant")
    cache = CompressedDynamicCache(config=model.config, bits=4, max_cache_len=capacity)
    fill(cache, model, 150)
    assert [layer.committed_tokens for layer in cache.compressed_layers()] == [150, 150]


def test_the_longest_context_is_where_cache_and_step_fill_the_memory():
    def timing(tokens, peak_bytes):  # 30 bytes a token and 1,000 beside them
        size = CacheSize({"pages": 30 * tokens, "exact": 1000})
        return StepTiming("ours", tokens, 1.0, 1.0, size, peak_bytes)

    assert longest_context([timing(100, None), timing(50, None)], 31_000) == 1000
    # A step's own memory: 500 bytes at 50 tokens, 10 more for each token.
    assert longest_context([timing(50, 500), timing(100, 1000)], 41_000) == 1000
    with pytest.raises(ValueError, match="two lengths"):
        longest_context([timing(50, 0)] * 2, 1)


def test_layers_of_other_kinds_are_refused():
    model = tiny_models.gemma3()
    with pytest.raises(ValueError, match="model: expected full-attention layers alone"):
        fill(DynamicCache(config=model.config), model, 10)
