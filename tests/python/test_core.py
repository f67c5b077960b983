from __future__ import annotations

import ast
import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import turboquant_cpp
from distortion import EXACT_DISTORTION
from hypothesis import given
from hypothesis import strategies as st
from turboquant_cpp import _core


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = (
        "import sys, turboquant_cpp, turboquant_cpp.spec, turboquant_cpp._core\n"
        "turboquant_cpp.CacheConfig(bits=4)\n"
        "assert not {'torch', 'transformers', 'rich', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_listed_and_unknown_ones_refused():
    assert set(turboquant_cpp.__all__) <= set(dir(turboquant_cpp))
    assert turboquant_cpp.__version__ == _core.__version__
    with pytest.raises(AttributeError, match="no attribute 'Cache'"):
        turboquant_cpp.Cache  # noqa: B018


def test_the_stub_describes_the_module():
    stub = ast.parse((Path(turboquant_cpp.__file__).parent / "_core.pyi").read_text())

    def defined(body):
        names = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        return names | {node.target.id for node in body if isinstance(node, ast.AnnAssign)}

    only_types = {"LloydMaxSolution", "MseCodes", "ProdCodes"}
    public = {name for name in dir(_core) if not name.startswith("_")}
    assert defined(stub.body) - only_types == public | {"__version__"}
    for node in stub.body:
        if isinstance(node, ast.ClassDef) and node.name not in only_types:
            members = {name for name in dir(getattr(_core, node.name)) if not name.startswith("_")}
            assert defined(node.body) - {"__init__"} == members, node.name


@pytest.mark.parametrize("dim", EXACT_DISTORTION)
def test_lloyd_max_distortions(dim):
    for bits, expected in EXACT_DISTORTION[dim].items():
        solution = _core.solve_lloyd_max(dim, bits)
        assert solution["distortion"] == pytest.approx(expected, rel=1e-8)
        assert solution["residual"] < 1e-10
        assert len(solution["levels"]) == 2**bits
        assert np.array_equal(solution["levels"], -solution["levels"][::-1])
        middles = (solution["levels"][1:] + solution["levels"][:-1]) / 2
        np.testing.assert_allclose(solution["boundaries"], middles, atol=1e-15)


def test_codebook_is_the_rounded_solution():
    book = _core.Codebook(128, 3)
    solution = _core.solve_lloyd_max(128, 3)
    assert (book.dim, book.bits) == (128, 3)
    assert np.array_equal(book.levels, solution["levels"].astype(np.float32))
    assert book.distortion == solution["distortion"]


def test_vector_codebooks():
    for bits in (2, 3, 4):
        book = _core.VectorCodebook(bits)
        assert book.bits == bits
        assert (book.levels.shape, book.levels.dtype) == ((256, 2), np.float32)
        assert book.distortion < 0.85 * _core.solve_lloyd_max(None, bits)["distortion"]
    assert [b for b in range(10) if _core.VectorCodebook.exists(b)] == [2, 3, 4]
    with pytest.raises(ValueError, match=r"bits: expected 2, 3 or 4 .* got 5"):
        _core.VectorCodebook(5)


@pytest.mark.parametrize(("dim", "bits"), [(1, 4), (64, 0), (64, 9), (-3, 2)])
def test_solver_arguments_are_checked(dim, bits):
    for solve in (_core.solve_lloyd_max, _core.Codebook):
        with pytest.raises(ValueError, match=r"(dim|bits): expected .*got"):
            solve(dim, bits)


@given(st.integers(1, 8), st.integers(1, 80), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_packing_round_trips(bits, dim, rows, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, dim), dtype=np.uint8)
    packed = _core.pack_rows(codes, bits)
    assert packed.shape == (rows, 3 * -(-dim // 8) if bits == 3 else -(-dim * bits // 8))
    assert np.array_equal(_core.unpack_rows(packed, dim, bits), codes)


def test_packing_checks_its_arguments():
    with pytest.raises(ValueError, match="codes: expected below 4, got 4"):
        _core.pack_rows(np.array([[1, 4]], np.uint8), 2)
    with pytest.raises(ValueError, match="bits"):
        _core.pack_rows(np.zeros((1, 8), np.uint8), 9)
    with pytest.raises(ValueError, match=r"codes: expected shape \(any, any\)"):
        _core.pack_rows(np.zeros(8, np.uint8), 4)
    with pytest.raises(ValueError, match=r"packed: expected shape \(any, 4\), got \(1, 5\)"):
        _core.unpack_rows(np.zeros((1, 5), np.uint8), 8, 4)


def spec(**options):
    return _core.LayerSpec(**{"head_dim": 64, "num_kv_heads": 2, **options})


def test_layer_spec_compares_by_value():
    assert spec() == spec()
    assert spec() != spec(layer=1)
    assert copy.deepcopy(spec(k_bits=3)) == spec(k_bits=3)
    assert len({spec(), spec(), spec(seed=1)}) == 2


@pytest.mark.parametrize(
    ("ints", "message"),
    [([], "spec"), ([1] * 13, "spec"), ([-1] * 14, "spec"), ([64] * 14, ".")],
)
def test_broken_spec_integers_are_refused(ints, message):
    with pytest.raises(ValueError, match=message):
        _core.LayerSpec.from_ints(ints)


def test_block_layout_sizes():
    # 64 tokens of d = 128 at 4 + 4 bits: 2 * 64 * 64 code bytes, scales, and 256 bytes of mean.
    wide = {"head_dim": 128, "num_kv_heads": 8}
    plain = {"center_keys": False, "smooth_keys": False}
    wider = {"scale_type": "float32"}
    assert _core.BlockLayout(spec(**wide, **wider)).block_bytes == 64 * 140
    assert _core.BlockLayout(spec(**wide, **plain, **wider)).block_bytes == 64 * 136
    default = _core.BlockLayout(spec(**wide))
    assert default.block_bytes == 64 * 136
    assert default.page_bytes(8) == 8 * 64 * 136


@pytest.mark.parametrize("scale_type", [np.float16, np.float32])
def test_block_rows_reads_codes_and_scales(scale_type):
    name = np.dtype(scale_type).name
    layout = _core.BlockLayout(spec(center_keys=False, smooth_keys=False, scale_type=name))
    block = np.zeros((1, layout.block_bytes), np.uint8)
    codes = np.arange(64 * 32, dtype=np.uint32).astype(np.uint8)
    scales = np.arange(64, dtype=scale_type)
    block[0, : 64 * 32] = codes
    block[0, 64 * 32 :][: scales.nbytes] = scales.view(np.uint8)
    packed, read = layout.rows(block, "k", 10)
    assert np.array_equal(packed[0], codes.reshape(64, 32)[:10])
    assert np.array_equal(read[0], scales[:10])
    with pytest.raises(ValueError, match="tokens: expected 0 to 64, got 65"):
        layout.rows(block, "k", 65)
    with pytest.raises(ValueError, match="kind"):
        layout.rows(block, "q", 1)
    with pytest.raises(ValueError, match="blocks"):
        layout.rows(block[:, 1:], "k", 1)


def test_page_table_plans_without_changing_anything():
    table = _core.PageTable(spec(), 2)
    plan = table.plan_append([300, 10])
    assert table.lengths == [0, 0]
    # 4 sinks; 296 tokens leave 104 in the ring after three blocks.
    assert plan.jobs.tolist() == [
        [0, 4, 64, 0, 0, 1],
        [0, 68, 64, 1, 0, 0],
        [0, 132, 64, 2, 0, 0],
    ]
    assert plan.pages_needed == 3
    assert plan.copies.shape == (0, 2)
    table.prepare(plan)
    table.commit(plan)
    assert table.lengths == [300, 10]
    assert table.num_entries == [3, 0]
    assert table.page_table().tolist() == [
        [[0, 64], [1, 64], [2, 64]],
        [[0, 0], [0, 0], [0, 0]],
    ]
    assert table.rows([1, 0]).tolist() == [[300, 3, 196, 1], [10, 0, 4, 0]]
    with pytest.raises(ValueError, match="plan"):
        table.commit(plan)


def test_page_table_copies_shared_pages_before_writing():
    table = _core.PageTable(spec(center_keys=False, smooth_keys=False, window_tokens=0), 1)
    plan = table.plan_append([70])
    table.prepare(plan)
    table.commit(plan)
    table.select([0, 0])
    assert table.used_pages == 2
    plan = table.plan_append([1, 0])
    assert plan.copies.tolist() == [[1, 2]]
    assert plan.jobs.tolist() == [[0, 70, 1, 2, 2, 0]]
    clone = table.clone()
    table.prepare(plan)
    table.commit(plan)
    assert (table.lengths, clone.lengths) == ([71, 70], [70, 70])
    table.reset()
    assert (table.used_pages, table.high_water_pages()) == (0, 0)


def test_page_table_arguments_are_checked():
    table = _core.PageTable(spec(), 2)
    for wrong in (
        lambda: _core.PageTable(spec(), 0),
        lambda: table.plan_append([1]),
        lambda: table.plan_append([1, -1]),
        lambda: table.crop(2, 0),
        lambda: table.crop(0, 1),
        lambda: table.select([2]),
    ):
        with pytest.raises(ValueError, match=r"expected .*got"):
            wrong()


@pytest.mark.parametrize("codebook", ["scalar", "vector"])
def test_what_cuda_attention_takes(codebook):
    def problem(capability_major=9, **spec):
        spec = {"head_dim": 64, "k_bits": 3, "v_bits": 3, "codebook": codebook, **spec}
        spec = _core.LayerSpec(num_kv_heads=2, **spec)
        return _core.cuda_attention_problem(spec, capability_major)

    of_codebook = " of a vector codebook" if codebook == "vector" else ""
    assert problem() == ""
    assert problem(capability_major=7).endswith("8.0 or newer, got 7.x")
    assert problem(head_dim=48).endswith(f", got head_dim 48 with 3+3{of_codebook}")
    mixed = problem(k_bits=4, v_bits=2)
    if codebook == "scalar":
        assert mixed == ""
    else:
        assert "k_bits+v_bits 4+4 3+3 2+2 of a vector codebook, got head_dim 64 with 4+2" in mixed
