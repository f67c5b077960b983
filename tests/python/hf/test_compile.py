"""A compiled decode step with a cache of fixed capacity: one graph, the growing cache's tokens."""

from __future__ import annotations

import copy
import re

import pytest
import tiny_models
import torch
from tiny_models import generate, left_padded, prompt
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from transformers import CompileConfig, StaticCache
from turboquant_cpp import CompressedDynamicCache, FixedStore
from turboquant_cpp.hf import fixed_layer

CAPACITY, PROMPT, STEPS = 320, 150, 100  # a step in 64 moves tokens into a page
PADDING = [37, 0]


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    """No graph of another test, and an error for any that is traced twice."""
    monkeypatch.setattr(fixed_layer._Replays, "are_possible", False)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def fixed_cache(model, **options):
    return CompressedDynamicCache(
        **{"config": model.config, "bits": 4, "max_cache_len": CAPACITY, **options}
    )


def step_of(model):
    def step(tokens, cache, position_ids):
        return model(tokens, past_key_values=cache, position_ids=position_ids).logits

    return step


@torch.no_grad()
def decode(model, step, cache, tokens, mask=None, steps=STEPS):
    """Prompt, then greedy steps; the logits of every step."""
    model.set_attn_implementation("turboquant")
    out = model(tokens, past_key_values=cache, attention_mask=mask).logits[:, -1:]
    logits = [out]
    lengths = (torch.ones_like(tokens) if mask is None else mask).sum(1, keepdim=True)
    for i in range(steps):
        logits.append(step(logits[-1].argmax(-1), cache, lengths + i))
    return torch.cat(logits, 1)


def assert_same_codes(growing, fixed):
    for mine, theirs in zip(fixed.compressed_layers(), growing.compressed_layers(), strict=True):
        assert mine.store.lengths == theirs.store.lengths
        for a, b in zip(mine.store.codes(), theirs.store.codes(), strict=True):
            assert torch.equal(a, b)


def assert_compiled_once(model, tokens, mask=None, backend="eager", **options):
    """Eager execution of the traced graph: the bits must be the growing cache's."""
    growing = CompressedDynamicCache(**{"config": model.config, "bits": 4, **options})
    expected = decode(model, step_of(model), growing, tokens, mask)
    counter = CompileCounter() if backend == "eager" else None
    step = torch.compile(step_of(model), fullgraph=True, backend=counter or backend)
    fixed = fixed_cache(model, **options)
    assert torch.equal(decode(model, step, fixed, tokens, mask), expected)
    assert_same_codes(growing, fixed)
    if counter is not None:
        assert counter.frame_count == 1
    assert int(fixed.get_seq_length()) == tokens.shape[1] + STEPS


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 3, "recipe": "plain"},
        {"bits": 2, "prefill": "quantized"},
        {"bits": None, "k_bits": 5, "v_bits": 3, "window_tokens": 128, "sink_tokens": 0},
    ],
    ids=str,
)
def test_a_hundred_steps_are_one_graph(options):
    assert_compiled_once(tiny_models.llama(), prompt(2, PROMPT), **options)


def test_ahead_of_time_autograd_keeps_the_mutations():
    assert_compiled_once(tiny_models.llama(), prompt(2, PROMPT), backend="aot_eager")


def test_a_padded_batch():
    tokens, mask = left_padded(prompt(2, PROMPT), PADDING)
    assert_compiled_once(tiny_models.llama(), tokens, mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    assert_compiled_once(tiny_models.llama().to(dtype), prompt(1, PROMPT))


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [tiny_models.qwen2, tiny_models.gemma2, tiny_models.gemma3, tiny_models.gpt_oss]
)
def test_other_models(make):
    """Soft caps, learned sinks, sliding layers: those are stock static ones, a rounding apart.

    Stock sliding layers count on the host, so the model may be traced as often as it is with them
    alone.
    """
    model = make()
    tokens = prompt(1, PROMPT)
    eager = decode(model, step_of(model), fixed_cache(model), tokens)
    frames = []
    with torch._dynamo.config.patch(error_on_recompile=False):
        for cache in (
            StaticCache(config=model.config, max_cache_len=CAPACITY),
            fixed_cache(model),
        ):
            torch._dynamo.reset()
            counter = CompileCounter()
            step = torch.compile(step_of(model), fullgraph=True, backend=counter)
            compiled = decode(model, step, cache, tokens)
            frames.append(counter.frame_count)
    torch.testing.assert_close(compiled, eager, atol=2e-5, rtol=2e-5)
    assert frames[1] <= frames[0]


class Fault:
    is_due = False


@torch.library.custom_op("turboquant_tests::copy_or_fail", mutates_args=())
def copy_or_fail(states: torch.Tensor) -> torch.Tensor:
    if Fault.is_due:
        raise torch.OutOfMemoryError("injected")
    return states.clone()


@copy_or_fail.register_fake
def _(states):
    return states.new_empty(states.shape)


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("use", ["step", "crop", "save"])
@pytest.mark.parametrize("was_traced", [False, True], ids=["its own graph", "another's graph"])
def test_a_compiled_step_that_fails_between_layers(monkeypatch, tmp_path, steps, use, was_traced):
    """Nothing in the graph can notice. The next use outside of one does, and what it says cures."""
    model = tiny_models.llama(num_hidden_layers=3)
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda states: forward(copy_or_fail(states)))
    step = torch.compile(step_of(model), fullgraph=True, backend="eager")
    cache, held = fixed_cache(model), PROMPT + steps
    if was_traced:
        decode(model, step, fixed_cache(model), prompt(1, PROMPT), steps=1)
    decode(model, step, cache, prompt(1, PROMPT), steps=steps)
    after = copy.deepcopy(cache)
    call = (prompt(1, 1, seed=1), torch.tensor([[held]]))
    with torch.no_grad():
        expected = step_of(model)(call[0], after, call[1])
        monkeypatch.setattr(Fault, "is_due", True)
        with pytest.raises(torch.OutOfMemoryError, match="injected"):
            step(call[0], cache, call[1])
        monkeypatch.setattr(Fault, "is_due", False)
        if use != "crop":
            uses = {
                "step": lambda: step_of(model)(call[0], cache, call[1]),
                "save": lambda: cache.save(tmp_path / "cache"),
            }
            problem = rf"layer 0 holds {held + 1} tokens and layer 2 {held}: .* crop\(-1\)"
            with pytest.raises(RuntimeError, match=problem):
                uses[use]()
        cache.crop(-1)
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [held] * 3
        assert torch.equal(step_of(model)(call[0], cache, call[1]), expected)
        cache.crop(-1)
        assert torch.equal(step(call[0], cache, call[1]), expected)
    assert_same_codes(after, cache)


def test_counts_are_read_back_only_where_steps_were_traced(monkeypatch):
    """A step asks once for the positions of its new tokens, however many layers there are."""
    model = tiny_models.llama(num_hidden_layers=3)
    step = step_of(model)
    cache = fixed_cache(model)
    decode(model, step, cache, prompt(1, PROMPT), steps=1)
    reads = []
    seen_positions = FixedStore.seen_positions.fget

    def counting(store):
        reads.append(store)
        return seen_positions(store)

    monkeypatch.setattr(FixedStore, "seen_positions", property(counting))

    def reads_of_a_step() -> int:
        reads.clear()
        with torch.no_grad():
            step(prompt(1, 1), cache, torch.tensor([[int(cache.layers[0].get_host_length())]]))
        return len(reads)

    once = reads_of_a_step()
    assert once <= 2
    decode(
        model,
        torch.compile(step, fullgraph=True, backend="eager"),
        fixed_cache(model),
        prompt(1, PROMPT),
        steps=1,
    )
    assert reads_of_a_step() == once + 3


def compile_config():
    """What `generate()` compiles with on a GPU, cheap, and on the CPU too."""
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize("padding", [None, PADDING], ids=str)
@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_compiles_once(padding, num_beams):
    """For every call with the same shapes, with a cache that was reset or a new one."""
    model = tiny_models.llama()
    tokens, mask = left_padded(prompt(2, PROMPT), padding or [0, 0])
    options = {"attention_mask": mask, "num_beams": num_beams, "new_tokens": 70}
    growing = CompressedDynamicCache(config=model.config, bits=4)
    expected = generate(model, "turboquant", growing, tokens, **options)
    config = compile_config()
    cache = fixed_cache(model)
    for attempt in range(3):
        actual = generate(model, "turboquant", cache, tokens, compile_config=config, **options)
        assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
        assert_same_codes(growing, cache)
        if attempt == 1:
            cache = fixed_cache(model)
        else:
            cache.reset()
    # Beam search runs the model as it is.
    assert counters["stats"]["unique_graphs"] == (0 if num_beams > 1 else 1)


@torch.no_grad()
def test_changes_between_compiled_steps_need_no_new_graph():
    model = tiny_models.llama()
    model.set_attn_implementation("turboquant")
    counter = CompileCounter()
    results = []
    for cache, step in (
        (CompressedDynamicCache(config=model.config, bits=4), step_of(model)),
        (fixed_cache(model), torch.compile(step_of(model), fullgraph=True, backend=counter)),
    ):
        logits = [model(prompt(2, PROMPT), past_key_values=cache).logits[:, -1:]]
        at = PROMPT
        for change in (
            lambda c: None,
            lambda c: c.crop(-60),
            lambda c: c.reorder_cache(torch.tensor([1, 1])),
            lambda c: c.reorder_cache(torch.tensor([1, 0])),
        ):
            change(cache)
            at = int(cache.get_seq_length())
            for i in range(40):
                position = torch.full((2, 1), at + i)
                logits.append(step(prompt(2, 1, seed=i), cache, position))
        results.append((torch.cat(logits, 1), cache))
    assert torch.equal(results[0][0], results[1][0])
    assert_same_codes(results[0][1], results[1][1])
    assert counter.frame_count == 1


@torch.no_grad()
def test_a_whole_compiled_model_after_early_initialization():
    """The prompt too, compiled; padding is then told to the cache, for nothing shows it a mask."""
    model = tiny_models.llama()
    tokens, mask = left_padded(prompt(2, 90), PADDING)
    model.set_attn_implementation("turboquant")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = [(tokens, positions)]
    inputs += [(prompt(2, 1, seed=i), positions[:, -1:] + 1 + i) for i in range(60)]
    growing = CompressedDynamicCache(config=model.config, bits=4)
    expected = [
        model(ids, past_key_values=growing, position_ids=at, attention_mask=shown).logits[:, -1:]
        for (ids, at), shown in zip(inputs, [mask] + [None] * 60, strict=True)
    ]
    cache = fixed_cache(model, left_padding=PADDING)
    cache.early_initialization(
        batch_size=2, num_heads=2, head_dim=16, dtype=torch.float32, device=torch.device("cpu")
    )
    counter = CompileCounter()
    with torch._dynamo.config.patch(error_on_recompile=False):  # the prompt is a graph of its own
        step = torch.compile(step_of(model), fullgraph=True, backend=counter, dynamic=False)
        logits = [step(ids, cache, at)[:, -1:] for ids, at in inputs]
    # Attention over the prompt is this package's, not torch's: a rounding apart.
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert [layer.store.lengths for layer in cache.compressed_layers()] == [[113, 150]] * 2
    assert counter.frame_count == 2


@torch.no_grad()
def test_a_full_cache_is_an_error_of_the_compiled_step():
    model = tiny_models.llama()
    model.set_attn_implementation("turboquant")
    cache = fixed_cache(model, max_cache_len=150)
    model(prompt(1, 149), past_key_values=cache)
    step = torch.compile(step_of(model), fullgraph=True, backend=CompileCounter())
    token = prompt(1, 1)
    step(token, cache, torch.tensor([[149]]))
    before = [state.clone() for layer in cache.layers for state in layer.dense()]
    message = "at most 0 more tokens in row 0 .* made for 150.*got 1"
    with pytest.raises((RuntimeError, ValueError), match=message):
        step(token, cache, torch.tensor([[150]]))
    after = [state for layer in cache.layers for state in layer.dense()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@torch.no_grad()
def test_what_cannot_be_compiled_says_why():
    model = tiny_models.llama()
    model.set_attn_implementation("turboquant")
    step = torch.compile(step_of(model), backend="eager", fullgraph=True)
    position = torch.tensor([[0]])
    with pytest.raises(Exception, match="has no storage yet: run the first prompt outside"):
        step(prompt(1, 1), fixed_cache(model), position)
    cache = fixed_cache(model)
    for layer in range(model.config.num_hidden_layers):
        cache.update(*torch.zeros(2, 1, 2, 20, 16), layer)
    with pytest.raises(Exception, match="holds tokens that update"):
        step(prompt(1, 1), cache, position)
    cache.reset()
    model(prompt(1, 20), past_key_values=cache)
    full = torch.ones(1, 1, 1, CAPACITY, dtype=torch.bool)
    with_mask = torch.compile(
        lambda tokens: model(tokens, past_key_values=cache, attention_mask=full).logits,
        backend="eager",
        fullgraph=True,
    )
    with pytest.raises(Exception, match="causal attention without a 4-D mask"):
        with_mask(prompt(1, 1))


@pytest.mark.slow
def test_inductor_gives_the_same_tokens_and_copies_no_page():
    model = tiny_models.llama()
    tokens = prompt(2, PROMPT)
    growing = CompressedDynamicCache(config=model.config, bits=4)
    expected = decode(model, step_of(model), growing, tokens, steps=70)
    fixed = fixed_cache(model)
    step = torch.compile(step_of(model), fullgraph=True)
    logits, code = run_and_get_code(decode, model, step, fixed, tokens, steps=70)
    # Sums in another order: roundings of fp32, which the tiny model enlarges.
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    assert int(fixed.get_seq_length()) == PROMPT + 70
    assert code[0].count("turboquant.attend_append") >= 2
    # No buffer of the graph's own is as large as what is changed in place.
    made = re.findall(r"= empty_strided\w*\(\((.*?)\)", code[0])
    assert made
    for tensor in (*fixed.layers[0].store._slabs, fixed.layers[0].store._dense.keys):
        assert ", ".join(str(size) for size in tensor.shape) not in made
