"""Answer several turns of a chat with a cache of fixed capacity and compiled steps.

The first compiled step traces the model; all others, of later turns too, run the same graph.

    python examples/compiled_chat.py "Name a river." "How long is it?" --capacity 4096
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from turboquant_cpp import CompressedDynamicCache
from turboquant_cpp.hf.compat import CACHE_ARGUMENT  # "past_key_values" before transformers 5.24


class Chat:
    """A model, its compiled step, and the cache of a conversation."""

    def __init__(self, model, bits: int, capacity: int) -> None:
        self.model = model
        self.cache = CompressedDynamicCache(config=model.config, bits=bits, max_cache_len=capacity)
        self.compiled = torch.compile(model.forward, fullgraph=True)

    @torch.no_grad()
    def answer(self, tokens: torch.Tensor, new_tokens: int, end: int | None) -> list[int]:
        """Greedy tokens after a turn's; none of the conversation before is computed again."""
        cache = {CACHE_ARGUMENT: self.cache}
        logits = self.model(tokens, **cache, logits_to_keep=1).logits
        reply: list[int] = []
        while len(reply) < new_tokens:
            token = logits[:, -1:].argmax(-1)
            if int(token) == end:
                break
            reply.append(int(token))
            logits = self.compiled(token, **cache).logits
        return reply


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("turns", nargs="+", help="what the user says, turn by turn")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--bits", type=int, default=4, help="of keys and values")
    parser.add_argument("--capacity", type=int, default=4096, help="tokens of the conversation")
    parser.add_argument("--new-tokens", type=int, default=128, help="of each answer, at most")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).to(arguments.device)
    model.set_attn_implementation("turboquant")
    chat = Chat(model, arguments.bits, arguments.capacity)
    for turn in arguments.turns:
        text = f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n"
        if chat.cache.is_initialized:
            text = f"<|im_end|>\n{text}"  # of the answer before
        tokens = tokenizer(text, return_tensors="pt").input_ids.to(arguments.device)
        reply = chat.answer(tokens, arguments.new_tokens, tokenizer.eos_token_id)
        print(f"> {turn}\n{tokenizer.decode(reply, skip_special_tokens=True)}")
    print(f"{int(chat.cache.get_seq_length())} tokens in {chat.cache.vram_bytes()} bytes")


if __name__ == "__main__":
    main()
