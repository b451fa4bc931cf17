"""Privacy units: which rows of a batch are one person's, one set's, or one image's several noise draws.

A map of rows to units holds data also where a step is only imagined: how rows lie together decides what is done.

Shapes: R rows, U units, K rows of the largest unit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dit_dp.clipping.batch import Batch, map_tensors
from dit_dp.clipping.hardware import hardware
from dit_dp.errors import UsageError

ROW_TO_UNIT = "row_to_unit"
"""Entry of a dict batch that is kept in step with the rows when an engine takes some of the units."""


@dataclass(frozen=True)
class Units:
    """R rows of U units. `row_to_unit` is `None` where every row is a unit of its own."""

    num_rows: int
    num_units: int
    row_to_unit: Tensor | None = None

    @classmethod
    def of(cls, num_rows: int, row_to_unit: Tensor | Sequence[int] | None) -> "Units":
        """Check a map, an integer tensor or a list, (R,), whose values are 0 ... U - 1, each used.

        Raises:
            UsageError: Wrong shape, dtype or values; or as many units as rows in another order, where the first
                dimension of a layer would not say which of the two it is.
        """
        if row_to_unit is None:
            return cls(num_rows, num_rows)
        with hardware().with_data():
            try:
                ids = torch.as_tensor(row_to_unit)
            except (TypeError, ValueError, RuntimeError) as error:
                got, wanted = type(row_to_unit).__name__, f"an integer tensor of shape ({num_rows},), one entry a row"
                raise UsageError.for_value(ROW_TO_UNIT, got, wanted) from error
            return cls._of_map(num_rows, ids.detach().cpu())

    @classmethod
    def _of_map(cls, num_rows: int, ids: Tensor) -> "Units":
        """Check a map that is on the CPU."""
        if ids.shape != (num_rows,) or ids.is_floating_point() or ids.dtype == torch.bool:
            got = f"{ids.dtype} of shape {tuple(ids.shape)}"
            raise UsageError.for_value(ROW_TO_UNIT, got, f"an integer tensor of shape ({num_rows},), one entry a row")
        used = torch.unique(ids)
        num_units = len(used)
        if num_units and (int(used[0]) != 0 or int(used[-1]) != num_units - 1):
            got = f"{num_units} units numbered from {int(used[0])} to {int(used[-1])}"
            raise UsageError.for_value(ROW_TO_UNIT, got, "units numbered 0, 1, 2, ..., each with a row")
        if num_units == num_rows:
            if not torch.equal(ids, torch.arange(num_rows)):
                raise UsageError.for_value(
                    ROW_TO_UNIT, "one row a unit, reordered", "rows in the order of their units", "sort the batch"
                )
            return cls(num_rows, num_rows)
        return cls(num_rows, num_units, ids.long())

    @property
    def rows_of_first(self) -> int:
        """Rows of the first unit; 0 without any."""
        if self.row_to_unit is None:
            return min(1, self.num_units)
        with hardware().with_data():
            return int((self.row_to_unit == 0).sum())

    @cached_property
    def adjacent(self) -> bool:
        """Whether every unit has K rows, one after the other: grouping is then a view."""
        assert self.row_to_unit is not None
        if self.num_rows % self.num_units:
            return False
        with hardware().with_data():
            regular = torch.arange(self.num_units).repeat_interleave(self.num_rows // self.num_units)
            return torch.equal(self.row_to_unit, regular)

    @cached_property
    def _slots(self) -> Tensor:
        """Row of each slot, (U, K); R where a unit has fewer than K rows."""
        assert self.row_to_unit is not None
        with hardware().with_data():
            counts = self.row_to_unit.bincount(minlength=self.num_units)
            order = self.row_to_unit.argsort(stable=True)
            place = torch.arange(self.num_rows) - (counts.cumsum(0) - counts)[self.row_to_unit[order]]
            slots = torch.full((self.num_units, int(counts.max())), self.num_rows)
            slots[self.row_to_unit[order], place] = order
            return slots

    def gather(self, rows: Tensor) -> Tensor:
        """Return (R, ...) as (U, K, ...), zero where a unit has fewer than K rows."""
        if self.row_to_unit is None:
            return rows[:, None]
        if self.adjacent:
            return rows.reshape(self.num_units, -1, *rows.shape[1:])
        padded = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
        return padded[self._slots.to(rows.device)]

    def sum(self, rows: Tensor) -> Tensor:
        """Return the sums of (R, ...) over the rows of each unit, (U, ...)."""
        return rows if self.row_to_unit is None else self.gather(rows).sum(1)

    def per_row(self, values: Tensor) -> Tensor:
        """Return values of units, (U, ...), once for each row, (R, ...)."""
        return values if self.row_to_unit is None else values[self.row_to_unit.to(values.device)]

    def halves(self) -> list[tuple[int, int]]:
        """Return the borders of two halves of the units, or of all where their rows do not lie together."""
        middle = self.num_units // 2
        if middle == 0 or not (self.row_to_unit is None or self.adjacent):
            return [(0, self.num_units)]
        return [(0, middle), (middle, self.num_units)]

    def span(self, start: int, stop: int) -> "tuple[slice, Units]":
        """Return the rows of units start ... stop - 1, which lie together or are all, and them as units from 0."""
        if self.row_to_unit is None:
            return slice(start, stop), Units(stop - start, stop - start)
        if (start, stop) == (0, self.num_units):
            return slice(None), self
        size = self.num_rows // self.num_units
        with hardware().with_data():
            ids = torch.arange(stop - start).repeat_interleave(size)
        return slice(start * size, stop * size), Units(len(ids), stop - start, ids)

    def take(self, batch: Batch, start: int, stop: int) -> tuple[Batch, "Units"]:
        """Return the rows of units start ... stop - 1, renumbered from 0, in their order."""
        if self.row_to_unit is None or self.adjacent:
            rows, units = self.span(start, stop)
            part = map_tensors(lambda t: t[rows], batch)
            ids = torch.arange(stop - start) if units.row_to_unit is None else units.row_to_unit
        else:
            chosen = ((self.row_to_unit >= start) & (self.row_to_unit < stop)).nonzero()[:, 0]
            part = map_tensors(lambda t: t[chosen.to(t.device)], batch)
            ids = self.row_to_unit[chosen] - start
            units = Units(len(ids), stop - start, ids if len(ids) != stop - start else None)
        if isinstance(part, Mapping) and ROW_TO_UNIT in part:
            part = {**part, ROW_TO_UNIT: ids.to(part[ROW_TO_UNIT].device)}
        return part, units


def with_zero_units(batch: Batch, units: Units, count: int, rows: int) -> tuple[Batch, Units]:
    """Return a batch with units of zeros added until there are `count`, each of so many rows."""
    missing = max(0, count - units.num_units)
    with hardware().with_data():
        ids = torch.arange(units.num_rows) if units.row_to_unit is None else units.row_to_unit
        ids = torch.cat([ids, torch.arange(units.num_units, units.num_units + missing).repeat_interleave(rows)])
    longer = map_tensors(lambda t: torch.cat([t, t.new_zeros(missing * rows, *t.shape[1:])]), batch)
    if isinstance(longer, Mapping) and ROW_TO_UNIT in longer:
        longer = {**longer, ROW_TO_UNIT: ids.to(longer[ROW_TO_UNIT].device)}
    return longer, Units.of(len(ids), ids)
