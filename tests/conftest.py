"""Fixtures that every suite may use."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long a busy machine takes to draw examples says nothing about the code.
settings.register_profile("any machine", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Test processes share the cores already, and OpenMP threads that wait for a core spin: ten times
# slower on a busy machine. Tests of threading ask for threads themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-docs", action="store_true", help="write the tables that tests keep in docs/"
    )


@pytest.fixture(scope="session")
def repository_root() -> Path:
    return Path(__file__).resolve().parents[1]
