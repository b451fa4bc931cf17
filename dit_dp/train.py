"""``dit-dp train``; also ``python -m dit_dp.train``, and a script for torchrun. Parse, call, exit."""

import sys
from collections.abc import Sequence

from dit_dp.console import guarded, speaks_here, started_by_torchrun
from dit_dp.trainer.config import TrainConfig
from dit_dp.trainer.recipes import with_recipe

NAME = "dit-dp"
INTERRUPTED = "interrupted; go on with --resume auto: the steps that were charged stay charged"


def main(argv: Sequence[str] | None = None, prog: str = f"{NAME} train") -> int:
    """Train a workload: ``--recipe NAME|FILE``, and options that change it.

    Returns:
        0 done, 2 the user's mistake, 130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)

    def train(config: TrainConfig) -> int:
        from dit_dp.trainer.run import run
        from dit_dp.trainer.world import launch

        if config.devices > 1 and not started_by_torchrun():
            return launch(config.devices, arguments)
        return run(config)

    return guarded(
        TrainConfig,
        arguments,
        prog,
        train,
        name=NAME,
        prepare=with_recipe,
        interrupted=INTERRUPTED,
        speaks=speaks_here(),
    )


if __name__ == "__main__":
    sys.exit(main())
