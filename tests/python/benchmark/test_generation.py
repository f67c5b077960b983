import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils import ModelOutput
from turboquant_cpp.benchmark.generation import run_generation
from turboquant_cpp.hf.compat import CACHE_ARGUMENT

WORDS = ["", "one", " two", " three", ",", "\n", " four", " fi", "ve", "."]


class WordTokenizer:
    def decode(self, ids, skip_special_tokens=False):
        return "".join(WORDS[i] for i in ids)


class ScriptedModel:
    """Stands for a model whose `generate` yields given tokens."""

    device = torch.device("cpu")

    def __init__(self, script):
        self.script = script

    def generate(self, input_ids, max_new_tokens, streamer, **options):
        self.options = options
        new = self.script[:max_new_tokens]
        streamer.put(input_ids)
        for token in new:
            streamer.put(torch.tensor([token]))
        streamer.end()
        sequences = torch.cat([input_ids, torch.tensor([new])], dim=1)
        return ModelOutput(
            sequences=sequences, **{CACHE_ARGUMENT: options[CACHE_ARGUMENT] or DynamicCache()}
        )


def test_streamed_pieces_are_whole_words_and_add_up():
    model, pieces = ScriptedModel([1, 2, 3, 4, 5, 6, 7, 8, 9]), []
    generation = run_generation(
        model,
        WordTokenizer(),
        {"input_ids": torch.tensor([[1, 2]])},
        max_new_tokens=9,
        on_text=pieces.append,
    )
    assert generation.text == "one two three,\n four five."
    assert "".join(pieces) == generation.text
    assert all(piece.endswith((" ", "\n")) for piece in pieces[:-1])
    assert generation.new_tokens == 9
    assert generation.token_ids[:2] == [1, 2]


def test_greedy_unless_told_otherwise():
    model = ScriptedModel([1])
    run_generation(model, WordTokenizer(), {"input_ids": torch.tensor([[1]])}, max_new_tokens=1)
    assert model.options["do_sample"] is False
    run_generation(
        model,
        WordTokenizer(),
        {"input_ids": torch.tensor([[1]])},
        max_new_tokens=1,
        do_sample=True,
    )
    assert model.options["do_sample"] is True


def test_one_token_has_no_decode_speed():
    generation = run_generation(
        ScriptedModel([1]),
        WordTokenizer(),
        {"input_ids": torch.tensor([[1]])},
        max_new_tokens=1,
    )
    assert generation.tokens_per_s is None
    assert generation.vram_peak_mib is None


@pytest.mark.parametrize("new_tokens", [3, 6])
def test_a_real_model_s_cache_is_measured(new_tokens):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    calls = []
    generation = run_generation(
        model,
        WordTokenizer(),
        {"input_ids": torch.tensor([[1, 2, 3]])},
        max_new_tokens=new_tokens,
        progress=lambda done, total: calls.append((done, total)),
    )
    stored_tokens = 3 + new_tokens - 1  # the last token was never fed back
    assert generation.cache.total_bytes == 2 * 2 * 16 * 4 * stored_tokens
    assert calls == [(i + 1, new_tokens) for i in range(new_tokens)]
    assert generation.tokens_per_s > 0
    assert 0 < generation.prefill_s < generation.elapsed_s
