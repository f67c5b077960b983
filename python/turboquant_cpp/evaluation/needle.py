"""Needle in a haystack: a number that a long text mentions once must still be found."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from turboquant_cpp.evaluation.forward import read_chunk

__all__ = ["EXACT", "HiddenNeedle", "NeedleCell", "NeedleProtocol", "find_needles", "hide_needle"]

#: What the exact cache is called beside the others.
EXACT = "exact"

_NEEDLE = "\nThe secret number of the lighthouse is {number}.\n"
_QUESTION = (
    "\nQuestion: What is the secret number of the lighthouse?"
    "\nAnswer: The secret number of the lighthouse is"
)
_DIGITS = 6
#: Other numbers whose tokens compete with the answer's. A tokenizer with one token a digit shows
#: all of its ten here, one with three digits a token some two hundred of its thousand.
_DISTRACTORS = 200


@dataclasses.dataclass(frozen=True)
class NeedleProtocol:
    """Where needles are hidden and how the text is read.

    Attributes
    ----------
    lengths : sequence of int
        Tokens read in all: haystack, needle, question and the answer but for its last token.
    depths : sequence of float
        Share of the haystack before the needle, 0 to 1. The needle goes to the end of the sentence
        before that point.
    repeats : int
        Needles for each length and depth, every one with its own number and part of the text.
    chunk_tokens : int
        Tokens per forward pass; all earlier ones are read from the cache.
    seed : int
        Seed of the numbers.
    batch_needles : int
        Needles of one length that are read at once, as rows of a batch.
    """

    lengths: Sequence[int] = (512, 1024, 2048)
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    repeats: int = 1
    chunk_tokens: int = 64
    seed: int = 0
    batch_needles: int = 1

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths: expected positive numbers, got {list(self.lengths)}")
        if not self.depths or min(self.depths) < 0 or max(self.depths) > 1:
            raise ValueError(f"depths: expected numbers of 0 to 1, got {list(self.depths)}")
        for name in ("repeats", "chunk_tokens", "batch_needles"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class NeedleCell:
    """Result of one cache at one length and depth, over the protocol's repeats.

    Attributes
    ----------
    length : int
        Tokens read.
    depth : float
        Share of the haystack before the needle.
    log_probability : float
        Mean log-probability of the whole number, nats. NaN when a logit was not finite.
    retrieved : float
        Share of needles whose every token is more likely than those that other numbers have in its
        place: what greedy decoding restricted to numbers would answer. 0 to 1.
    greedy : float
        Share of needles whose every token is the most likely of the whole vocabulary: what greedy
        decoding does answer. Never above ``retrieved``.
    """

    length: int
    depth: float
    log_probability: float
    retrieved: float
    greedy: float


@dataclasses.dataclass(frozen=True)
class HiddenNeedle:
    """A haystack with its needle, the question and the answer.

    Attributes
    ----------
    tokens : torch.Tensor
        All tokens; the last one is part of the answer and never fed.
    answer_start : int
        Index of the answer's first token.
    alternatives : list of list of int
        For every answer token the tokens that other numbers have in its place.
    """

    tokens: torch.Tensor
    answer_start: int
    alternatives: list[list[int]]


def hide_needle(
    tokenizer: Any, text: torch.Tensor, length: int, depth: float, *, seed: int, start: float = 0.0
) -> HiddenNeedle:
    """Cut a haystack out of a text, hide a number in it and ask for it.

    Parameters
    ----------
    tokenizer
        The model's tokenizer.
    text : torch.Tensor
        The tokenised text, one dimension.
    length : int
        Tokens in all but the answer's last, which is never fed.
    depth : float
        Share of the haystack before the needle.
    seed : int
        Seed of the number.
    start : float
        Where in the text the haystack begins, as a share of what there is to choose from.

    Returns
    -------
    HiddenNeedle
        ``length + 1`` tokens.

    Raises
    ------
    ValueError
        The length does not hold needle and question, or the text is too short for it.
    """
    source = random.Random(seed)
    number, *others = (_number(source) for _ in range(1 + _DISTRACTORS))
    question, answer = _split_answer(tokenizer, number)
    distractors = [_split_answer(tokenizer, other)[1] for other in others if other != number]
    distractors = [tokens for tokens in distractors if len(tokens) == len(answer)]
    alternatives = [
        sorted({tokens[index] for tokens in distractors} - {token})
        for index, token in enumerate(answer)
    ]
    needle = _encode(tokenizer, _NEEDLE.format(number=number))
    hay_tokens = length + 1 - len(needle) - len(question) - len(answer)
    if hay_tokens < 1:
        raise ValueError(
            f"lengths: expected at least {length + 1 - hay_tokens} tokens to hold needle and "
            f"question, got {length}"
        )
    if len(text) < hay_tokens:
        raise ValueError(
            f"text: expected at least {hay_tokens} tokens for a length of {length}, "
            f"got {len(text)}; use a longer text or shorter lengths"
        )
    begin = round(start * (len(text) - hay_tokens))
    hay = text[begin : begin + hay_tokens].tolist()
    at = _sentence_end(tokenizer, hay, round(depth * hay_tokens))
    tokens = torch.tensor([*hay[:at], *needle, *hay[at:], *question, *answer])
    return HiddenNeedle(tokens, len(tokens) - len(answer), alternatives)


@torch.inference_mode()
def find_needles(
    model: Any,
    tokenizer: Any,
    text: torch.Tensor,
    caches: Mapping[str, Callable[[], Any]],
    protocol: NeedleProtocol | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[NeedleCell]]:
    """Hide numbers in a text and measure how well each cache lets the model repeat them.

    Parameters
    ----------
    model
        A causal language model of transformers, in evaluation mode.
    tokenizer
        Its tokenizer.
    text : torch.Tensor
        The tokenised text, one dimension.
    caches : mapping of str to callable
        Name of each cache and a function returning a fresh, empty one. The exact cache is measured
        first, in any case.
    protocol : NeedleProtocol, optional
        Lengths, depths, repeats.
    progress : callable, optional
        Called with (texts read, texts in total).

    Returns
    -------
    dict of str to list of NeedleCell
        For ``"exact"`` and every cache one cell per length and depth, lengths in the outer loop.

    Examples
    --------
    >>> cells = find_needles(model, tokenizer, tokens, {"4+4": make_cache})  # doctest: +SKIP
    >>> cells["4+4"][0].retrieved  # doctest: +SKIP
    1.0
    """
    protocol = protocol or NeedleProtocol()
    makers: dict[str, Callable[[], Any]] = {EXACT: lambda: None, **caches}  # None: the model's own
    per_length = len(protocol.depths) * protocol.repeats
    hidden = [
        [
            hide_needle(
                tokenizer,
                text,
                length,
                protocol.depths[index // protocol.repeats],
                seed=protocol.seed + place * per_length + index,
                start=index % protocol.repeats / protocol.repeats,
            )
            for index in range(per_length)
        ]
        for place, length in enumerate(protocol.lengths)
    ]
    cells: dict[str, list[NeedleCell]] = {name: [] for name in makers}
    done, total = 0, len(protocol.lengths) * per_length * len(makers)
    for length, needles in zip(protocol.lengths, hidden, strict=True):
        for name, make in makers.items():
            answers: list[tuple[float, float, float]] = []
            for start in range(0, per_length, protocol.batch_needles):
                batch = needles[start : start + protocol.batch_needles]
                answers += _answers(model, batch, make(), protocol.chunk_tokens)
                done += len(batch)
                if progress:
                    progress(done, total)
            for index, depth in enumerate(protocol.depths):
                here = answers[index * protocol.repeats : (index + 1) * protocol.repeats]
                means = (sum(values) / len(values) for values in zip(*here, strict=True))
                cells[name].append(NeedleCell(length, depth, *means))
    return cells


def _answers(
    model: Any, needles: Sequence[HiddenNeedle], cache: Any, chunk_tokens: int
) -> list[tuple[float, float, float]]:
    """Read equally long texts as one batch; judge the answer to each."""
    ids = torch.stack([needle.tokens[:-1] for needle in needles]).to(model.device)
    first_answer = min(needle.answer_start for needle in needles)
    pieces = []
    for start in range(0, ids.shape[1], chunk_tokens):
        chunk = ids[:, start : start + chunk_tokens]
        # From the token before the answer on, logits predict the answer.
        last_logits = min(max(start + chunk.shape[1] - (first_answer - 1), 0), chunk.shape[1])
        logits, cache = read_chunk(model, chunk, cache, last_logits)
        pieces.append(logits.float().log_softmax(-1).cpu())
    log_probs = torch.cat(pieces, dim=1)
    return [
        _judge(needle, rows[needle.answer_start - first_answer :])
        for needle, rows in zip(needles, log_probs, strict=True)
    ]


def _judge(needle: HiddenNeedle, log_probs: torch.Tensor) -> tuple[float, float, float]:
    """Log-probability of the number, whether it beats other numbers, whether it beats all."""
    answer = needle.tokens[needle.answer_start :]
    own = log_probs.gather(1, answer[:, None])[:, 0]
    retrieved = all(
        bool((value > row[others]).all())
        for value, row, others in zip(own, log_probs, needle.alternatives, strict=True)
    )
    greedy = bool((log_probs.argmax(-1) == answer).all()) and retrieved
    return own.sum().item(), float(retrieved), float(greedy)


def _number(source: random.Random) -> str:
    return str(source.randrange(10 ** (_DIGITS - 1), 10**_DIGITS))


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _split_answer(tokenizer: Any, number: str) -> tuple[list[int], list[int]]:
    """Tokens of the question and of the answer, as they are when written in one go."""
    question = _encode(tokenizer, _QUESTION)
    whole = _encode(tokenizer, f"{_QUESTION} {number}")
    common = 0
    while common < len(question) and question[common] == whole[common]:
        common += 1
    return whole[:common], whole[common:]


def _sentence_end(tokenizer: Any, tokens: list[int], limit: int) -> int:
    """Last place at or before `limit` that follows a full stop; `limit` when there is none."""
    for place in range(limit, 0, -1):
        if tokenizer.decode([tokens[place - 1]]).rstrip().endswith((".", "!", "?")):
            return place
    return limit
