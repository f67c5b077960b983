"""The programs of examples/ do what they say, with a small model of random weights."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys

import pytest
import torch
from tiny_tokenizer import byte_llama, byte_tokenizer
from torch._dynamo.testing import CompileCounter
from turboquant_cpp import CompressedDynamicCache
from turboquant_cpp.hf.compat import CACHE_ARGUMENT

TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model, its tokenizer and the folder that both are saved in."""
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    model = byte_llama(tokenizer)
    folder = tmp_path_factory.mktemp("model")
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    model.set_attn_implementation("turboquant")
    return model, tokenizer, folder


def run(root, name, *arguments):
    """What the program prints, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(root / "examples" / name), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def generated(model, tokens, cache, new_tokens):
    """The tokens of the prompt and after it."""
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        **{CACHE_ARGUMENT: cache},
        max_new_tokens=new_tokens,
        do_sample=False,
    )[0]


def ids(tokenizer, text):
    return tokenizer(text, return_tensors="pt").input_ids


def test_generate(model, repository_root):
    model, tokenizer, folder = model
    text = "Tell me how rain forms. " * 10
    printed = run(
        repository_root, "generate.py", text, "--model", folder, "--bits", 3, "--new-tokens", 30
    )
    cache = CompressedDynamicCache(config=model.config, bits=3)
    output = generated(model, ids(tokenizer, text), cache, 30)
    answer, _, figures = printed.rstrip("\n").rpartition("\n")
    assert answer == tokenizer.decode(output, skip_special_tokens=True)
    expected = (cache.get_seq_length(), cache.vram_bytes(), cache.baseline_vram_bytes())
    assert tuple(map(int, re.findall(r"\d+", figures))) == expected


def test_prompt_cache(model, repository_root, tmp_path):
    """Two processes say what one would that keeps its cache."""
    model, tokenizer, folder = model
    text, question = "The filter is behind the lid. " * 20, "Where is it?"
    (tmp_path / "text").write_text(text, encoding="utf-8")
    paths = (tmp_path / "text", tmp_path / "cache")
    saved = run(repository_root, "prompt_cache.py", "save", *paths, "--model", folder)
    tokens = ids(tokenizer, text)
    assert saved == f"{tokens.shape[1]} tokens in {paths[1].stat().st_size} bytes\n"
    ask = ("ask", *paths, question, "--model", folder, "--new-tokens", 30)
    answer = run(repository_root, "prompt_cache.py", *ask)
    cache = CompressedDynamicCache(config=model.config, bits=4)
    with torch.no_grad():
        model(tokens, **{CACHE_ARGUMENT: cache})
    everything = torch.cat([tokens, ids(tokenizer, question)], dim=1)
    output = generated(model, everything, cache, 30)[everything.shape[1] :]
    assert answer == tokenizer.decode(output, skip_special_tokens=True) + "\n"
    (tmp_path / "text").write_text(text + "More.", encoding="utf-8")
    with pytest.raises(AssertionError, match="was made from another text: save it anew"):
        run(repository_root, "prompt_cache.py", *ask)


def test_compiled_chat(model, repository_root, monkeypatch, capsys):
    """Every step of all turns is one graph; the answers are those of a cache that grows."""
    model, tokenizer, folder = model
    torch._dynamo.reset()
    counter, compiler = CompileCounter(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **options: compiler(*args, backend=counter, **options)
    )
    turns = ["Name a river that is long. " * 4, "How long is it?"]
    options = ["--model", str(folder), "--capacity", "600", "--new-tokens", "90"]
    monkeypatch.setattr(sys, "argv", ["compiled_chat.py", *turns, *options])
    with torch._dynamo.config.patch(error_on_recompile=True):
        runpy.run_path(str(repository_root / "examples" / "compiled_chat.py"), run_name="__main__")
    torch._dynamo.reset()
    printed = capsys.readouterr().out
    assert counter.frame_count == 1
    cache, history = CompressedDynamicCache(config=model.config, bits=4), ""
    tokens, expected = torch.zeros(1, 0, dtype=torch.int64), ""
    for turn in turns:
        text = ("<|im_end|>\n" if history else "") + TURN.format(turn)
        history += text
        tokens = torch.cat([tokens, ids(tokenizer, text)], dim=1)
        output = generated(model, tokens, cache, 90)[tokens.shape[1] :].tolist()
        reply = [token for token in output if token != tokenizer.eos_token_id]
        expected += f"> {turn}\n{tokenizer.decode(reply, skip_special_tokens=True)}\n"
        tokens = torch.cat([tokens, torch.tensor([reply])], dim=1)
    assert printed.startswith(expected)
    assert printed[len(expected) :].startswith(f"{tokens.shape[1]} tokens in ")
