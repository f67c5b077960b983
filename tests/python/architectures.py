"""Real architectures with few, narrow, randomly initialised layers, made from configurations.

`ARCHITECTURES` is the list behind `docs/architectures.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tiny_models
import torch
import transformers
from tiny_models import ENCODER_DECODER, MAMBA, MIXED_LAYERS, SHAPE, left_padded, prompt, spread
from torch import Tensor

PROMPT_TOKENS = 150
NEW_TOKENS = 8
PADDING = [11, 0]
IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 120, 121, 122, 123


@dataclass(frozen=True)
class Architecture:
    """One row of the table: a model, what it is given, and what is worth knowing about it."""

    name: str
    make: Callable[[], Any]
    note: str
    #: Attention that is right for the model: SDPA knows neither score caps nor sink logits.
    stock_attention: tuple[str, ...] = ("sdpa", "eager")
    inputs: Callable[[], dict[str, Tensor]] = field(default=lambda: text_inputs())


def text_inputs() -> dict[str, Tensor]:
    tokens, mask = left_padded(prompt(2, PROMPT_TOKENS), PADDING)
    return {"input_ids": tokens, "attention_mask": mask}


def decoder_inputs() -> dict[str, Tensor]:
    return {"input_ids": prompt(2, 90), "decoder_input_ids": prompt(2, PROMPT_TOKENS, seed=1)}


def speech_inputs() -> dict[str, Tensor]:
    features = torch.randn(2, 8, 200, generator=torch.Generator().manual_seed(0))
    start = prompt(2, PROMPT_TOKENS, seed=1)
    return {"input_features": features, "decoder_input_ids": start}


def image_inputs() -> dict[str, Tensor]:
    """One image of 4 tokens and a video of 2 x 4 tokens in a text, as Qwen2-VL's processor says."""
    generator = torch.Generator().manual_seed(0)
    tokens = prompt(1, PROMPT_TOKENS).clamp(max=IMAGE_TOKEN - 1)
    kinds = torch.zeros_like(tokens, dtype=torch.int32)
    for begin, count, token, kind in ((5, 4, IMAGE_TOKEN, 1), (20, 8, VIDEO_TOKEN, 2)):
        tokens[0, begin - 1], tokens[0, begin + count] = VISION_START, VISION_END
        tokens[0, begin : begin + count] = token
        kinds[0, begin : begin + count] = kind
    patch = 3 * 2 * 4 * 4
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": kinds,
        "pixel_values": torch.randn(16, patch, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "pixel_values_videos": torch.randn(32, patch, generator=generator),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }


def idefics_inputs() -> dict[str, Tensor]:
    tokens = prompt(1, PROMPT_TOKENS).clamp(max=IMAGE_TOKEN - 1)
    tokens[0, 5:9] = IMAGE_TOKEN
    pixels = torch.randn(1, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    return {"input_ids": tokens, "attention_mask": mask, "pixel_values": pixels}


def causal(kind: str, **overrides: Any) -> Callable[[], Any]:
    """The causal language model of a model type, two layers unless told otherwise."""

    def make() -> Any:
        options = SHAPE | {"num_hidden_layers": 2} | overrides
        config = transformers.AutoConfig.for_model(kind, **options)
        return spread(transformers.AutoModelForCausalLM.from_config(config))

    return make


def qwen2_vl(vocabulary: int = tiny_models.VOCABULARY, **tokens: int) -> Any:
    text = {name: value for name, value in SHAPE.items() if name != "head_dim"}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    config = transformers.Qwen2VLConfig(
        text_config=text
        | {"num_hidden_layers": 2, "rope_parameters": rope, "vocab_size": vocabulary},
        vision_config={
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "patch_size": 4,
        },
        **{
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": VIDEO_TOKEN,
            "vision_start_token_id": VISION_START,
            "vision_end_token_id": VISION_END,
        }
        | tokens,
    )
    return spread(transformers.Qwen2VLForConditionalGeneration(config))


def idefics3(vocabulary: int = tiny_models.VOCABULARY, image_token: int = IMAGE_TOKEN) -> Any:
    config = transformers.Idefics3Config(
        text_config=SHAPE
        | {"num_hidden_layers": 2, "model_type": "llama", "vocab_size": vocabulary},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        scale_factor=2,
        image_token_id=image_token,
        pad_token_id=0,
    )
    return spread(transformers.Idefics3ForConditionalGeneration(config))


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=tiny_models.VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=None,
        decoder_start_token_id=0,
    )
    return spread(transformers.T5ForConditionalGeneration(config))


def bart() -> Any:
    return spread(transformers.BartForConditionalGeneration(tiny_models.bart_config()))


def whisper() -> Any:
    config = transformers.WhisperConfig(
        **ENCODER_DECODER,
        num_mel_bins=8,
        max_source_positions=100,
        max_target_positions=256,
        bos_token_id=None,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return spread(transformers.WhisperForConditionalGeneration(config))


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
JETMOE = {"kv_channels": 16, "num_local_experts": 4}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
SHARED = {
    "vocab_size_per_layer_input": tiny_models.VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 24,
    "activation_sparsity_pattern": [0.0] * 4,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
}
WIDE = {
    "head_dim": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
}

ARCHITECTURES = [
    Architecture("Llama", tiny_models.llama, "grouped queries"),
    Architecture("Mistral", causal("mistral", sliding_window=None), "without a window (v0.2 on)"),
    Architecture(
        "Mistral, window", causal("mistral", sliding_window=24), "every layer slides (v0.1)"
    ),
    Architecture("Qwen2", tiny_models.qwen2, "biases"),
    Architecture("Qwen3", causal("qwen3"), "normalised queries and keys"),
    Architecture("Qwen3-MoE", causal("qwen3_moe", **MOE), "experts"),
    Architecture("Phi-3", causal("phi3"), "queries, keys and values from one projection"),
    Architecture("Gemma 2", tiny_models.gemma2, "score cap, sliding and full layers", ("eager",)),
    Architecture(
        "Gemma 3",
        lambda: tiny_models.gemma3(**WIDE),
        "sliding and full layers, head_dim 256",
    ),
    Architecture("Gemma 3n", causal("gemma3n_text", **SHARED), "layers that share keys and values"),
    Architecture("gpt-oss", tiny_models.gpt_oss, "learned sinks, sliding and full", ("eager",)),
    Architecture("SmolLM3", causal("smollm3", no_rope_layers=[1, 0]), "a layer without RoPE"),
    Architecture("Granite", causal("granite", attention_multiplier=0.2), "scaling of its own"),
    Architecture("OLMo", causal("olmo"), "no weights in its norms"),
    Architecture("OLMo 2", causal("olmo2"), "norms after attention"),
    Architecture("Cohere 2", causal("cohere2", layer_types=MIXED_LAYERS[:2]), "sliding and full"),
    Architecture("Falcon-H1", causal("falcon_h1", **MAMBA), "attention beside Mamba in each layer"),
    Architecture("Qwen3-Next", causal("qwen3_next", **LINEAR), "linear and full layers in turn"),
    Architecture("LFM2", causal("lfm2", layer_types=["conv", "full_attention"]), "convolutions"),
    Architecture(
        "Qwen2-VL", qwen2_vl, "an image and a video, multimodal RoPE", inputs=image_inputs
    ),
    Architecture("Idefics3", idefics3, "an image; SmolVLM's family", inputs=idefics_inputs),
    Architecture("T5", t5, "score bias by distance", inputs=decoder_inputs),
    Architecture("BART", bart, "learned positions", inputs=decoder_inputs),
    Architecture("Whisper", whisper, "speech", inputs=speech_inputs),
]
