"""What a command needs before it can measure: the model, its text as tokens, its caches."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import torch

from turboquant_cpp import CompressedDynamicCache
from turboquant_cpp.cli.console import remark
from turboquant_cpp.cli.exit_codes import UserError, as_user_error
from turboquant_cpp.evaluation import read_text
from turboquant_cpp.hf.loading import (
    LoadedModel,
    ModelUnavailableError,
    load_model,
    silence_transformers,
)

__all__ = ["cache_maker", "chat_inputs", "load", "text_tokens", "video_inputs"]


def load(arguments: argparse.Namespace, *, with_vision: bool = False) -> LoadedModel:
    """Load the model that the arguments name and set its attention implementation."""
    silence_transformers()
    try:
        loaded = load_model(
            arguments.model,
            gguf_file=arguments.gguf_file,
            dtype=arguments.dtype,
            device=arguments.device,
            with_vision=with_vision,
            report=remark,
        )
    except ModelUnavailableError as error:
        raise UserError(str(error)) from error
    with as_user_error():
        loaded.model.set_attn_implementation(arguments.attention)
    return loaded


def text_tokens(loaded: LoadedModel, path: pathlib.Path | None) -> torch.Tensor:
    """Tokenise a text file, or the packaged passage, without special tokens."""
    with as_user_error():
        text = read_text(path)
    ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids)


def chat_inputs(loaded: LoadedModel, prompt: str) -> dict[str, torch.Tensor]:
    """Tokenise a user's turn with the model's chat template; without one, the bare prompt."""
    tokenizer = loaded.tokenizer
    if getattr(tokenizer, "chat_template", None):
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def video_inputs(loaded: LoadedModel, prompt: str, video: pathlib.Path) -> dict[str, torch.Tensor]:
    """Prepare a user's turn that shows a video, with the processor of a vision-language model."""
    content = [{"type": "video", "path": str(video)}, {"type": "text", "text": prompt}]
    with as_user_error():
        encoded = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_tensors="pt",
            return_dict=True,
        )
    return {name: value for name, value in encoded.items() if isinstance(value, torch.Tensor)}


def cache_maker(loaded: LoadedModel, options: dict[str, Any]) -> Any:
    """Return a function that makes an empty cache with these options."""
    return lambda: CompressedDynamicCache(config=loaded.model.config, **options)
