"""Files of tensors with a description: safetensors whose header and bytes are checked.

The library ``safetensors`` reads and writes; here is what it does not promise: a header of bounded
size without duplicate keys, a checksum, and a file that is complete or not there at all.
"""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from turboquant_cpp.fields import Fields, FormatError, parse_json, refused

__all__ = ["MAX_HEADER_BYTES", "Container", "open_container", "write_container"]

# What a hostile header can make a parser allocate is a multiple of its size; ours are small.
MAX_HEADER_BYTES: Final = 1 << 20
_LENGTH_BYTES: Final = 8  # the header's length in front of it, little-endian
_CHECKSUM: Final = "crc32"
_DTYPES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


def write_container(
    path: str | os.PathLike[str], metadata: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    """Write a file at once: another file of that name is replaced when all is written, or stays.

    Parameters
    ----------
    path : str or path-like
        Where to; a symbolic link is followed.
    metadata : mapping of str to str
        The description.
    tensors : mapping of str to Tensor
        Contiguous tensors in host memory, each with memory of its own.

    Raises
    ------
    ValueError
        When a dtype has no place in such a file or the header would be too long.
    OSError
        When the file cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path}: expected a file to write, got a directory")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path}: expected a file in a directory that exists")
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name}: expected {', '.join(map(str, _DTYPES))}, got {tensor.dtype}")
    described = {**metadata, _CHECKSUM: _checksum(metadata, tensors)}
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        try:
            save_file(dict(tensors), temporary, described)
        except SafetensorError as error:  # how the library reports the operating system's errors
            raise OSError(f"{path}: {error}") from error
        with temporary.open("rb+") as file:
            header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if header_bytes > MAX_HEADER_BYTES:
                raise ValueError(
                    f"the description of the tensors takes {header_bytes} bytes; expected at most "
                    f"{MAX_HEADER_BYTES} (save fewer rows)"
                )
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


class Container:
    """An open file: its description, and tensors that are read when they are taken.

    The tensors are views of the file: copy what is to be kept.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._names = set(file.keys())
        self._taken: dict[str, Tensor] = {}
        self.metadata = Fields("__metadata__", file.metadata())

    def take(self, name: str) -> Tensor:
        """The tensor `name`, in host memory.

        Raises
        ------
        FormatError
            When there is none, or its dtype is none that `write_container` writes.
        """
        if name not in self._names:
            raise FormatError(f"{name}: expected the tensor, got none")
        dtype = self._file.get_slice(name).get_dtype()
        if dtype not in _DTYPES.values():
            raise refused(name, f"a dtype of {', '.join(_DTYPES.values())}", dtype)
        tensor: Tensor = self._file.get_tensor(name)
        self._taken[name] = tensor
        return tensor

    def finish(self) -> None:
        """Every tensor and every field was taken and the bytes are those that were written.

        Raises
        ------
        FormatError
            When one was not, or the checksum differs.
        """
        stored = self.metadata.take(_CHECKSUM)
        self.metadata.finish()
        for name in sorted(self._names - self._taken.keys()):
            raise FormatError(f"{name[:200]}: expected no such tensor, got one")
        described = self._file.metadata()
        del described[_CHECKSUM]
        checksum = _checksum(described, self._taken)
        if checksum != stored:
            expected = f"{checksum!r} (the file's bytes are not those that were written)"
            raise refused(f"{self.metadata.path}.{_CHECKSUM}", expected, stored)


@contextlib.contextmanager
def open_container(path: str | os.PathLike[str]) -> Iterator[Container]:
    """Open a file that `write_container` wrote, or anything else that claims to be one.

    Raises
    ------
    FormatError
        When it is not such a file.
    OSError
        When there is no file or it cannot be read.
    """
    _check_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield Container(file)
    except SafetensorError as error:
        raise FormatError(f"{path}: {error}") from error


def _check_header(path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise FormatError(f"{path}: expected a file, got something else (a directory?)")
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_LENGTH_BYTES)
        most = min(MAX_HEADER_BYTES, size - _LENGTH_BYTES)
        length = int.from_bytes(head, "little")
        if len(head) < _LENGTH_BYTES or length > most:
            raise FormatError(
                f"{path}: expected a header of at most {max(most, 0)} bytes after its length, got "
                f"{length if len(head) == _LENGTH_BYTES else 'the end of the file'}"
            )
        header = file.read(length)
    described = parse_json("header", header)
    Fields("header", described)
    for name in described.keys() - {"__metadata__"}:
        entry = Fields(f"header.{name[:200]}", described[name])
        for field in ("dtype", "shape", "data_offsets"):  # the library checks their values
            entry.take(field)
        entry.finish()


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of the description and of the tensors with their names, dtypes and shapes."""
    crc = 0
    for name in sorted(metadata):
        crc = zlib.crc32(f"{name}\0{metadata[name]}\0".encode(), crc)
    for name in sorted(tensors):
        tensor = tensors[name]
        shape = ",".join(map(str, tensor.shape))
        crc = zlib.crc32(f"{name}\0{_DTYPES[tensor.dtype]}\0{shape}\0".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
