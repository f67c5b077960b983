"""A model with keys of 30 and 100 times the usual size in a few channels keeps its perplexity."""

import pytest
import torch
from biased_keys import bias_keys
from turboquant_cpp import CompressedDynamicCache
from turboquant_cpp.evaluation import Protocol, compare_caches, read_text
from turboquant_cpp.hf import loading

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("factor", [30, 100])
def test_the_defaults_hold_and_the_plain_recipe_fails(repository_root, factor):
    try:
        loaded = loading.load_model(device="cpu")
    except loading.ModelUnavailableError as error:
        pytest.skip(str(error))
    model = bias_keys(loaded.model, factor)
    model.set_attn_implementation("turboquant")
    text = read_text(repository_root / "tests" / "data" / "prose.txt")
    ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def maker(recipe):
        return lambda: CompressedDynamicCache(
            config=model.config, bits=4, recipe=recipe, prefill="quantized"
        )

    caches = {recipe: maker(recipe) for recipe in ("recommended", "plain")}
    # Four places of the text: the change on one window of 768 has a 95 % range of 1.5 %.
    quality = compare_caches(model, torch.tensor(ids), caches, Protocol(4, 512, 64, 4))
    ours, plain = (quality.caches[recipe].divergence for recipe in caches)
    # A language model still: 25 without the bias, 32 with it.
    assert ours.perplexity_exact < 40
    assert abs(ours.perplexity_change_percent) < 1
    # Without the knee of the smoothing rule 0.2 and more; without a bias 0.0015.
    assert ours.kl_mean < 0.01
    assert plain.perplexity_change_percent > 100
