import types

import torch
from transformers import DynamicCache
from turboquant_cpp.evaluation import measure_cache
from turboquant_cpp.hf.compat import CACHE_ARGUMENT


def test_dense_cache_is_the_size_of_its_tensors(model, tokens):
    with torch.inference_mode():
        cache = model(tokens[None, :50])[CACHE_ARGUMENT]
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    expected = config.num_hidden_layers * config.num_key_value_heads * 50 * head_dim * 4 * 2
    size = measure_cache(cache)
    assert size.parts == {"dense": expected}
    assert size.total_bytes == expected


def test_empty_cache_holds_nothing(model):
    assert measure_cache(DynamicCache(config=model.config)).total_bytes == 0


def test_a_view_counts_its_whole_storage_once():
    storage = torch.zeros(1000, dtype=torch.uint8)
    layer = types.SimpleNamespace(keys=storage[:10], values=storage[10:20], other=[storage, 3])
    assert measure_cache(types.SimpleNamespace(layers=[layer])).total_bytes == 1000


def test_a_compressed_cache_is_asked_for_its_parts():
    cache = types.SimpleNamespace(memory=lambda: {"pages": 100, "exact": 10, "total": 110})
    size = measure_cache(cache)
    assert size.parts == {"pages": 100, "exact": 10}
    assert size.total_bytes == 110
