"""Cache files with one thing wrong each, made from a whole one.

`damaged_files` changes bytes and leaves the checksum alone, as an accident does. `hostile_files`
writes consistent files with a right checksum, as an attacker does: only the meaning is wrong.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from turboquant_cpp.container import MAX_HEADER_BYTES, _checksum

Files = Iterator[tuple[str, bytes, str]]  # name, content, what the message must match


@dataclass
class CacheFile:
    """A file taken apart."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def parse(cls, content: bytes) -> CacheFile:
        metadata = header_of(content)["__metadata__"]
        for name in ("config", "layers"):
            metadata[name] = json.loads(metadata[name])
        return cls(metadata, safetensors.torch.load(content))

    def build(self, checksum: str | None = None) -> bytes:
        metadata = {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in self.metadata.items()
            if name != "crc32"
        }
        tensors = {name: tensor.contiguous().clone() for name, tensor in self.tensors.items()}
        known = {name: tensor for name, tensor in tensors.items() if tensor.dtype != torch.int16}
        metadata["crc32"] = checksum or _checksum(metadata, known)
        return safetensors.torch.save(tensors, metadata)

    def changed(self, change: Callable[[CacheFile], object]) -> bytes:
        other = copy.deepcopy(self)
        change(other)
        return other.build()


def header_of(content: bytes) -> dict[str, Any]:
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def with_header(content: bytes, header: dict[str, Any] | bytes | str) -> bytes:
    """The file with another header and the same data."""
    if isinstance(header, dict):
        header = json.dumps(header)
    text = header.encode() if isinstance(header, str) else header
    data = content[8 + int.from_bytes(content[:8], "little") :]
    return len(text).to_bytes(8, "little") + text + data


def damaged_files(whole: bytes) -> Files:
    header_bytes = int.from_bytes(whole[:8], "little")
    data_begin = 8 + header_bytes
    ends = {0, 1, 7, 8, 9, 8 + header_bytes // 2, data_begin - 1, data_begin, data_begin + 1}
    ends |= {len(whole) * part // 16 for part in range(1, 16)} | {len(whole) - 1, len(whole) - 64}
    for end in sorted(ends):
        yield f"truncated at {end}", whole[:end], r"header|expected|"
    for surplus in (1, 4096):
        yield f"{surplus} bytes behind", whole + bytes(surplus), "not fully covered"
    for length in (0, 1, header_bytes - 1, header_bytes + 1, len(whole), 1 << 31, 1 << 63):
        yield f"header length {length}", length.to_bytes(8, "little") + whole[8:], "."
    for step in range(48):
        at = 8 + header_bytes * step // 48
        yield f"header bit {at}.{step % 8}", flipped(whole, at, step % 8), "."
    for step in range(24):
        at = data_begin + (len(whole) - data_begin) * step // 24
        yield f"data bit {at}.{step % 8}", flipped(whole, at, step % 8), "."
    yield from _other_formats()
    yield from _bad_headers(whole)
    yield from _bad_offsets(whole)


def _other_formats() -> Files:
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, stream)
    yield "pickle", pickle.dumps({"format": "turboquant-cpp cache"}), "header"
    yield "torch.save", stream.getvalue(), "header"
    yield "text", b"This is no cache.\n" * 100, "header"
    yield "zeros", bytes(4096), "header"
    yield "ones", b"\xff" * 4096, "header"
    other = safetensors.torch.save({"weight": torch.zeros(4)})
    yield "no metadata", other, "__metadata__: expected an object"
    other = safetensors.torch.save({"weight": torch.zeros(4)}, {"format": "pt"})
    yield "a model's weights", other, "format: expected 'turboquant-cpp cache', got 'pt'"


def _bad_headers(whole: bytes) -> Files:
    header = header_of(whole)
    text = json.dumps(header)
    first = next(name for name in header if name != "__metadata__")
    yield "deep header", with_header(whole, "[" * 200_000), "header: expected JSON"
    yield "deep object", with_header(whole, '{"a":' * 100_000), "header: expected JSON"
    yield "header is a list", with_header(whole, "[]"), "header: expected an object"
    yield "header is no JSON", with_header(whole, "{" + "x" * 99), "header: expected JSON"
    yield "header is not UTF-8", with_header(whole, b'{"\xff\xfe": 1}'), "header: expected JSON"
    yield "NaN in the header", with_header(whole, '{"a": NaN}'), "finite numbers, got 'NaN'"
    yield "huge integer", with_header(whole, '{"a": ' + "9" * 5000 + "}"), "header: expected JSON"
    yield "wide header", with_header(whole, '{"a": [' + "[]," * 300_000 + "[]]}"), "."
    spaces = text + " " * MAX_HEADER_BYTES
    yield "long header", with_header(whole, spaces), "header of at most 1048576 bytes"
    twice = text.replace('"__metadata__"', '"__metadata__": {"a": "b"}, "__metadata__"', 1)
    yield "metadata twice", with_header(whole, twice), "distinct keys, got '__metadata__'"
    entry = f'"{first}": {json.dumps(header[first])}'
    twice = text[:-1] + ", " + entry + "}"
    yield "tensor twice", with_header(whole, twice), f"distinct keys, got '{first}'"
    twice = text.replace('"format_version"', '"format_version": "7", "format_version"')
    yield "field twice", with_header(whole, twice), "distinct keys, got 'format_version'"
    for name, value in (("number", 4), ("list", []), ("null", None), ("object", {"a": 1})):
        changed = header | {"__metadata__": header["__metadata__"] | {"prefill": value}}
        yield f"metadata holds a {name}", with_header(whole, changed), "."
    yield "metadata is a list", with_header(whole, header | {"__metadata__": ["a"]}), "."


def _bad_offsets(whole: bytes) -> Files:
    header = header_of(whole)
    data_bytes = len(whole) - 8 - int.from_bytes(whole[:8], "little")
    names = sorted(
        (name for name in header if name != "__metadata__"),
        key=lambda name: header[name]["data_offsets"],
    )
    first, second = names[:2]
    begin, end = header[first]["data_offsets"]
    for name, offsets in (
        ("overlapping", header[second]["data_offsets"]),
        ("shifted", [begin + 8, end + 8]),
        ("backwards", [end, begin]),
        ("negative", [-8, end - 8]),
        ("out of the file", [data_bytes, data_bytes + end]),
        ("huge", [1 << 62, (1 << 62) + end]),
        ("larger than 64 bits", [1 << 70, (1 << 70) + end]),
        ("longer", [begin, end + 8]),
        ("shorter", [begin, end - 8]),
        ("one number", [begin]),
        ("three numbers", [begin, end, end]),
        ("text", ["0", str(end)]),
        ("none", None),
    ):
        entry = header[first] | {"data_offsets": offsets}
        yield f"offsets {name}", with_header(whole, header | {first: entry}), "."
    for name, entry in (
        ("unknown dtype", {"dtype": "X9"}),
        ("another dtype", {"dtype": "F64"}),
        ("no dtype", {"dtype": None}),
        ("larger shape", {"shape": [*header[first]["shape"], 2]}),
        ("negative shape", {"shape": [-1]}),
        ("huge shape", {"shape": [1 << 62, 1 << 62]}),
        ("shape as text", {"shape": "2"}),
        ("no shape", {"shape": None}),
        ("unknown field", {"pickle": "cos"}),
    ):
        changed = header | {first: header[first] | entry}
        yield f"tensor of {name}", with_header(whole, changed), "."


def hostile_files(whole: bytes) -> Files:
    file = CacheFile.parse(whole)
    yield from _wrong_metadata(file)
    yield from _wrong_config(file)
    yield from _wrong_layers(file)
    yield from _wrong_spec(file)
    yield from _wrong_tensors(file)
    yield from _wrong_tables(file)
    yield from _wrong_capacity(file)


def _wrong_metadata(file: CacheFile) -> Files:
    def setting(name: str, value: Any) -> bytes:
        return file.changed(lambda f: f.metadata.update({name: value}))

    for name in ("format", "format_version", "written_by", "config", "prefill", "layers"):
        without = file.changed(lambda f, name=name: f.metadata.pop(name))
        yield f"no {name}", without, f"__metadata__.{name}: expected the field, got none"
    for version in ("2", "0", "", "1.0", "-1", "1" * 1000):
        yield f"version {version[:9]}", setting("format_version", version), "format_version: expec"
    yield "another format", setting("format", "gguf"), "__metadata__.format: expected"
    yield "another prefill", setting("prefill", "fast"), "__metadata__.prefill: expected 'exact' or"
    yield "unknown field", setting("code", "import os"), "__metadata__.code: expected no such field"
    yield "wrong checksum", file.build(checksum="00000000"), "crc32: expected .*got '00000000'"
    yield "checksum is no number", file.build(checksum="x" * 999), r"crc32: expected .*\.\.\. \(str"
    for name in ("config", "layers"):
        yield f"{name} is no JSON", setting(name, "{"), f"{name}: expected JSON"
        yield f"{name} is deep", setting(name, "[" * 100_000), f"{name}: expected JSON"
        yield f"{name} is null", setting(name, "null"), f"{name}: expected (an object|a list)"
        yield f"{name} has NaN", setting(name, '{"a": Infinity}'), f"{name}: expected finite"
        yield f"{name} repeats", setting(name, '{"a": 1, "a": 2}'), f"{name}: expected distinct"


def _wrong_config(file: CacheFile) -> Files:
    wrong = {
        "bits": ["4", 0, 9, True],
        "k_bits": [None, "4", 0, 9, 1 << 70, 4.0],
        "v_bits": [None, [], 0, 9],
        "preset": ["best", 3],
        "recipe": ["best", 3],
        "window_tokens": [None, "64", -64, 63, 1 << 40],
        "sink_tokens": [None, -1, 1 << 40, 2.5],
        "center_keys": [None, 1, "yes"],
        "smooth_keys": [None, 0],
        "k_scale_rule": [None, "median", 1],
        "v_scale_rule": [None, {}],
        "scale_dtype": [None, "float64"],
        "codebook": [None, "vectors", 1, {}],
        "seed": [None, -1, 1 << 64, "42"],
        "exact_first_layers": [-1, "0", None],
        "exact_last_layers": [-1, 0.0],
        "policy": [None, "best", 1],
        "bytes_per_token": [0, "9", 4096],
        "layer_bits": [None, {}, [[0, 4]], [[0, 4, 9]], [[-1, 4, 4]], [["0", 4, 4]], [[[], 4, 4]]],
    }
    assert wrong.keys() == file.metadata["config"].keys()
    for name, values in wrong.items():
        without = file.changed(lambda f, name=name: f.metadata["config"].pop(name))
        yield f"config without {name}", without, f"config.{name}: expected the field"
        for value in values:
            changed = file.changed(
                lambda f, name=name, value=value: f.metadata["config"].update({name: value})
            )
            yield f"config.{name} {str(value)[:12]}", changed, r"config\.\w+"
    other = file.changed(lambda f: f.metadata["config"].update(pages=3))
    yield "config with more", other, "config.pages: expected no such field"


def _wrong_layers(file: CacheFile) -> Files:
    def layer(change: Callable[[dict[str, Any]], object]) -> bytes:
        return file.changed(lambda f: change(f.metadata["layers"][0]))

    wrong = {
        "kind": ["linear", "exact", "unknown", None, 3, ["compressed"]],
        "holds_tokens": [None, 1, "true", False],
        "committed_tokens": [None, "9", -1, 1 << 31, 1 << 70, 1.5, True],
        "left_padding": [None, 0, "", [], [0, 0, 0], [-1, 0], [1 << 40, 0], [0, True], [0, "0"]],
        "store": [None, [], {}, "pages"],
    }
    for name, values in wrong.items():
        without = layer(lambda fields, name=name: fields.pop(name))
        yield f"layer without {name}", without, rf"layers\.0\.{name}: expected the field"
        for value in values:
            changed = layer(lambda fields, name=name, value=value: fields.update({name: value}))
            yield f"layer {name} {value!s:.12}", changed, r"layers\.0\."
    more = layer(lambda fields: fields.update(committed_tokens=fields["committed_tokens"] + 1))
    yield "one token more", more, r"layers.0.store.rows: expected \d+ tokens in row 0, got"
    padded = layer(lambda fields: fields.update(left_padding=[1, 0]))
    yield "padding that is stored", padded, r"layers.0.store.rows: expected \d+ tokens in row 0"
    yield (
        "more in a layer",
        layer(lambda fields: fields.update(a=1)),
        "layers.0.a: expected no such",
    )
    layers = file.metadata["layers"]
    for name, value in (
        ("no layers", []),
        ("a layer less", layers[:-1]),
        ("a layer more", [*layers, layers[0]]),
        ("an object", {"0": layers[0]}),
        ("numbers", [1, 2]),
        ("layers exchanged", layers[::-1]),
    ):
        changed = file.changed(lambda f, value=value: f.metadata.update(layers=value))
        yield f"layers: {name}", changed, "layers"


def _wrong_spec(file: CacheFile) -> Files:
    def store(change: Callable[[dict[str, Any]], object]) -> bytes:
        return file.changed(lambda f: change(f.metadata["layers"][0]["store"]))

    wrong = {
        "head_dim": [0, 8, 12, 1 << 20, 1 << 40, "16", None],
        "num_kv_heads": [0, 1, 1 << 16, 1 << 31, 1.0],
        "k_bits": [0, 3, 9, "4"],
        "v_bits": [0, 3, 9],
        "k_rule": ["norm", "x", 0],
        "v_rule": ["norm", None],
        "scale_type": ["float32", "bfloat16", 1],
        "center_keys": [False, 1],
        "smooth_keys": [False, None],
        "sink_tokens": [0, 3, 1 << 20, -1],
        "window_tokens": [0, 63, 128, 1 << 20],
        "layer": [1, -1, 1 << 40],
        "seed": [43, -1, 1 << 65, None],
        "codebook": ["vector", "x", 0, None],
    }
    assert wrong.keys() == file.metadata["layers"][0]["store"]["spec"].keys()
    for name, values in wrong.items():
        without = store(lambda fields, name=name: fields["spec"].pop(name))
        yield f"spec without {name}", without, rf"layers\.0\.store\.spec\.{name}: expected the"
        for value in values:
            changed = store(
                lambda fields, name=name, value=value: fields["spec"].update({name: value})
            )
            yield f"spec.{name} {value}", changed, r"layers\.0\.store\."
    for name, values in {
        "dtype": ["float16", "float64", None, 3],
        "saturated_scales": [-1, 1 << 63, "0"],
        "non_finite_tokens": [-1, None],
    }.items():
        for value in values:
            changed = store(lambda fields, name=name, value=value: fields.update({name: value}))
            yield f"store.{name} {value}", changed, r"layers\.0\.store\."
    yield "more in a spec", store(lambda f: f["spec"].update(a=1)), "spec.a: expected no such field"
    yield "more in a store", store(lambda f: f.update(a=1)), "store.a: expected no such field"


def _wrong_tensors(file: CacheFile) -> Files:
    for name in sorted(file.tensors):
        tensor = file.tensors[name]
        other = torch.float16 if tensor.dtype == torch.float32 else torch.float32
        for what, wrong in (
            ("dtype", tensor.to(other)),
            ("foreign dtype", tensor.to(torch.int16)),
            ("rank", tensor[None]),
            ("flat", tensor.reshape(-1)),
            ("number", tensor.reshape(-1)[0]),
            ("first row twice", torch.cat([tensor[:1], tensor])),
            # What width a sliding layer's keys have only the model knows.
            ("no last column", tensor[..., :-1] if ".store." in name else tensor[:, :, :-1]),
            ("empty", tensor[:0]),
            ("endless and empty", torch.empty((1 << 31) - 1, 0, dtype=tensor.dtype)),
        ):
            changed = file.changed(
                lambda f, name=name, wrong=wrong: f.tensors.update({name: wrong})
            )
            yield f"{name}: {what}", changed, "layers"
        without = file.changed(lambda f, name=name: f.tensors.pop(name))
        yield f"without {name}", without, f"{name}: expected the tensor, got none"
    more = file.changed(lambda f: f.tensors.update(weight=torch.zeros(3)))
    yield "a tensor more", more, "weight: expected no such tensor, got one"
    for value in (float("nan"), float("inf"), 0.0, 257.0, -1.0, 1e-3):
        changed = file.changed(
            lambda f, value=value: f.tensors["layers.0.store.smoothing"][0, 0, 3:4].fill_(value)
        )
        yield f"smoothing {value}", changed, "layers.0.store.smoothing: expected numbers of 1/16 to"
    for value in (float("nan"), float("-inf")):
        half = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
        changed = file.changed(
            lambda f, half=half: f.tensors["layers.0.store.pages"][1, 2:4].copy_(half)
        )
        yield f"key mean {value}", changed, "layers.0.store.pages: expected finite key means"


def _wrong_tables(file: CacheFile) -> Files:
    def table(name: str, change: Callable[[Tensor], object]) -> bytes:
        return file.changed(lambda f: change(f.tensors[f"layers.0.store.{name}"]))

    rows = file.tensors["layers.0.store.rows"]
    assert rows[0, 1] >= 2
    most = (1 << 31) - 1
    for column, name in enumerate(("length", "num_entries", "exact_begin", "new_tokens")):
        right = int(rows[0, column])
        for value in (right - 1, right + 1, -1, most, -most - 1):
            changed = table("rows", lambda t, c=column, v=value: t[0, c : c + 1].fill_(v))
            yield f"rows.{name} {value}", changed, r"layers\.0\.store\.(rows|page_table)"
    pages = len(file.tensors["layers.0.store.pages"])
    for page in (pages, -1, most, -most - 1):
        changed = table("page_table", lambda t, page=page: t[0, 1, :1].fill_(page))
        yield f"page {page}", changed, r"layers\.0\.store\.page_table\[1\]\.page: expected 0 to"
    for tokens in (0, 63, 65, -1, most):
        changed = table("page_table", lambda t, tokens=tokens: t[0, 1, 1:].fill_(tokens))
        yield f"page of {tokens} tokens", changed, r"layers\.0\.store\.page_table"
    twice = table("page_table", lambda t: t[0, 1, :1].copy_(t[0, 0, :1]))
    yield "page used twice", twice, r"page_table\[1\]: expected a page that the row does not use"

    def unused(f: CacheFile) -> None:
        name = "layers.0.store.pages"
        f.tensors[name] = torch.cat([f.tensors[name], f.tensors[name][:1]])

    yield "page that no row uses", file.changed(unused), "layers.0.store.pages: expected shape"

    def behind(f: CacheFile) -> None:
        name = "layers.0.store.page_table"
        f.tensors[name] = torch.nn.functional.pad(f.tensors[name], (0, 0, 0, 1), value=1)

    yield "entries behind the last", file.changed(behind), "behind the row's entries"

    def shorter(f: CacheFile) -> None:
        """Every other layer is two exact tokens short of layer 0, consistent in itself."""
        f.tensors["layers.1.store.rows"][:, 0] -= 2
        for layer in f.metadata["layers"][1:]:
            layer["tokens" if "tokens" in layer else "committed_tokens"] -= 2

    yield "a layer behind", file.changed(shorter), "layers: layer 0 holds .* tokens and layer 1"


def _wrong_capacity(file: CacheFile) -> Files:
    """A cache of fixed capacity has a field more; `file` may be one or none."""

    def capacity(text: str) -> bytes:
        return file.changed(lambda f: f.metadata.update(max_cache_len=text))

    for text in ("0", "-1", "true", "null", "4.0", "1e3", "[400]", str(1 << 31), str(1 << 70)):
        yield f"capacity {text}", capacity(text), "max_cache_len: expected an integer of 1 to"
    for text in ("", "many", "0x10", "4" * 5000):
        yield f"capacity {text[:9]}", capacity(text), "max_cache_len: expected JSON"
    yield "less than it holds", capacity("299"), r"layers\.0: expected at most 299 positions"
    for name in ("exact_first_layers", "exact_last_layers"):

        def exact(f: CacheFile, name: str = name) -> None:
            f.metadata["max_cache_len"] = "400"
            f.metadata["config"][name] = 1

        yield f"{name} with a capacity", file.changed(exact), f"config.{name}: expected 0 with max"
    if "max_cache_len" not in file.metadata:
        return
    growing = file.changed(lambda f: f.metadata.pop("max_cache_len"))
    yield "no capacity", growing, r"layers\.2\.kind: expected 'compressed'"
    sliding = len(file.metadata["layers"]) - 1
    for name, values in {
        "kind": ["sliding", "exact", "compressed hybrid", "linear"],
        "sliding_window": [None, 0, 23, 25, 1 << 31, "24"],
        "tokens": [None, -1, 401, 1 << 31, 1.5],
        "holds_tokens": [None, 1, False],
    }.items():
        for value in values:
            changed = file.changed(
                lambda f, n=name, v=value: f.metadata["layers"][sliding].update({n: v})
            )
            yield f"sliding {name} {value}", changed, rf"layers\.{sliding}"
    without = file.changed(lambda f: f.metadata["layers"][sliding].pop("tokens"))
    yield "sliding without tokens", without, rf"layers\.{sliding}\.tokens: expected the field"


def flipped(content: bytes, at: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 1 << bit
    return bytes(changed)
