"""Measure one method on one model; the same as ``memory-test run``."""

import sys

from memory_test.cli import main_run

if __name__ == "__main__":
    sys.exit(main_run())
