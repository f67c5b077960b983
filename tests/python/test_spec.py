from __future__ import annotations

import copy
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from turboquant_cpp.spec import CacheConfig, LayerSpec


def test_bits_sets_both_widths_and_single_widths_take_precedence():
    assert CacheConfig(bits=4).bits_of(0) == (4, 4)
    assert CacheConfig(k_bits=5, v_bits=4).bits_of(0) == (5, 4)
    assert CacheConfig(bits=4, k_bits=6).bits_of(0) == (6, 4)


@pytest.mark.parametrize(
    ("options", "missing"),
    [({}, "k_bits"), ({"k_bits": 4}, "v_bits"), ({"v_bits": 4}, "k_bits")],
)
def test_a_missing_width_is_named(options, missing):
    with pytest.raises(ValueError, match=f"^{missing}: expected a width"):
        CacheConfig(**options)


def test_the_recommended_recipe():
    config = CacheConfig(bits=4)
    assert (config.window_tokens, config.sink_tokens) == (64, 4)
    assert config.center_keys
    assert config.smooth_keys
    assert (config.k_scale_rule, config.v_scale_rule) == ("unbiased", "norm_preserving")


def test_the_plain_recipe_is_the_papers_quantiser():
    config = CacheConfig(bits=4, recipe="plain")
    assert (config.window_tokens, config.sink_tokens) == (0, 0)
    assert not config.center_keys
    assert not config.smooth_keys
    assert (config.k_scale_rule, config.v_scale_rule) == ("norm", "norm")


@pytest.mark.parametrize(
    ("preset", "widths"), [("quality", (5, 4)), ("balanced", (4, 4)), ("max", (3, 2))]
)
def test_a_preset_gives_the_widths_and_the_recommended_recipe(preset, widths):
    config = CacheConfig(preset=preset)
    assert config.bits_of(0) == widths
    assert repr(preset) in repr(config)
    same = CacheConfig(k_bits=widths[0], v_bits=widths[1])
    assert config.layer_spec(0, 64, 2) == same.layer_spec(0, 64, 2)
    # What a file holds: the preset beside its widths.
    assert CacheConfig(preset=preset, k_bits=widths[0], v_bits=widths[1]) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "best"}, "preset: expected one of 'quality', 'balanced', 'max', got 'best'"),
        ({"preset": "max", "bits": 4}, "k_bits: expected 3 or None with preset='max', got 4"),
        ({"preset": "max", "v_bits": 3}, "v_bits: expected 2 or None with preset='max', got 3"),
        ({"preset": "max", "recipe": "plain"}, "recipe: expected 'recommended' with preset='max'"),
    ],
)
def test_a_preset_is_not_mixed_with_other_widths(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        CacheConfig(**options)


def test_parts_of_a_recipe_can_be_replaced():
    config = CacheConfig(bits=2, recipe="plain", sink_tokens=4, k_scale_rule="unbiased")
    assert (config.sink_tokens, config.k_scale_rule, config.v_scale_rule) == (4, "unbiased", "norm")
    assert not CacheConfig(bits=2, center_keys=False).center_keys


def test_without_a_window_centring_and_smoothing_default_to_off():
    config = CacheConfig(bits=4, window_tokens=0)
    assert not config.center_keys
    assert not config.smooth_keys
    with pytest.raises(ValueError, match="center_keys"):
        CacheConfig(bits=4, window_tokens=0, center_keys=True)
    with pytest.raises(ValueError, match="smooth_keys"):
        CacheConfig(bits=4, window_tokens=0, smooth_keys=True)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("bits", 0),
        ("bits", 9),
        ("bits", 4.0),
        ("bits", True),
        ("k_bits", 9),
        ("v_bits", -1),
        ("recipe", "best"),
        ("window_tokens", 63),
        ("window_tokens", -64),
        ("window_tokens", "64"),
        ("sink_tokens", -1),
        ("center_keys", 1),
        ("smooth_keys", "yes"),
        ("k_scale_rule", "l2"),
        ("v_scale_rule", 0),
        ("scale_dtype", "bfloat16"),
        ("seed", -1),
        ("seed", 2**63),
        ("exact_first_layers", -1),
        ("exact_last_layers", 0.5),
        ("layer_bits", [(4, 4)]),
        ("layer_bits", {0: 4}),
        ("layer_bits", {0: (4, 9)}),
        ("layer_bits", {-1: (4, 4)}),
        ("layer_bits", {"0": (4, 4)}),
    ],
)
def test_a_wrong_option_is_named_with_what_was_given(option, value):
    with pytest.raises(ValueError, match=f"^{option}.*: expected .*got "):
        CacheConfig(**{"bits": 4, option: value})


def test_unknown_options_are_rejected_and_the_known_ones_listed():
    with pytest.raises(TypeError, match="windows_tokens"):
        CacheConfig(bits=4, windows_tokens=64)
    message = r"did you mean 'window_tokens'.*k_bits, v_bits, preset, recipe"
    with pytest.raises(TypeError, match=message):
        CacheConfig.from_options({"bits": 4, "windows_tokens": 64})
    assert CacheConfig.from_options({"bits": 4}) == CacheConfig(bits=4)


def test_exact_layers_at_both_ends():
    config = CacheConfig(bits=4, exact_first_layers=1, exact_last_layers=2)
    assert [config.is_exact(i, 6) for i in range(6)] == [True, False, False, False, True, True]
    assert not any(CacheConfig(bits=4).is_exact(i, 3) for i in range(3))
    with pytest.raises(ValueError, match="layer"):
        config.is_exact(6, 6)


def test_layers_can_have_their_own_widths():
    config = CacheConfig(bits=4, layer_bits={1: (8, 6)})
    assert [config.bits_of(i) for i in range(3)] == [(4, 4), (8, 6), (4, 4)]
    assert config.layer_spec(1, 64, 2).v_bits == 6


def test_layer_bits_is_copied():
    own = {1: (8, 6)}
    config = CacheConfig(bits=4, layer_bits=own)
    own[1] = (2, 2)
    assert config.bits_of(1) == (8, 6)


def test_a_config_can_be_copied_pickled_and_hashed():
    config = CacheConfig(bits=4, layer_bits={1: (8, 6)})
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config
        assert hash(again) == hash(config)


def test_layer_spec_carries_every_choice():
    config = CacheConfig(
        k_bits=5,
        v_bits=3,
        window_tokens=128,
        sink_tokens=2,
        smooth_keys=False,
        scale_dtype="float16",
        seed=7,
    )
    assert config.layer_spec(0, head_dim=64, num_kv_heads=1).codebook == "scalar"
    spec = config.layer_spec(3, head_dim=96, num_kv_heads=8)
    assert (spec.head_dim, spec.num_kv_heads, spec.k_bits, spec.v_bits) == (96, 8, 5, 3)
    assert (spec.window_tokens, spec.sink_tokens, spec.exact_capacity) == (128, 2, 2 + 192)
    assert spec.center_keys
    assert not spec.smooth_keys
    assert (spec.k_rule, spec.v_rule, spec.scale_type) == ("unbiased", "norm_preserving", "float16")
    assert (spec.seed, spec.layer) == (7, 3)
    assert LayerSpec.from_ints(spec.to_ints()) == spec


def test_a_vector_codebook_reaches_every_layer():
    config = CacheConfig(bits=4, codebook="vector", layer_bits={1: (2, 3)})
    specs = [config.layer_spec(layer, head_dim=64, num_kv_heads=2) for layer in (0, 1)]
    assert [(s.codebook, s.k_bits, s.v_bits) for s in specs] == [("vector", 4, 4), ("vector", 2, 3)]
    for spec in specs:
        assert LayerSpec.from_ints(spec.to_ints()) == spec
        assert "codebook='vector'" in repr(spec)
    assert specs[0] != CacheConfig(bits=4).layer_spec(0, head_dim=64, num_kv_heads=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4, "codebook": "lattice"}, "codebook: expected one of 'scalar', 'vector', got"),
        ({"k_bits": 5, "v_bits": 4, "codebook": "vector"}, "k_bits: expected 2, 3 or 4 .* got 5"),
        ({"k_bits": 4, "v_bits": 1, "codebook": "vector"}, "v_bits: expected 2, 3 or 4 .* got 1"),
        (
            {"bits": 4, "codebook": "vector", "layer_bits": {3: (8, 8)}},
            r"layer_bits\[3\]: expected widths of 2, 3 or 4 .* got \(8, 8\)",
        ),
    ],
)
def test_widths_without_a_vector_codebook_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig(**options)


@pytest.mark.parametrize("head_dim", [63, 36, 0, -64, 72])
def test_an_unsupported_head_dim_lists_what_is(head_dim):
    with pytest.raises(ValueError, match=r"head_dim: expected .*2\^k.*got " + str(head_dim)):
        CacheConfig(bits=4).layer_spec(0, head_dim, 8)


def test_repr_shows_what_was_chosen():
    text = repr(CacheConfig(bits=3, recipe="plain"))
    assert "k_bits=3, v_bits=3, preset=None, recipe='plain', window_tokens=0" in text


@given(
    bits=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    window=st.integers(0, 8).map(lambda blocks: 64 * blocks),
    sinks=st.integers(0, 16),
    head_dim=st.sampled_from([8, 64, 80, 96, 128, 256]),
    heads=st.integers(1, 64),
    seed=st.integers(0, 2**63 - 1),
    layer=st.integers(0, 200),
)
def test_every_valid_choice_round_trips_through_integers(
    bits, window, sinks, head_dim, heads, seed, layer
):
    config = CacheConfig(
        k_bits=bits[0], v_bits=bits[1], window_tokens=window, sink_tokens=sinks, seed=seed
    )
    spec = config.layer_spec(layer, head_dim, heads)
    again = LayerSpec.from_ints(spec.to_ints())
    assert again == spec
    assert repr(again) == repr(spec)
    assert hash(again) == hash(spec)
