"""Print the requirements of this project's extras and build system, one a line.

`pip install .[demo,test,dev]` would build the project before torch is there to build against;
the Makefile installs what this prints first and the project after it.
"""

import re
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]


def expand(requirement: str, project: dict) -> list[str]:
    """Replace the project's own extras by what they stand for."""
    own = re.fullmatch(re.escape(project["name"]) + r"\[([\w,-]+)\]", requirement)
    if not own:
        return [requirement]
    extras = own.group(1).split(",")
    return [
        line
        for extra in extras
        for inner in project["optional-dependencies"][extra]
        for line in expand(inner, project)
    ]


def main() -> None:
    pyproject = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    project = pyproject["project"]
    wanted = f"{project['name']}[{','.join(sys.argv[1:])}]"
    lines = pyproject["build-system"]["requires"] + project["dependencies"]
    lines += expand(wanted, project) if sys.argv[1:] else []
    print("\n".join(dict.fromkeys(lines)))


if __name__ == "__main__":
    main()
