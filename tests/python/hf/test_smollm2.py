"""A real model, SmolLM2-135M-Instruct: fused attention, fallback and the twin on real text."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from tiny_models import assert_same_tokens, generate
from turboquant_cpp import CacheConfig, CompressedDynamicCache
from turboquant_cpp.hf import loading
from twin import TwinCache

pytestmark = pytest.mark.slow

# Openings only: the passages below make the prompts long enough that most of them is encoded.
OPENINGS = [
    "Explain to a child why the sky is blue.",
    "Write a short story about a lighthouse keeper.",
    "List three ways to save water at home.",
    "What is the capital of France, and what is it known for?",
    "Summarise how a bill becomes a law.",
    "Describe the life of a honey bee.",
    "Give me a recipe for tomato soup.",
    "How does a refrigerator keep food cold?",
    "Why do leaves change colour in autumn?",
    "Write a polite letter that declines an invitation.",
    "What are the phases of the moon?",
    "Tell me about the history of the bicycle.",
    "How do vaccines work?",
    "Compare cats and dogs as pets.",
    "What should I pack for a week in the mountains?",
    "Explain the difference between weather and climate.",
    "Write four lines of verse about the sea.",
    "How is bread made?",
    "What does a compiler do?",
    "Give advice to someone who starts a new job.",
]
PASSAGE = (
    "The keeper wrote in his log every evening. He noted the wind, the height of the waves, the "
    "ships that had passed and the oil that was left. On clear nights he counted the lamps of the "
    "village across the bay; when the fog came in he rang the bell each minute until morning. "
    "Nobody had told him to keep the old books, but he kept them, and in forty years they had "
    "filled a wall. "
)


@pytest.fixture(scope="module")
def loaded():
    try:
        return loading.load_model(device="cpu")
    except loading.ModelUnavailableError as error:
        pytest.skip(str(error))


def tokens_of(loaded, index: int) -> torch.Tensor:
    text = PASSAGE * 2 + OPENINGS[index]
    messages = [{"role": "user", "content": text}]
    prompt = loaded.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return loaded.tokenizer(prompt, return_tensors="pt").input_ids


@pytest.mark.parametrize("index", range(len(OPENINGS)))
def test_fused_and_fallback_give_the_same_tokens(loaded, index):
    model, tokens = loaded.model, tokens_of(loaded, index)
    assert tokens.shape[1] > 200
    results = []
    for implementation in ("sdpa", "turboquant"):
        cache = CompressedDynamicCache(config=model.config, bits=4)
        results.append(generate(model, implementation, cache, tokens, new_tokens=24))
        assert cache.layers[0].store.encoded_tokens[0] >= 128
    assert_same_tokens(*results)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_fused_equals_the_twin(loaded, options):
    model, tokens = loaded.model, tokens_of(loaded, 1)
    twin = TwinCache(model.config, CacheConfig(bits=4))
    expected = generate(model, "sdpa", twin, tokens, new_tokens=8, **options)
    cache = CompressedDynamicCache(config=model.config, bits=4)
    actual = generate(model, "turboquant", cache, tokens, new_tokens=8, **options)
    assert_same_tokens(expected, actual)


def test_padded_batch_equals_each_prompt_alone(loaded):
    model = loaded.model
    rows = [tokens_of(loaded, index)[0] for index in (2, 15)]
    longest = max(map(len, rows))
    tokens = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(longest).ge(longest - len(row)).long() for row in rows])
    cache = CompressedDynamicCache(config=model.config, bits=4)
    together, logits = generate(model, "turboquant", cache, tokens, attention_mask=mask)
    for index, row in enumerate(rows):
        alone = CompressedDynamicCache(config=model.config, bits=4)
        expected = generate(model, "turboquant", alone, row[None])
        actual = together[index : index + 1, longest - len(row) :], logits[index : index + 1]
        steps = min(expected[0].shape[1], actual[0].shape[1])
        shortened = expected[0][:, :steps], expected[1][:, : steps - len(row)]
        assert_same_tokens(shortened, (actual[0][:, :steps], actual[1]))


_CONTINUE = """
import sys, torch, tiny_models
from turboquant_cpp import CompressedDynamicCache
from turboquant_cpp.hf import loading
path, implementation = sys.argv[1:]
model = loading.load_model(device="cpu").model
cache = CompressedDynamicCache.load(path, config=model.config)
tokens = torch.load(path + ".tokens")
print(tiny_models.generate(model, implementation, cache, tokens, new_tokens=24)[0].tolist())
"""


@pytest.mark.parametrize("implementation", ["sdpa", "turboquant"])
def test_a_saved_prompt_continues_in_another_process(loaded, tmp_path, implementation):
    model, tokens = loaded.model, tokens_of(loaded, 7)
    path = str(tmp_path / "prompt.safetensors")
    cache = CompressedDynamicCache(config=model.config, k_bits=4, v_bits=3)
    reply, _ = generate(model, implementation, cache, tokens, new_tokens=8)
    cache.save(path)
    torch.save(reply, path + ".tokens")
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CONTINUE, path, implementation],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    expected, _ = generate(model, implementation, cache, reply, new_tokens=24)
    assert printed.strip() == str(expected.tolist())
