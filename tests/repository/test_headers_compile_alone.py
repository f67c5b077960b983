"""Every public header compiles alone, without torch, CUDA or Python, with either compiler."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

FLAGS = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-x", "c++"]


def compile_alone(compiler: str, include_dir: Path, header: Path) -> str:
    """Return the compiler's complaints about a unit that includes the header, twice."""
    line = f'#include "{header.relative_to(include_dir).as_posix()}"\n'
    result = subprocess.run(
        [compiler, *FLAGS, f"-I{include_dir}", "-"],
        input=line * 2,
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if result.returncode == 0 else f"{header.name}:\n{result.stderr}"


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_headers_compile_alone(compiler: str, repository_root: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    include_dir = repository_root / "include"
    headers = sorted(include_dir.rglob("*.hpp"))
    assert headers
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        complaints = pool.map(lambda header: compile_alone(compiler, include_dir, header), headers)
        failures = [text for text in complaints if text]
    assert not failures, "\n".join(failures)
