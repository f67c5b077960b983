import pytest
from tiny_tokenizer import byte_llama, byte_tokenizer


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    """A saved model of random weights (head_dim 64) and a tokenizer with one token per byte."""
    tokenizer = byte_tokenizer()
    model = byte_llama(tokenizer)
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
