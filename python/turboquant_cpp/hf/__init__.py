"""The Hugging Face transformers side: the only part of the package that imports transformers.

Importing it registers the attention implementation ``"turboquant"``.
"""

from __future__ import annotations

from turboquant_cpp.hf.accuracy import TurboQuantKVCache
from turboquant_cpp.hf.attention import IMPLEMENTATION, register
from turboquant_cpp.hf.cache import CompressedDynamicCache
from turboquant_cpp.hf.layer import CompressedLayer

__all__ = ["IMPLEMENTATION", "CompressedDynamicCache", "CompressedLayer", "TurboQuantKVCache"]

register()
