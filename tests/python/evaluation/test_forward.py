import pytest
import torch
from transformers import DynamicCache
from turboquant_cpp.evaluation import Protocol, compare_caches
from turboquant_cpp.evaluation.forward import read_chunk


@pytest.fixture
def head_tokens(model):
    """Tokens of every call of the model's output layer, the one that makes logits."""
    counts = []
    hook = model.lm_head.register_forward_hook(lambda _, args, out: counts.append(args[0].shape[1]))
    yield counts
    hook.remove()


@pytest.mark.parametrize(
    ("last_logits", "computed"), [(None, 20), (20, 20), (3, 3), (1, 1), (0, 1)]
)
def test_only_the_logits_that_are_wanted_are_computed(
    model, tokens, head_tokens, last_logits, computed
):
    chunk = torch.stack([tokens[:20], tokens[20:40]])
    with torch.inference_mode():
        expected = model(chunk).logits
    head_tokens.clear()
    logits, cache = read_chunk(model, chunk, None, last_logits)
    assert head_tokens == [computed]
    wanted = 20 if last_logits is None else last_logits
    torch.testing.assert_close(logits, expected[:, 20 - wanted :])
    assert cache.get_seq_length() == 20
    logits, same = read_chunk(model, chunk, cache)
    assert logits.shape == expected.shape
    assert same is cache
    assert cache.get_seq_length() == 40


def test_a_model_that_always_computes_all_gives_the_same(model, tokens):
    class Wrapped:
        def __call__(self, **inputs):
            return self.forward(**inputs)

        def forward(self, input_ids, use_cache, **cache):
            return model(input_ids=input_ids, use_cache=use_cache, **cache)

    chunk = tokens[None, :20]
    expected, _ = read_chunk(model, chunk, None)
    for last_logits in (0, 5):
        logits, cache = read_chunk(Wrapped(), chunk, None, last_logits)
        assert torch.equal(logits, expected[:, 20 - last_logits :])
        assert cache.get_seq_length() == 20


def test_a_lead_takes_one_logit_a_pass(model, tokens, head_tokens):
    compare_caches(
        model,
        tokens,
        {"same": lambda: DynamicCache(config=model.config)},
        Protocol(1, 100, 8, lead_tokens=72),
    )
    assert head_tokens == [1, 1, 1, 1] + [8, 8] * 3 + [4, 4]
