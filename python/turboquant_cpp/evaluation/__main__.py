"""``python -m turboquant_cpp.evaluation``: the protocol as a program."""

import sys

from turboquant_cpp.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
