from __future__ import annotations

import doctest
import importlib.util
import pathlib
import pkgutil

import pytest
import turboquant_cpp
from turboquant_cpp.hf.compat import CACHE_ARGUMENT


def modules_with_examples():
    for _, name, _ in pkgutil.walk_packages(turboquant_cpp.__path__, "turboquant_cpp."):
        origin = importlib.util.find_spec(name).origin
        if origin.endswith(".py") and ">>> " in pathlib.Path(origin).read_text(encoding="utf-8"):
            yield name.removeprefix("turboquant_cpp.")


MODULES = list(modules_with_examples())


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_run(name):
    module = importlib.import_module(f"turboquant_cpp.{name}")
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for case in doctest.DocTestFinder(exclude_empty=True).find(module):
        for example in case.examples:  # older transformers know the old name only
            example.source = example.source.replace(", cache=cache", f", {CACHE_ARGUMENT}=cache")
        runner.run(case)
    assert runner.summarize().failed == 0


def test_all_modules_are_found():
    assert {"hf.cache", "layer_store", "quantizers", "spec"} <= set(MODULES)
