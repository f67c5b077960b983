"""Generate with a compressed cache in the place of transformers' own.

python examples/generate.py "Tell me how rain forms." --bits 4
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer
from turboquant_cpp import CompressedDynamicCache
from turboquant_cpp.hf.compat import CACHE_ARGUMENT  # "past_key_values" before transformers 5.24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--bits", type=int, default=4, help="of keys and values")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).to(arguments.device)
    model.set_attn_implementation("turboquant")  # reads the codes in place

    inputs = tokenizer(arguments.prompt, return_tensors="pt").to(arguments.device)
    cache = CompressedDynamicCache(config=model.config, bits=arguments.bits)
    output = model.generate(
        **inputs,
        **{CACHE_ARGUMENT: cache},
        max_new_tokens=arguments.new_tokens,
        do_sample=False,
    )
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    print(
        f"{cache.get_seq_length()} tokens in {cache.vram_bytes()} bytes; "
        f"the stock cache takes {cache.baseline_vram_bytes()}"
    )


if __name__ == "__main__":
    main()
