"""Steps that fail halfway: nothing is lost, or the cache says what repairs it."""

from __future__ import annotations

import copy
import itertools

import pytest
import tiny_models
import torch
from contents import assert_same, contents
from faults import FailAt
from tiny_models import assert_same_tokens, generate, prompt
from transformers import DynamicCache
from turboquant_cpp import CacheConfig, CompressedDynamicCache
from turboquant_cpp.hf.chunk import pending_chunk
from turboquant_cpp.hf.context import CacheContext
from turboquant_cpp.hf.dense import AttentionCall
from turboquant_cpp.hf.fixed_layer import FixedLayer
from turboquant_cpp.hf.layer import CompressedLayer

# 4 sinks, one page and 126 exact tokens: two more make the next page.
PAST = 194
MODES = {
    "dense": {},
    "incremental": {"dequantize": "incremental"},
    "quantized": {"prefill": "quantized"},
    "fused": {},
    "fused quantized": {"prefill": "quantized"},
    "dense, fixed": {"max_cache_len": 600},
    "fused, fixed": {"max_cache_len": 600},
    "fused quantized, fixed": {"max_cache_len": 600, "prefill": "quantized"},
}


class ModelConfig:
    model_type = "tiny"

    def __init__(self, mode: str) -> None:
        self._attn_implementation = "turboquant" if mode.startswith("fused") else "sdpa"


def states(tokens: int, batch: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, 2, tokens, 16, generator=generator).unbind()


def make_layer(mode: str, past: int = PAST, **options) -> CompressedLayer:
    config = CacheConfig(bits=4, **options)
    kind = FixedLayer if mode.endswith("fixed") else CompressedLayer
    layer = kind(CacheContext(config, ModelConfig(mode), **MODES[mode]), layer_idx=0)
    if past:
        step(layer, past)
    return layer


def step(layer: CompressedLayer, tokens: int, seed: int = 0) -> list[torch.Tensor]:
    """What a model's layer does: update, and attention over what that returned."""
    keys, values = layer.update(*states(tokens, seed=seed))
    chunk = pending_chunk(keys, values)
    if chunk is None:
        return [keys.clone(), values.clone()]
    query = torch.ones(2, 4, tokens, 16)
    return [chunk.attend(query, None, AttentionCall(scaling=0.25))]


def shown(layer: CompressedLayer):
    """Everything that reading the layer shows; the layer itself is not changed."""
    twin = copy.deepcopy(layer)
    if not twin.is_initialized:
        return 0, []
    return twin.committed_tokens, [*twin.dense(), twin.store.export_state().smoothing]


def same(one, other) -> bool:
    return one[0] == other[0] and all(map(torch.equal, one[1], other[1]))


def failures(make, action):
    """Run `action` on what `make` returns with each of its operations failing once."""
    for nth in itertools.count(1):
        made, fault = make(), FailAt(nth)
        try:
            with fault:
                action(made)
        except torch.OutOfMemoryError:
            yield made
        else:
            assert nth > fault.calls
            assert nth > 3
            return


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [1, 2, 200])
def test_a_step_that_fails_can_be_repeated(mode, tokens):
    """As long as the tokens are not stored; if they are, they can be removed and added again."""
    before, expected = make_layer(mode), make_layer(mode)
    expected_read = step(expected, tokens, seed=1)
    for layer in failures(lambda: make_layer(mode), lambda layer: step(layer, tokens, seed=1)):
        length = layer.get_seq_length()
        assert length in (PAST, PAST + tokens)
        if length == PAST:
            assert same(shown(layer), shown(before))
        elif layer._pending is None:
            assert same(shown(layer), shown(expected))  # whole: only its reading failed
            continue
        layer.crop(PAST - length)
        assert same(shown(layer), shown(before))
        read = step(layer, tokens, seed=1)
        assert all(map(torch.equal, read, expected_read))
        assert same(shown(layer), shown(expected))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"recipe": "plain"}], ids=str)
def test_a_first_prefill_that_fails_leaves_nothing(mode, options):
    expected = make_layer(mode, 0, **options)
    expected_read = step(expected, 300, seed=1)
    make = lambda: make_layer(mode, 0, **options)  # noqa: E731
    for layer in failures(make, lambda layer: step(layer, 300, seed=1)):
        if layer.get_seq_length():  # fused: the chunk waits
            layer.crop(-300)
        assert layer.get_seq_length() == 0
        read = step(layer, 300, seed=1)
        assert all(map(torch.equal, read, expected_read))
        assert same(shown(layer), shown(expected))


def test_after_a_failed_first_prefill_a_smaller_batch_may_come():
    layer = make_layer("dense", 0)
    with pytest.raises(torch.OutOfMemoryError), FailAt(5):
        layer.update(*states(300))
    assert not layer.is_initialized
    layer.update(*states(300, batch=1))
    assert layer.batch_size == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_select_indices(torch.tensor([False, True])),
        lambda layer: layer.batch_repeat_interleave(3),
        copy.deepcopy,
    ],
    ids=["reorder", "select", "repeat", "deepcopy"],
)
def test_a_change_of_rows_happens_or_does_not(mode, change):
    before, after = make_layer(mode), make_layer(mode)
    change(after)
    for layer in failures(lambda: make_layer(mode), change):
        assert same(shown(layer), shown(before))
        change(layer)
        assert same(shown(layer), shown(after))


def test_a_crop_allocates_nothing():
    """So that it can free a cache which has no memory left, a chunk that waits included."""
    layer = make_layer("fused")
    layer.update(*states(80, seed=1))
    before = shown(make_layer("fused"))
    with FailAt(1):
        layer.crop(-80)
    assert same(shown(layer), before)


def test_a_chunk_that_waits_is_stored_when_only_a_part_is_cropped():
    layer = make_layer("fused")
    layer.update(*states(5, seed=1))
    with pytest.warns(UserWarning, match="never reached"):
        layer.crop(-3)
    assert layer.store.lengths == [PAST + 2] * 2
    torch.testing.assert_close(layer.keys[:, :, PAST:], states(5, seed=1)[0][:, :, :2])


@pytest.fixture(scope="module")
def llama():
    return tiny_models.llama(num_hidden_layers=3)


def prefilled(model, implementation: str, tokens: int = 150, **options) -> CompressedDynamicCache:
    model.set_attn_implementation(implementation)
    cache = CompressedDynamicCache(config=model.config, bits=4, **options)
    with torch.no_grad():
        model(prompt(1, tokens), past_key_values=cache)
    return cache


def forward(model, cache, tokens):
    with torch.no_grad():
        return model(tokens, past_key_values=cache).logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "options"),
    [
        ("sdpa", {}),
        ("sdpa", {"dequantize": "incremental"}),
        ("turboquant", {}),
        ("turboquant", {"prefill": "quantized"}),
        ("sdpa", {"max_cache_len": 300}),
        ("turboquant", {"max_cache_len": 300}),
    ],
    ids=str,
)
def test_a_models_step_that_fails_anywhere_can_be_repeated(llama, implementation, options):
    """Every operation of a forward pass fails once, in the layers and between them."""
    past = prefilled(llama, implementation, **options)
    before, new = contents(past), prompt(1, 3, seed=1)
    expected_cache = copy.deepcopy(past)
    expected = forward(llama, expected_cache, new)
    uneven = 0
    for cache in failures(lambda: copy.deepcopy(past), lambda cache: forward(llama, cache, new)):
        lengths = [int(layer.get_seq_length()) for layer in cache.layers]
        if len(set(lengths)) > 1:
            uneven += 1
            with pytest.raises(RuntimeError, match=r"crop\(-3\), or forget .* reset\(\)"):
                forward(llama, cache, new)
            assert [int(layer.get_seq_length()) for layer in cache.layers] == lengths
        cache.crop(150 - lengths[0])
        assert_same(contents(cache), before)
        assert torch.equal(forward(llama, cache, new), expected)
        assert_same(contents(cache), contents(expected_cache))
    assert uneven > 20


def failing(module, call: int):
    """Make the module's call of that number fail, once."""
    calls = itertools.count(1)

    def hook(*_):
        if next(calls) == call:
            raise KeyboardInterrupt

    return module.register_forward_pre_hook(hook)


@pytest.mark.parametrize("implementation", ["sdpa", "turboquant"])
@pytest.mark.parametrize("wrapping", [False, True], ids=["native", "wrapping"])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("call", [1, 4])
def test_generate_interrupted_in_a_layer(llama, implementation, wrapping, layer, call):
    tokens = prompt(1, 150)
    expected = generate(
        llama, implementation, CompressedDynamicCache(config=llama.config, bits=4), tokens
    )
    if wrapping:
        cache = CompressedDynamicCache(DynamicCache(), 16, 4, model_config=llama.config)
    else:
        cache = CompressedDynamicCache(config=llama.config, bits=4)
    hook = failing(llama.model.layers[layer].mlp, call)  # its keys are stored then
    with pytest.raises(KeyboardInterrupt):
        generate(llama, implementation, cache, tokens)
    hook.remove()
    seen = cache.get_seq_length()
    assert seen == 150 + call - 1
    added = 150 if call == 1 else 1
    if layer < 2:
        # The retry goes on where layer 0 is, and must not read the others' past beside it.
        with pytest.raises(
            RuntimeError, match=rf"(layer {layer + 1} |.* layer {layer + 1} ).*crop"
        ):
            generate(llama, implementation, cache, expected[0][:, : seen + 1])
    cache.crop(seen - added - cache.get_seq_length())
    assert {one.get_seq_length() for one in cache.layers} == {seen - added}
    known = 150 + call - 1  # the newest of which was fed by the step that failed
    ids, _ = generate(llama, implementation, cache, expected[0][:, :known], new_tokens=162 - known)
    assert torch.equal(ids, expected[0])


def test_reset_cures_a_failed_step(llama):
    cache = prefilled(llama, "sdpa")
    hook = failing(llama.model.layers[1].mlp, 1)
    with pytest.raises(KeyboardInterrupt):
        forward(llama, cache, prompt(1, 3))
    hook.remove()
    with pytest.raises(RuntimeError, match="a step failed between them"):
        cache.save("nowhere")
    cache.reset()
    expected = generate(
        llama, "sdpa", CompressedDynamicCache(config=llama.config, bits=4), prompt(1, 9)
    )
    assert_same_tokens(expected, generate(llama, "sdpa", cache, prompt(1, 9)), 0)


def test_a_reset_that_fails_is_done_again():
    """Layers before the one that failed are shorter than the others, as after no failed step."""
    config = tiny_models.gemma3().config

    def make() -> CompressedDynamicCache:
        cache = CompressedDynamicCache(config=config, bits=4, max_cache_len=300)
        for layer in range(4):
            cache.update(*states(20), layer)
        return cache

    for cache in failures(make, lambda cache: cache.reset()):
        with pytest.raises(RuntimeError, match=r"reset failed .* forget everything with reset\(\)"):
            cache.update(*states(1), 0)
        cache.reset()
        for layer in range(4):
            assert int(cache.get_seq_length(layer)) == 0
            cache.update(*states(5), layer)


CHANGES = {
    "reorder_cache": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "batch_repeat_interleave": lambda cache: cache.batch_repeat_interleave(2),
    "batch_select_indices": lambda cache: cache.batch_select_indices(torch.tensor([1])),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {}), ("gemma3", {}), ("llama", {"max_cache_len": 300})],
    ids=["llama", "gemma3", "llama, fixed"],
)
def test_a_change_that_fails_between_layers_asks_for_a_reset(change, kind, options):
    config = getattr(tiny_models, kind)().config

    def make() -> CompressedDynamicCache:
        cache = CompressedDynamicCache(config=config, bits=4, **options)
        for layer in range(len(cache.layers)):
            cache.update(*states(150), layer)
        return cache

    before, after = contents(make()), make()
    CHANGES[change](after)
    asked = 0
    for cache in failures(make, CHANGES[change]):
        if cache._damage is None:  # the first layer failed and is as it was
            assert_same(contents(cache), before)
            CHANGES[change](cache)
            assert_same(contents(cache), contents(after))
            continue
        asked += 1
        for use in (
            lambda cache: cache.update(*states(1), 0),
            lambda cache: cache.crop(-1),
            lambda cache: cache.save("nowhere"),
            *CHANGES.values(),
        ):
            with pytest.raises(RuntimeError, match=rf"{change} failed .*reset\(\)"):
                use(cache)
        cache.reset()
        cache.check_usable()
        cache.layers[1].update(*states(3, batch=1))
    assert asked > 0


@pytest.mark.parametrize(
    "change",
    [CHANGES["reorder_cache"], lambda cache: cache.crop(-3)],
    ids=["reorder_cache", "crop"],
)
def test_a_change_of_stock_layers_of_fixed_size_that_fails(change):
    config = tiny_models.gemma3().config  # its sliding layers are changed first

    def make() -> CompressedDynamicCache:
        cache = CompressedDynamicCache(config=config, bits=4, max_cache_len=300)
        for layer in range(4):
            cache.update(*states(20, seed=layer), layer)
        return cache

    before, after = contents(make()), make()
    change(after)
    asked = 0
    for cache in failures(make, change):
        if cache._damage is None:
            assert_same(contents(cache), before)
            change(cache)
            assert_same(contents(cache), contents(after))
            continue
        asked += 1
        with pytest.raises(RuntimeError, match=r"failed .*reset\(\)"):
            cache.update(*states(1), 0)
    assert asked > 0


@pytest.mark.parametrize("options", [{}, {"max_cache_len": 300}], ids=["growing", "fixed"])
def test_a_change_that_the_first_layer_refuses_changes_nothing(options):
    cache = CompressedDynamicCache(config=tiny_models.llama().config, bits=4, **options)
    for layer in range(2):
        cache.update(*states(150), layer)
    before = contents(cache)
    for wrong in (
        lambda: cache.reorder_cache(torch.tensor([0, 2])),
        lambda: cache.batch_repeat_interleave(0),
        lambda: cache.crop(1.5),
    ):
        with pytest.raises((ValueError, TypeError)):
            wrong()
    assert_same(contents(cache), before)
    cache.update(*states(1), 0)


@pytest.mark.parametrize("options", [{}, {"max_cache_len": 300}], ids=["growing", "fixed"])
@pytest.mark.parametrize(
    ("past", "tokens"),
    # A window of 24: free slots suffice, some do, none is left, all tokens are replaced.
    [(12, 9), (20, 9), (20, 40), (30, 1), (30, 9), (30, 24), (30, 40)],
)
@pytest.mark.parametrize("is_inference", [(False, False), (True, True), (False, True)], ids=str)
def test_a_stock_layer_that_fails_holds_what_it_held(options, past, tokens, is_inference):
    """A sliding-window layer counts tokens before it stores them, one of fixed size in place."""
    config = tiny_models.gemma3().config
    was_made_in, is_used_in = (torch.inference_mode(mode) for mode in is_inference)

    def make() -> CompressedDynamicCache:
        cache = CompressedDynamicCache(config=config, bits=4, **options)
        with was_made_in:
            for layer in range(4):
                cache.update(*states(past), layer)
        return cache

    def update(cache) -> tuple[torch.Tensor, torch.Tensor]:
        with is_used_in:
            return cache.update(*states(tokens, seed=1), 0)

    before, after = contents(make()), make()
    expected = [part.clone() for part in update(after)]
    for cache in failures(make, update):
        assert_same(contents(cache), before)
        assert all(map(torch.equal, update(cache), expected))
        assert_same(contents(cache), contents(after))
    empty = CompressedDynamicCache(config=config, bits=4, **options)
    with pytest.raises(torch.OutOfMemoryError), FailAt(3):
        empty.update(*states(9), 0)
    assert empty.get_seq_length() == 0
    assert not empty.layers[0].is_initialized


@torch.inference_mode()
def prefilled_in_inference_mode(config) -> CompressedDynamicCache:
    cache = CompressedDynamicCache(config=config, bits=4, max_cache_len=300)
    for layer in range(4):
        cache.update(*states(30), layer)
    return cache


def test_a_window_of_inference_mode_cannot_be_written_outside_of_it():
    """Torch says so when it has written to it."""
    cache = prefilled_in_inference_mode(tiny_models.gemma3().config)
    before = contents(cache)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        cache.update(*states(1, seed=1), 0)
    assert_same(contents(cache), before)


def test_a_crop_after_a_failed_step_counts_from_the_layers_ahead():
    cache = CompressedDynamicCache(config=tiny_models.gemma3().config, bits=4)
    for layer in range(4):
        cache.update(*states(15), layer)
    for layer in range(2):
        cache.update(*states(5), layer)
    assert [layer.get_seq_length() for layer in cache.layers] == [20, 20, 15, 15]
    cache.crop(-2)
    assert [layer.get_seq_length() for layer in cache.layers] == [18, 18, 15, 15]
    with pytest.raises(RuntimeError, match=r"layer 0 holds 18 tokens and layer 2 15.*crop\(-3\)"):
        cache.update(*states(1), 0)
    cache.crop(15)
    assert {layer.get_seq_length() for layer in cache.layers} == {15}
    cache.update(*states(1), 0)


def test_layers_of_other_lengths_that_no_failed_step_leaves():
    """Cross-attention layers among the others hold an image's tokens, more or fewer."""
    for image_tokens in (10, 400):
        cache = CompressedDynamicCache(config=tiny_models.llama(num_hidden_layers=3).config, bits=4)
        for layer, tokens in enumerate((150, image_tokens, 150)):
            cache.update(*states(tokens), layer)
        cache.update(*states(1), 0)
        cache.update(*states(1), 2)
        cache.update(*states(1), 0)


@pytest.mark.parametrize("implementation", ["sdpa", "turboquant"])
def test_a_failed_step_of_a_cache_of_fixed_capacity(llama, implementation):
    llama.set_attn_implementation(implementation)
    cache = CompressedDynamicCache(config=llama.config, bits=4, max_cache_len=300)
    forward(llama, cache, prompt(1, 150))
    expected = forward(llama, copy.deepcopy(cache), prompt(1, 3, seed=1))
    hook = failing(llama.model.layers[1].mlp, 1)
    with pytest.raises(KeyboardInterrupt):
        forward(llama, cache, prompt(1, 3, seed=1))
    hook.remove()
    with pytest.raises(RuntimeError, match=r"layer 0 holds 153 .* layer 2 150: .*crop\(-3\)"):
        forward(llama, cache, prompt(1, 3, seed=1))
    cache.crop(-3)
    assert torch.equal(forward(llama, cache, prompt(1, 3, seed=1)), expected)
