"""Turn a folder of records into a report; the same as ``memory-test report``."""

import sys

from memory_test.cli import main_report

if __name__ == "__main__":
    sys.exit(main_report())
