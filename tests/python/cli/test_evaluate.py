"""`eval`: intervals, and transformers' own caches beside ours."""

import importlib.util
import json

import pytest
from transformers import cache_utils
from turboquant_cpp.cli import main
from turboquant_cpp.cli.candidates import rival_spec
from turboquant_cpp.cli.exit_codes import USER_ERROR
from turboquant_cpp.evaluation import default_passage
from turboquant_cpp.hf import rivals

SHORT = ("--length", "200", "--chunk", "40")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(default_passage()[:400], "utf-8")
    return path


@pytest.fixture
def evaluate(model_directory, text, tmp_path, capsys):
    def evaluate(*arguments):
        output = tmp_path / "eval.json"
        command = ["eval", "--model", str(model_directory), "--text", str(text)]
        assert main([*command, *SHORT, "--output", str(output), *arguments]) == 0
        return json.loads(output.read_text()), capsys.readouterr().out

    return evaluate


@pytest.fixture
def refuse(model_directory, text, capsys):
    def refuse(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["eval", "--model", str(model_directory), "--text", str(text), *SHORT, *arguments])
        assert stopped.value.code == USER_ERROR
        return capsys.readouterr().err

    return refuse


def test_intervals_surround_the_figures(evaluate):
    report, printed = evaluate("--widths", "4+4", "2+2")
    assert report["intervals"] == {
        "confidence": 0.95,
        "resampled": "blocks of 64 positions",
        "units": 2 * 3,  # 2 windows of 160 compared positions
    }
    assert "6 blocks of 64" in " ".join(printed.split())
    for row in report["caches"]:
        for figure in ("kl", "perplexity_change_percent"):
            low, high = row[f"{figure}_interval"]
            assert low < row[figure] < high
        low, high = row["kl_interval"]
        assert f"{low:.2g}/{high:.2g}" in printed


def test_a_batch_gives_the_figures_and_bytes_of_single_windows(evaluate):
    (alone,), (batched,) = (
        evaluate("--widths", "4+4", "--batch", batch)[0]["caches"] for batch in ("1", "2")
    )
    # Rounding moves a few codes across a boundary.
    assert batched["kl"] == pytest.approx(alone["kl"], rel=0.02)
    assert batched["bytes_per_token"] == pytest.approx(alone["bytes_per_token"], rel=0.05)


def test_a_chunk_read_exactly_diverges_less(evaluate):
    """By so many tokens fewer are read through codes: 20 of each query's, on average."""
    arguments = ("--widths", "4+4", "--window-tokens", "0")
    coded, exact = (evaluate(*arguments, *flag)[0] for flag in ((), ("--exact-chunk",)))
    assert (coded["exact_chunk"], exact["exact_chunk"]) == (False, True)
    assert 0 < exact["caches"][0]["kl"] < coded["caches"][0]["kl"]


def test_a_lead_is_not_compared(evaluate):
    report, _ = evaluate("--widths", "4+4", "--windows", "1", "--lead", "160")
    assert report["caches"][0]["positions"] == 40
    assert report["protocol"]["lead_tokens"] == 160


def test_too_short_a_text_says_so(evaluate):
    report, printed = evaluate("--widths", "4+4", "--windows", "1", "--length", "104")
    assert report["caches"][0]["kl_interval"] is None
    assert "too short for confidence intervals" in " ".join(printed.split())


@pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"),
    reason="transformers before 5.24 has no fp8 cache",
)
def test_a_rival_stands_beside_ours(evaluate):
    report, printed = evaluate("--widths", "4+4", "--against", "fp8", "--windows", "1")
    ours, fp8 = report["caches"]
    assert (ours["label"], fp8["label"], fp8["backend"]) == ("4+4", "fp8", "fp8")
    assert 0 < fp8["kl"] < 1
    # One byte a number instead of four, and a scale for each of 2 layers' keys and values.
    assert fp8["cache_bytes"] == report["exact_cache_bytes"] // 4 + 2 * 2 * 4
    # The scales weigh a little more where fewer tokens had been read.
    assert fp8["bytes_per_token"] == pytest.approx(fp8["cache_bytes"] / 200, rel=1e-3)
    assert "fp8" in printed


@pytest.mark.parametrize(
    ("backend", "bits", "module"), [("quanto", 4, "optimum.quanto"), ("hqq", 2, "hqq")]
)
def test_installed_backends_run(evaluate, backend, bits, module):
    if not rivals.is_installed(module):
        pytest.skip(f"{module} is not installed")
    arguments = ("--widths", "8+8", "--windows", "1", "--residual-length", "64")
    report, _ = evaluate(*arguments, "--against", f"{backend}:{bits}")
    ours, rival = report["caches"]
    assert rival["residual_length"] == 64
    assert rival["kl"] > ours["kl"] > 0
    assert rival["cache_bytes"] < report["exact_cache_bytes"] / 2


@pytest.mark.parametrize(
    ("backend", "distribution"), [("quanto", "optimum-quanto"), ("hqq", "hqq")]
)
def test_a_missing_backend_says_what_to_install(refuse, monkeypatch, backend, distribution):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert f"pip install {distribution}" in refuse("--against", f"{backend}:4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--against", "quanto:3"), "bits: expected one of 2, 4 for quanto, got 3"),
        (("--against", "magic:4"), "backend: expected one of quanto, hqq, fp8, got magic"),
        (("--lead", "200"), "lead_tokens: expected 0 to 199"),
        (("--against", "hqq:4", "--chunk", "20"), "--chunk: expected a multiple of 8"),
        (("--against", "hqq:4", "--length", "204"), "--length: expected a multiple of 8"),
        (("--against", "quanto:four"), "expected BACKEND:BITS"),
    ],
)
def test_wrong_rivals_are_refused(refuse, arguments, message):
    assert message in refuse(*arguments)


def test_rivals_are_parsed():
    assert rival_spec("hqq:2") == ("hqq", 2)
    assert rival_spec("fp8") == ("fp8", None)


def test_needle_reports_every_place(evaluate, tmp_path):
    places = ("--lengths", "250", "300", "--depths", "0", "1", "--repeats", "2")
    report, printed = evaluate("--needle", "--widths", "8+8", *places)
    assert report["kind"] == "needle"
    assert [row["label"] for row in report["caches"]] == ["exact", "8+8"]
    exact, ours = (row["cells"] for row in report["caches"])
    assert [(cell["length"], cell["depth"]) for cell in ours] == [
        (length, depth) for length in (250, 300) for depth in (0.0, 1.0)
    ]
    for cell, reference in zip(ours, exact, strict=True):
        assert cell["log_probability"] == pytest.approx(reference["log_probability"], abs=0.3)
    assert "8 needles" in " ".join(printed.split())
    assert main(["plot", str(tmp_path / "eval.json")]) == 0
    assert (tmp_path / "eval.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--depths", "2"), "depths: expected numbers of 0 to 1"),
        (("--lengths", "4000"), "text: expected at least"),
        (("--lengths", "250", "--against", "hqq:4"), "--lengths: expected a multiple of 8"),
        (("--gate",), "--gate"),
        (("--lead", "64"), "--lead: expected 0 with --needle"),
    ],
)
def test_wrong_needles_are_refused(refuse, arguments, message):
    assert message in refuse("--needle", *arguments)
