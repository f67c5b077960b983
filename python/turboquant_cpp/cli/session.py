"""What a command needs before it can measure: the model, its text as tokens, its caches."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import torch

from turboquant_cpp import CompressedDynamicCache
from turboquant_cpp.cli.console import remark
from turboquant_cpp.cli.devices import usable_device
from turboquant_cpp.cli.exit_codes import UserError, as_user_error
from turboquant_cpp.evaluation import read_text
from turboquant_cpp.hf.loading import (
    LoadedModel,
    ModelUnavailableError,
    load_model,
    silence_transformers,
)

__all__ = ["cache_maker", "chat_inputs", "load", "pictures", "text_tokens", "vision_inputs"]


def load(arguments: argparse.Namespace, *, with_vision: bool = False) -> LoadedModel:
    """Load the model that the arguments name and set its attention implementation.

    What it is loaded for is looked at before: loading takes long.
    """
    text = getattr(arguments, "text", None)
    if text is not None and not text.is_file():
        raise UserError(f"--text: there is no file {text}")
    if arguments.gguf_file and not arguments.model:
        raise UserError("--gguf-file needs --model: the repository or directory that it is in")
    if arguments.device:
        usable_device(arguments.device)
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


def vision_inputs(
    loaded: LoadedModel, arguments: argparse.Namespace, pictures: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Prepare a user's turn that shows pictures, with a vision-language model's processor."""
    from turboquant_cpp.benchmark import vision

    with as_user_error():
        encoded = vision.vision_inputs(loaded.tokenizer, arguments.prompt, **pictures)
    dtype = loaded.model.dtype
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in encoded.items()
    }


def pictures(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read the files that --image and --video name."""
    from turboquant_cpp.benchmark import vision

    try:
        with as_user_error():
            image = vision.read_image(arguments.image) if arguments.image else None
            video = (
                vision.read_video(arguments.video, arguments.frames) if arguments.video else None
            )
    except vision.VisionUnavailableError as error:
        raise UserError(str(error)) from error
    found = {"image": image, "video": video}
    return {name: picture for name, picture in found.items() if picture is not None}


def cache_maker(loaded: LoadedModel, options: dict[str, Any]) -> Any:
    """Return a function that makes an empty cache with these options."""

    def make() -> CompressedDynamicCache:
        with as_user_error():
            return CompressedDynamicCache(config=loaded.model.config, **options)

    return make
