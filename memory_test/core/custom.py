"""A model of the user's own, ``module:callable``: imported, called and checked; one line says what is wrong."""

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from dit_dp.clipping.batch import Batch, LossFn, map_tensors, num_rows
from dit_dp.errors import UsageError

_ACCEPTED = (
    "(model, loss_fn, batch) with batch a tuple or dict of tensors, or a model whose make_batch(num_examples) "
    "returns (loss_fn, batch)"
)


@dataclass(frozen=True)
class OwnModel:
    """What a callable of the user's returned.

    Attributes:
        spec: ``module:callable``.
        model: As it came.
        given: The loss and the batch that came with it; `None`: the model makes batches.
    """

    spec: str
    model: nn.Module
    given: tuple[LossFn, Batch] | None

    def case(self, num_examples: int) -> tuple[LossFn, Batch]:
        """Return the loss and a batch: of `num_examples` rows where the model makes batches, else the given one.

        Raises:
            UsageError: The model's ``make_batch`` raised, or returned something else.
        """
        if self.given is not None:
            return self.given
        asked = f"{self.spec}().make_batch({num_examples})"
        with users_code(f"model: {asked}"):
            own: Any = self.model.make_batch(num_examples)  # type: ignore[operator]
        if not isinstance(own, tuple) or len(own) != 2:
            raise UsageError.for_value("model", f"{asked}: {type(own).__name__}", _ACCEPTED)
        _check_types(asked, self.model, *own)
        if num_rows(own[1]) != num_examples:
            raise UsageError.for_value("model", f"{asked}: {num_rows(own[1])} rows", f"{num_examples} rows")
        return own


@contextlib.contextmanager
def users_code(doing: str) -> Iterator[None]:
    """Turn whatever the user's code raises into one line that names the exception.

    Raises:
        UsageError: Something was raised, which is its cause.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        raise UsageError(f"{doing} raised {type(error).__name__}{': ' * bool(text)}{text}") from error


def load_target(spec: str) -> Any:
    """Import what ``module:callable`` names.

    Raises:
        UsageError: There is no such module or attribute, or importing it raised.
    """
    module_name, _, path = spec.partition(":")
    try:
        with users_code(f"model: importing {module_name!r}"):
            module = importlib.import_module(module_name)
    except UsageError as error:
        cause = error.__cause__
        missing = isinstance(cause, ModuleNotFoundError) and module_name.startswith(cause.name or "\0")
        hint = f"; install it, or set PYTHONPATH to the folder that holds {module_name.partition('.')[0]}"
        raise UsageError(f"{error}{hint if missing else ''}") from cause
    try:
        return reduce(getattr, path.split("."), module)
    except AttributeError as error:
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UsageError.for_value("model", spec, names or "a module with a callable") from error


def call_target(spec: str, target: Any) -> Any:
    """Return what the user's callable makes.

    Raises:
        UsageError: It is no callable, or it raised.
    """
    if not callable(target):
        raise UsageError.for_value("model", spec, "a callable that returns an nn.Module")
    with users_code(f"model: {spec}()"):
        return target()


def build_own(spec: str) -> OwnModel:
    """Call ``module:callable`` and check what it returns.

    Raises:
        UsageError: It cannot be had, or is no model with a loss and a batch, or with a method that makes them.
    """
    made = call_target(spec, load_target(spec))
    if isinstance(made, tuple) and len(made) == 3:
        _check_types(spec, *made)
        return OwnModel(spec, made[0], made[1:])
    if isinstance(made, nn.Module) and callable(getattr(made, "make_batch", None)):
        return OwnModel(spec, made, None)
    raise UsageError.for_value("model", f"{spec}(): {type(made).__name__}", _ACCEPTED)


def _check_types(said: str, model: object, loss_fn: object, batch: object) -> None:
    """Raise `UsageError` unless these are a model, a loss and a batch of tensors."""
    parts = tuple(batch.values()) if isinstance(batch, Mapping) else batch
    is_batch = isinstance(parts, tuple) and all(isinstance(part, Tensor) for part in parts)
    if not isinstance(model, nn.Module) or not callable(loss_fn) or not is_batch:
        held = {type(part).__name__: None for part in parts} if isinstance(parts, tuple) else {}
        got = ", ".join(type(part).__name__ for part in (model, loss_fn, batch)) + f" of {', '.join(held)}" * bool(held)
        raise UsageError.for_value("model", f"{said}: ({got})", _ACCEPTED)


def with_rows(batch: Batch, count: int) -> Batch:
    """Return a batch of `count` rows: the first ones of it, over again where it has fewer.

    Raises:
        UsageError: It has no row, or its tensors disagree about how many they have.
    """
    rows = num_rows(batch)
    if rows == count:
        return batch
    if rows == 0:
        raise UsageError.for_value("batch", "0 rows", "at least 1", "there is nothing to repeat")
    index = torch.arange(count) % rows
    return map_tensors(lambda tensor: tensor[index.to(tensor.device)], batch)
