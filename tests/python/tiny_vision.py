"""Vision-language models of random weights with processors of their own, and pictures to show."""

from __future__ import annotations

import pathlib

import architectures
import av
import numpy as np
import transformers
from PIL import Image
from tiny_tokenizer import byte_tokenizer

HEIGHT, WIDTH = 48, 64
PLACEHOLDERS = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}PLACE{% endif %}"
    "{% endfor %}{% endfor %}"
)


def save_qwen2_vl(directory: pathlib.Path) -> pathlib.Path:
    """Takes images and videos: one token for 8 x 8 pixels of one image or of two frames."""
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = byte_tokenizer(*marks)
    names = ("vision_start", "vision_end", "image", "video")
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(mark)
        for name, mark in zip(names, marks, strict=True)
    }
    shape = {"patch_size": 4, "size": {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}}
    place = "<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>"
    processor = transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(**shape),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**shape),
        chat_template=PLACEHOLDERS.replace("PLACE", place),
    )
    processor.save_pretrained(directory)
    architectures.qwen2_vl(len(tokenizer), **ids).save_pretrained(directory)
    return directory


def save_idefics3(directory: pathlib.Path) -> pathlib.Path:
    """Takes images only, 4 tokens each."""
    tokenizer = byte_tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>")
    side = {"longest_edge": 16}
    processor = transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessor(
            size=side, max_image_size=side, do_image_splitting=False
        ),
        tokenizer,
        image_seq_len=4,
        chat_template=PLACEHOLDERS.replace("PLACE", "<image>"),
    )
    processor.save_pretrained(directory)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    model = architectures.idefics3(len(processor.tokenizer), image_token)
    model.save_pretrained(directory)
    return directory


def frames(count: int) -> np.ndarray:
    """Grey frames that brighten evenly from black, so that a frame's brightness is its place."""
    shades = (255 * np.arange(count) / count).astype(np.uint8)
    return np.broadcast_to(shades[:, None, None, None], (count, HEIGHT, WIDTH, 3))


def save_gif(path: pathlib.Path, count: int) -> pathlib.Path:
    first, *others = (Image.fromarray(np.ascontiguousarray(frame)) for frame in frames(count))
    first.save(path, save_all=True, append_images=others, duration=100)
    return path


def save_mp4(path: pathlib.Path, count: int) -> pathlib.Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frame in frames(count):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def save_png(path: pathlib.Path) -> pathlib.Path:
    Image.fromarray(np.ascontiguousarray(frames(4)[2])).save(path)
    return path
