"""What `memory-test inspect` takes. No torch, so that ``--help`` answers at once."""

from dataclasses import dataclass

from dit_dp import validate
from memory_test.core.model_args import ModelArgs


@dataclass(frozen=True, kw_only=True)
class InspectArgs(ModelArgs):
    """Show a model's modules, its trainable parameters and which method supports which layer."""

    model: str | None = None
    """Name of the model's size: DiT-{S,B,L,XL}/{2,4,8}, DDT-{S,B,L,XL}/1, Set/2, Panda/4; default: the workload's.
    With --pretrained a hub name or a local folder. Or module:callable of your own, which returns an nn.Module,
    (nn.Module, inputs) with inputs a tuple or dict of example tensors, or (nn.Module, loss_fn, batch)."""
    max_depth: int = 3
    """Levels of the printed module tree; the JSON document always holds all of them."""
    json: bool = False
    """Write one JSON document instead of text."""

    def __post_init__(self) -> None:
        validate.integer("max_depth", self.max_depth, minimum=0)
        super().__post_init__()
