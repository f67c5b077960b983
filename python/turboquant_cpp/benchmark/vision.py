"""Images and videos in a prompt: decoded from files, prepared by a model's own processor."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from typing import Any

import numpy as np
import torch

__all__ = ["Video", "VisionUnavailableError", "read_image", "read_video", "vision_inputs"]


class VisionUnavailableError(RuntimeError):
    """A library for images or videos is missing; the message says what to install."""


@dataclasses.dataclass(frozen=True)
class Video:
    """Frames that stand for a video.

    Attributes
    ----------
    frames : numpy.ndarray
        ``[F, height, width, 3]``, RGB bytes.
    indices : list of int
        Where in the file they come from, counted in frames.
    total_frames : int
        Frames of the file.
    fps : float
        Frames a second of the file.
    """

    frames: np.ndarray
    indices: list[int]
    total_frames: int
    fps: float

    def metadata(self) -> dict[str, Any]:
        """What processors of transformers that place frames in time ask for."""
        _, height, width, _ = self.frames.shape
        return {
            "total_num_frames": self.total_frames,
            "fps": self.fps,
            "duration": self.total_frames / self.fps,
            "frames_indices": self.indices,
            "height": height,
            "width": width,
        }


def read_image(path: pathlib.Path) -> Any:
    """Read an image as RGB.

    Raises
    ------
    ValueError
        When the file holds no image.
    VisionUnavailableError
        When Pillow is not installed.
    """
    pillow = _import("PIL.Image", "reading an image needs Pillow")
    try:
        with pillow.open(path) as image:
            return image.convert("RGB")
    except pillow.UnidentifiedImageError as error:
        raise ValueError(f"image: {path} is not an image that Pillow can read") from error


def read_video(path: pathlib.Path, num_frames: int) -> Video:
    """Read frames spread evenly over a video, in one pass and with room for twice as many.

    Parameters
    ----------
    path : pathlib.Path
        A file in any format that FFmpeg decodes, animated GIFs among them.
    num_frames : int
        Frames to keep; a shorter video gives all that it has.

    Returns
    -------
    Video

    Raises
    ------
    ValueError
        When the file holds no video.
    VisionUnavailableError
        When PyAV is not installed.
    """
    av = _import("av", "reading a video needs PyAV")
    kept: list[tuple[int, np.ndarray]] = []
    total, stride = 0, 1
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"video: {path} has no video stream")
            rate = container.streams.video[0].average_rate
            for frame in container.decode(video=0):
                if total % stride == 0:
                    kept.append((total, frame.to_ndarray(format="rgb24")))
                total += 1
                if len(kept) == 2 * num_frames:
                    kept, stride = kept[::2], 2 * stride
    except av.FFmpegError as error:
        raise ValueError(f"video: {path} cannot be decoded: {error}") from error
    if not kept:
        raise ValueError(f"video: {path} has no frames")
    count = min(num_frames, len(kept))
    chosen = [kept[position * len(kept) // count] for position in range(count)]
    return Video(
        frames=np.stack([frame for _, frame in chosen]),
        indices=[index for index, _ in chosen],
        total_frames=total,
        fps=float(rate or 24),
    )


def vision_inputs(
    processor: Any,
    prompt: str,
    *,
    image: Any = None,
    video: Video | None = None,
) -> dict[str, torch.Tensor]:
    """Prepare a user's turn that shows an image, a video or both.

    A processor that takes no videos is given the frames as images.

    Parameters
    ----------
    processor
        A vision-language model's processor of transformers, with a chat template.
    prompt : str
        The text after the pictures.
    image, video : optional
        As `read_image` and `read_video` return them.

    Returns
    -------
    dict of str to torch.Tensor
        The arguments of ``generate()``.

    Raises
    ------
    ValueError
        When the processor has no chat template to place pictures with, or refuses them.
    """
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"model: {type(processor).__name__} has no chat template, which says where in the "
            "prompt a picture belongs"
        )
    content: list[dict[str, Any]] = []
    options: dict[str, Any] = {}
    if image is not None:
        content.append({"type": "image", "image": image})
    if video is not None and getattr(processor, "video_processor", None) is None:
        content += [{"type": "image", "image": frame} for frame in video.frames]
    elif video is not None:
        content.append({"type": "video", "video": video.frames})
        options = {"do_sample_frames": False, "video_metadata": [[video.metadata()]]}
    content.append({"type": "text", "text": prompt})
    encoded = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )
    return {name: value for name, value in encoded.items() if isinstance(value, torch.Tensor)}


def _import(module: str, need: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise VisionUnavailableError(f"{need}: pip install 'turboquant-cpp[vision]'") from error
