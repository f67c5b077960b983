"""`benchmark --video` and `--image`: both generations of a prompt with pictures, and mistakes."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("av")
pytest.importorskip("torchvision")

import tiny_vision
from turboquant_cpp.benchmark import vision
from turboquant_cpp.cli import main

PROMPT = "What happens in this picture, and what will happen after it? " * 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vision")
    tiny_vision.save_qwen2_vl(directory / "qwen2_vl")
    tiny_vision.save_idefics3(directory / "idefics3")
    tiny_vision.save_mp4(directory / "a.mp4", 20)
    tiny_vision.save_gif(directory / "a.gif", 10)
    tiny_vision.save_png(directory / "a.png")
    return directory


@pytest.mark.parametrize("model", ["qwen2_vl", "idefics3"])
@pytest.mark.parametrize(
    ("pictures", "attention"),
    [
        (["--video", "a.mp4"], "turboquant"),
        (["--video", "a.gif", "--frames", "4"], "sdpa"),
        (["--image", "a.png"], "turboquant"),
        (["--image", "a.png", "--video", "a.mp4"], "turboquant"),
    ],
    ids=["mp4", "gif", "image", "both"],
)
def test_both_generations_of_a_prompt_with_pictures(
    directory, tmp_path, monkeypatch, capsys, model, pictures, attention
):
    monkeypatch.chdir(directory)
    output = tmp_path / "report.json"
    options = ["--compressed", "--bits", "8", "--max-new-tokens", "4", "--attention", attention]
    options += ["--model", model, "--prompt", PROMPT, "--output", str(output)]
    assert main(["benchmark", *pictures, *options]) == 0
    report = json.loads(output.read_text())
    assert report["model_id"] == model
    for name in ("image", "video"):
        given = dict(zip(pictures[::2], pictures[1::2], strict=True)).get(f"--{name}")
        assert report[f"{name}_path"] == given
    for side in ("baseline", "turboquant"):
        assert report[side]["new_tokens"] == 4
        assert report[side]["kv_cache_mib"] > 0
    assert report["turboquant"]["compression_stats"]["seq_len"] > len(PROMPT)
    assert report["comparison"]["texts_identical"]  # 8 bits of a model whose logits are far apart
    assert report["comparison"]["kld"] is None
    assert "KV cache, MiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "a.png"], "--image needs a vision-language model"),
        (["--model", "qwen2_vl", "--video", "b.mp4"], "--video: there is no file b.mp4"),
        (["--model", "qwen2_vl", "--image", "a.mp4"], "a.mp4 is not an image"),
        (["--model", "qwen2_vl", "--video", "qwen2_vl/config.json"], "cannot be decoded"),
        (["--model", "qwen2_vl", "--video", "a.mp4", "--frames", "0"], "positive number"),
    ],
    ids=["no-model", "no-file", "no-image", "no-video", "no-frames"],
)
def test_mistakes_are_named(directory, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(directory)
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main(["benchmark", *arguments]))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_library_is_named(directory, monkeypatch, capsys):
    def missing(path, num_frames):
        raise vision.VisionUnavailableError("reading a video needs PyAV")

    monkeypatch.chdir(directory)
    monkeypatch.setattr(vision, "read_video", missing)
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "--model", "qwen2_vl", "--video", "a.mp4"])
    assert stop.value.code == 2
    assert "needs PyAV" in capsys.readouterr().err
