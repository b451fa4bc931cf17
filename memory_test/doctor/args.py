"""What `memory-test doctor` takes. No torch, so that ``--help`` answers at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dit_dp import validate
from dit_dp.clipping.registry import METHODS
from dit_dp.errors import UsageError
from dit_dp.workloads import WORKLOADS
from memory_test.core.model_args import ModelArgs

PRIVATE = tuple(name for name, method in METHODS.items() if method.private)
"""Methods with a promise to check."""

OURS = tuple(name for name in PRIVATE if not METHODS[name].peer)
"""Private methods of this project."""

IMAGE_SIZES = {"dit": 64, "x2": 64, "set": 8, "ddt": 56, "panda": 16}
"""By workload: pixels of 16 tokens; a pretrained model has its own."""


@dataclass(frozen=True, kw_only=True)
class DoctorArgs(ModelArgs):
    """Check that private methods keep their promise on a model: exact, bounded, independent, finite, noised.

    Exit code 0: every check passed; 1: a check failed, or a method refused the model; 2: a mistake in the call.
    """

    model: tyro.conf.Positional[str | None] = None
    """Name of the model's size, DiT-{S,B,L,XL}/{2,4,8} and so on, on a small random input; default: the workload's
    smallest. With --pretrained a hub name or a local folder. Or module:callable of your own, which returns
    (model, loss_fn, batch) with loss_fn(model, batch) one loss per example, or a model whose method
    make_batch(num_examples) returns (loss_fn, batch)."""
    image_size: int | None = None
    """Side of the image in pixels; default: 64 for DiT and x2, 8 for sets, 56 for DDT, 16 for panda: 16 tokens."""
    batch_size: int = 4
    """Examples (images, or sets) in the batch."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[METHOD ...]")] = ()
    """Methods to check; default: all of ours. Peers (opacus, ...) where they are named."""
    max_grad_norm: float | None = None
    """Clipping threshold C; default: the median norm, so that about half of the examples are clipped."""
    seed: int = 0
    """Seed of weights, data, noise and of which examples are changed."""
    json: Path | None = None
    """Write the findings to this file too."""

    def __post_init__(self) -> None:
        validate.integer("batch_size", self.batch_size, minimum=2, fix="one example has nobody to depend on")
        validate.integer("seed", self.seed, minimum=0)
        if self.max_grad_norm is not None:
            validate.real("max_grad_norm", self.max_grad_norm, positive=True)
        for name in self.methods:
            validate.one_of("methods", name, PRIVATE)
        if len(set(self.methods)) < len(self.methods):
            raise UsageError.for_value("methods", " ".join(self.methods), "each method once")
        if not self.is_custom:
            self._fill_in()
        super().__post_init__()

    def _fill_in(self) -> None:
        """Choose the workload's smallest model and few tokens, unless others were asked for."""
        workload = "diffusers" if self.pretrained else self.workload
        validate.one_of("workload", workload, WORKLOADS)
        smallest = next(iter(WORKLOADS[workload].sizes), None)
        defaults = {"model": self.model or smallest, "image_size": self.image_size or IMAGE_SIZES.get(workload)}
        for name, value in defaults.items():
            object.__setattr__(self, name, value)
