"""Compile the CUDA code that a build folder's compile commands name, for a limited time.

    python tools/compile_kernels.py BUILD_DIR [SECONDS]

Nothing is linked: this shows that the kernels, their tests and their benchmarks compile, without
spills, where no GPU can run them. Units not begun after SECONDS are named and left out, so that a
slow machine still gets an answer.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "tests/cuda", "bench/cuda")


def breadth_first(units: list[dict]) -> list[dict]:
    """Order the units so that one of every family comes before a second of any.

    A family is the instantiations of a kernel, by head_dim and widths; most models have 128. Large
    families come first: their units take longest.
    """
    families = defaultdict(list)
    for unit in sorted(units, key=lambda unit: ("_d128" not in unit["file"], unit["file"])):
        families[re.sub(r"_(d|to_)\d.*", "", unit["file"])].append(unit)
    ranks = zip_longest(*sorted(families.values(), key=len, reverse=True))
    return [unit for rank in ranks for unit in rank if unit is not None]


def main() -> int:
    build_dir = Path(sys.argv[1]).resolve()
    deadline = time.monotonic() + float(sys.argv[2] if len(sys.argv) > 2 else 1e9)
    commands = json.loads((build_dir / "compile_commands.json").read_text(encoding="utf-8"))
    folders = [ROOT / folder for folder in FOLDERS]
    units = breadth_first([u for u in commands if Path(u["file"]).parent in folders])
    if not units:
        print(f"{build_dir}: no CUDA code is built there (is nvcc on the PATH?)")
        return 1

    def compile_unit(unit: dict) -> tuple[str, str]:
        name = str(Path(unit["file"]).relative_to(ROOT))
        if time.monotonic() >= deadline:
            return "left out", name
        (build_dir / unit["output"]).parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            unit["command"],
            shell=True,
            cwd=unit["directory"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return "failed" if done.returncode else "compiled", f"{name}\n{done.stdout}".rstrip()

    counts = Counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for outcome, text in pool.map(compile_unit, units):
            print(f"{outcome}: {text}", flush=True)
            counts[outcome] += 1
    print(", ".join(f"{counts[word]} {word}" for word in ("compiled", "failed", "left out")))
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
