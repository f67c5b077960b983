"""The compiled, torch-free core: codebooks, quantisers, page table and layout on NumPy arrays."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

__version__: str

BLOCK_TOKENS: int

def simd_level() -> str:
    """Instruction set in use: portable, avx2, avx512, avx512vnni or neon."""

class LloydMaxSolution(TypedDict):
    """An optimal scalar quantiser and how well it was solved."""

    levels: NDArray[np.float64]
    boundaries: NDArray[np.float64]
    distortion: float
    residual: float
    iterations: int

def solve_lloyd_max(dim: int | None, bits: int) -> LloydMaxSolution:
    """Lloyd-Max quantiser of a coordinate of a random unit vector in R^dim, unit variance.

    None stands for the limit of large dimensions, the Gaussian.
    """

class Codebook:
    """The float32 codebook of a dimension and width, solved once per process."""

    def __init__(self, dim: int, bits: int) -> None: ...
    @property
    def dim(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def levels(self) -> NDArray[np.float32]: ...
    @property
    def boundaries(self) -> NDArray[np.float32]: ...
    @property
    def distortion(self) -> float: ...

class VectorCodebook:
    """The codebook of pairs of coordinates of a width, 2 to 4 bits."""

    def __init__(self, bits: int) -> None: ...
    @staticmethod
    def exists(bits: int) -> bool: ...
    @property
    def bits(self) -> int: ...
    @property
    def levels(self) -> NDArray[np.float32]:
        """``[256, 2]``, unit variance."""
    @property
    def distortion(self) -> float:
        """Mean squared error of a standard normal coordinate."""

class LayerSpec:
    """Everything that fixes the meaning of a layer's bytes."""

    def __init__(
        self,
        *,
        head_dim: int,
        num_kv_heads: int,
        k_bits: int = 4,
        v_bits: int = 4,
        k_rule: str = "unbiased",
        v_rule: str = "norm_preserving",
        scale_type: str = "float16",
        center_keys: bool = True,
        smooth_keys: bool = True,
        sink_tokens: int = 4,
        window_tokens: int = 64,
        seed: int = 42,
        layer: int = 0,
        codebook: str = "scalar",
    ) -> None: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def k_bits(self) -> int: ...
    @property
    def v_bits(self) -> int: ...
    @property
    def k_rule(self) -> str: ...
    @property
    def v_rule(self) -> str: ...
    @property
    def scale_type(self) -> str: ...
    @property
    def center_keys(self) -> bool: ...
    @property
    def smooth_keys(self) -> bool: ...
    @property
    def sink_tokens(self) -> int: ...
    @property
    def window_tokens(self) -> int: ...
    @property
    def exact_capacity(self) -> int:
        """Token slots of the exact buffers: the sinks and, with a window, window + 64."""
    @property
    def seed(self) -> int: ...
    @property
    def layer(self) -> int: ...
    @property
    def codebook(self) -> str: ...
    def to_ints(self) -> list[int]:
        """The spec as the ``int[] spec`` of the torch operators."""
    @staticmethod
    def from_ints(ints: Sequence[int]) -> LayerSpec: ...

def rotation_matrix(spec: LayerSpec, head: int, kind: str) -> NDArray[np.float32]:
    """R of one head's keys ("k") or values ("v"), ``[D, D]``: ``rotated = R @ x``."""

CUDA_MAX_HEAD_DIM: int

def cuda_attention_problem(spec: LayerSpec, capability_major: int) -> str:
    """Why attention on CUDA devices does not take such a layer; "" when it does."""

class BlockLayout:
    """Where everything is in a block: 64 tokens of one key/value head."""

    def __init__(self, spec: LayerSpec) -> None: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def k_row_bytes(self) -> int: ...
    @property
    def v_row_bytes(self) -> int: ...
    def page_bytes(self, num_kv_heads: int) -> int: ...
    def rows(
        self, blocks: NDArray[np.uint8], kind: str, tokens: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Packed rows ``[n, tokens, row_bytes]`` and scales ``[n, tokens]`` of blocks, copied."""
    def means_are_finite(self, blocks: NDArray[np.uint8]) -> bool:
        """Whether no key mean of blocks ``[n, block_bytes]`` holds NaN or infinity."""

class AppendPlan:
    """What an append will do; nothing has happened yet."""

    @property
    def copies(self) -> NDArray[np.int32]:
        """``[C, 2]``: page to copy from, page to copy to."""
    @property
    def jobs(self) -> NDArray[np.int32]:
        """``[N, 6]``: row, first token, tokens, page, offset in the page, fit smoothing."""
    @property
    def moves_tokens(self) -> bool:
        """Whether tokens go to pages; if not, there are no copies and no jobs."""
    @property
    def pages_needed(self) -> int:
        """Pages (highest id + 1) that storage must have before the plan can run."""

class PageTable:
    """Which pages hold which row's tokens: bookkeeping without storage."""

    def __init__(self, spec: LayerSpec, batch_size: int) -> None: ...
    @staticmethod
    def from_exports(
        spec: LayerSpec, rows: NDArray[np.int32], page_table: NDArray[np.int32], num_pages: int
    ) -> PageTable:
        """The table that exported these; ValueError names what no table could have exported."""
    @property
    def batch_size(self) -> int: ...
    @property
    def lengths(self) -> list[int]: ...
    @property
    def num_entries(self) -> list[int]: ...
    @property
    def used_pages(self) -> int: ...
    def plan_append(self, new_tokens: Sequence[int]) -> AppendPlan: ...
    def prepare(self, plan: AppendPlan) -> None:
        """Obtain the memory that the commit needs, so that it cannot fail."""
    def commit(self, plan: AppendPlan) -> None: ...
    def crop(self, row: int, new_length: int) -> None: ...
    def select(self, indices: Sequence[int]) -> None: ...
    def reset(self) -> None: ...
    def high_water_pages(self) -> int:
        """Highest page id in use + 1."""
    def page_table(self) -> NDArray[np.int32]:
        """``[B, P, 2]``: page, tokens in it."""
    def rows(self, new_tokens: Sequence[int] = ...) -> NDArray[np.int32]:
        """``[B, 4]``: length, entries, first ring position, new tokens."""
    def live_slots(self) -> NDArray[np.bool_]:
        """``[B, exact_capacity]``: which slots of the exact buffers hold a token."""
    def clone(self) -> PageTable: ...

def max_append_jobs(spec: LayerSpec, chunk_tokens: int) -> int:
    """Most jobs that appending `chunk_tokens` tokens to one row can take."""

def entries_of_full_rows(
    spec: LayerSpec,
    rows: NDArray[np.int32],
    page_table: NDArray[np.int32],
    positions: NDArray[np.int32],
    max_tokens: int,
) -> list[int]:
    """Entries that each row of a fixed-capacity cache has once it holds `max_tokens` tokens."""

def crop_tables(
    spec: LayerSpec,
    rows: NDArray[np.int32],
    page_table: NDArray[np.int32],
    positions: NDArray[np.int32],
    max_tokens: int,
    new_lengths: Sequence[int],
) -> None:
    """Shorten the rows of a fixed-capacity cache, in place; `positions` stay."""

def pack_rows(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack codes ``[n, dim]`` as pages store them."""

def unpack_rows(packed: NDArray[np.uint8], dim: int, bits: int) -> NDArray[np.uint8]:
    """Codes ``[n, dim]`` of packed rows."""

class MseCodes(TypedDict):
    """Encoded rows of `TurboQuantMse`."""

    codes: NDArray[np.uint8]
    """``[n, row_bytes]``, packed."""
    scales: NDArray[np.float32]

class ProdCodes(TypedDict):
    """Encoded rows of `TurboQuantProd`."""

    codes: NDArray[np.uint8]
    """``[n, row_bytes]``: packed codes of one bit less, then packed signs."""
    scales: NDArray[np.float32]
    residual_norms: NDArray[np.float32]

class TurboQuantMse:
    """Rotation and an optimal scalar quantiser per coordinate: least mean squared error.

    `scale_rule` is norm, norm_preserving, least_squares or unbiased; `rotation` is sign_hadamard
    or haar (dense, any dimension). `threads` 0 means all.
    """

    def __init__(
        self,
        dim: int,
        bits: int,
        seed: int = 42,
        scale_rule: str = "norm",
        rotation: str = "sign_hadamard",
    ) -> None: ...
    @property
    def dim(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def row_bytes(self) -> int: ...
    def rotate(self, rows: ArrayLike) -> NDArray[np.float32]: ...
    def encode(self, rows: ArrayLike, threads: int = 0) -> MseCodes: ...
    def decode(self, codes: MseCodes, threads: int = 0) -> NDArray[np.float32]: ...
    def score(self, queries: ArrayLike, codes: MseCodes, threads: int = 0) -> NDArray[np.float32]:
        """Products of queries ``[m, dim]`` with the rows, ``[m, n]``, without decoding."""

class TurboQuantProd:
    """One bit less of `TurboQuantMse` and a sign bit of the residual: unbiased products.

    `projection` is orthogonal or gaussian.
    """

    def __init__(
        self,
        dim: int,
        bits: int,
        seed: int = 42,
        projection: str = "orthogonal",
        rotation: str = "sign_hadamard",
    ) -> None: ...
    @property
    def dim(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def row_bytes(self) -> int: ...
    @property
    def expected_variance(self) -> float:
        """Variance of the product of two random unit vectors."""
    def encode(self, rows: ArrayLike, threads: int = 0) -> ProdCodes: ...
    def decode(self, codes: ProdCodes, threads: int = 0) -> NDArray[np.float32]: ...
    def score(
        self, queries: ArrayLike, codes: ProdCodes, threads: int = 0
    ) -> NDArray[np.float32]: ...
