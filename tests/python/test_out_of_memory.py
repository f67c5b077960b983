"""Memory that runs out within the package's C++ code, at every allocation of every operation."""

from __future__ import annotations

import native_faults
import pytest


@pytest.fixture(scope="module")
def survived(tmp_path_factory) -> dict[str, int]:
    return native_faults.survived_failures(tmp_path_factory.mktemp("preload"))


@pytest.mark.slow
def test_every_operation_happens_or_does_not(survived):
    """How many allocations failed, one at a time: all that change tables have some."""
    torch_alone = ("select", "repeat", *native_faults.CONSTRUCTING)
    for name, failures in survived.items():
        if not name.endswith(torch_alone):
            assert failures > 3, name
    assert len(survived) == len(list(native_faults.cases())) + 5
    assert survived["model step, growing, turboquant"] > 100
