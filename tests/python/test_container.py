"""`write_container` and `open_container`: bytes, checksum, atomic replacement."""

from __future__ import annotations

import zlib

import pytest
import safetensors.torch
import torch
from turboquant_cpp.container import open_container, write_container
from turboquant_cpp.fields import FormatError

TENSORS = {
    "b": torch.tensor([[1.5, float("nan")], [3.0, 4.0]], dtype=torch.bfloat16),
    "a": torch.arange(3, dtype=torch.int32),
    "empty": torch.empty(0, 7, dtype=torch.uint8),
    "half": torch.tensor([1.0]).half(),
}


def read(path):
    with open_container(path) as container:
        tensors = {name: container.take(name).clone() for name in TENSORS}
        text = container.metadata.take("text")
        container.finish()
    return text, tensors


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "file"
    write_container(path, {"text": "ä"}, TENSORS)
    text, tensors = read(path)
    assert text == "ä"
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name].float().nan_to_num(), tensor.float().nan_to_num())
    # It is a safetensors file like any other.
    assert safetensors.torch.load_file(path).keys() == TENSORS.keys()


def test_the_checksum_is_the_documented_one(tmp_path):
    write_container(tmp_path / "file", {"text": "x", "also": "y"}, TENSORS)
    stream = b"also\0y\0text\0x\0"
    stream += b"a\0I32\x003\0" + bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])
    stream += b"b\0BF16\x002,2\0" + bytes([0xC0, 0x3F, 0xC0, 0x7F, 0x40, 0x40, 0x80, 0x40])
    stream += b"empty\0U8\x000,7\0" + b"half\0F16\x001\0" + bytes([0x00, 0x3C])
    with safetensors.safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata()["crc32"] == f"{zlib.crc32(stream):08x}"


def test_every_tensor_and_field_has_to_be_taken(tmp_path):
    write_container(tmp_path / "file", {"text": "x"}, TENSORS)
    with open_container(tmp_path / "file") as container:
        container.metadata.take("text")
        with pytest.raises(FormatError, match="a: expected no such tensor"):
            container.finish()
    with open_container(tmp_path / "file") as container:
        for name in TENSORS:
            container.take(name)
        with pytest.raises(FormatError, match=r"__metadata__\.text: expected no such field"):
            container.finish()
        with pytest.raises(FormatError, match="other: expected the tensor, got none"):
            container.take("other")


def test_dtypes_that_no_file_holds(tmp_path):
    with pytest.raises(ValueError, match=r"a: expected torch.float64, .*got torch.complex64"):
        write_container(tmp_path / "file", {}, {"a": torch.zeros(1, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []
    safetensors.torch.save_file(
        {"a": torch.zeros(1, dtype=torch.int16)}, tmp_path / "file", {"text": "x"}
    )
    with (
        open_container(tmp_path / "file") as container,
        pytest.raises(FormatError, match=r"a: expected a dtype of F64, .*got 'I16'"),
    ):
        container.take("a")
