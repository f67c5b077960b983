import pytest
import torch
from tiny_tokenizer import EOS, PAD, byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    """A saved model of random weights (head_dim 64) and a tokenizer with one token per byte."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.2,
            bos_token_id=None,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
    )
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
