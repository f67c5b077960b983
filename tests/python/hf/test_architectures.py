"""Every architecture of `docs/architectures.md`: `generate()` equals the dense twin's."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import re
from collections import Counter
from dataclasses import dataclass
from unittest import mock

import pytest
from architectures import ARCHITECTURES, NEW_TOKENS
from tiny_models import assert_same_tokens, generate
from torch import Tensor
from transformers import DeepseekV3Config, DynamicCache, EncoderDecoderCache, LlamaConfig
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin
from turboquant_cpp import CacheConfig, CompressedDynamicCache, LayerStore
from turboquant_cpp.hf.takeover import attention_half
from twin import TwinCache

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
every_architecture = pytest.mark.parametrize("name", BY_NAME)


@dataclass(frozen=True)
class Run:
    """One generation: ids and the logits of each step, the caches it left, what was called."""

    tokens: tuple[Tensor, Tensor]
    caches: list[DynamicCache]
    attends: int
    dequantizes: int


@functools.cache
def model(name):
    return BY_NAME[name].make()


@functools.cache
def run(name, kind):
    """Generate with the cache `kind`: "exact", "twin", or the attention that reads a packed one."""
    architecture, config = BY_NAME[name], model(name).config
    inputs = architecture.inputs()
    mask = inputs.get("attention_mask")
    padding = None if mask is None else (mask == 0).sum(1).tolist()
    options = {"attention_mask": mask} if mask is not None and mask.shape[0] > 1 else {}
    caches = []
    for _ in range(1 + config.is_encoder_decoder):
        if kind == "exact":
            caches.append(DynamicCache(config=config))
        elif kind == "twin":
            caches.append(TwinCache(config, CacheConfig(bits=3), left_padding=padding))
        else:
            caches.append(CompressedDynamicCache(config=config, bits=3, **options))
    with contextlib.ExitStack() as watched:
        calls = {
            method: watched.enter_context(
                mock.patch.object(
                    LayerStore, method, autospec=True, side_effect=getattr(LayerStore, method)
                )
            )
            for method in ("attend", "attend_append", "dequantize")
        }
        tokens = generate(
            model(name),
            architecture.stock_attention[0] if kind in ("exact", "twin") else kind,
            EncoderDecoderCache(*caches) if len(caches) == 2 else caches[0],
            inputs.pop(model(name).main_input_name),
            new_tokens=NEW_TOKENS,
            eos_token_id=None,
            **inputs,
        )
    attends = calls["attend"].call_count + calls["attend_append"].call_count
    return Run(tokens, caches, attends, calls["dequantize"].call_count)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, how) for name in BY_NAME for how in ("turboquant", *BY_NAME[name].stock_attention)],
)
def test_generation_equals_the_twin(name, implementation):
    actual, expected = run(name, implementation), run(name, "twin")
    assert_same_tokens(expected.tokens, actual.tokens)
    # The first step after the prompt reads the codes; every run enters it with the same token.
    exact, twin, packed = (
        result.tokens[1][:, 1] for result in (run(name, "exact"), expected, actual)
    )
    quantised_by = (twin - exact).abs().max()
    has_codes = any(attention_half(layer) for cache in actual.caches for layer in cache.layers)
    assert has_codes == (quantised_by > 1e-3)
    assert (packed - twin).abs().max() < max(0.05 * quantised_by, 1e-4)


def row(name):
    """The table's line, from what the generation with the fused attention left and called."""
    fused = run(name, "turboquant")
    config = model(name).config.get_text_config(decoder=True)
    kinds = Counter(map(kind_of, fused.caches[0].layers))
    missing = config.num_hidden_layers - len(fused.caches[0].layers)
    kinds["without keys of their own"] += missing
    compressed = kinds.pop("compressed", 0)
    stock = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()) if count)
    if fused.attends and fused.dequantizes:
        reads = "codes; cross attention dequantised"
    elif fused.attends:
        reads = "codes"
    else:
        reads = "dequantised" if fused.dequantizes else ""
    cells = (
        name,
        BY_NAME[name].note,
        f"{compressed} of {config.num_hidden_layers}",
        stock,
        reads,
        ", ".join(("turboquant", *BY_NAME[name].stock_attention)),
    )
    return f"| {' | '.join(cells)} |"


def kind_of(layer):
    if attention_half(layer) is not None:
        return "compressed"
    if isinstance(layer, DynamicSlidingWindowLayer):
        return "sliding"
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return "linear"
    return "without keys of their own"


@pytest.fixture
def table(repository_root: pathlib.Path, request: pytest.FixtureRequest) -> dict[str, str]:
    """Lines of the table in the documentation by model; written anew with ``--rewrite-docs``."""
    path = repository_root / "docs/architectures.md"
    text = path.read_text(encoding="utf-8")
    head, old, tail = re.split(r"(?<=\|---\|\n)((?:\|.*\n)*)", text, maxsplit=1)
    if request.config.getoption("--rewrite-docs"):
        old = "".join(f"{row(name)}\n" for name in BY_NAME)
        path.write_text(head + old + tail, encoding="utf-8")
    return {line.split("|")[1].strip(): line for line in old.splitlines()}


@every_architecture
def test_the_documented_row_is_what_happens(name, table):
    assert table[name] == row(name), "run this file with --rewrite-docs"


def test_the_documented_table_is_complete(table):
    assert list(table) == list(BY_NAME), "run this file with --rewrite-docs"


def test_mla_is_refused_with_the_models_name():
    config = DeepseekV3Config(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    with pytest.raises(ValueError, match=r"deepseek_v3.*192 channels.*128.*\(MLA\)"):
        CompressedDynamicCache(config=config, bits=4)


def test_layers_that_compress_by_themselves_are_refused():
    config = LlamaConfig(num_hidden_layers=2)
    # As DeepSeek-V4 names them, whatever the release of transformers.
    config.layer_types = ["sliding_attention", "heavily_compressed_attention"]
    with pytest.raises(ValueError, match="heavily_compressed_attention layers compress"):
        CompressedDynamicCache(config=config, bits=4)
