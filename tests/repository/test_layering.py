"""The layers of the design: who may include or import whom."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^">]+)[">]', re.MULTILINE)

# Room under include/turboquant -> rooms it may include. "" is the base: error, version, parallel.
ROOMS = {
    "": {""},
    "math": {"", "math"},
    "quant": {"", "math", "quant"},
    "cache": {"", "math", "quant", "cache"},
    "attention": {"", "math", "quant", "cache", "attention"},
    "cuda": {"", "math", "quant", "cache", "attention", "cuda"},
}
TORCH_OR_PYTHON = re.compile(r"^(torch|ATen|c10|caffe2|pybind11|Python\.h)")


def includes(path: Path) -> Iterator[tuple[str, str]]:
    """Yield ('<' or '"', name) of every include directive of a file."""
    for match in INCLUDE.finditer(path.read_text(encoding="utf-8")):
        yield match.group(1), match.group(2)


def sources(folder: Path) -> list[Path]:
    suffixes = {".hpp", ".cpp", ".inl", ".cuh", ".cu"}
    return sorted(path for path in folder.rglob("*") if path.suffix in suffixes)


def room_of(header: str) -> str:
    """Room of 'turboquant/math/x.hpp' is 'math', of 'turboquant/x.hpp' the base ''."""
    parts = header.split("/")
    return parts[1] if len(parts) > 2 else ""


def test_public_headers_include_only_lower_rooms(repository_root: Path) -> None:
    include_dir = repository_root / "include"
    wrong = []
    for path in sources(include_dir):
        name = path.relative_to(include_dir).as_posix()
        rooms = ROOMS[room_of(name)]
        for style, target in includes(path):
            if style == "<":
                # The standard library has no slash or suffix; only the CUDA room may know CUDA's.
                allowed = re.fullmatch(r"[a-z0-9_]+", target) or (
                    room_of(name) == "cuda" and target.startswith("cuda")
                )
            else:
                allowed = target.startswith("turboquant/") and room_of(target) in rooms
            if not allowed:
                wrong.append(f"{name} includes {target}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", ["src", "kernels", "bench"])
def test_library_knows_neither_torch_nor_python(folder: str, repository_root: Path) -> None:
    wrong = [
        f"{path} includes {target}"
        for path in sources(repository_root / folder)
        for _, target in includes(path)
        if TORCH_OR_PYTHON.match(target)
    ]
    assert not wrong, "\n".join(wrong)


def test_bindings_know_one_of_torch_and_pybind11(repository_root: Path) -> None:
    """core*.{cpp,hpp} see pybind11 and no torch; every other file torch's stable headers alone."""
    stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    wrong = []
    for path in sources(repository_root / "python" / "csrc"):
        allowed = ("pybind11/",) if path.name.startswith("core") else stable
        wrong += [
            f"{path.name} includes {target}"
            for _, target in includes(path)
            if TORCH_OR_PYTHON.match(target) and not target.startswith(allowed)
        ]
    assert not wrong, "\n".join(wrong)


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Yield the top-level name of every import that can run (not under TYPE_CHECKING)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.partition(".")[0]
        yield from imported_modules(node)


@pytest.mark.parametrize(
    ("module", "homes"),
    [
        ("transformers", {"hf"}),
        ("rich", {"cli", "benchmark"}),
        ("matplotlib", {"cli", "benchmark"}),
        ("av", set()),
        ("PIL", set()),
        ("pickle", set()),
    ],
)
def test_python_imports_stay_in_their_homes(
    module: str, homes: set[str], repository_root: Path
) -> None:
    package = repository_root / "python" / "turboquant_cpp"
    wrong = [
        path.relative_to(package).as_posix()
        for path in sorted(package.rglob("*.py"))
        if path.relative_to(package).parts[0] not in homes
        and module in imported_modules(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not wrong, f"{module} imported in {wrong}"


def defined_names(tree: ast.AST) -> Iterator[str]:
    """Yield every name that a module gives to a function, class, attribute, field or variable."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.attr if isinstance(node, ast.Attribute) else node.id


def used_private_names(tree: ast.AST) -> Iterator[str]:
    """Yield ``_x`` of ``from a import _x``, ``a._x``, and ``getattr(a, "_x")`` and its kin."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("attr"):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        yield from (name for name in names if re.match("_[a-zA-Z]", str(name)))


def test_what_is_private_to_transformers_is_used_in_one_file(repository_root: Path) -> None:
    """A private name that neither the package nor torch defines is transformers' own."""
    package = repository_root / "python" / "turboquant_cpp"
    trees = {
        path.relative_to(package).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    }
    own = {name for tree in trees.values() for name in defined_names(tree)}
    own |= {"_core", "_torch_ops", "_C", "_dispatch_has_kernel_for_dispatch_key", "_dynamo"}
    own |= {"_parameters", "_buffers"}  # of torch.nn.Module
    found = {file: set(used_private_names(tree)) - own for file, tree in trees.items()}
    assert "_attn_implementation" in found.pop("hf/compat.py")
    wrong = {file: names for file, names in found.items() if names}
    assert not wrong, wrong


def test_import_is_light() -> None:
    code = "import sys, turboquant_cpp; print(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    heavy = {"torch", "transformers", "rich", "matplotlib", "accelerate"} & set(output.split())
    assert not heavy
