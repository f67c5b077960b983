"""The command line ``turboquant-cpp``."""

from turboquant_cpp.cli.program import main

__all__ = ["main"]
