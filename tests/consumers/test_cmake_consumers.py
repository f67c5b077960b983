"""Projects that use the C++ library: installed, embedded, and the README's own example."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")


def run(*command: object) -> str:
    """Run a command and return its output; its whole output is the failure's message."""
    result = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}"
    return result.stdout


def build_and_run(project: Path, build_dir: Path, *definitions: str) -> str:
    run("cmake", "-S", project, "-B", build_dir, *definitions)
    run("cmake", "--build", build_dir, "--parallel", "2")
    return run(build_dir / "consumer")


@pytest.fixture(scope="module")
def install_prefix(repository_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An install of the release build, which is built first where `make ctest` has not."""
    prefix = tmp_path_factory.mktemp("prefix")
    build_dir = repository_root / "build" / "release"
    if not (build_dir / "CMakeCache.txt").is_file():
        build_dir = repository_root / "build" / "consumer"
        run("cmake", "-S", repository_root, "-B", build_dir, "-DTQ_BUILD_TESTS=OFF",
            "-DTQ_BUILD_BENCHMARKS=OFF")  # fmt: skip
    run("cmake", "--build", build_dir, "--target", "turboquant")
    run("cmake", "--install", build_dir, "--prefix", prefix, "--component", "development")
    return prefix


def test_find_package(install_prefix: Path, tmp_path: Path) -> None:
    output = build_and_run(
        HERE / "find_package",
        tmp_path,
        f"-DCMAKE_PREFIX_PATH={install_prefix}",
        f"-DSOURCE={HERE / 'consumer.cpp'}",
    )
    assert re.fullmatch(r"turboquant [0-9.]+, 16 levels\n", output)


def test_add_subdirectory(repository_root: Path, tmp_path: Path) -> None:
    # The whole library once more: as other builds have compiled it, or in the least time.
    ccache = shutil.which("ccache")
    output = build_and_run(
        HERE / "add_subdirectory",
        tmp_path,
        f"-DCMAKE_BUILD_TYPE={'Release' if ccache else 'Debug'}",
        f"-DCMAKE_CXX_COMPILER_LAUNCHER={ccache or ''}",
        f"-DTURBOQUANT_SOURCE_DIR={repository_root}",
        f"-DSOURCE={HERE / 'consumer.cpp'}",
    )
    assert re.fullmatch(r"turboquant [0-9.]+, 16 levels\n", output)


def test_readme_example(install_prefix: Path, repository_root: Path, tmp_path: Path) -> None:
    readme = (repository_root / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```cpp\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert blocks, "the README has no C++ example"
    for number, block in enumerate(blocks):
        source = tmp_path / f"readme_{number}.cpp"
        source.write_text(block, encoding="utf-8")
        build_and_run(
            HERE / "find_package",
            tmp_path / f"build_{number}",
            f"-DCMAKE_PREFIX_PATH={install_prefix}",
            f"-DSOURCE={source}",
        )
