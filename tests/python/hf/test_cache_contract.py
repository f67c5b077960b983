"""What transformers expects of a `DynamicCache`, held against the twin and the stock class.

The behaviours are those that transformers' own tests of its caches check.
"""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace

import architectures
import pytest
import tiny_models
import torch
from contents import assert_same, contents
from tiny_models import assert_same_tokens, generate, prompt
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicSlidingWindowLayer
from turboquant_cpp import CacheConfig, CompressedDynamicCache
from turboquant_cpp.hf.attention import IMPLEMENTATION, turboquant_attention
from turboquant_cpp.hf.compat import CACHE_ARGUMENT
from turboquant_cpp.hf.layer import CompressedLayer
from twin import TwinCache

TOKENS = 150
CONFIG = tiny_models.llama().config


def states(tokens: int = TOKENS, batch: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, 2, tokens, 16, generator=generator).unbind()


def pair(tokens: int = TOKENS, batch: int = 2):
    """A dense twin and a packed cache that hold the same."""
    caches = TwinCache(CONFIG, CacheConfig(bits=4)), CompressedDynamicCache(config=CONFIG, bits=4)
    for cache in caches:
        for layer in range(2):
            cache.update(*states(tokens, batch, seed=layer), layer)
    return caches


def assert_same_contents(twin, cache):
    assert cache.get_seq_length() == twin.get_seq_length()
    for expected, actual in zip(twin.layers, cache.layers, strict=True):
        for name in ("keys", "values"):
            one, other = getattr(expected, name), getattr(actual, name)
            assert one.shape == other.shape
            # A scale between two fp16 numbers may be rounded either way: an ulp of the norm.
            ulp = 2.0**-10 * one.norm(dim=-1, keepdim=True)
            assert bool(((one - other).abs() <= 1e-4 + ulp).all())


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-1),
        lambda cache: cache.crop(-149),
        lambda cache: cache.crop(0),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.batch_repeat_interleave(3),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: (cache.batch_repeat_interleave(2), cache.crop(-40)),
        lambda cache: (cache.crop(-100), cache.update(*states(90, seed=5), 0)),
    ],
    ids=[
        "crop-one",
        "crop-all-but-one",
        "crop-none",
        "swap-rows",
        "repeat-one-row",
        "repeat-all",
        "select",
        "repeat-and-crop",
        "crop-and-append",
    ],
)
def test_changes_leave_what_the_twin_holds(change):
    twin, cache = pair()
    for one in (twin, cache):
        change(one)
        keys, values = states(9, batch=one.layers[1].keys.shape[0], seed=3)
        one.layers[0].update(keys, values)
        one.layers[1].update(keys, values)
    assert_same_contents(twin, cache)


def test_mask_sizes_and_lengths_are_the_stock_ones():
    stock, cache = DynamicCache(config=CONFIG), CompressedDynamicCache(config=CONFIG, bits=4)
    for tokens in (70, 1, 80):
        for one in (stock, cache):
            for layer in range(2):
                one.update(*states(tokens), layer)
        assert cache.get_mask_sizes(5, 1) == stock.get_mask_sizes(5, 1)
        for layer in (0, 1, 7):  # a layer that is not there holds nothing
            assert cache.get_seq_length(layer) == stock.get_seq_length(layer)
        assert cache.get_query_offset() == stock.get_query_offset()
        assert cache.get_max_length() == stock.get_max_length() == -1


@pytest.mark.parametrize("name", ["Gemma 3", "gpt-oss", "Falcon-H1", "Qwen3-Next", "LFM2"])
def test_properties_of_mixed_layers_are_the_stock_ones(name):
    model = next(a for a in architectures.ARCHITECTURES if a.name == name).make()
    stock = DynamicCache(config=model.config)
    cache = CompressedDynamicCache(config=model.config, bits=4)
    for one in (stock, cache):
        generate(model, "eager", one, prompt(1, 40), new_tokens=2)
        assert one.get_seq_length() == 41
    properties = ["is_sliding", "is_linear", "is_dummy", "is_croppable", "is_initialized"]
    properties = [name for name in properties if hasattr(stock, name)]  # 5.24 knows the most
    for name in properties:
        assert getattr(cache, name) == getattr(stock, name), name
    for layer in range(len(stock)):
        kinds = stock.is_sliding[layer], stock.is_linear[layer]
        if not kinds[1]:
            assert cache.get_mask_sizes(3, layer) == stock.get_mask_sizes(3, layer)
            assert cache.get_max_length(layer) == stock.get_max_length(layer)
    if any("conv" in name or "recurrent" in name for name in vars(stock.layers[0])):
        assert cache.has_previous_state() == stock.has_previous_state() is True
    assert not cache.is_compileable


def test_early_initialization_prepares_every_layer():
    cache = CompressedDynamicCache(config=CONFIG, bits=4)
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    assert (cache.batch_size, cache.get_seq_length()) == (2, 0)
    twin = TwinCache(CONFIG, CacheConfig(bits=4))
    for one in (twin, cache):
        for layer in range(2):
            one.update(*states(seed=layer), layer)
    assert_same_contents(twin, cache)
    lists = CompressedDynamicCache(config=CONFIG, bits=4)
    lists.early_initialization(2, [2, 2], [16, 16], torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"expected shape \(2, 2, 150, 16\)"):
        lists.update(*states(batch=3), 0)
    assert lists.get_seq_length() == 0


def test_iterating_gives_dense_copies_that_make_a_stock_cache():
    """What the gather step of `DataParallel` does."""
    twin, cache = pair()
    rebuilt = DynamicCache(list(cache))
    assert_same_contents(twin, rebuilt)
    for keys, values, window in cache:
        keys.fill_(9)
        values.fill_(9)
        assert window is None
    assert_same_contents(twin, cache)


def test_a_reset_cache_serves_another_batch():
    model = tiny_models.llama()
    fresh = CompressedDynamicCache(config=model.config, bits=3)
    used = CompressedDynamicCache(config=model.config, bits=3)
    generate(model, "turboquant", used, prompt(2, TOKENS))
    used.reset()
    assert not used.is_initialized
    results = [generate(model, "turboquant", one, prompt(3, TOKENS, 1)) for one in (fresh, used)]
    assert_same_tokens(*results, 0)


@pytest.mark.parametrize("copies_the_original", [False, True])
def test_a_copy_is_independent(copies_the_original):
    twin, cache = pair()
    other = copy.deepcopy(cache)
    changed, kept = (cache, other) if copies_the_original else (other, cache)
    changed.crop(-30)
    changed.update(*states(70, seed=4), 0)
    assert_same_contents(twin, kept)


def test_update_takes_whatever_models_add():
    """Models pass positions, the attention's arguments and names of their own."""
    cache = CompressedDynamicCache(config=CONFIG, bits=4)
    keys, values = states(3)
    for layer in range(len(cache)):
        cache.update(keys, values, layer, {"cache_position": torch.arange(3)})
    cache.update(keys, values, 0, kwargs={"position_ids": torch.arange(3)})
    assert cache.get_seq_length() == 6


def test_a_shard_of_the_heads_is_enough():
    """With tensor parallelism a layer sees fewer KV heads than the configuration says."""
    keys, values = states()
    whole = CompressedDynamicCache(config=CONFIG, bits=4)
    shard = CompressedDynamicCache(config=CONFIG, bits=4)
    whole.update(keys, values, 0)
    shard.update(keys[:, :1], values[:, :1], 0)
    assert CONFIG.num_key_value_heads == 2
    assert shard.layers[0].keys.shape == (2, 1, TOKENS, 16)
    assert torch.equal(shard.layers[0].keys, whole.layers[0].keys[:, :1])


def test_a_shard_attends_with_its_heads():
    config = tiny_models.llama(num_hidden_layers=1).config
    config._attn_implementation = IMPLEMENTATION
    module, outs = SimpleNamespace(layer_idx=0, is_causal=True), []
    for heads in (2, 1):
        cache = CompressedDynamicCache(config=config, bits=4)
        for tokens, seed in ((TOKENS, 0), (1, 1)):
            keys, values = cache.update(*(part[:, :heads] for part in states(tokens, seed=seed)), 0)
            query = torch.cat(states(tokens, seed=2 + seed), dim=1)[:, : 2 * heads]
            out, _ = turboquant_attention(module, query, keys, values, None, scaling=0.25)
        outs.append(out)
    assert torch.equal(outs[1], outs[0][:, :, :2])


@pytest.mark.parametrize("implementation", ["turboquant", "sdpa"])
@pytest.mark.parametrize("options", [{}, {"max_cache_len": 500}], ids=["growing", "fixed"])
@pytest.mark.parametrize(
    "modes",
    [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)],
    ids=["inference first", "inference last"],
)
def test_inference_mode_may_begin_or_end(implementation, options, modes):
    """What one mode's steps have stored, those of the other read and write."""
    model, results = tiny_models.llama(), []
    model.set_attn_implementation(implementation)
    for first, last in (modes, (torch.no_grad, torch.no_grad)):
        cache = CompressedDynamicCache(config=model.config, bits=4, **options)
        with first():
            model(prompt(2, TOKENS), **{CACHE_ARGUMENT: cache})
            model(prompt(2, 3, seed=1), **{CACHE_ARGUMENT: cache})
        with last():
            cache.crop(-2)
            cache.reorder_cache(torch.tensor([1, 0]))
            cache = copy.deepcopy(cache)
            results.append(model(prompt(2, 70, seed=2), **{CACHE_ARGUMENT: cache}).logits)
            results.append(model(prompt(2, 1, seed=3), **{CACHE_ARGUMENT: cache}).logits)
            cache.reset()
            results.append(model(prompt(2, TOKENS), **{CACHE_ARGUMENT: cache}).logits)
    assert all(map(torch.equal, results[:3], results[3:]))


def test_crop_of_a_full_sliding_layer_changes_nothing():
    """A sliding layer that has dropped tokens cannot go back: nothing is cropped."""
    model = architectures.causal(
        "cohere2", layer_types=["full_attention", "sliding_attention"], sliding_window=24
    )()
    cache = CompressedDynamicCache(config=model.config, bits=4)
    generate(model, "turboquant", cache, prompt(1, 40), new_tokens=2)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-3)
    assert [cache.get_seq_length(layer) for layer in range(2)] == [41, 41]


@pytest.mark.parametrize("is_stepwise", [False, True])
def test_crop_of_a_window_of_fixed_size(is_stepwise):
    """As far as it has dropped nothing; then it would show other tokens' keys and not say so."""
    config = tiny_models.gemma3().config  # sliding, full, sliding, full; a window of 24

    def cache_of(tokens: int) -> CompressedDynamicCache:
        cache = CompressedDynamicCache(config=config, bits=4, max_cache_len=300)
        keys, values = states(tokens)
        for at in range(tokens) if is_stepwise else [slice(None)]:
            part = slice(at, at + 1) if is_stepwise else at
            for layer in range(4):
                cache.update(keys[:, :, part], values[:, :, part], layer)
        return cache

    for tokens, removed, kept in ((20, -3, 17), (24, -4, 20), (20, -100, 0), (24, 0, 24)):
        cache = cache_of(tokens)
        cache.crop(removed)
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [kept] * 4
        assert [int(layer.cumulative_length) for layer in cache.layers[::2]] == [kept] * 2
    cache = cache_of(30)
    before = contents(cache)
    for removed in (-3, -30, 10):
        with pytest.raises(RuntimeError, match=r"cannot go back: it holds 24 of 30 .*reset\(\)"):
            cache.crop(removed)
    assert_same(contents(cache), before)
    cache.crop(0)
    cache.update(*states(1), 0)


@pytest.mark.parametrize("options", [{}, {"max_cache_len": 300}], ids=["growing", "fixed"])
def test_crop_of_an_empty_cache(options):
    cache = CompressedDynamicCache(config=tiny_models.gemma3().config, bits=4, **options)
    cache.crop(-3)
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [0] * 4


def test_encoder_decoder_pairs():
    model, inputs = architectures.bart(), architectures.decoder_inputs()
    model.set_attn_implementation("turboquant")
    pairs = []
    for make in (
        lambda: TwinCache(model.config, CacheConfig(bits=4)),
        lambda: CompressedDynamicCache(config=model.config, bits=4),
    ):
        cache = EncoderDecoderCache(make(), make())
        with torch.no_grad():
            model(**inputs, **{CACHE_ARGUMENT: cache})
        cache = copy.deepcopy(cache)
        assert cache.is_updated == {0: True, 1: True}
        cache.crop(-30)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([2, 1, 0, 3]))
        cache.batch_select_indices(torch.tensor([0, 3]))
        assert len(cache) == 2
        assert cache.get_seq_length() == TOKENS - 30
        assert [len(layer) for layer in cache] == [6, 6]
        pairs.append(cache)
    for name in ("self_attention_cache", "cross_attention_cache"):
        assert_same_contents(*(getattr(cache, name) for cache in pairs))
    rebuilt = EncoderDecoderCache(list(pairs[1]))
    assert_same_contents(pairs[0].cross_attention_cache, rebuilt.cross_attention_cache)
    pairs[1].reset()
    assert pairs[1].get_seq_length() == 0
    assert pairs[1].is_updated == {0: False, 1: False}


class Stream(contextlib.nullcontext):
    """Stands for the streams of an accelerator."""

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def moves(monkeypatch):
    """What offloading asks of compressed layers, in order, without an accelerator."""
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    monkeypatch.setattr(torch.accelerator, "current_stream", Stream)
    moves = []
    for name in ("offload", "prefetch"):
        original = getattr(CompressedLayer, name)

        def move(layer, name=name, original=original):
            moves.append((name, layer.layer_idx))
            original(layer)

        monkeypatch.setattr(CompressedLayer, name, move)
    return moves


# Of a step of two layers.
MOVES = [("prefetch", 1), ("offload", 0), ("prefetch", 0), ("offload", 1)]


@pytest.mark.parametrize("implementation", ["turboquant", "sdpa"])
def test_offloading(moves, implementation):
    """Every layer but the one at work lives on the host, and the tokens are the twin's."""
    model = tiny_models.llama()
    cache = CompressedDynamicCache(config=model.config, bits=3, offloading=True)
    twin = TwinCache(model.config, CacheConfig(bits=3))
    expected = generate(model, "sdpa", twin, prompt(2, TOKENS))
    assert_same_tokens(expected, generate(model, implementation, cache, prompt(2, TOKENS)))
    assert moves == MOVES * 12


@pytest.mark.parametrize("implementation", ["turboquant", "sdpa"])
def test_an_offloading_cache_is_taken_over(moves, implementation):
    """Steps through either object offload its layers, which the other finds where they are."""
    model = tiny_models.llama()
    stock = DynamicCache(config=model.config, offloading=True)
    ids, _ = generate(model, "sdpa", stock, prompt(2, TOKENS))
    cache = CompressedDynamicCache(stock, 16, 3, model_config=model.config)
    assert moves == []
    plain = DynamicCache(config=model.config)
    generate(model, "sdpa", plain, prompt(2, TOKENS))
    expected = CompressedDynamicCache(plain, 16, 3, model_config=model.config)
    for each in (cache, stock):
        wanted = generate(model, "sdpa", expected, ids)
        actual = generate(model, implementation, each, ids)
        assert_same_tokens(wanted, actual)
        ids = actual[0]
        assert moves == MOVES * 12
        moves.clear()


@pytest.mark.parametrize("implementation", ["turboquant", "sdpa"])
@pytest.mark.parametrize("with_config", [True, False])
def test_a_file_is_loaded_into_an_offloading_cache(moves, tmp_path, implementation, with_config):
    """Layers leave for the host as they are made; the step begins with the first, which stays."""
    model = tiny_models.llama()
    cache = CompressedDynamicCache(config=model.config, bits=3)
    ids, _ = generate(model, "sdpa", cache, prompt(2, TOKENS))
    cache.save(tmp_path / "cache")
    config = model.config if with_config else None
    loaded = CompressedDynamicCache.load(tmp_path / "cache", config=config, offloading=True)
    assert moves == [("offload", 1)]
    assert loaded.offloading
    assert_same(contents(loaded), contents(cache))
    moves.clear()
    expected = generate(model, "sdpa", cache, ids)
    assert_same_tokens(expected, generate(model, implementation, loaded, ids))
    assert moves == MOVES * 12


@pytest.mark.parametrize("only_non_sliding", [False, True])
def test_sliding_layers_of_a_file_may_stay(moves, monkeypatch, tmp_path, only_non_sliding):
    stock_moves = []
    monkeypatch.setattr(DynamicSlidingWindowLayer, "offload", lambda self: stock_moves.append(self))
    model = tiny_models.gemma3()  # sliding, full, sliding, full
    cache = CompressedDynamicCache(config=model.config, bits=4)
    generate(model, "sdpa", cache, prompt(1, TOKENS))
    cache.save(tmp_path / "cache")
    loaded = CompressedDynamicCache.load(
        tmp_path / "cache", offloading=True, offload_only_non_sliding=only_non_sliding
    )
    # The first layer that leaves between steps is there when one begins.
    assert moves == ([("offload", 3)] if only_non_sliding else [("offload", 1), ("offload", 3)])
    assert stock_moves == ([] if only_non_sliding else [loaded.layers[2]])
    assert_same(contents(loaded), contents(cache))


def test_a_file_of_fixed_capacity_is_not_offloaded(tmp_path):
    cache = CompressedDynamicCache(config=CONFIG, bits=4, max_cache_len=300)
    for layer in range(len(cache.layers)):
        cache.update(*states(), layer)
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="offloading: expected False with max_cache_len"):
        CompressedDynamicCache.load(tmp_path / "cache", config=CONFIG, offloading=True)


def test_a_copy_of_an_offloading_cache(monkeypatch):
    """The stream that it prefetches on holds nothing, and torch cannot copy it."""
    stream = torch.Stream(device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "Stream", lambda: stream)
        cache = CompressedDynamicCache(config=CONFIG, bits=4, offloading=True)
    cache.layers[0].update(*states())
    twin = copy.deepcopy(cache)
    assert twin.offloading
    assert twin.prefetch_stream is stream
    assert_same(contents(twin), contents(cache))
    twin.crop(-3)
    assert cache.get_seq_length() == TOKENS
