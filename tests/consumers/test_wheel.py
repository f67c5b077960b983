"""The package as strangers get it: an sdist that is whole, a wheel that needs NumPy alone."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest


def run(*command: object, check: bool = True) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=environment,
    )
    assert not check or result.returncode == 0, f"{command}\n{result.stdout}"
    return result.stdout


@pytest.fixture(scope="module")
def bare_python(repository_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with this project's wheel and NumPy alone."""
    pytest.importorskip("scikit_build_core")
    folder = tmp_path_factory.mktemp("wheel")
    # The source tree's own build folder is reused, so that this takes seconds.
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
        "--wheel-dir", folder, repository_root)  # fmt: skip
    (wheel,) = folder.glob("turboquant_cpp-*.whl")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel)
    return python


def test_import_without_torch(bare_python: Path) -> None:
    code = """
import turboquant_cpp
from turboquant_cpp import _core
assert _core.__version__ == turboquant_cpp.__version__
levels = _core.Codebook(128, 4).levels
assert len(levels) == 16
"""
    run(bare_python, "-c", code)


def test_cache_without_torch_says_what_is_missing(bare_python: Path) -> None:
    output = run(
        bare_python, "-c", "from turboquant_cpp import CompressedDynamicCache", check=False
    )
    assert "ModuleNotFoundError" in output or "ImportError" in output
    assert "torch" in output.splitlines()[-1]


def test_info_without_torch_says_what_is_missing(bare_python: Path) -> None:
    output = run(bare_python.parent / "turboquant-cpp", "info")
    for name in ("torch", "transformers"):
        (line,) = re.findall(rf"^{name}  .*", output, re.MULTILINE)
        assert "absent" in line
        assert "pip install" in line


def test_sdist_holds_every_source(repository_root: Path, tmp_path: Path) -> None:
    pytest.importorskip("build")
    listing = subprocess.run(
        ["git", "ls-files"], cwd=repository_root, capture_output=True, text=True, check=False
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    # A copy of what is tracked: the backend would walk the virtual environment and build folders.
    tracked = [name for name in listing.stdout.split() if (repository_root / name).is_file()]
    for name in tracked:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(repository_root / name, tmp_path / "tree" / name)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path,
        tmp_path / "tree")  # fmt: skip
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    needed = ("include/", "src/", "kernels/", "cmake/", "python/", "CMakeLists.txt", "LICENSE")
    assert not {name for name in tracked if name.startswith(needed)} - packed
