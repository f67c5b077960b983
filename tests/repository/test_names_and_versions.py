"""What is written in more than one place agrees: versions, and the stem that names a feature."""

import re
from pathlib import Path

import turboquant_cpp


def header_version(root: Path) -> str:
    text = (root / "include/turboquant/version.hpp").read_text(encoding="utf-8")
    parts = [re.search(rf"TQ_VERSION_{part} (\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    version = ".".join(match.group(1) for match in parts if match)
    assert f'TQ_VERSION_STRING "{version}"' in text
    return version


def test_versions_agree(repository_root: Path) -> None:
    version = header_version(repository_root)
    assert turboquant_cpp.__version__ == version
    changelog = (repository_root / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[?([0-9.]+)", changelog, re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == version


# Operators that call others one after the other, and so have no kernel or header of their own.
SEQUENCES = {"attend_append": ("decode_attention", "encode_append")}

# Halves of one feature, in one header and one test: the operator, its feature's stem.
HALVES = {"plan_append": "fixed_append", "commit_append": "fixed_append"}


def test_one_stem_names_an_operator_through_every_layer(repository_root: Path) -> None:
    """A torch operator's name is its header's, its Python function's and its tests'."""
    text = "".join(
        path.read_text(encoding="utf-8")
        for path in sorted((repository_root / "python/csrc").glob("torch_ops*.cpp"))
    )
    stems = set(re.findall(r'\.def\(\s*"(\w+)\(', text))
    assert stems, "no operator definitions found in python/csrc/torch_ops*.cpp"
    ops = (repository_root / "python/turboquant_cpp/ops.py").read_text(encoding="utf-8")
    missing = []
    for stem, parts in SEQUENCES.items():
        assert {stem, *parts} <= stems
    for stem in sorted(stems - SEQUENCES.keys()):
        feature = HALVES.get(stem, stem)
        if not list((repository_root / "include/turboquant").glob(f"*/{feature}.hpp")):
            missing.append(f"include/turboquant/*/{feature}.hpp")
        if not list((repository_root / "tests").glob(f"*/{feature}_test.cpp")):
            missing.append(f"tests/*/{feature}_test.cpp")
        if not re.search(rf"^def {stem}\(", ops, re.MULTILINE):
            missing.append(f"def {stem}() in ops.py")
    assert not missing, missing
