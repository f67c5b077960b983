"""Divergence of next-token distributions: per position, then summarised."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch

__all__ = ["DivergenceAccumulator", "DivergenceSummary"]


@dataclasses.dataclass(frozen=True)
class DivergenceSummary:
    """How far a cache's next-token distributions lie from the exact cache's.

    Attributes
    ----------
    positions : int
        Positions compared.
    kl_mean, kl_p99, kl_max : float
        Mean, 99th percentile and maximum of KL(exact || cache) in nats per token. NaN when any
        logit was not finite, so that a gate on them fails.
    top1_agreement : float
        Share of positions whose most likely token is the same, 0 to 1.
    perplexity_exact, perplexity : float
        Perplexity of the text under either cache, over every token with a predecessor.
    perplexity_change_percent : float
        ``100 * (perplexity / perplexity_exact - 1)``.
    """

    positions: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    perplexity_exact: float
    perplexity: float
    perplexity_change_percent: float


class DivergenceAccumulator:
    """Collects per-position figures chunk by chunk; keeps one float per position, no logits."""

    def __init__(self) -> None:
        self._kl: list[torch.Tensor] = []
        self._agree: list[torch.Tensor] = []
        self._nll_exact: list[torch.Tensor] = []
        self._nll_cache: list[torch.Tensor] = []

    @classmethod
    def joined(cls, parts: Iterable[DivergenceAccumulator]) -> DivergenceAccumulator:
        """Return an accumulator of all that was added to others, one after the other."""
        whole = cls()
        for part in parts:
            whole._kl += part._kl
            whole._agree += part._agree
            whole._nll_exact += part._nll_exact
            whole._nll_cache += part._nll_cache
        return whole

    def add(
        self,
        log_probs_exact: torch.Tensor,
        log_probs_cache: torch.Tensor,
        targets: torch.Tensor,
        *,
        compare: bool,
    ) -> None:
        """Add one chunk.

        Parameters
        ----------
        log_probs_exact, log_probs_cache : torch.Tensor
            ``[positions, vocabulary]``, normalised.
        targets : torch.Tensor
            Next tokens, at most one per position (the last position of a text has none).
        compare : bool
            False for the first chunk: it reads nothing from the cache, so it counts for the
            perplexity only.
        """
        if compare:
            # 0 * (-inf - -inf) of tokens that both distributions exclude would be NaN.
            excluded = torch.isneginf(log_probs_exact)
            terms = log_probs_exact.exp() * (log_probs_exact - log_probs_cache)
            self._kl.append(terms.masked_fill(excluded, 0.0).sum(-1).cpu())
            agree = log_probs_exact.argmax(-1) == log_probs_cache.argmax(-1)
            self._agree.append(agree.cpu())
        for log_probs, nll in (
            (log_probs_exact, self._nll_exact),
            (log_probs_cache, self._nll_cache),
        ):
            nll.append(-log_probs[: len(targets)].gather(1, targets[:, None])[:, 0].cpu())

    @property
    def kl(self) -> torch.Tensor:
        """KL divergence of every compared position, in the order they were added."""
        return torch.cat(self._kl) if self._kl else torch.empty(0, dtype=torch.float64)

    @property
    def nll(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-likelihood of every target, in order: under the exact cache, the other."""
        return torch.cat(self._nll_exact), torch.cat(self._nll_cache)

    def summary(self) -> DivergenceSummary:
        """Summarise what was added; at least one compared position is needed."""
        kl = self.kl
        if kl.numel() == 0:
            raise ValueError("no position to compare: the windows are not longer than one chunk")
        perplexity_exact, perplexity = map(_perplexity, self.nll)
        return DivergenceSummary(
            positions=kl.numel(),
            kl_mean=kl.mean().item(),
            kl_p99=kl.quantile(0.99).item(),
            kl_max=kl.max().item(),
            top1_agreement=torch.cat(self._agree).double().mean().item(),
            perplexity_exact=perplexity_exact,
            perplexity=perplexity,
            perplexity_change_percent=100.0 * (perplexity / perplexity_exact - 1.0),
        )


def _perplexity(nll: torch.Tensor) -> float:
    mean = nll.mean().item()
    return math.exp(mean) if mean < 700.0 else math.inf  # exp overflows a double at 709.8
