from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from distortion import EXACT_DISTORTION
from turboquant_cpp import _core
from turboquant_cpp.quantizers import (
    LloydMaxCodebook,
    TurboQuantCompressorMSE,
    TurboQuantCompressorV2,
    TurboQuantMSE,
    TurboQuantProd,
    solve_lloyd_max,
)

DISTORTION = EXACT_DISTORTION[64]


def unit_vectors(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def test_levels_are_those_of_a_unit_vectors_coordinate():
    centroids, boundaries = solve_lloyd_max(128, 2)
    expected = torch.tensor([-1.50519298, -0.45245325, 0.45245325, 1.50519298]) / math.sqrt(128)
    torch.testing.assert_close(centroids, expected)
    torch.testing.assert_close(boundaries, (expected[1:] + expected[:-1]) / 2)
    centroids.zero_()
    assert solve_lloyd_max(128, 2)[0].any()


def test_codebook_picks_the_nearest_level():
    codebook = LloydMaxCodebook.solve(64, 4)
    x = torch.linspace(-0.5, 0.5, 1001)
    distances = (x[:, None] - codebook.centroids).abs()
    error = (codebook.dequantize(codebook.quantize(x)) - x).abs()
    torch.testing.assert_close(error, distances.min(1).values)
    assert codebook.quantize(x.view(7, 11, 13)).shape == (7, 11, 13)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_mse_meets_the_exact_distortion(bits):
    x = unit_vectors(4000, 64)
    quantizer = TurboQuantMSE(64, bits)
    indices, norms = quantizer.quantize(x)
    assert indices.dtype == torch.int64
    assert (indices.min(), indices.max()) == (0, 2**bits - 1)
    torch.testing.assert_close(norms, torch.ones(4000, 1))
    error = float((quantizer.dequantize(indices, norms) - x).square().sum(-1).mean())
    # 256,000 coordinates: the mean is good to well under a percent.
    assert error == pytest.approx(DISTORTION[bits], rel=0.02)


def test_rotation_is_the_matrix_that_the_quantizer_uses():
    quantizer = TurboQuantMSE(96, 4, seed=5)
    rotation = quantizer.rotation
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(96), atol=1e-5, rtol=0)
    x = unit_vectors(100, 96)
    indices, norms = quantizer.quantize(x)
    rotated = quantizer.codebook.dequantize(indices) * norms
    torch.testing.assert_close(quantizer.dequantize(indices, norms), rotated @ rotation)
    # Codes may differ from the core's only where a coordinate is a rounding away from a boundary.
    own = quantizer.codebook.quantize(x @ rotation.T)
    assert (own != indices).float().mean() < 1e-3
    assert (own - indices).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 5, 64), (0, 64)])
def test_any_leading_dimensions_and_dtypes(shape, dtype):
    quantizer = TurboQuantMSE(64, 3)
    indices, norms = quantizer.quantize(torch.ones(shape, dtype=dtype))
    assert indices.shape == shape
    assert norms.shape == (*shape[:-1], 1)
    assert quantizer.dequantize(indices, norms).shape == shape


def test_magnitudes_and_zero_vectors():
    quantizer = TurboQuantMSE(64, 4)
    x = unit_vectors(3, 64) * torch.tensor([[0.0], [1e-6], [1e6]])
    indices, norms = quantizer.quantize(x)
    torch.testing.assert_close(norms, x.norm(dim=-1, keepdim=True))
    back = quantizer.dequantize(indices, norms)
    assert not back[0].any()
    assert ((back - x).norm(dim=-1) <= 0.2 * x.norm(dim=-1)).all()


def test_prod_is_unbiased_with_the_expected_variance():
    keys, queries = unit_vectors(20000, 64), unit_vectors(20000, 64, seed=1)
    quantizer = TurboQuantProd(64, 3)
    parts = quantizer.quantize(keys)
    assert parts[0].max() < 4
    assert set(parts[2].unique().tolist()) == {-1.0, 1.0}
    estimate = quantizer.estimate_inner_product(queries, *parts)
    error = (estimate - (queries * keys).sum(-1, keepdim=True)).double()
    variance = _core.TurboQuantProd(64, 3).expected_variance
    assert abs(float(error.mean())) < 4 * math.sqrt(variance / 20000)
    assert float(error.square().mean()) == pytest.approx(variance, rel=0.05)
    plain = TurboQuantMSE(64, 3)
    shrunk = (queries * plain.dequantize(*plain.quantize(keys))).sum(-1, keepdim=True)
    slope = float((estimate * shrunk).mean() / (shrunk * shrunk).mean())
    assert slope > 1  # plain codes shrink products, unbiased ones do not


def test_scores_equal_products_with_the_decoded_vectors():
    compressor = TurboQuantCompressorV2(64, bits=4)
    keys, queries = torch.randn(2, 3, 10, 64), torch.randn(2, 3, 4, 64)
    compressed = compressor.compress(keys)
    scores = compressor.asymmetric_attention_scores(queries, compressed)
    decoded = compressor.quantizer.dequantize(
        compressed.indices, compressed.norms, compressed.qjl_signs, compressed.residual_norms
    )
    torch.testing.assert_close(scores, queries @ decoded.transpose(-1, -2), atol=2e-4, rtol=1e-4)
    aligned = compressor.quantizer.estimate_inner_product(
        queries[:, :, :1],
        compressed.indices,
        compressed.norms,
        compressed.qjl_signs,
        compressed.residual_norms,
    )
    torch.testing.assert_close(aligned[..., 0], scores[:, :, 0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compressor", [TurboQuantCompressorMSE, TurboQuantCompressorV2])
def test_compressors_keep_shape_and_dtype(compressor, dtype):
    compressor = compressor(64, bits=4)
    x = unit_vectors(1, 2, 1000, 64).to(dtype)
    back = compressor.decompress(compressor.compress(x))
    assert (back.shape, back.dtype) == (x.shape, dtype)
    # Keys come back without the bit of the signs. 2000 vectors give the mean to half a percent.
    used_bits = 3 if isinstance(compressor, TurboQuantCompressorV2) else 4
    error = float((back - x).float().square().sum() / x.float().square().sum())
    assert error == pytest.approx(DISTORTION[used_bits], rel=0.05)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="bits >= 2"):
        TurboQuantProd(64, 1)
    with pytest.raises(ValueError, match="bits"):
        TurboQuantMSE(64, 9)
    with pytest.raises(ValueError, match=r"dim.*2\^k"):
        TurboQuantMSE(100, 4)
    quantizer = TurboQuantMSE(64, 4)
    with pytest.raises(ValueError, match="x: expected 64 as the last dimension"):
        quantizer.quantize(torch.zeros(3, 65))
    with pytest.raises(ValueError, match="floating-point"):
        quantizer.quantize(torch.zeros(3, 64, dtype=torch.int32))
    with pytest.raises(ValueError, match="indices: expected 64 as the last dimension"):
        quantizer.dequantize(torch.zeros(3, 65, dtype=torch.long), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="norms: expected shape"):
        quantizer.dequantize(torch.zeros(3, 64, dtype=torch.long), torch.zeros(3))
    with pytest.raises(ValueError, match="codes: expected below 16"):
        quantizer.dequantize(torch.full((3, 64), 16), torch.zeros(3, 1))
    compressor = TurboQuantCompressorV2(64)
    with pytest.raises(ValueError, match="query"):
        compressor.asymmetric_attention_scores(
            torch.zeros(1, 4, 1, 64), compressor.compress(torch.zeros(1, 2, 3, 64))
        )


@pytest.mark.parametrize("rotation", ["sign_hadamard", "haar"])
def test_core_quantisers_do_not_depend_on_threads(rotation):
    rows = np.random.default_rng(0).standard_normal((333, 80)).astype(np.float32)
    for quantizer in (
        _core.TurboQuantMse(80, 3, 1, "unbiased", rotation),
        _core.TurboQuantProd(80, 3, 1, "gaussian", rotation),
    ):
        one, many = quantizer.encode(rows, threads=1), quantizer.encode(rows, threads=4)
        for name, values in one.items():
            assert np.array_equal(values, many[name])
        assert one["codes"].shape == (333, quantizer.row_bytes)
        decoded = quantizer.decode(one, threads=2)
        assert np.array_equal(decoded, quantizer.decode(many, threads=1))
        scores = quantizer.score(rows[:7], one)
        np.testing.assert_allclose(scores, rows[:7] @ decoded.T, atol=2e-4)


def test_core_quantisers_check_their_arguments():
    quantizer = _core.TurboQuantMse(64, 4)
    rows = np.zeros((2, 64), np.float32)
    encoded = quantizer.encode(rows)
    for wrong in (
        lambda: quantizer.encode(rows[:, 1:]),
        lambda: quantizer.encode(rows[0]),
        lambda: quantizer.encode(rows, threads=-1),
        lambda: quantizer.decode({"codes": encoded["codes"]}),
        lambda: quantizer.decode({**encoded, "scales": np.zeros(3, np.float32)}),
        lambda: quantizer.decode({**encoded, "codes": encoded["codes"][:, 1:]}),
        lambda: _core.TurboQuantMse(64, 4, 0, "l2"),
        lambda: _core.TurboQuantMse(64, 4, 0, "norm", "dct"),
        lambda: _core.TurboQuantProd(64, 4, 0, "sparse"),
        lambda: _core.TurboQuantMse(100, 4),
        lambda: _core.TurboQuantProd(64, 0),
    ):
        with pytest.raises(ValueError, match=r"expected .*got"):
            wrong()


def test_core_names_its_instruction_set():
    assert _core.simd_level() in {"portable", "avx2", "avx512", "avx512vnni", "neon"}
