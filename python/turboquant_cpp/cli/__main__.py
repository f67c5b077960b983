"""``python -m turboquant_cpp.cli``."""

import sys

from turboquant_cpp.cli import main

if __name__ == "__main__":
    sys.exit(main())
