"""How far off a prediction may be, and who has seen that. Plain data."""

from memory_test.core.schema import ErrorBand

CUDA = ErrorBand(
    peak_allocated=0.005,
    peak_reserved=0.03,
    source="largest errors against CUDA's caching allocator on an emulated runtime; not yet compared with a GPU",
)
"""`make emulator-check` holds them: results/prediction/emulator.json."""

CPU = ErrorBand(
    peak_allocated=0.005,
    peak_reserved=None,
    source="largest error against the CPU allocator's true peak, every method, in the tests",
)
