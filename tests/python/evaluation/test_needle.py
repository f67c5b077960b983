"""Needles, found by a model of pure copying that sees exactly what its cache holds."""

import math
import types

import pytest
import torch
from tiny_tokenizer import byte_tokenizer
from turboquant_cpp.evaluation.needle import NeedleProtocol, find_needles, hide_needle
from turboquant_cpp.hf.compat import CACHE_ARGUMENT

TOKENIZER = byte_tokenizer()
#: Half of the bytes are digits, so that a copying model can be led astray by the text alone.
TEXT = "Numbers 123 to 456 are listed here. Line 99 says so. " * 60
TOKENS = torch.tensor(TOKENIZER(TEXT, add_special_tokens=False)["input_ids"])
SPAN = 12  # longer than any run that haystack and question share
CONFIDENT = 20.0


class CopyModel:
    """Predicts what followed the latest earlier run of the same 12 tokens, else nothing at all."""

    device = torch.device("cpu")

    def __init__(self):
        self.longest_chunk = self.largest_batch = 0

    def __call__(self, **inputs):
        return self.forward(**inputs)

    def forward(self, input_ids, use_cache, **cache):
        seen = cache[CACHE_ARGUMENT] or Memory()
        self.longest_chunk = max(self.longest_chunk, input_ids.shape[1])
        self.largest_batch = max(self.largest_batch, len(input_ids))
        logits = torch.zeros(*input_ids.shape, len(TOKENIZER))
        for row, tokens in enumerate(input_ids.tolist()):
            for index, token in enumerate(tokens):
                seen.add(row, token)
                guess = seen.next(row)
                if guess is not None:
                    logits[row, index, guess] = CONFIDENT
        output = types.SimpleNamespace(logits=logits)
        return Output(output, seen)


class Output:
    def __init__(self, output, cache):
        self.logits, self.cache = output.logits, cache

    def __getitem__(self, name):
        assert name == CACHE_ARGUMENT
        return self.cache


class Memory:
    """The last `capacity` tokens of each row; a stand-in for a cache that loses what is old."""

    def __init__(self, capacity=10**9):
        self.capacity, self.rows = capacity, {}

    def add(self, row, token):
        self.rows[row] = [*self.rows.get(row, []), token][-self.capacity :]

    def next(self, row):
        tokens = self.rows[row]
        run = tokens[-SPAN:]
        for start in range(len(tokens) - SPAN - 1, -1, -1):
            if tokens[start : start + SPAN] == run:
                return tokens[start + SPAN]
        return None


def test_what_is_fed_is_as_long_as_asked_and_holds_the_number_twice():
    hidden = hide_needle(TOKENIZER, TOKENS, 400, 0.5, seed=3)
    assert len(hidden.tokens) == 401
    written = TOKENIZER.decode(hidden.tokens.tolist())
    answer = TOKENIZER.decode(hidden.tokens[hidden.answer_start :].tolist()).strip()
    assert len(answer) == 6
    assert written.count(answer) == 2
    assert written.count(f"lighthouse is {answer}.\n") == 1
    assert written.endswith(f"Answer: The secret number of the lighthouse is {answer}")


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_depth_is_the_share_of_text_before_the_needle(depth):
    written = TOKENIZER.decode(hide_needle(TOKENIZER, TOKENS, 900, depth, seed=0).tokens.tolist())
    before = written.index("\nThe secret")
    hay = before + written.index("\nQuestion") - written.index(".\n", before) - 2
    sentence = len(TEXT) / 120
    assert depth * hay - 1.2 * sentence <= before <= depth * hay
    assert before == 0 or written[before - 1] == "."


def test_repeats_read_other_parts_and_hide_other_numbers():
    first, second = (
        TOKENIZER.decode(
            hide_needle(TOKENIZER, TOKENS, 300, 1.0, seed=seed, start=start).tokens.tolist()
        )
        for seed, start in ((0, 0.0), (1, 0.35))
    )
    assert first[:40] != second[:40]
    assert first[-6:] != second[-6:]


def test_alternatives_are_the_digits_that_others_have():
    hidden = hide_needle(TOKENIZER, TOKENS, 300, 0.0, seed=5)
    answer = hidden.tokens[hidden.answer_start :].tolist()
    digits = {str(digit) for digit in range(10)}
    assert TOKENIZER.decode(answer[:1]) == " "
    assert hidden.alternatives[0] == []  # every number begins with the same blank
    for index, (own, others) in enumerate(zip(answer[1:], hidden.alternatives[1:], strict=True)):
        written = {TOKENIZER.decode([token]) for token in [own, *others]}
        assert written == (digits - {"0"} if index == 0 else digits)
        assert own not in others


def test_a_cache_that_forgets_finds_only_what_is_recent():
    protocol = NeedleProtocol((300, 600), (0.0, 1.0), repeats=2, chunk_tokens=64)
    model = CopyModel()
    cells = find_needles(model, TOKENIZER, TOKENS, {"short": lambda: Memory(250)}, protocol)
    assert model.longest_chunk == 64
    places = [(300, 0.0), (300, 1.0), (600, 0.0), (600, 1.0)]
    assert [(cell.length, cell.depth) for cell in cells["short"]] == places
    assert all(cell.retrieved == cell.greedy == 1 for cell in cells["exact"])
    assert [cell.retrieved for cell in cells["short"]] == [0, 1, 0, 1]
    # Seven tokens, each against the rest of the vocabulary at logit 0.
    per_token = -math.log1p((len(TOKENIZER) - 1) * math.exp(-CONFIDENT))
    assert cells["exact"][0].log_probability == pytest.approx(7 * per_token, rel=1e-3, abs=1e-6)
    assert cells["short"][0].log_probability < 7 * -math.log(len(TOKENIZER)) + 1e-3


def test_needles_read_in_a_batch_are_judged_as_those_read_alone():
    places = {"lengths": (300, 600), "depths": (0.0, 0.5, 1.0), "repeats": 2, "chunk_tokens": 64}
    short = {"short": lambda: Memory(250)}
    alone = find_needles(CopyModel(), TOKENIZER, TOKENS, short, NeedleProtocol(**places))
    model, calls = CopyModel(), []
    batched = find_needles(
        model,
        TOKENIZER,
        TOKENS,
        short,
        NeedleProtocol(**places, batch_needles=4),  # of six, so the last batch is smaller
        progress=lambda done, total: calls.append((done, total)),
    )
    assert model.largest_batch == 4
    assert batched == alone
    assert {cell.retrieved for cell in batched["short"]} == {0, 1}
    assert calls == [(done, 24) for done in (4, 6, 10, 12, 16, 18, 22, 24)]


def test_greedy_is_stricter_than_retrieved():
    """A word that beats every digit spoils the free answer, not the one among numbers."""
    word = TOKENIZER("x", add_special_tokens=False)["input_ids"][0]

    class Chatty(CopyModel):
        def __call__(self, *args, **kwargs):
            output = super().__call__(*args, **kwargs)
            output.logits[..., word] = CONFIDENT + 1
            return output

    cell = find_needles(Chatty(), TOKENIZER, TOKENS, {}, NeedleProtocol((300,), (0.5,)))["exact"][0]
    assert (cell.retrieved, cell.greedy) == (1, 0)


def test_a_tie_is_not_found():
    """Higher digits are as likely as the right one, which comes first and so wins the argmax."""

    class Undecided(CopyModel):
        def __call__(self, *args, **kwargs):
            output = super().__call__(*args, **kwargs)
            for row in output.logits[0]:
                row[row.argmax() :] = row.max()
            return output

    protocol = NeedleProtocol((300,), (0.5,))
    (cell,) = find_needles(Undecided(), TOKENIZER, TOKENS, {}, protocol)["exact"]
    assert (cell.retrieved, cell.greedy) == (0, 0)


def test_nan_is_not_found():
    class Broken(CopyModel):
        def __call__(self, *args, **kwargs):
            output = super().__call__(*args, **kwargs)
            output.logits[:] = math.nan
            return output

    cell = find_needles(Broken(), TOKENIZER, TOKENS, {}, NeedleProtocol((300,), (0.5,)))["exact"][0]
    assert math.isnan(cell.log_probability)
    assert (cell.retrieved, cell.greedy) == (0, 0)


def test_progress_counts_every_text():
    calls = []
    find_needles(
        CopyModel(),
        TOKENIZER,
        TOKENS,
        {"same": Memory},
        NeedleProtocol((250,), (0.0, 1.0), repeats=2),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(i + 1, 8) for i in range(8)]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"lengths": ()}, "lengths"),
        ({"lengths": (0,)}, "lengths"),
        ({"depths": (1.5,)}, "depths"),
        ({"repeats": 0}, "repeats"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"batch_needles": 0}, "batch_needles"),
    ],
)
def test_impossible_protocol_is_refused(arguments, name):
    with pytest.raises(ValueError, match=name):
        NeedleProtocol(**arguments)


@pytest.mark.parametrize(
    ("length", "message"), [(20, "lengths: expected at least"), (5000, "text: expected at least")]
)
def test_lengths_that_do_not_fit_are_refused(length, message):
    with pytest.raises(ValueError, match=message):
        find_needles(CopyModel(), TOKENIZER, TOKENS, {}, NeedleProtocol((length,)))
