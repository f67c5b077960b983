from turboquant_cpp.evaluation import (
    SMOLLM2_PLAIN_KL,
    SMOLLM2_RECIPE_KL,
    SMOLLM2_VECTOR_KL,
    reference_kl,
)


def test_recipe_and_plain_are_kept_apart():
    assert reference_kl(4, 4, "recommended") == SMOLLM2_RECIPE_KL[4, 4]
    assert reference_kl(4, 4, "plain") == SMOLLM2_PLAIN_KL[4, 4]
    assert reference_kl(3, 3, "plain") is None
    assert reference_kl(3, 3, "recommended", "vector") == SMOLLM2_VECTOR_KL[3, 3]
    assert reference_kl(4, 4, "plain", "vector") is None


def test_more_bits_are_better():
    figures = SMOLLM2_RECIPE_KL
    assert figures[5, 4] < figures[4, 4] < figures[4, 2] < figures[2, 2]
    assert figures[4, 4] < figures[3, 3] < figures[2, 2]
    assert all(kl < figures[widths] for widths, kl in SMOLLM2_VECTOR_KL.items())
