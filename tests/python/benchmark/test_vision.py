"""Pictures from files, and what processors make of them."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("torchvision")

import tiny_vision
from transformers import AutoModelForImageTextToText, AutoProcessor
from turboquant_cpp import CompressedDynamicCache
from turboquant_cpp.benchmark import vision
from turboquant_cpp.hf.compat import CACHE_ARGUMENT


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def processors(directory):
    tiny_vision.save_qwen2_vl(directory / "qwen2_vl")
    tiny_vision.save_idefics3(directory / "idefics3")
    return {
        name: AutoProcessor.from_pretrained(directory / name) for name in ("qwen2_vl", "idefics3")
    }


@pytest.mark.parametrize(("save", "name"), [("save_gif", "a.gif"), ("save_mp4", "a.mp4")])
@pytest.mark.parametrize(("total", "wanted"), [(10, 4), (50, 8), (7, 100), (64, 1)])
def test_frames_are_spread_evenly(directory, save, name, total, wanted):
    path = getattr(tiny_vision, save)(directory / name, total)
    video = vision.read_video(path, wanted)
    count = min(total, wanted)
    assert video.frames.shape == (count, tiny_vision.HEIGHT, tiny_vision.WIDTH, 3)
    assert (video.total_frames, video.fps) == (total, 10)
    # A frame's brightness says which one it is; MPEG-4 is lossy.
    assert video.frames[:, 0, 0, 0] == pytest.approx(
        255 * np.array(video.indices) / total, abs=1 if name == "a.gif" else 8
    )
    # One pass keeps every 2^k-th frame, so gaps differ by one such step at most.
    gaps = np.diff([*video.indices, total])
    assert video.indices[0] == 0
    assert gaps.max() <= 2 * total / count
    assert video.metadata()["duration"] == total / 10


def test_an_image_is_rgb(directory):
    assert vision.read_image(tiny_vision.save_png(directory / "a.png")).mode == "RGB"


@pytest.mark.parametrize("content", [b"", b"no picture" * 100])
def test_other_files_are_refused(directory, content):
    path = directory / "broken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"video: .*broken cannot be decoded"):
        vision.read_video(path, 4)
    with pytest.raises(ValueError, match=r"image: .*broken is not an image"):
        vision.read_image(path)


def test_a_missing_library_is_named(directory, monkeypatch):
    def no_module(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", no_module)
    with pytest.raises(vision.VisionUnavailableError, match=r"PyAV: pip install .*\[vision\]"):
        vision.read_video(directory / "a.mp4", 4)
    with pytest.raises(vision.VisionUnavailableError, match=r"Pillow: pip install .*\[vision\]"):
        vision.read_image(directory / "a.png")


def test_frames_of_a_video_become_tokens(processors, directory):
    """Qwen2-VL joins two frames, and four patches of them, into a token."""
    video = vision.read_video(tiny_vision.save_mp4(directory / "b.mp4", 20), 6)
    inputs = vision.vision_inputs(processors["qwen2_vl"], "What is it?", video=video)
    pairs, rows, columns = inputs["video_grid_thw"][0].tolist()
    assert pairs == 3
    token = processors["qwen2_vl"].video_token_id
    assert int((inputs["input_ids"] == token).sum()) == 3 * rows * columns // 4
    pixels = inputs["pixel_values_videos"].view(3, -1).mean(1)
    assert bool((pixels.diff() > 0).all())  # the frames are the file's, in order


def test_frames_are_images_to_a_processor_without_videos(processors, directory):
    video = vision.read_video(tiny_vision.save_mp4(directory / "b.mp4", 20), 3)
    image = vision.read_image(tiny_vision.save_png(directory / "a.png"))
    inputs = vision.vision_inputs(processors["idefics3"], "What?", image=image, video=video)
    assert inputs["pixel_values"].shape[:2] == (1, 4)
    token = processors["idefics3"].image_token_id
    assert int((inputs["input_ids"] == token).sum()) == 4 * 4
    brightness = inputs["pixel_values"][0].flatten(1).mean(1)
    assert bool((brightness[1:].diff() > 0).all())


def test_a_processor_without_a_template_is_refused(processors, monkeypatch):
    monkeypatch.setattr(processors["qwen2_vl"], "chat_template", None)
    with pytest.raises(ValueError, match="Qwen2VLProcessor has no chat template"):
        vision.vision_inputs(processors["qwen2_vl"], "What?")


@pytest.mark.parametrize("name", ["qwen2_vl", "idefics3"])
def test_the_answer_depends_on_the_picture(processors, directory, name):
    """Or a benchmark of pictures would measure text."""
    model = AutoModelForImageTextToText.from_pretrained(directory / name).eval()
    model.set_attn_implementation("turboquant")
    logits = []
    for count in (4, 9):
        video = vision.read_video(tiny_vision.save_gif(directory / "c.gif", count), 4)
        inputs = vision.vision_inputs(processors[name], "What is it?", video=video)
        cache = CompressedDynamicCache(config=model.config, bits=4)
        with torch.no_grad():
            logits.append(model(**inputs, **{CACHE_ARGUMENT: cache}).logits[0, -1])
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    assert (logits[0] - logits[1]).abs().max() > 1e-3
