"""Options that say which model is meant. No torch, so that ``--help`` answers at once."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from dit_dp.errors import UsageError
from dit_dp.workloads.config import WorkloadConfig

PRETRAINED = "diffusers"
"""The workload whose model comes with its weights."""


@dataclass(frozen=True, kw_only=True)
class ModelArgs(WorkloadConfig):
    """A workload's model with its sizes and objective, a pretrained one, or a callable of the user's own."""

    model: str | None = None
    """Name of the model's size: DiT-{S,B,L,XL}/{2,4,8}, DDT-{S,B,L,XL}/1, Set/2, Panda/4; default: the workload's.
    With --pretrained a hub name or a local folder. Or module:callable of your own, which returns
    (model, loss_fn, batch) with loss_fn(model, batch) one loss per example, or a model whose method
    make_batch(num_examples) returns (loss_fn, batch)."""
    pretrained: bool = False
    """Load diffusers' DiTTransformer2DModel and its weights from MODEL; the same as --workload diffusers."""

    def __post_init__(self) -> None:
        """Check every field; a pretrained model is of its workload, and lists are made tuples."""
        for name in ("model_options", "objective"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.pretrained and self.workload not in ("dit", PRETRAINED):
            raise UsageError.for_value(
                "workload", self.workload, PRETRAINED, "only it is pretrained; drop --pretrained"
            )
        if self.pretrained or self.workload == PRETRAINED:
            object.__setattr__(self, "pretrained", True)
            object.__setattr__(self, "workload", PRETRAINED)
        if not self.is_custom:
            super().__post_init__()
            return
        assert self.model is not None
        check_spec(self.model)
        self._refuse_given([name for name in OF_MODEL if name != "pretrained"], self.model)

    @property
    def is_custom(self) -> bool:
        """Whether `model` is ``module:callable``, a model of the user's own."""
        return is_custom(self.model, self.pretrained)

    @property
    def model_label(self) -> str:
        """The model for people: its name and what differs from the named sizes; ``module:callable`` as it stands."""
        return str(self.model) if self.is_custom else self.spec.label

    def _refuse_given(self, names: Iterable[str], owner: str) -> None:
        """Raise `UsageError` if one of these options was given, although somebody else decides it."""
        defaults = {field.name: field.default for field in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                fix = f"{owner} decides it; drop the option"
                raise UsageError.for_value(name, getattr(self, name), "no value", fix)


OF_MODEL = tuple(field.name for field in fields(ModelArgs) if field.name != "model")
"""Fields that say which model, beside its name."""


def is_custom(model: str | None, pretrained: bool) -> bool:
    """Return whether a model is named as ``module:callable``."""
    return model is not None and ":" in model and not pretrained


def check_spec(model: str) -> None:
    """Raise `UsageError` unless a name is ``module:callable`` in Python's words."""
    module, _, attribute = model.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
        raise UsageError.for_value("model", model, "module:callable, such as my_package.models:make_model")
