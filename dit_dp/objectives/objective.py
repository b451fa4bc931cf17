"""One loss per privacy unit for any path, target, metric and distribution of times.

Shapes: U units, K draws of time and noise a unit, M images a set (1 where a unit is an image), R = U*K*M rows, ordered
by unit, draw, image; C channels, H x W positions.

All randomness is drawn by `draw` into the batch, so that two passes, recomputation, micro-batches and the oracle see
the same function. A unit's loss is the mean over its rows, so its gradient is the mean of theirs before any clipping.

**Guarantees**: the loss of a unit depends on its own rows alone; a label is dropped for all of a unit's rows or none.
**Edge cases**: no units give a batch without rows and (0,) losses.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dit_dp.clipping.batch import Batch
from dit_dp.clipping.contributions import HALF
from dit_dp.clipping.units import ROW_TO_UNIT
from dit_dp.errors import UsageError
from dit_dp.objectives.config import ObjectiveConfig
from dit_dp.objectives.paths import Diffusion, make_path
from dit_dp.objectives.times import draw_times
from dit_dp.objectives.variational import variational_bound


class Objective:
    """Draws training batches and gives their per-unit losses.

    Args:
        config: What it is made of.

    Attributes:
        config: As given.
        path: From data to noise.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self.path = make_path(config)

    def draw(
        self, x0: Tensor, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Draw all randomness of a batch.

        Args:
            x0: Clean inputs: images (U, C, H, W), or sets (U, M, C, H, W).
            labels: (U,) class indices; sets have none.
            generator: Source of randomness on the device of `x0`.

        Returns:
            The batch, every entry with R rows: ``x0``, ``noise`` and ``x_t`` (R, C, H, W), ``t`` (R,); for images
            ``y`` (R,) and, unless there is no null label, ``drop_labels`` (R,) bool; for sets, if their model is
            variational, ``context_noise``; and ``row_to_unit`` (R,) unless every row is a unit.

        Raises:
            UsageError: Shapes that are no images or sets, or labels missing or not wanted.
        """
        config, units, device = self.config, x0.shape[0], x0.device
        self._check(x0, labels)
        x0 = self._rows(x0)
        dtype = torch.promote_types(x0.dtype, torch.float32)
        t = draw_times(config, units * config.multiplicity, device=device, dtype=dtype, generator=generator)
        t = t if config.set_size is None else t.repeat_interleave(config.set_size)
        noise = torch.empty_like(x0).normal_(generator=generator)
        batch = {"x0": x0, "noise": noise, "x_t": self.diffuse(x0, noise, t), "t": t}
        if labels is not None:
            batch["y"] = self._per_row(labels)
        if config.class_dropout_prob is not None and labels is not None:
            dropped = torch.rand(units, generator=generator, device=device) < config.class_dropout_prob
            batch["drop_labels"] = self._per_row(dropped)
        if config.context_shape is not None:
            batch["context_noise"] = x0.new_empty(len(x0), *config.context_shape).normal_(generator=generator)
        if config.rows_per_unit > 1:
            batch[ROW_TO_UNIT] = self._per_row(torch.arange(units, device=device))
        return batch

    def row_to_unit(self, batch: Batch) -> Tensor | None:
        """Return the unit of each row of a batch, (R,), for `Engine.accumulate`; `None` where every row is one."""
        return batch.get(ROW_TO_UNIT) if isinstance(batch, Mapping) else None

    def diffuse(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t, (R, C, H, W): the path at times t, (R,)."""
        return self.path.diffuse(x0, noise, t)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the per-unit losses.

        Args:
            model: ``model(x_t, t, y, drop_labels=...)`` for images, ``model(x_t, t, x0, context_noise)`` for sets,
                gives (R, C or 2C, H, W), or that and (R,) KL divergences, and draws nothing at random.
            batch: From `draw`.

        Returns:
            (U,) losses: the error of the prediction; plus the variational bound in bits per dimension if variances
            are learned, its mean held fixed; plus the weighted KL divergence if the model returns one.
        """
        assert isinstance(batch, Mapping)
        output, kl = self._predict(model, batch)
        target = self.path.target(self.config.target, batch["x0"], batch["noise"], batch["t"])
        channels = target.shape[1]
        prediction = output[:, :channels]  # (R, C, H, W)
        error = prediction - target
        error = error.square() if self.config.metric == "l2" else error.abs()
        losses: Tensor = error.flatten(1).mean(1)  # (R,)
        if self.config.learn_sigma:
            losses = losses + self._variational(prediction.detach(), output[:, channels:], batch)
        if kl is not None:
            losses = losses + self.config.kl_weight * kl
        rows = self.config.rows_per_unit
        return losses if rows == 1 else losses.view(-1, rows).mean(1)

    def _predict(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return the model's output and its KL divergences, both in float32 or better."""
        t, scale = batch["t"], self.config.scale_of_times
        t = t if scale == 1 else t * scale
        if self.config.set_size is not None:
            output = model(batch["x_t"], t, batch["x0"], batch.get("context_noise"))
        else:
            output = model(batch["x_t"], t, batch["y"], drop_labels=batch.get("drop_labels"))
        output, kl = output if isinstance(output, tuple) else (output, None)
        output = output.float() if output.dtype in HALF else output
        return output, kl.float() if kl is not None and kl.dtype in HALF else kl

    def _variational(self, prediction: Tensor, fraction: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the variational bound, (R,)."""
        assert isinstance(self.path, Diffusion)
        x_t, t = batch["x_t"], batch["t"]
        x0_hat = self.path.to_x0(self.config.target, prediction, x_t, t)
        return variational_bound(self.path, x0_hat, fraction, batch["x0"], x_t, t)

    def _rows(self, x0: Tensor) -> Tensor:
        """Return images (U, C, H, W) or sets (U, M, C, H, W) as rows, K times each unit."""
        times = self.config.multiplicity
        x0 = x0 if times == 1 else x0.repeat_interleave(times, 0)  # (U*K, ...)
        return x0 if self.config.set_size is None else x0.flatten(0, 1)

    def _per_row(self, values: Tensor) -> Tensor:
        """Return values of units, (U,), once for each row, (R,)."""
        rows = self.config.rows_per_unit
        return values if rows == 1 else values.repeat_interleave(rows)

    def _check(self, x0: Tensor, labels: Tensor | None) -> None:
        """Raise `UsageError` unless x0 and labels are what a unit is made of."""
        size = self.config.set_size
        if size is None and x0.dim() != 4:
            raise UsageError.for_value("x0", tuple(x0.shape), "images, shape (U, C, H, W)", "set_size is for sets")
        if size is not None and (x0.dim() != 5 or x0.shape[1] != size):
            raise UsageError.for_value("x0", tuple(x0.shape), f"sets, shape (U, {size}, C, H, W)", "see set_size")
        if (labels is None) == (size is None):
            wanted = f"shape ({x0.shape[0]},)" if size is None else "None, sets have no labels"
            raise UsageError.for_value("labels", None if labels is None else tuple(labels.shape), wanted)
