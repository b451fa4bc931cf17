"""The scripts of the profiling suite, each a few lines over `memory_test.cli`."""
