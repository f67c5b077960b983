"""TurboQuant compression of transformer key/value caches.

Importing the package imports neither torch nor transformers: a name brings in what it needs when
it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turboquant_cpp._core import __version__
    from turboquant_cpp.fields import FormatError
    from turboquant_cpp.fixed_store import FixedStore
    from turboquant_cpp.hf import CompressedDynamicCache, TurboQuantKVCache
    from turboquant_cpp.layer_store import LayerStore
    from turboquant_cpp.quantizers import (
        LloydMaxCodebook,
        TurboQuantCompressorMSE,
        TurboQuantCompressorV2,
        TurboQuantMSE,
        TurboQuantProd,
        solve_lloyd_max,
    )
    from turboquant_cpp.spec import CacheConfig, LayerSpec

# The module that defines each public name.
_EXPORTS = {
    "CacheConfig": "spec",
    "CompressedDynamicCache": "hf",
    "FixedStore": "fixed_store",
    "FormatError": "fields",
    "LayerSpec": "spec",
    "LayerStore": "layer_store",
    "LloydMaxCodebook": "quantizers",
    "TurboQuantCompressorMSE": "quantizers",
    "TurboQuantCompressorV2": "quantizers",
    "TurboQuantKVCache": "hf",
    "TurboQuantMSE": "quantizers",
    "TurboQuantProd": "quantizers",
    "__version__": "_core",
    "solve_lloyd_max": "quantizers",
}

__all__ = [
    "CacheConfig",
    "CompressedDynamicCache",
    "FixedStore",
    "FormatError",
    "LayerSpec",
    "LayerStore",
    "LloydMaxCodebook",
    "TurboQuantCompressorMSE",
    "TurboQuantCompressorV2",
    "TurboQuantKVCache",
    "TurboQuantMSE",
    "TurboQuantProd",
    "__version__",
    "solve_lloyd_max",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
