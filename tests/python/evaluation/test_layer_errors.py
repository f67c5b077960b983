import math

import pytest
import torch
from transformers import DynamicCache
from turboquant_cpp.evaluation import layer_errors
from turboquant_cpp.hf.compat import CACHE_ARGUMENT


def test_errors_are_those_of_the_model_s_own_states(model, tokens, rounding_cache):
    step = 0.5
    errors = layer_errors(model, tokens[:40], lambda: rounding_cache(step))
    with torch.inference_mode():
        exact = model(tokens[None, :40])[CACHE_ARGUMENT]
    assert [error.layer for error in errors] == [0, 1]
    for error, layer in zip(errors, exact.layers, strict=True):
        for states, measured in ((layer.keys, error.key_error), (layer.values, error.value_error)):
            rounded = torch.round(states / step) * step
            expected = (rounded - states).square().sum() / states.square().sum()
            assert measured == pytest.approx(float(expected), rel=1e-4)
        assert error.encoded_tokens == 40


def test_exact_tokens_are_left_out(model, tokens):
    errors = layer_errors(model, tokens[:40], lambda: DynamicCache(config=model.config))
    assert all(math.isnan(error.key_error) and error.encoded_tokens == 0 for error in errors)
