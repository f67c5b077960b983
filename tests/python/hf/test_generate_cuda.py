"""`generate()` over packed codes on a GPU gives the tokens that it gives on the CPU."""

from __future__ import annotations

import gc

import pytest
import tiny_models
import torch
from gpu import MARGINS, require_fused_attention, require_gpu
from tiny_models import assert_same_tokens, generate, left_padded, prompt
from turboquant_cpp import CompressedDynamicCache, LayerStore
from turboquant_cpp.hf.compat import CACHE_ARGUMENT

IMPLEMENTATIONS = ["turboquant", "sdpa", "eager"]
PADDING = [37, 0]
# Of head_dim 16; said once in a process.
pytestmark = pytest.mark.filterwarnings("ignore:CUDA attention takes")


@pytest.fixture(autouse=True)
def gpu():
    return require_gpu()


@pytest.fixture(scope="module", params=[16, 64], ids=["head_dim 16", "head_dim 64"])
def models(request):
    """On the CPU and on the GPU. No kernel reads codes of head_dim 16: they are dequantised."""
    require_gpu()
    shape = {"head_dim": request.param}
    return tiny_models.llama(**shape), tiny_models.llama(**shape).cuda()


def packed(model, implementation, tokens, *, cache_options=None, **options):
    cache = CompressedDynamicCache(config=model.config, **(cache_options or {"bits": 4}))
    device = model.device
    options = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    ids, logits = generate(model, implementation, cache, tokens.to(device), **options)
    return ids.cpu(), logits.cpu()


def assert_same(models, implementation, tokens, **options):
    cpu, gpu = models
    expected = packed(cpu, "turboquant", tokens, **options)
    actual = packed(gpu, implementation, tokens, **options)
    assert_same_tokens(expected, actual, margin=MARGINS[implementation])
    # The first token comes from a prompt that is read exactly.
    torch.testing.assert_close(actual[1][:, 0], expected[1][:, 0], atol=1e-3, rtol=1e-3)
    return expected, actual


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "cache_options",
    [
        {"bits": 4},
        {"bits": 2},
        {"k_bits": 5, "v_bits": 3, "window_tokens": 128, "sink_tokens": 0},
        {"bits": 4, "smooth_keys": False, "scale_dtype": "float16"},
        {"bits": 3, "codebook": "vector"},
        {"k_bits": 4, "v_bits": 2, "codebook": "vector"},
    ],
    ids=str,
)
def test_greedy_equals_the_cpu(models, implementation, cache_options):
    assert_same(models, implementation, prompt(2, 200), cache_options=cache_options, new_tokens=20)


def test_fused_attention_is_what_answers(models, monkeypatch):
    """Steps of a model with supported heads go through the codes, others do not."""
    require_fused_attention()
    calls = []
    attend_append = LayerStore.attend_append

    def counted(self, query, *args, **kwargs):
        calls.append(query.shape[2])
        return attend_append(self, query, *args, **kwargs)

    monkeypatch.setattr(LayerStore, "attend_append", counted)
    model = models[1]
    packed(model, "turboquant", prompt(1, 150), new_tokens=5)
    # One call a layer and step; the prompt is exact.
    expected = [1] * 4 * model.config.num_hidden_layers
    assert calls == (expected if model.config.head_dim == 64 else [])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_left_padding_equals_the_cpu(models, implementation):
    tokens, mask = left_padded(prompt(2, 190), PADDING)
    options = {} if implementation == "turboquant" else {"bits": 4, "attention_mask": mask}
    cpu = packed(models[0], "turboquant", tokens, attention_mask=mask)
    gpu = packed(
        models[1], implementation, tokens, cache_options=options or None, attention_mask=mask
    )
    assert_same_tokens(cpu, gpu, margin=MARGINS[implementation])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_beam_search_finds_beams_as_good_as_the_cpus(models, implementation):
    """Beams that score alike may change places, so their scores are compared."""
    tokens, scores = prompt(2, 150), []
    for model, name in ((models[0], "turboquant"), (models[1], implementation)):
        model.set_attn_implementation(name)
        result = model.generate(
            tokens.to(model.device),
            **{CACHE_ARGUMENT: CompressedDynamicCache(config=model.config, bits=4)},
            max_new_tokens=12,
            do_sample=False,
            num_beams=3,
            num_return_sequences=2,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert result.sequences.shape == (4, 162)
        scores.append(result.sequences_scores.cpu())
    torch.testing.assert_close(scores[1], scores[0], atol=MARGINS[implementation], rtol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("part", [7, 38])
def test_a_prompt_in_parts_equals_the_cpu(models, implementation, part):
    """Parts of up to 16 tokens are decode attention's, longer ones extend attention's.

    What a part's attention rounds goes into the next part's keys, where the last bit of float32 may
    change a code. Errors of 1e-7 in queries, keys and values changed one of these on the CPU, and
    logits by up to 0.0205: the margin of all is that of the fused attention.
    """
    tokens, results = prompt(1, 5 * 38), []
    for model, name in ((models[0], "turboquant"), (models[1], implementation)):
        model.set_attn_implementation(name)
        cache = CompressedDynamicCache(config=model.config, bits=4)
        with torch.no_grad():
            parts = [
                model(piece.to(model.device), **{CACHE_ARGUMENT: cache}).logits.cpu()
                for piece in tokens.split(part, dim=1)
            ]
        results.append(torch.cat(parts, 1))
    torch.testing.assert_close(results[1], results[0], atol=MARGINS["turboquant"], rtol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_prompt_lookup_equals_the_cpu(models, implementation):
    """Guessed tokens are appended and cropped away again when they are refused."""
    tokens = prompt(1, 40).repeat(1, 4)
    options = {"prompt_lookup_num_tokens": 6, "new_tokens": 40}
    expected = packed(models[0], implementation, tokens, **options)
    assert expected[1].shape[1] == 40
    actual = packed(models[1], implementation, tokens, **options)
    assert_same_tokens(expected, actual, margin=MARGINS[implementation])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_models_generate(dtype):
    model = tiny_models.llama(head_dim=64).to("cuda", dtype)
    ids, logits = packed(model, "turboquant", prompt(2, 200), new_tokens=20)
    exact, expected = packed(model, "sdpa", prompt(2, 200), new_tokens=20)
    assert ids.shape == exact.shape
    same = int((ids == exact).all(0).int().cumprod(0).sum()) - 200
    assert torch.isfinite(logits).all()
    # Until tokens part, logits differ by the dtype's rounding of a few layers.
    limit = 0.1 if dtype == torch.float16 else 0.8
    until = min(same + 1, 20)
    assert (logits[:, :until] - expected[:, :until]).float().abs().max() < limit


@pytest.mark.parametrize("implementation", ["turboquant", "sdpa"])
def test_memory_held_is_the_caches(implementation):
    model = tiny_models.llama(head_dim=64).to("cuda", torch.bfloat16)
    packed(
        model, implementation, prompt(1, 600), new_tokens=3
    )  # tables and workspaces of libraries
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model.set_attn_implementation(implementation)
    cache = CompressedDynamicCache(config=model.config, bits=4)
    generate(model, implementation, cache, prompt(1, 3000).cuda(), new_tokens=3)
    gc.collect()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    measured = cache.vram_bytes()
    # Every tensor is rounded up to 512 bytes; a dense layer would be 3000 * 2 * 2 * 64 * 2.
    assert measured <= held < measured + 64 * 1024
