"""Randomly initialised models that are small enough for a test and still generate varied text."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from turboquant_cpp.hf.compat import CACHE_ARGUMENT

VOCABULARY = 128
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def llama(**overrides):
    return spread(LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": 2} | overrides)))


def qwen2(**overrides):
    shape = {name: value for name, value in SHAPE.items() if name != "head_dim"}
    return spread(Qwen2ForCausalLM(Qwen2Config(**shape | {"num_hidden_layers": 2} | overrides)))


def gemma2():
    config = Gemma2Config(
        **SHAPE,
        num_hidden_layers=4,
        layer_types=MIXED_LAYERS,
        sliding_window=24,
        attn_logit_softcapping=5.0,
        query_pre_attn_scalar=16,
    )
    return spread(Gemma2ForCausalLM(config))


def gemma3(**overrides):
    options = {
        "num_hidden_layers": 4,
        "layer_types": MIXED_LAYERS,
        "sliding_window": 24,
        "query_pre_attn_scalar": 16,
    }
    config = Gemma3TextConfig(**SHAPE | options | overrides)
    return spread(Gemma3ForCausalLM(config))


def gpt_oss():
    config = GptOssConfig(
        **SHAPE,
        num_hidden_layers=4,
        layer_types=MIXED_LAYERS,
        sliding_window=24,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    return spread(GptOssForCausalLM(config))


MAMBA = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
# As BART and Whisper name it.
ENCODER_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def falcon_h1():
    """Attention beside Mamba in every layer, with the weights that it starts from."""
    config = FalconH1Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
        eos_token_id=None,
        **MAMBA,
    )
    torch.manual_seed(0)
    return FalconH1ForCausalLM(config).eval()


def bart_config():
    return BartConfig(**ENCODER_DECODER, max_position_embeddings=256, forced_eos_token_id=None)


def spread(model):
    """Scale weights up, so that attention is peaked and the most likely token is clear."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" not in name:
                parameter.copy_(0.12 * noise)
            if name.endswith("sinks"):
                parameter.copy_(noise)
    return model.eval()


def prompt(batch: int, tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, tokens), generator=generator)


def left_padded(tokens: Tensor, padding: list[int]) -> tuple[Tensor, Tensor]:
    """The prompt with its first tokens of each row padded away, and its mask."""
    mask = torch.ones_like(tokens)
    tokens = tokens.clone()
    for row, count in enumerate(padding):
        mask[row, :count] = 0
        tokens[row, :count] = 0
    return tokens, mask


def generate(model, implementation: str, cache, tokens: Tensor, new_tokens: int = 12, **options):
    """Generation with `cache`, greedy by default; ids ``[B, T]`` and raw logits of each step."""
    model.set_attn_implementation(implementation)
    result = model.generate(
        tokens,
        max_new_tokens=new_tokens,
        return_dict_in_generate=True,
        output_logits=True,
        **{CACHE_ARGUMENT: cache, "do_sample": False, **options},
    )
    return result.sequences, torch.stack(result.logits, dim=1)


def assert_same_tokens(expected, actual, margin: float = 1e-3) -> None:
    """Sequences agree; a row may part where its two best logits are within `margin`."""
    (ids, logits), (other, _) = expected, actual
    assert ids.shape == other.shape
    prompt_tokens = ids.shape[1] - logits.shape[1]
    for row in range(ids.shape[0]):
        parted = (ids[row] != other[row]).nonzero()
        if len(parted) == 0:
            continue
        best = logits[row, int(parted[0]) - prompt_tokens].topk(2).values
        gap = float(best[0] - best[1])
        assert gap < margin, f"row {row} parts at token {int(parted[0])}, logits {gap:.4g} apart"
