import json
import subprocess
import sys

import pytest

# Stands for an environment without the optional packages: neither importable nor installed.
_BLOCK = """
import importlib.metadata, sys
for name in ("torch", "transformers", "rich", "matplotlib"):
    sys.modules[name] = None
find = importlib.metadata.version
def version(name):
    if name in ("torch", "transformers", "rich", "matplotlib"):
        raise importlib.metadata.PackageNotFoundError(name)
    return find(name)
importlib.metadata.version = version
from turboquant_cpp.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run_without_optional_packages(*arguments):
    return subprocess.run(
        [sys.executable, "-c", _BLOCK, *arguments], capture_output=True, text=True, timeout=60
    )


def test_info_needs_no_optional_package(tmp_path):
    result = run_without_optional_packages("info", "--output", str(tmp_path / "info.json"))
    assert result.returncode == 0, result.stderr
    facts = json.loads((tmp_path / "info.json").read_text())
    assert "pip install" in facts["torch"]
    assert 128 in facts["head dimensions"]
    assert 80 in facts["head dimensions"]
    assert facts["widths"] == list(range(1, 9))
    assert facts["simd"] in ("portable", "avx2", "avx512", "avx512vnni", "neon")


@pytest.mark.parametrize("command", [["generate", "hello"], ["demo"], ["verify"]])
def test_other_commands_say_what_to_install(command):
    result = run_without_optional_packages(*command)
    assert result.returncode == 2
    assert 'pip install "turboquant-cpp[demo]"' in result.stderr
