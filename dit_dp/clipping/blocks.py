"""Blocks whose activations are not kept: run without a graph, recomputed when their backward comes.

Chen, Xu, Zhang and Guestrin, "Training deep nets with sublinear memory cost" (arXiv 1604.06174), for a backward that
has to be walked twice: once for norms, once for the clipped sum. A block is called by its inputs and outputs alone;
what it reads from outside (a closure, another module's output kept as an attribute) would not be differentiated.
"""

import contextlib
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dit_dp.clipping.compiled import outside_graphs
from dit_dp.clipping.probe import Prober
from dit_dp.errors import UnsupportedModelError


@dataclass
class Block:
    """A module that runs as one step of a chain.

    Attributes:
        name: Its path in the model.
        module: The module.
        stored: Keep its graph between forward and backward; if not, recompute it.
        booked: Book what the clipped sum needs from it in the first backward; if not, recompute it for that.
        forward: Its own forward while another stands in for it.
    """

    name: str
    module: nn.Module
    stored: bool = False
    booked: bool = False
    forward: Callable[..., Any] | None = None

    @property
    def as_written(self) -> bool:
        """Whether it runs as without an engine: its graph is kept, and so is what the clipped sum needs."""
        return self.stored and self.booked


class Owner(Protocol):
    """What an engine offers to its blocks: a scalar that needs a gradient, and how many contributions it got so far."""

    anchor: Tensor
    num_received: int

    @property
    def prober(self) -> Prober | None:
        """What runs blocks while there is a trial."""

    def inside(self, block: Block) -> contextlib.AbstractContextManager[None]:
        """Say that layers called or back-propagated meanwhile belong to a block."""

    def revisit(self, call: "BlockCall") -> None:
        """Take note of a call that was differentiated for norms alone."""


class BlockCall:
    """One call of a block: its inputs, the state it ran in, and, after its backward, its outputs' gradients."""

    def __init__(self, block: Block, owner: Owner, leaves: list[Any], spec: TreeSpec) -> None:
        self.block, self.owner, self.spec = block, owner, spec
        self.leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._versions = self._versions_now()
        self.differentiable = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves]
        self.gradients: tuple[Tensor | None, ...] = ()
        self.out_spec: TreeSpec | None = None
        self._num_received = 0
        self._devices = sorted(
            {leaf.device for leaf in self.leaves if isinstance(leaf, Tensor) and leaf.is_cuda}, key=str
        )
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")
        ]
        self._random = (torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in self._devices])

    def _versions_now(self) -> list[int | None]:
        return [leaf._version if isinstance(leaf, Tensor) else None for leaf in self.leaves]

    def run(self, leaves: list[Any]) -> list[Any]:
        """Run the module's own forward; return its outputs as a flat list."""
        args, kwargs = tree_unflatten(leaves, self.spec)
        assert self.block.forward is not None
        outputs, self.out_spec = tree_flatten(self.block.forward(*args, **kwargs))
        return outputs

    def run_with_graph(self, *, with_inputs: bool) -> tuple[list[Any], list[Any]]:
        """Run it with a graph of its own; return (inputs, outputs), both flat.

        Args:
            with_inputs: Whether the inputs' gradients are wanted too.
        """
        leaves = [
            leaf.detach().requires_grad_() if with_inputs and wanted else leaf
            for leaf, wanted in zip(self.leaves, self.differentiable, strict=True)
        ]
        with torch.enable_grad():
            return leaves, self.run(leaves)

    def run_again(self, *, with_inputs: bool) -> tuple[list[Any], list[Any]]:
        """Do the same in the state of random numbers and autocast in which it first ran.

        Raises:
            UnsupportedModelError: An input was changed in place since: it would run on other numbers.
        """
        if self._versions_now() != self._versions:
            raise UnsupportedModelError(
                f"model: an input of block {self.block.name} is changed in place after the call, so it cannot be "
                f"recomputed; make a new tensor there, such as x = x + h for x += h"
            )
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(self._devices))
            torch.set_rng_state(self._random[0])
            for device, state in zip(self._devices, self._random[1], strict=True):
                torch.cuda.set_rng_state(state, device)
            for kind, enabled, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            return self.run_with_graph(with_inputs=with_inputs)

    def differentiate_again(self, part: Callable[[Tensor], Tensor], sliced: Sequence[bool]) -> None:
        """Walk its backward once more, for the parameters alone and for some of the units.

        Args:
            part: Takes those units' share of a tensor whose first dimension is rows or units.
            sliced: Which of the inputs are such tensors; all gradients are.

        Raises:
            UnsupportedModelError: Other layers were differentiated than the first time.
        """
        whole, before = self.leaves, self.owner.num_received
        with self.owner.inside(self.block):
            try:
                self.leaves = [part(leaf) if cut else leaf for leaf, cut in zip(whole, sliced, strict=True)]
                _, outputs = self.run_again(with_inputs=False)
            finally:
                self.leaves = whole
            _backward(outputs, tuple(None if g is None else part(g) for g in self.gradients))
        if self.owner.num_received - before != self._num_received:
            raise UnsupportedModelError(
                f"model: block {self.block.name} differentiates other layers when its inputs need no gradient, as "
                f"reentrant checkpointing inside it does; drop that, since lean recomputes the block anyway, or "
                f"checkpoint with use_reentrant=False"
            )

    def differentiate(self, graph: tuple[list[Any], list[Any]], gradients: tuple[Tensor | None, ...]) -> None:
        """Walk its backward the first time, for the parameters and the inputs."""
        before = self.owner.num_received
        _backward(graph[1], gradients)
        self.gradients, self._num_received = gradients, self.owner.num_received - before


def _backward(outputs: list[Any], gradients: tuple[Tensor | None, ...]) -> None:
    """Back-propagate what there is to back-propagate."""
    pairs = [
        (output, gradient)
        for output, gradient in zip(outputs, gradients, strict=True)
        if isinstance(output, Tensor) and output.requires_grad and gradient is not None
    ]
    if pairs:
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))  # type: ignore[arg-type]


class _Recomputed(torch.autograd.Function):
    """A call of a block as one node of the graph; leaves come flat, so that autograd sees every tensor."""

    @staticmethod
    def forward(ctx: Any, call: BlockCall, anchor: Tensor, *leaves: Any) -> tuple[Any, ...]:
        ctx.call, ctx.graph = call, None
        ctx.set_materialize_grads(False)
        if call.block.stored:
            with call.owner.inside(call.block):
                ctx.graph = call.run_with_graph(with_inputs=True)
            outputs = ctx.graph[1]
        else:
            outputs = call.run(call.leaves)
        detached = tuple(output.detach() if isinstance(output, Tensor) else output for output in outputs)
        ctx.mark_non_differentiable(
            *[o for o in detached if isinstance(o, Tensor) and not (o.is_floating_point() or o.is_complex())]
        )
        return detached

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        call: BlockCall = ctx.call
        with call.owner.inside(call.block):
            graph = ctx.graph or call.run_again(with_inputs=True)
            ctx.graph = None
            call.differentiate(graph, gradients)
        inputs = graph[0]
        del graph
        if not call.block.booked:
            call.owner.revisit(call)
        return None, None, *[leaf.grad if isinstance(leaf, Tensor) else None for leaf in inputs]


def install(block: Block, owner: Owner) -> None:
    """Replace a module's forward by one that is a single node of the graph, unless it is stored and booked."""

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert block.forward is not None
        if not torch.is_grad_enabled():
            return block.forward(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        if owner.prober is not None:
            return owner.prober.block(block.name, block.forward, leaves, args, kwargs)
        if block.as_written:
            return block.forward(*args, **kwargs)
        call = BlockCall(block, owner, leaves, spec)
        outputs = _Recomputed.apply(call, owner.anchor, *leaves)  # type: ignore[no-untyped-call]
        assert call.out_spec is not None
        return tree_unflatten(list(outputs), call.out_spec)

    block.forward = block.module.forward
    block.module.forward = types.MethodType(outside_graphs(forward), block.module)


def stand_in(blocks: Sequence[Block], owner: Owner, *, everywhere: bool) -> None:
    """Install what stands in for blocks' forwards, `everywhere` or where a block is recomputed; uninstall the rest.

    A block without stays open to `torch.compile`.
    """
    for block in blocks:
        if everywhere or not block.as_written:
            if block.forward is None:
                install(block, owner)
        elif block.forward is not None:
            uninstall(block)


def refuse_compiled_in_place(blocks: Iterable[Block]) -> None:
    """Refuse to recompute a block that was compiled around its forward: recomputation would run it as written.

    Raises:
        UnsupportedModelError: There is one; says how to compile it instead.
    """
    for block in blocks:
        if not block.as_written and block.module._compiled_call_impl is not None:
            raise UnsupportedModelError(
                f"model: block {block.name} was compiled in place, which recomputation would undo; put "
                f"torch.compile(block) in its place, or compile the whole model, which leaves it as written"
            )


def uninstall(block: Block) -> None:
    """Give a module its own forward back."""
    assert block.forward is not None
    del block.module.forward
    if getattr(block.forward, "__func__", None) is not type(block.module).forward:  # compiled, or patched by others
        block.module.forward = block.forward
    block.forward = None


def find_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost chains' members: elements of an `nn.ModuleList` or `nn.Sequential` that have layers inside.

    A chain has two or more such elements with trainable parameters; blocks do not lie within blocks.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found) or not isinstance(
            module, (nn.ModuleList, nn.Sequential)
        ):
            continue
        members = [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]
        members = [(path, child) for path, child in members if _is_block(child)]
        if len(members) >= 2:
            found += [path for path, _ in members]
            yield from members


def _is_block(module: nn.Module) -> bool:
    has_layers = any(True for _ in module.children()) and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
    return has_layers and any(p.requires_grad for p in module.parameters())
