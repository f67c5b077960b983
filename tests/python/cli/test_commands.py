"""The commands on a small model of random weights: what they print, write and return."""

import json

import pytest
import torch
from turboquant_cpp.cli import main, session
from turboquant_cpp.evaluation import default_passage


@pytest.fixture
def run(model_directory, capsys):
    def run_command(command, *arguments):
        code = main([command, "--model", str(model_directory), *map(str, arguments)])
        return code, capsys.readouterr()

    return run_command


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(default_passage()[:400], "utf-8")
    return path


SHORT = ("--length", 200, "--chunk", 40)


@pytest.mark.parametrize("attention", ["turboquant", "sdpa"])
def test_verify_passes_at_many_bits(run, text, attention):
    code, printed = run("verify", "--text", text, "--bits", 8, "--attention", attention, *SHORT)
    assert code == 0, printed.err
    assert "PASS" in printed.out


def test_verify_fails_below_its_threshold(run, text):
    code, printed = run(
        "verify", "--text", text, "--bits", 1, "--recipe", "plain", "--threshold", 1e-9, *SHORT
    )
    assert code == 1
    assert "FAIL" in printed.out
    assert "--k-bits" in printed.out


def test_verify_json_is_the_only_output(run, text, tmp_path):
    output = tmp_path / "verify.json"
    arguments = ("--text", text, "--k-bits", 6, "--v-bits", 3, "--json", "--output", output, *SHORT)
    code, printed = run("verify", *arguments)
    report = json.loads(printed.out)
    assert report == json.loads(output.read_text())
    assert report["passed"] == (code == 0)
    assert report["caches"][0]["label"] == "6+3"
    assert report["caches"][0]["positions"] == 160
    assert len(report["layers"]) == 2
    for layer in report["layers"]:
        assert layer["encoded_tokens"] == 128  # 200 tokens: 4 sinks, two blocks, the rest exact
        assert 0 < layer["key_error"] < layer["value_error"]  # 6 bits against 3


def test_every_control_reaches_the_cache(run, text):
    arguments = (
        *("--preset", "quality", "--no-smooth-keys", "--no-center-keys", "--sink-tokens", 8),
        *("--k-scale-rule", "least_squares", "--v-scale-rule", "norm"),
        *("--layer-bits", "0:8+6", "1:3", "--json"),
    )
    _, printed = run("verify", "--text", text, *arguments, *SHORT)
    cache = json.loads(printed.out)["caches"][0]
    assert cache["label"] == "5+4"
    assert (cache["preset"], cache["sink_tokens"]) == ("quality", 8)
    assert (cache["smooth_keys"], cache["center_keys"]) == (False, False)
    assert (cache["k_scale_rule"], cache["v_scale_rule"]) == ("least_squares", "norm")
    assert cache["layer_bits"] == {"0": [8, 6], "1": [3, 3]}


def test_verify_explains_what_was_decided(run, text, tmp_path):
    long_text = tmp_path / "long.txt"
    long_text.write_text(text.read_text("utf-8") * 2, "utf-8")
    shape = ("--text", long_text, "--length", 640, "--chunk", 64)
    output = tmp_path / "verify.json"
    arguments = ("--policy", "auto", "--explain", "--bits", 3, "--output", output)
    _, printed = run("verify", *shape, *arguments)
    assert "What the policy decided" in printed.out
    decisions = json.loads(output.read_text())["decisions"]
    assert [decision["layer"] for decision in decisions] == [0, 1]
    assert all(decision["key_error"] > 0 for decision in decisions)
    _, printed = run("verify", "--text", text, "--policy", "auto", "--explain", *SHORT)
    assert "Nothing was decided" in printed.out


def test_explain_needs_a_policy_that_decides(model_directory, text, capsys):
    with pytest.raises(SystemExit) as error:
        main(["verify", "--model", str(model_directory), "--text", str(text), "--explain"])
    assert error.value.code == 2
    assert "--explain: expected --policy auto" in capsys.readouterr().err


def test_eval_puts_decided_widths_beside_uniform_ones(run, text, tmp_path):
    output = tmp_path / "eval.json"
    arguments = ("--widths", "4+4", "--policy", "auto", "--output", output)
    code, printed = run("eval", "--text", text, *arguments, "--windows", 1, *SHORT)
    assert code == 0, printed.err
    caches = json.loads(output.read_text())["caches"]
    assert [cache["label"] for cache in caches] == ["4+4", "4+4 auto"]
    assert [cache.get("policy") for cache in caches] == [None, "auto"]


def test_layers_can_stay_exact(run, text):
    arguments = ("--exact-first-layers", 1, "--exact-last-layers", 1, "--bits", 1, "--json")
    code, printed = run("verify", "--text", text, *arguments, *SHORT)
    report = json.loads(printed.out)
    assert code == 0
    assert [layer["encoded_tokens"] for layer in report["layers"]] == [0, 0]  # all there are
    assert report["caches"][0]["kl"] < 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", 9), "bits: expected an integer of 1 to 8, got 9"),
        (("--window-tokens", 65), "window_tokens"),
        (("--length", 4000), "got 400"),
        (("--length", 8), "window_tokens: expected more than chunk_tokens"),
        (("--device", "gpu"), "--device: cannot use 'gpu'"),
    ],
)
def test_wrong_values_name_the_argument(model_directory, text, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        main(
            [
                *("verify", "--model", str(model_directory), "--text", str(text)),
                *map(str, arguments),
            ]
        )
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_text_is_named(model_directory, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["eval", "--model", str(model_directory), "--text", str(tmp_path / "no.txt")])
    assert error.value.code == 2
    assert "no.txt" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can be used")
def test_a_device_that_is_not_there_is_named(model_directory, capsys):
    with pytest.raises(SystemExit) as error:
        main(["generate", "hello", "--model", str(model_directory), "--device", "cuda"])
    assert error.value.code == 2
    assert "--device: cannot use 'cuda'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("generate", "hello"), ("benchmark", "--compressed")])
def test_widths_for_layers_that_are_not_there_are_named(model_directory, capsys, command):
    with pytest.raises(SystemExit) as error:
        main([*command, "--model", str(model_directory), "--bits", "4", "--layer-bits", "2:4+4"])
    assert error.value.code == 2
    assert "layer_bits: expected layers of 0 to 1" in capsys.readouterr().err


def test_what_a_model_is_loaded_for_is_looked_at_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(session, "load_model", None)
    for arguments, message in (
        (("verify", "--text", str(tmp_path)), f"--text: there is no file {tmp_path}"),
        (("generate", "hello", "--gguf-file", "x.gguf"), "--gguf-file needs --model"),
    ):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
        assert message in capsys.readouterr().err


def test_missing_model_says_what_to_give(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["generate", "hello", "--model", str(tmp_path)])
    assert error.value.code == 2
    assert "--model" in capsys.readouterr().err


def test_eval_reports_every_cache(run, text, tmp_path):
    output = tmp_path / "eval.json"
    code, printed = run(
        "eval", "--text", text, "--widths", "8+8", "2+2", "--windows", 1, "--output", output, *SHORT
    )
    assert code == 0
    report = json.loads(output.read_text())
    fine, coarse = report["caches"]
    assert (fine["label"], coarse["label"]) == ("8+8", "2+2")
    assert fine["kl"] < coarse["kl"]
    assert coarse["cache_bytes"] < fine["cache_bytes"]
    assert report["text_tokens"] == len(text.read_bytes())
    assert "2+2" in printed.out


@pytest.mark.parametrize(("reference", "code"), [(1e-12, 1), (1e3, 0)])
def test_eval_gate_decides_the_exit_code(run, text, monkeypatch, reference, code):
    monkeypatch.setattr("turboquant_cpp.cli.evaluate_text.reference_kl", lambda *widths: reference)
    arguments = ("--text", text, "--widths", "2+2", "--gate", "--windows", 1)
    actual, printed = run("eval", *arguments, *SHORT)
    assert actual == code
    assert ("FAIL" in printed.out) == (code == 1)


def test_eval_gate_needs_a_reference(model_directory, text, capsys):
    with pytest.raises(SystemExit) as error:
        main(
            [
                *("eval", "--model", str(model_directory), "--text", str(text), "--gate"),
                *("--widths", "7+1", "--windows", "1", *map(str, SHORT)),
            ]
        )
    assert error.value.code == 2
    assert "no reference figure" in capsys.readouterr().err


def test_generate_streams_the_text(run, tmp_path):
    output = tmp_path / "generate.json"
    code, printed = run("generate", "RAID is", "--max-new-tokens", 12, "--output", output)
    assert code == 0
    report = json.loads(output.read_text())
    assert report["new_tokens"] <= 12
    assert printed.out.rstrip("\n") == report["text"].rstrip("\n")
    assert report["cache_bytes"] == sum(report["cache_bytes_by_part"].values()) > 0
    assert "tokens" in printed.err


def test_generate_exact_has_a_dense_cache(run, tmp_path):
    output = tmp_path / "generate.json"
    run("generate", "RAID is", "--exact", "--max-new-tokens", 4, "--output", output)
    assert set(json.loads(output.read_text())["cache_bytes_by_part"]) == {"dense"}


@pytest.mark.parametrize("compressed", [True, False])
def test_benchmark_json_has_the_original_keys(run, tmp_path, compressed):
    output = tmp_path / "benchmark.json"
    arguments = ("--prompt", "RAID " * 60, "--max-new-tokens", 8, "--bits", 3, "--output", output)
    code, _ = run("benchmark", *arguments, *(["--compressed"] if compressed else []))
    assert code == 0
    report = json.loads(output.read_text())
    assert {
        *("model_id", "bits", "mode", "head_dim", "num_heads", "num_kv_heads", "num_layers"),
        *("prompt", "video_path", "baseline", "turboquant", "comparison"),
    } <= set(report)
    assert report["mode"] == ("compressed" if compressed else "accuracy-only")
    assert (report["head_dim"], report["num_heads"], report["num_kv_heads"]) == (64, 2, 1)
    assert report["num_layers"] == 2
    for side in ("baseline", "turboquant"):
        assert {"output_text", "vram_peak_mib", "elapsed_s", "kv_cache_mib"} <= set(report[side])
    assert {
        *("texts_identical", "time_ratio", "vram_delta_mib", "baseline_text_preview"),
        *("turboquant_text_preview", "kld", "top1_agreement"),
    } <= set(report["comparison"])
    assert report["comparison"]["kld"] > 0
    smaller = report["turboquant"]["kv_cache_mib"] < report["baseline"]["kv_cache_mib"]
    assert smaller == compressed  # accuracy only stays dense
    if compressed:
        assert report["turboquant"]["compression_stats"]["bits"] == 3


def test_benchmark_accuracy_only_has_one_width(model_directory, capsys):
    with pytest.raises(SystemExit) as error:
        main(["benchmark", "--model", str(model_directory), "--k-bits", "5"])
    assert error.value.code == 2
    assert "--compressed" in capsys.readouterr().err


def test_demo_writes_its_files(run, text, tmp_path):
    output = tmp_path / "out"
    code, printed = run(
        *("demo", "--text", text, "--output-dir", output, "--max-new-tokens", 6), *SHORT
    )
    assert code == 0, printed.err
    assert {path.name for path in output.iterdir()} == {"demo.json", "demo.png", "demo.svg"}
    report = json.loads((output / "demo.json").read_text())
    assert [row["label"] for row in report["caches"]] == ["exact", "4+4", "3+3", "2+2"]
    exact, *compressed = report["caches"]
    assert all(row["cache_bytes"] < exact["cache_bytes"] for row in compressed)
    assert all(row["kl"] > 0 for row in compressed)
    for row in report["caches"]:
        assert row["label"] in printed.out


def test_benchmark_of_decode_steps(run, tmp_path):
    output = tmp_path / "steps.json"
    options = ("--past", 40, 90, "--steps", 3, "--bits", 3, "--fallback", "--output", output)
    code, printed = run("benchmark", "decode", *options)
    assert code == 0, printed.err
    report = json.loads(output.read_text("utf-8"))
    assert report["kind"] == "decode steps"
    labels = [(row["past_tokens"], row["cache"]) for row in report["steps"]]
    assert labels == [(past, name) for past in (40, 90) for name in ("exact", "3+3", "3+3, sdpa")]
    for row in report["steps"]:
        assert row["median_ms"] > 0
        assert row["cache_bytes"] > 0
        assert str(row["past_tokens"]) in printed.out
    assert [row["times_exact"] for row in report["steps"] if row["cache"] == "exact"] == [1, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would make a model of 16 GB")
def test_benchmark_of_the_large_random_model_needs_a_gpu(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark", "decode", "--bits", "4", "--random-8b"])
    assert "--random-8b: expected a CUDA device" in capsys.readouterr().err


def test_benchmark_of_kernels(capsys, tmp_path):
    output = tmp_path / "kernels.json"
    shapes = ("--heads", "4/2", "--head-dim", "64", "--tokens", "200", "--widths", "4+3")
    assert main(["benchmark", "kernels", *shapes, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "4/2" in printed
    assert "million coordinates per second" in printed
    report = json.loads(output.read_text())
    kernels = ["torch fp32", "torch bf16", "4+3"]
    assert [row["kernel"] for row in report["decode"]] == kernels
    assert report["decode"][0]["times"]["torch fp32"] == 1
    assert report["encode_coordinates_per_second"]["4+3"] > 0
    assert main(["plot", str(output)]) == 0
    assert output.with_suffix(".png").stat().st_size > 0


def test_benchmark_of_controls(capsys, tmp_path):
    output = tmp_path / "controls.json"
    shapes = ("--heads", "4/2", "--head-dim", "64", "--tokens", "200", "--widths", "4+3")
    controls = ("--controls", "--turns", "2", "--output", str(output))
    assert main(["benchmark", "kernels", *shapes, *controls]) == 0
    assert "on / off" in capsys.readouterr().out
    rows = json.loads(output.read_text())["controls"]
    assert {row["widths"] for row in rows} == {"4+3"}
    by_name = {row["control"]: row for row in rows}
    assert by_name["window_tokens"]["on_bytes"] > by_name["window_tokens"]["off_bytes"]
    assert by_name["smooth_keys"]["on_bytes"] == by_name["smooth_keys"]["off_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--heads", "9/2"), "multiple of 2 query heads"),
        (("--heads", "8"), "QUERY/KV"),
        (("--widths", "9+4"), "k_bits"),
        (("--head-dim", "60"), "head_dim"),
        (("--device", "meta"), "cpu and cuda"),
        (("--device", "gpu"), "--device: cannot use 'gpu'"),
    ],
)
def test_benchmark_of_kernels_refuses(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", "kernels", "--tokens", "100", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
