"""The harness's wrapper: with lm-eval where it is installed, else with the part that we use."""

import importlib
import sys
import types

import pytest
import torch
from tiny_tokenizer import PAD, byte_llama, byte_tokenizer
from transformers import DynamicCache
from turboquant_cpp import CompressedDynamicCache
from turboquant_cpp.hf.compat import CACHE_ARGUMENT

MODULE = "turboquant_cpp.evaluation.harness"


class StubHFLM:
    """What `CachedLM` needs of lm-eval's class, by the same names."""

    def __init__(self, pretrained, backend="causal", tokenizer=None, batch_size=1, device=None):
        self.model, self.backend, self.tokenizer = pretrained, backend, tokenizer
        self.device, self.mixed_precision_dtype = pretrained.device, None

    def _model_generate(self, context, max_length, stop, **generation_kwargs):
        return self.model.generate(
            input_ids=context, max_length=max_length, use_cache=True, **generation_kwargs
        )


def installed_classes():
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        return [StubHFLM]
    return [StubHFLM, HFLM]


@pytest.fixture(params=installed_classes(), ids=lambda base: base.__name__)
def harness(request, monkeypatch):
    """The module, imported afresh with one of the base classes."""
    names = ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")
    if request.param is StubHFLM:
        for name in names:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[names[-1]].HFLM = StubHFLM
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def lm_model(tokenizer):
    return byte_llama(tokenizer)


@pytest.fixture
def coarse(lm_model):
    """Makes caches of 2 bits without an exact window, and remembers them."""
    made = []

    def make():
        made.append(
            CompressedDynamicCache(
                config=lm_model.config, bits=2, recipe="plain", prefill="quantized"
            )
        )
        return made[-1]

    make.made = made
    return make


def texts(rows, tokens):
    return torch.randint(2, 258, (rows, tokens), generator=torch.Generator().manual_seed(0))


def test_scores_are_read_from_the_cache(harness, lm_model, tokenizer, coarse):
    lm = harness.CachedLM(lm_model, coarse, chunk_tokens=16, tokenizer=tokenizer, device="cpu")
    inputs = texts(2, 90)
    logits = lm._model_call(inputs)
    (cache,) = coarse.made
    assert cache.get_seq_length() == 90
    twin = coarse()
    with torch.no_grad():
        expected = [
            lm_model(inputs[:, start : start + 16], **{CACHE_ARGUMENT: twin}).logits
            for start in range(0, 90, 16)
        ]
        exact = lm_model(inputs).logits
    assert torch.equal(logits, torch.cat(expected, dim=1))
    assert (logits - exact).abs().max() > 0.05  # 2 bits show; a single exact pass would not


def test_an_exact_cache_gives_the_scores_of_a_single_pass(harness, lm_model, tokenizer):
    lm = harness.CachedLM(
        lm_model, lambda: DynamicCache(config=lm_model.config), tokenizer=tokenizer, device="cpu"
    )
    inputs = texts(2, 45)
    with torch.no_grad():
        exact = lm_model(inputs).logits
    torch.testing.assert_close(lm._model_call(inputs), exact, atol=1e-4, rtol=1e-4)


def test_padding_on_the_right_changes_no_score(harness, lm_model, tokenizer):
    def make():
        return CompressedDynamicCache(config=lm_model.config, bits=4, prefill="quantized")

    lm = harness.CachedLM(lm_model, make, chunk_tokens=16, tokenizer=tokenizer, device="cpu")
    inputs = texts(2, 300)
    padded = inputs.clone()
    padded[0, 210:] = PAD
    alone, batch = lm._model_call(inputs[:1, :210]), lm._model_call(padded)
    torch.testing.assert_close(alone[0], batch[0, :210], atol=1e-4, rtol=1e-4)


def test_answers_are_generated_from_the_cache(harness, lm_model, tokenizer, coarse):
    lm = harness.CachedLM(lm_model, coarse, tokenizer=tokenizer, device="cpu")
    context = texts(1, 40)
    mask = torch.ones_like(context)
    answer = lm._model_generate(context, 60, ["\n\n"], attention_mask=mask, do_sample=False)
    (cache,) = coarse.made
    assert cache.get_seq_length() == answer.shape[1] - 1  # the last token is never fed
    expected = lm_model.generate(
        context, attention_mask=mask, max_length=60, do_sample=False, **{CACHE_ARGUMENT: coarse()}
    )
    assert torch.equal(answer, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"chunk_tokens": 0}, "chunk_tokens"), ({"backend": "seq2seq"}, "decoder-only")],
)
def test_what_does_not_fit_is_refused(harness, lm_model, tokenizer, coarse, options, message):
    with pytest.raises(ValueError, match=message):
        harness.CachedLM(lm_model, coarse, tokenizer=tokenizer, device="cpu", **options)


def test_requests_of_the_harness(lm_model, tokenizer, coarse):
    """lm-eval's own entry points: a batch of log-likelihoods of unequal length, and an answer."""
    pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    lm = importlib.import_module(MODULE).CachedLM(
        lm_model, coarse, chunk_tokens=16, tokenizer=tokenizer, batch_size=2, device="cpu"
    )
    pairs = [("RAID means Redundant Array of", " Independent Disks"), ("Linux", " is a kernel")]
    scores = lm.loglikelihood(
        [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)],
        disable_tqdm=True,
    )
    for (context, continuation), (score, _) in zip(pairs, scores, strict=True):
        ids = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
        log_probs = lm._model_call(ids[:, :-1])[0].log_softmax(-1)
        count = len(continuation)
        picked = log_probs[-count:].gather(1, ids[0, -count:, None])
        assert score == pytest.approx(picked.sum().item(), rel=1e-4)
    request = Instance("generate_until", {}, ("RAID", {"until": ["\n"], "max_gen_toks": 5}), 0)
    (answer,) = lm.generate_until([request], disable_tqdm=True)
    assert isinstance(answer, str)
    assert coarse.made[-1].get_seq_length() >= len("RAID")


def test_missing_lm_eval_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(ImportError, match="pip install lm-eval"):
        importlib.import_module(MODULE)
