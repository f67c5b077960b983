"""The README's Python code runs as printed (its C++ code: tests/consumers)."""

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def blocks(root: Path, language: str) -> list[str]:
    readme = (root / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)


def prose(document: Path) -> str:
    """A document without its code, where brackets are no links."""
    text = document.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


class ByteTokenizer:
    """Stands in for a downloaded tokenizer: one token a byte."""

    def __call__(self, text: str, return_tensors: str) -> dict[str, Any]:
        import torch

        assert return_tensors == "pt"
        ids = torch.tensor([list(text.encode())])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(token) for token in ids).decode(errors="replace")


@pytest.fixture
def _random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the one thing a test cannot have, the download, by a small random model."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def from_pretrained(name: str) -> Any:
        assert "/" in name
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        return transformers.LlamaForCausalLM(config).eval()

    auto_model = SimpleNamespace(from_pretrained=from_pretrained)
    auto_tokenizer = SimpleNamespace(from_pretrained=lambda name: ByteTokenizer())
    monkeypatch.setattr(transformers, "AutoModelForCausalLM", auto_model)
    monkeypatch.setattr(transformers, "AutoTokenizer", auto_tokenizer)


@pytest.mark.usefixtures("_random_weights")
def test_python_blocks_run(repository_root: Path) -> None:
    code = blocks(repository_root, "python")
    assert code, "the README has no Python example"
    name = importlib.import_module("turboquant_cpp.hf.compat").CACHE_ARGUMENT
    for number, block in enumerate(code):
        block = block.replace(", cache=cache", f", {name}=cache")  # as the README says
        exec(compile(block, f"README.md, Python block {number}", "exec"), {})


def test_test_command_is_written_down(repository_root: Path) -> None:
    """The continuous integration runs what the README tells a newcomer to run."""
    assert "make test\n" in blocks(repository_root, "sh")


def test_relative_links_lead_somewhere(repository_root: Path) -> None:
    broken = [
        f"{document.relative_to(repository_root)} -> {target}"
        for document in [*repository_root.glob("*.md"), *repository_root.glob("docs/**/*.md")]
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose(document))
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert not broken, broken
