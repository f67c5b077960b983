"""Quality of a compressed cache, judged by the model's own next-token distributions.

The protocol feeds a text in small chunks, so that every earlier token is read from the cache, and
compares the distribution of the next token with the one an exact cache gives. Models and tokenizers
are passed in; what their arguments are called is known to `turboquant_cpp.hf` alone.
"""

from turboquant_cpp.evaluation.bootstrap import Interval, Intervals
from turboquant_cpp.evaluation.cache_size import CacheSize, measure_cache
from turboquant_cpp.evaluation.divergence import DivergenceSummary
from turboquant_cpp.evaluation.layer_errors import LayerError, layer_errors
from turboquant_cpp.evaluation.needle import NeedleCell, NeedleProtocol, find_needles
from turboquant_cpp.evaluation.passage import default_passage, read_text
from turboquant_cpp.evaluation.protocol import (
    CacheReport,
    Protocol,
    QualityReport,
    compare_caches,
    select_windows,
)
from turboquant_cpp.evaluation.reference_figures import (
    SMOLLM2_PLAIN_KL,
    SMOLLM2_RECIPE_KL,
    SMOLLM2_VECTOR_KL,
    TOLERANCE,
    reference_kl,
)

__all__ = [
    "SMOLLM2_PLAIN_KL",
    "SMOLLM2_RECIPE_KL",
    "SMOLLM2_VECTOR_KL",
    "TOLERANCE",
    "CacheReport",
    "CacheSize",
    "DivergenceSummary",
    "Interval",
    "Intervals",
    "LayerError",
    "NeedleCell",
    "NeedleProtocol",
    "Protocol",
    "QualityReport",
    "compare_caches",
    "default_passage",
    "find_needles",
    "layer_errors",
    "measure_cache",
    "read_text",
    "reference_kl",
    "select_windows",
]
