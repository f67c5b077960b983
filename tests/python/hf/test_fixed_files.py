"""`save` and `load` of a cache of fixed capacity: the same tokens, and memory when it is needed."""

from __future__ import annotations

import copy
import resource
import sys

import pytest
import tiny_models
import torch
from contents import assert_same, contents
from tiny_models import generate, left_padded, prompt
from torch._dynamo.testing import CompileCounter
from turboquant_cpp import CompressedDynamicCache

CAPACITY = 400


@pytest.fixture(scope="module")
def llama():
    return tiny_models.llama()


def fixed_cache(model, **options):
    return CompressedDynamicCache(
        **{"config": model.config, "bits": 4, "max_cache_len": CAPACITY, **options}
    )


def reloaded(cache, model, path):
    cache.save(path)
    return CompressedDynamicCache.load(path, config=model.config)


@pytest.mark.parametrize("implementation", ["turboquant", "sdpa"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 2, "recipe": "plain"},
        {"bits": None, "k_bits": 5, "v_bits": 3, "window_tokens": 128, "sink_tokens": 0},
        {"bits": 3, "prefill": "quantized", "max_cache_len": 301},
    ],
    ids=str,
)
@pytest.mark.parametrize("padding", [[0, 0], [37, 0]], ids=str)
def test_generation_goes_on_with_the_same_tokens(llama, tmp_path, implementation, options, padding):
    tokens, mask = left_padded(prompt(2, 150), padding)
    cache = fixed_cache(llama, **options, attention_mask=mask)
    reply, _ = generate(llama, implementation, cache, tokens, attention_mask=mask)
    loaded = reloaded(cache, llama, tmp_path / "cache")
    assert loaded.get_max_length() == options.get("max_cache_len", CAPACITY)
    longer = torch.cat([reply, prompt(2, 40, seed=1)], 1)
    mask = torch.cat([mask, torch.ones(2, longer.shape[1] - 150, dtype=mask.dtype)], 1)
    results = [
        generate(llama, implementation, each, longer, new_tokens=90, attention_mask=mask)
        for each in (cache, loaded)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert_same(contents(loaded), contents(cache))


@pytest.mark.parametrize("tokens", [15, 150], ids=["within the window", "beyond the window"])
@pytest.mark.parametrize("implementation", ["turboquant", "eager"])
def test_sliding_layers_go_on_too(tmp_path, tokens, implementation):
    model = tiny_models.gemma2()
    cache = fixed_cache(model)
    reply, _ = generate(model, implementation, cache, prompt(2, tokens), new_tokens=5)
    loaded = reloaded(cache, model, tmp_path / "cache")
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in cache.layers]
    longer = torch.cat([reply, prompt(2, 3, seed=1)], 1)
    results = [
        generate(model, implementation, each, longer, new_tokens=60) for each in (cache, loaded)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert_same(contents(loaded), contents(cache))


def test_what_a_sliding_layer_forgot_is_not_written(tmp_path):
    model = tiny_models.gemma2()
    cache = fixed_cache(model)
    generate(model, "eager", cache, prompt(1, 15), new_tokens=2)
    for buffer in (cache.layers[0].keys, cache.layers[0].values):
        buffer[:, :, 16:] = float("nan")
    loaded = reloaded(cache, model, tmp_path / "cache")
    assert not loaded.layers[0].keys[:, :, 16:].any()
    assert torch.equal(loaded.layers[0].values[:, :, :16], cache.layers[0].values[:, :, :16])


def test_every_position_of_a_loaded_cache_can_be_filled(llama, tmp_path):
    """Crops within pages make a wider table; a file has it as it is."""
    cache = fixed_cache(llama)
    llama.set_attn_implementation("turboquant")
    with torch.no_grad():
        for seed in range(4):
            room = CAPACITY - int(cache.get_seq_length())
            llama(prompt(2, room, seed=seed), past_key_values=cache)
            cache.crop(-(room // 2 + 30))
        loaded = reloaded(cache, llama, tmp_path / "cache")
        assert_same(contents(loaded), contents(cache))
        room = CAPACITY - int(cache.get_seq_length())
        for each in (cache, loaded):
            llama(prompt(2, room, seed=9), past_key_values=each)
    assert_same(contents(loaded), contents(cache))
    with pytest.raises(ValueError, match="at most 0 more tokens"), torch.no_grad():
        llama(prompt(2, 1), past_key_values=loaded)


@pytest.mark.parametrize("change", ["crop", "reorder", "repeat", "select", "copy", "reset"])
def test_a_loaded_cache_can_be_changed_at_once(llama, tmp_path, change):
    cache = fixed_cache(llama)
    generate(llama, "turboquant", cache, prompt(2, 200))
    loaded = reloaded(cache, llama, tmp_path / "cache")
    pair = [cache, loaded]
    for index, each in enumerate(pair):
        if change == "crop":
            each.crop(-100)
        elif change == "reorder":
            each.reorder_cache(torch.tensor([1, 0]))
        elif change == "repeat":
            each.batch_repeat_interleave(2)
        elif change == "select":
            each.batch_select_indices(torch.tensor([1]))
        elif change == "copy":
            pair[index] = copy.deepcopy(each)
        else:
            each.reset()
    if change == "reset":
        assert pair[1].get_seq_length() == 0
        generate(llama, "turboquant", pair[1], prompt(3, 20))
    else:
        assert_same(contents(pair[1]), contents(pair[0]))


@torch.no_grad()
def test_compiled_steps_before_and_after(llama, tmp_path):
    """The count comes from the device when a cache is saved after compiled steps."""

    def step(tokens, cache, position_ids):
        return llama(tokens, past_key_values=cache, position_ids=position_ids).logits

    llama.set_attn_implementation("turboquant")
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    cache = fixed_cache(llama)
    llama(prompt(2, 150), past_key_values=cache)
    for i in range(60):
        compiled(prompt(2, 1, seed=i), cache, torch.tensor([[150 + i]]))
    loaded = reloaded(cache, llama, tmp_path / "cache")
    with pytest.raises(Exception, match=r"was loaded and has taken no memory yet: .*memory\(\)"):
        compiled(prompt(2, 1), loaded, torch.tensor([[210]]))
    loaded.memory()
    torch._dynamo.reset()
    for i in range(70):
        operands = prompt(2, 1, seed=100 + i), torch.tensor([[210 + i]])
        expected = compiled(operands[0], cache, operands[1])
        assert torch.equal(compiled(operands[0], loaded, operands[1]), expected)
    assert_same(contents(loaded), contents(cache))
    assert int(loaded.get_seq_length()) == 280


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_file_takes_the_capacity_at_the_first_use(llama, tmp_path):
    """2^31 - 1 positions are a few bytes of text; what they would take is not there to be had."""
    cache = fixed_cache(llama, max_cache_len=2**31 - 1)
    growing = CompressedDynamicCache(config=llama.config, bits=4)
    generate(llama, "turboquant", growing, prompt(1, 150))
    for layer, grown in zip(cache.layers, growing.layers, strict=True):
        layer.hold(grown.store.export_state(), 161, [0], torch.device("cpu"))
    loaded = reloaded(cache, llama, tmp_path / "cache")
    assert loaded.get_max_length() == 2**31 - 1
    assert (tmp_path / "cache").stat().st_size < 1 << 20
    held = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, held[1]))
    try:
        with pytest.raises(RuntimeError, match="allocate"):
            loaded.layers[0].dense()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, held)
    loaded.reset()
    assert loaded.layers[0].nbytes()["pages"] == 0


def test_what_is_needed_beside_the_file(llama, tmp_path):
    cache = fixed_cache(llama)
    generate(llama, "turboquant", cache, prompt(1, 50))
    path = tmp_path / "cache"
    cache.save(path)
    load = CompressedDynamicCache.load
    with pytest.raises(ValueError, match=r"config: expected .*max_cache_len=400\) needs, got None"):
        load(path)
    with pytest.raises(ValueError, match="dequantize: expected 'full' with max_cache_len"):
        load(path, config=llama.config, dequantize="incremental")
    shape = {"num_hidden_layers": 2, "layer_types": tiny_models.MIXED_LAYERS[:2]}
    mixed = tiny_models.gemma3(**shape).config
    with pytest.raises(ValueError, match=r"expected layer 0 to be compressed .*got fixed sliding"):
        load(path, config=mixed)


def test_tokens_that_a_gpu_refused_are_reported(llama, tmp_path):
    cache = fixed_cache(llama)
    generate(llama, "turboquant", cache, prompt(1, 50))
    layer = cache.layers[0]
    layer.store._positions[0, 2] = 3
    layer._host_tokens = None
    with pytest.raises(RuntimeError, match="3 tokens came in compiled steps after the"):
        cache.save(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []
