from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["layer_store", "ops", "quantizers", "spec"])
def test_the_examples_in_the_docstrings_run(name):
    module = importlib.import_module(f"turboquant_cpp.{name}")
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert results.failed == 0
    assert results.attempted > 0 or name == "ops"
