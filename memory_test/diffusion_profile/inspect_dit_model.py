"""Show a model's tree, its trainable parameters and what supports it; the same as ``memory-test inspect``."""

import sys

from memory_test.cli import main_inspect

if __name__ == "__main__":
    sys.exit(main_inspect())
