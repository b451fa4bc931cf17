"""Measure every cell of a sweep file; the same as ``memory-test sweep``."""

import sys

from memory_test.cli import main_sweep

if __name__ == "__main__":
    sys.exit(main_sweep())
