"""What differs between releases of transformers is found out from the installed one."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
from transformers import (
    BartConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2VLConfig,
    T5Config,
    WhisperConfig,
)
from turboquant_cpp.hf import compat


def test_the_caches_argument_is_one_of_forward():
    assert compat.CACHE_ARGUMENT in inspect.signature(LlamaForCausalLM.forward).parameters


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("some/model", "llama", "some/model (llama)"),
        ("", "llama", "llama"),
        ("some/model", "", "some/model"),
        ("", "", "this model"),
    ],
)
def test_models_are_called_by_what_is_known(name, kind, expected):
    config = SimpleNamespace(_name_or_path=name, model_type=kind)
    assert compat.model_name(config) == expected
    assert compat.model_name(None) == "this model"


@pytest.mark.parametrize("make", [LlamaConfig, BartConfig, WhisperConfig, T5Config])
def test_a_flat_configuration_is_its_own_text_part(make):
    """`set_attn_implementation` changes the model's own, never a copy that was taken of it."""
    config = make()
    assert compat.text_config(config) is config


def test_a_nested_configuration_gives_its_text_part():
    config = Qwen2VLConfig()
    assert compat.text_config(config) is config.text_config


def test_the_attention_is_read_anew_each_time():
    config = LlamaConfig(attn_implementation="eager")
    assert compat.attention_implementation(config) == "eager"
    config._attn_implementation = "sdpa"
    assert compat.attention_implementation(config) == "sdpa"
    assert compat.attention_implementation(None) is None


def test_which_models_bias_scores_by_distance():
    assert compat.has_bias_by_distance(T5Config())
    assert not compat.has_bias_by_distance(BartConfig())
    assert not compat.has_bias_by_distance(None)


@pytest.mark.parametrize(
    ("argument", "removed"), [(-3, 3), (0, 0), (-99, 10), (4, 6), (10, 0), (99, 0)]
)
def test_both_forms_of_crop(argument, removed):
    assert compat.tokens_to_remove(argument, 10) == removed


@pytest.mark.parametrize(
    ("fields", "sources"),
    [
        ({}, set()),
        ({"kv_sharing_modes": [None, "store", "reuse"]}, {1}),
        ({"kv_sharing_modes": [None, None, "reuse"]}, {0, 1}),
        ({"kv_sharing_modes": [None, None]}, set()),
        (
            {"num_kv_shared_layers": 2, "num_hidden_layers": 5, "layer_types": list("sfsfs")},
            {1, 2},
        ),
    ],
    ids=["none", "marked", "unmarked", "unshared", "counted"],
)
def test_layers_whose_keys_are_read_again(fields, sources):
    assert compat.kv_source_layers(SimpleNamespace(**fields)) == sources
