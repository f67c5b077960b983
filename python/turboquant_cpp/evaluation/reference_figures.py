"""KL figures that a correct implementation must reach, from a float reference of the recipe.

SmolLM2-135M-Instruct (Q4_1 GGUF, fp32 arithmetic) on ``tests/data/prose.txt`` under the default
protocol (2 windows of 1,024 tokens, chunks of 8); `docs/experiments/quality-smollm2.md`.
"""

from __future__ import annotations

__all__ = [
    "SMOLLM2_PLAIN_KL",
    "SMOLLM2_RECIPE_KL",
    "SMOLLM2_VECTOR_KL",
    "TOLERANCE",
    "reference_kl",
]

#: (key bits, value bits) -> mean KL in nats with the recommended recipe.
SMOLLM2_RECIPE_KL = {
    (5, 4): 0.0005,
    (4, 4): 0.0015,
    (4, 2): 0.0071,
    (3, 3): 0.0059,
    (2, 2): 0.0316,
}
#: The recipe with a vector codebook (the reference's codes: 2-D at 3 and 4 bits, 4-D at 2 bits).
SMOLLM2_VECTOR_KL = {(4, 4): 0.0014, (3, 3): 0.0046, (2, 2): 0.0212}
#: The same as the first with the recipe off: every token quantised at once, plain norm.
SMOLLM2_PLAIN_KL = {(4, 4): 0.0464}
#: A run passes at up to this multiple of the figure: seeds alone move KL by about 10 %.
TOLERANCE = 1.25


def reference_kl(k_bits: int, v_bits: int, recipe: str, codebook: str = "scalar") -> float | None:
    """Figure of a pair of widths, None where there is none.

    Examples
    --------
    >>> reference_kl(4, 4, "recommended"), reference_kl(8, 8, "plain")
    (0.0015, None)
    >>> reference_kl(2, 2, "recommended", "vector")
    0.0212
    """
    if codebook == "vector":
        figures = {} if recipe == "plain" else SMOLLM2_VECTOR_KL
    else:
        figures = SMOLLM2_PLAIN_KL if recipe == "plain" else SMOLLM2_RECIPE_KL
    return figures.get((k_bits, v_bits))
