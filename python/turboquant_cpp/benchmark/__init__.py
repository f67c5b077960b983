"""Generation with an exact and a compressed cache, side by side.

``python -m turboquant_cpp.benchmark`` and ``turboquant-cpp benchmark`` are the same program.
"""

from turboquant_cpp.benchmark.comparison import BenchmarkOptions, run_benchmark
from turboquant_cpp.benchmark.generation import Generation, run_generation

__all__ = ["BenchmarkOptions", "Generation", "run_benchmark", "run_generation"]
