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

RANKS_CUDA = ErrorBand(
    peak_allocated=0.01,
    peak_reserved=None,
    source="one rank's largest error on an emulated runtime and rank 0's of two CPU processes, added; never compared "
    "with several GPUs",
)

RANKS_CPU = ErrorBand(
    peak_allocated=0.005,
    peak_reserved=None,
    source="largest error against rank 0 of two CPU processes, in the tests",
)

RANKS_COVERED = {
    "ddp": "this rank's batch, DDP's buckets, sums all-reduced in place, noise of one parameter at a time",
    "fsdp2": "this rank's batch and shards, gathered weights with the block gathered ahead, buffers of all-gather and "
    "reduce-scatter, sums and noise at full shape of one parameter at a time",
}

RANKS_NOT_COVERED = {
    "ddp": "the time of communication; NCCL's own buffers; DDP's copy of the parameters while it is built (at most "
    "500 MiB)",
    "fsdp2": "the time of communication; NCCL's own buffers; what CUDA reserves more because FSDP2's streams do not "
    "share freed blocks",
}


def of(on_cuda: bool, several_ranks: bool) -> ErrorBand:
    """Return the band of a prediction."""
    if several_ranks:
        return RANKS_CUDA if on_cuda else RANKS_CPU
    return CUDA if on_cuda else CPU
