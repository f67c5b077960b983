import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM


class RoundingCache(DynamicCache):
    """Keys and values rounded to multiples of `step`: a stand-in for a quantised cache."""

    def __init__(self, config, step):
        super().__init__(config=config)
        self.step = step

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        rounded = [torch.round(x / self.step) * self.step for x in (key_states, value_states)]
        return super().update(*rounded, layer_idx, *args, **kwargs)


@pytest.fixture(scope="session")
def model():
    """Two layers of random weights, large enough for the logits to depend on the context."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tokens():
    return torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def rounding_cache(model):
    return lambda step: RoundingCache(model.config, step)
