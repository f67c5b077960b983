"""Read a long text once, save what the cache holds, and answer from it in other processes.

python examples/prompt_cache.py save manual.txt manual.cache
python examples/prompt_cache.py ask manual.txt manual.cache "How is the filter changed?"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from turboquant_cpp import CompressedDynamicCache
from turboquant_cpp.hf.compat import CACHE_ARGUMENT  # "past_key_values" before transformers 5.24


def save(model, text: torch.Tensor, path: Path, bits: int) -> None:
    """The file holds the packed codes, not the text."""
    cache = CompressedDynamicCache(config=model.config, bits=bits)
    with torch.no_grad():
        model(text, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    cache.save(path)
    print(f"{cache.get_seq_length()} tokens in {path.stat().st_size} bytes")


def ask(model, text: torch.Tensor, question: torch.Tensor, path: Path, new_tokens: int):
    """Only the question's tokens are computed: the text's are in the file."""
    cache = CompressedDynamicCache.load(path, config=model.config, device=model.device)
    if cache.get_seq_length() != text.shape[1]:
        raise SystemExit(f"{path} was made from another text: save it anew")
    tokens = torch.cat([text, question], dim=1)
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        **{CACHE_ARGUMENT: cache},
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    return output[0, tokens.shape[1] :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["save", "ask"])
    parser.add_argument("text", type=Path, help="file with the text")
    parser.add_argument("cache", type=Path, help="file of the cache")
    parser.add_argument("question", nargs="?", default="", help="with `ask`")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--bits", type=int, default=4, help="of keys and values, with `save`")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).to(arguments.device)
    model.set_attn_implementation("turboquant")

    def ids(text: str) -> torch.Tensor:
        return tokenizer(text, return_tensors="pt").input_ids.to(arguments.device)

    text = ids(arguments.text.read_text(encoding="utf-8"))
    if arguments.command == "save":
        save(model, text, arguments.cache, arguments.bits)
    else:
        answer = ask(model, text, ids(arguments.question), arguments.cache, arguments.new_tokens)
        print(tokenizer.decode(answer, skip_special_tokens=True))


if __name__ == "__main__":
    main()
