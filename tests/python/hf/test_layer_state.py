"""Stock layers of mixed models in cache files: what is in them comes back exactly."""

from __future__ import annotations

import copy

import damage
import pytest
import tiny_models
import torch
from contents import assert_same, contents
from tiny_models import assert_same_tokens, falcon_h1, generate, prompt
from transformers import Lfm2Config
from transformers.cache_utils import LinearAttentionLayer
from turboquant_cpp import CompressedDynamicCache, FormatError


def states(tokens: int):
    return torch.randn(2, 1, 2, tokens, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [{}, {"exact_first_layers": 1}], ids=str)
def test_hybrid_layers_are_saved_with_their_states(tmp_path, options):
    model = falcon_h1()
    cache = CompressedDynamicCache(config=model.config, bits=4, **options)
    ids, _ = generate(model, "turboquant", cache, prompt(2, 150))
    cache.save(tmp_path / "cache")
    for config in (None, model.config):
        loaded = CompressedDynamicCache.load(tmp_path / "cache", config=config)
        assert_same(contents(loaded), contents(cache))
    expected = generate(model, "turboquant", copy.deepcopy(cache), ids)
    assert_same_tokens(expected, generate(model, "turboquant", loaded, ids), 0)


def test_linear_layers_are_saved(tmp_path):
    config = Lfm2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
    )
    cache = CompressedDynamicCache(config=config, bits=4)
    assert type(cache.layers[0]) is LinearAttentionLayer
    for layer in (0, 2):
        cache.update_conv_state(torch.randn(1, 64, 3), layer)
    cache.update(*states(150), 1)
    cache.save(tmp_path / "cache")
    loaded = CompressedDynamicCache.load(tmp_path / "cache", config=config)
    assert_same(contents(loaded), contents(cache))
    assert loaded.has_previous_state(0)
    assert loaded.layers[0].conv_kernel_size == cache.layers[0].conv_kernel_size
    file = damage.CacheFile.parse((tmp_path / "cache").read_bytes())
    fields = {"conv_kernel_size": 4, "has_previous_state": None, "conv": False, "recurrent": True}
    for name, value in fields.items():
        wrong = file.changed(
            lambda f, n=name, v=value: f.metadata["layers"][0]["states"][0].update({n: v})
        )
        (tmp_path / "cache").write_bytes(wrong)
        with pytest.raises(FormatError, match=r"layers\.0\."):
            CompressedDynamicCache.load(tmp_path / "cache")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sliding_window", 400),
        ("sliding_window", 0),
        ("sliding_window", "24"),
        ("tokens", 5),
        ("tokens", 1 << 40),
        ("record_past", 0),
        ("holds_tokens", False),
    ],
)
def test_sliding_layers_that_do_not_fit_their_keys(tmp_path, field, value):
    cache = CompressedDynamicCache(config=tiny_models.gemma3().config, bits=4)
    for layer in range(4):
        cache.update(*states(150), layer)
    path = tmp_path / "cache"
    cache.save(path)
    file = damage.CacheFile.parse(path.read_bytes())
    path.write_bytes(file.changed(lambda f: f.metadata["layers"][2].update({field: value})))
    with pytest.raises(FormatError, match=r"layers\.2\.|layers\.2: "):
        CompressedDynamicCache.load(path)
