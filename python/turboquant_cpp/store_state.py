"""What a file holds of a `LayerStore`: only pages and exact tokens in use, in host memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from turboquant_cpp._core import BlockLayout, LayerSpec, PageTable
from turboquant_cpp.fields import Fields, naming, refused
from turboquant_cpp.spec import CODEBOOKS, SCALE_DTYPES, SCALE_RULES

__all__ = ["STORE_DTYPES", "StoreState"]

# The dtypes that a store takes, and what a file calls them.
STORE_DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_MAX_INT: Final = (1 << 31) - 1
_MAX_COUNT: Final = (1 << 63) - 1
_MAX_SEED: Final = (1 << 64) - 1
_SMOOTHING_BOUNDS: Final = (2.0**-4, 2.0**8)  # encoding clamps to them (docs/cache_format.md)
_TENSORS: Final = ("pages", "exact_keys", "exact_values", "smoothing")


@dataclass(frozen=True)
class StoreState:
    """The contents of a store with B rows and P pages.

    Parameters
    ----------
    spec : LayerSpec
        What the bytes mean.
    table : PageTable
        Whose tokens are where; it uses each of the P pages.
    pages : Tensor
        uint8 ``[P, page_bytes]``.
    exact_keys, exact_values : Tensor
        ``[B, H, S + R, D]`` in the store's dtype.
    smoothing : Tensor
        float32 ``[B, H, D]``.
    saturated_scales, non_finite_tokens : int
        See `LayerStore`.

    Raises
    ------
    ValueError
        When the parts do not fit each other.
    """

    spec: LayerSpec
    table: PageTable
    pages: Tensor
    exact_keys: Tensor
    exact_values: Tensor
    smoothing: Tensor
    saturated_scales: int = 0
    non_finite_tokens: int = 0

    def __post_init__(self) -> None:
        """Check dtypes, shapes and what encoding never stores."""
        spec, batch = self.spec, self.table.batch_size
        layout = BlockLayout(spec)
        shape = (batch, spec.num_kv_heads, spec.exact_capacity, spec.head_dim)
        page_bytes = layout.page_bytes(spec.num_kv_heads)
        self._check("pages", (torch.uint8,), (self.table.used_pages, page_bytes))
        self._check("exact_keys", tuple(STORE_DTYPES.values()), shape)
        self._check("exact_values", (self.exact_keys.dtype,), shape)
        self._check("smoothing", (torch.float32,), (shape[0], shape[1], shape[3]))
        least, most = _SMOOTHING_BOUNDS
        if not bool(((self.smoothing >= least) & (self.smoothing <= most)).all()):
            raise ValueError("smoothing: expected numbers of 1/16 to 256, got others")
        if not layout.means_are_finite(self.pages.numpy().reshape(-1, layout.block_bytes)):
            raise ValueError("pages: expected finite key means, got NaN or infinity")

    def _check(self, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
        tensor: Tensor = getattr(self, name)
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name}: expected {', '.join(map(str, dtypes))}, got {tensor.dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")

    @property
    def counters(self) -> Tensor:
        """`saturated_scales` and `non_finite_tokens` as stores hold them."""
        return torch.tensor([self.saturated_scales, self.non_finite_tokens])

    def clone(self) -> StoreState:
        """Return a copy that shares no tensor."""
        tensors = {name: getattr(self, name).clone() for name in _TENSORS}
        return dataclasses.replace(self, **tensors)

    def describe(self, path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The description as JSON; adds the tensors ``path.name`` to `tensors`."""
        for name in _TENSORS:
            tensors[f"{path}.{name}"] = getattr(self, name)
        tensors[f"{path}.rows"] = torch.from_numpy(self.table.rows())
        tensors[f"{path}.page_table"] = torch.from_numpy(self.table.page_table())
        spec = self.spec
        names = {dtype: name for name, dtype in STORE_DTYPES.items()}
        return {
            "spec": {name: getattr(spec, name) for name in _SPEC_FIELDS},
            "dtype": names[self.exact_keys.dtype],
            "saturated_scales": self.saturated_scales,
            "non_finite_tokens": self.non_finite_tokens,
        }

    @classmethod
    def read(cls, fields: Fields, take: Callable[[str], Tensor]) -> StoreState:
        """The state that `describe` described; `take` gives the tensor of a name.

        Raises
        ------
        FormatError
            Naming the field or tensor that is not as `describe` writes it.
        """
        spec = _read_spec(fields.object("spec"))
        dtype = STORE_DTYPES[fields.choice("dtype", list(STORE_DTYPES))]
        saturated, non_finite = (
            fields.integer(name, 0, _MAX_COUNT)
            for name in ("saturated_scales", "non_finite_tokens")
        )
        fields.finish()
        parts = {name: take(f"{fields.path}.{name}") for name in _TENSORS}
        if parts["exact_keys"].dtype != dtype:
            raise refused(f"{fields.path}.exact_keys", str(dtype), parts["exact_keys"].dtype)
        rows, page_table = (
            _int32(f"{fields.path}.{name}", take(f"{fields.path}.{name}"))
            for name in ("rows", "page_table")
        )
        page_bytes = BlockLayout(spec).page_bytes(spec.num_kv_heads)
        if parts["pages"].dim() != 2 or parts["pages"].shape[1] != page_bytes:
            expected = f"shape [pages, {page_bytes}]"
            raise refused(f"{fields.path}.pages", expected, tuple(parts["pages"].shape))
        with naming(fields.path):
            table = PageTable.from_exports(spec, rows, page_table, len(parts["pages"]))
            return cls(
                spec,
                table,
                saturated_scales=saturated,
                non_finite_tokens=non_finite,
                **parts,
            )


# How each field of a spec is read.
_SPEC_FIELDS: Final[dict[str, Callable[[Fields, str], Any]]] = {
    **dict.fromkeys(
        ("head_dim", "num_kv_heads", "k_bits", "v_bits"),
        lambda fields, name: fields.integer(name, 1, _MAX_INT),
    ),
    **dict.fromkeys(("k_rule", "v_rule"), lambda fields, name: fields.choice(name, SCALE_RULES)),
    "scale_type": lambda fields, name: fields.choice(name, SCALE_DTYPES),
    **dict.fromkeys(("center_keys", "smooth_keys"), Fields.flag),
    **dict.fromkeys(
        ("sink_tokens", "window_tokens", "layer"),
        lambda fields, name: fields.integer(name, 0, _MAX_INT),
    ),
    "seed": lambda fields, name: fields.integer(name, 0, _MAX_SEED),
    "codebook": lambda fields, name: fields.choice(name, CODEBOOKS),
}


def _read_spec(fields: Fields) -> LayerSpec:
    values = {name: read(fields, name) for name, read in _SPEC_FIELDS.items()}
    fields.finish()
    with naming(fields.path):
        return LayerSpec(**values)


def _int32(path: str, tensor: Tensor) -> np.ndarray[Any, np.dtype[np.int32]]:
    if tensor.dtype != torch.int32:
        raise refused(path, "dtype torch.int32", tensor.dtype)
    return tensor.clone().numpy()  # a copy, as a file may hold integers at any address
