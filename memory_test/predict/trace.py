"""The log of a step that is only imagined: which storages are born and die, in which order, and what is computed.

Operations run on tensors without data (`FakeTensorMode`). A tensor belongs to the device if it came there by `.to`, or
was made by an operation on one that does; all others are the host's and not logged.
"""

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Rule = Callable[..., int]
"""Bytes of a temporary from integers, such as its operation's sizes."""


@dataclass(frozen=True)
class Temporary:
    """Memory that an operation takes inside, which no tensor shows.

    Attributes:
        rule, numbers: Its bytes are ``rule(*numbers)``; kept apart, since bytes need not be affine in the batch.
        before: Whether it is taken before the operation's results.
        last: Number, among those taken after the results, of the last one that it lives to see; `None`: lives until
            the operation ends.
        stays: Whether it is kept, as a library's workspace is.
    """

    rule: Rule
    numbers: tuple[int, ...]
    before: bool = False
    stays: bool = False
    last: int | None = None


Temporaries = Callable[[str, Sequence[Any], bool], list[Temporary]]
"""From an operation's name and arguments, and whether it runs in a backward, to what it takes inside."""


@dataclass(frozen=True)
class Storage:
    """What was born.

    Attributes:
        num_bytes: Its size.
        scope: Whether it was made for norms or Gram matrices.
        temporary: The rule of its size, if it is one.
    """

    num_bytes: int
    scope: bool
    temporary: Temporary | None = None


@dataclass(frozen=True)
class Operation:
    """One operation on the device.

    Attributes:
        name: In ATen, without the overload.
        flops: By `torch.utils.flop_counter`'s formulas.
        num_bytes: Read and written: operands and results once each.
        dtype: Of the first result.
    """

    name: str
    flops: int
    num_bytes: int
    dtype: torch.dtype


@dataclass
class Trace:
    """A run of operations.

    Attributes:
        storages: In order of birth.
        events: Index of a storage, at its birth and again at its death.
        operations: In order.
        event_operations: By event: how many operations had begun.
    """

    storages: list[Storage] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    event_operations: list[int] = field(default_factory=list)

    def add(self, event: int) -> None:
        """Append an event."""
        self.events.append(event)
        self.event_operations.append(len(self.operations))

    def drop_last(self) -> None:
        """Undo the last event, the birth of the last storage."""
        self.storages.pop()
        self.events.pop()
        self.event_operations.pop()


class Tracer(TorchDispatchMode):  # type: ignore[misc]
    """Writes a `Trace` of what runs while it is entered.

    Args:
        temporaries: What operations take inside.
        stand_ins: By operation: what to return where the result's size depends on data.
        host_too: Whether the host's tensors are logged as well: the device is the CPU.
    """

    def __init__(
        self,
        temporaries: Temporaries | None = None,
        stand_ins: dict[str, Callable[..., Any]] | None = None,
        *,
        host_too: bool = False,
    ) -> None:
        super().__init__()
        self.trace = Trace()
        self._temporaries, self._stand_ins, self._host_too = temporaries, stand_ins or {}, host_too
        self._live: dict[int, tuple[int, Any]] = {}
        self._scope = 0
        self._on_host = 0
        self._sum: tuple[int | None, int | None] = (None, None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        out = self._run(func, name, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not self._host_too and (self._on_host or not self._on_device(tensors)):
            return out
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and not leaf.is_meta]
        results = results[: len(results) - ON_HOST.get(name, 0)]
        found = self._temporaries(name, args, _in_backward()) if self._temporaries else []
        self._note_operation(func, name, args, kwargs, out, tensors, results)
        taken = [self._take(each) for each in found if each.before]
        for tensor in results:
            self.see(tensor)
        if name == "add" and _by_autograd():
            self._sum = (self.index(args[0]), self.index(out))
        for number, each in enumerate(each for each in found if not each.before):
            taken.append(self._take(each))
            taken = self._release(taken, number)
        self._release(taken, None)
        return out

    def _run(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Run the operation; where its result depends on data, return the stand-in's."""
        try:
            return func(*args, **kwargs)
        except Exception as error:
            if name in self._stand_ins and type(error).__name__ in _DATA_DEPENDENT:
                return self._stand_ins[name](*args, **kwargs)
            raise

    def _note_operation(
        self, func: Any, name: str, args: Any, kwargs: Any, out: Any, tensors: list[Tensor], results: list[Tensor]
    ) -> None:
        if func.is_view or not results:
            return
        flops = _flops(func, name, args, kwargs, out)
        num_bytes = sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in (*tensors, *results))
        self.trace.operations.append(Operation(name, flops, num_bytes, results[0].dtype))

    def _on_device(self, tensors: list[Tensor]) -> bool:
        """Return whether an operation on these runs on the device: one of them is there, or it makes the first."""
        return not tensors or any(self._key(tensor) in self._live for tensor in tensors)

    @staticmethod
    def _key(tensor: Tensor) -> int:
        key: int = tensor.untyped_storage()._cdata
        return key

    def see(self, tensor: Tensor) -> None:
        """Log the birth of a tensor's storage on the device, unless it is there; if its size changed, it is new."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._live.get(key)
        if known is not None:
            if self.trace.storages[known[0]].num_bytes == size:
                return
            self._bury(key, known[0])
        if size:
            index = self._bear(Storage(size, self._scope > 0))
            self._live[key] = (index, weakref.ref(storage, lambda _, k=key, i=index: self._bury(k, i)))  # type: ignore[misc]

    def _bear(self, storage: Storage) -> int:
        self.trace.storages.append(storage)
        self.trace.add(len(self.trace.storages) - 1)
        return len(self.trace.storages) - 1

    def _bury(self, key: int, index: int) -> None:
        if self._live.get(key, (None,))[0] == index:
            del self._live[key]
            if not self._reused(index):
                self.trace.add(index)

    def _reused(self, index: int) -> bool:
        """Return whether the storage that dies becomes the sum that was born last.

        Autograd adds up a tensor's gradients in the first one, if nothing else holds that, and if it is no fake one
        (torch/csrc/autograd/input_buffer.cpp). So what dies as soon as a sum exists would have become it.
        """
        first, total = self._sum
        if total is None or first != index or self.trace.events[-1] != total:
            return False
        if self.trace.storages[total].num_bytes != self.trace.storages[index].num_bytes:
            return False
        self._sum = (None, None)
        self.trace.drop_last()
        key, storage = next((key, ref()) for key, (known, ref) in self._live.items() if known == total)
        self._live[key] = (index, weakref.ref(storage, lambda _: self._bury(key, index)))
        return True

    def _release(self, taken: list[tuple[int, Temporary]], number: int | None) -> list[tuple[int, Temporary]]:
        """End the temporaries that do not outlive number so-and-so; return the others."""
        kept = []
        for index, temporary in taken:
            if temporary.last != number:
                kept.append((index, temporary))
            elif not temporary.stays:
                self.trace.add(index)
        return kept

    def _take(self, temporary: Temporary) -> tuple[int, Temporary]:
        num_bytes = temporary.rule(*temporary.numbers)
        return self._bear(Storage(num_bytes, self._scope > 0, temporary)), temporary

    # --- the rest of the imagined machine ---------------------------------------------------------------------

    def index(self, tensor: Tensor) -> int | None:
        """Return the index of a tensor's storage; `None` for the host's."""
        known = self._live.get(self._key(tensor))
        return None if known is None else known[0]

    @property
    def live_bytes(self) -> int:
        """Bytes of the storages that live now."""
        return sum(self.trace.storages[index].num_bytes for index, _ in self._live.values())

    @contextlib.contextmanager
    def norm_scope(self) -> Iterator[None]:
        """What is born meanwhile is for norms or Gram matrices."""
        self._scope += 1
        try:
            yield
        finally:
            self._scope -= 1

    @contextlib.contextmanager
    def host(self) -> Iterator[None]:
        """What is born meanwhile is the host's."""
        self._on_host += 1
        try:
            yield
        finally:
            self._on_host -= 1

    def stop(self) -> None:
        """Log no more: what dies now dies with the program."""
        self._live = {}


def _in_backward() -> bool:
    """Return whether autograd's engine runs: on CUDA in a thread of its own, with its own library handles."""
    task: int = torch._C._current_graph_task_id()
    return task >= 0


def _by_autograd() -> bool:
    """Return whether autograd's engine adds: no Python lies between it and the tracer, and no graph is made."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.endswith(_WRAPPERS):
        frame = frame.f_back
    return frame.f_code is _ENGINE and not frame.f_locals["args"][_CREATE_GRAPH]


_WRAPPERS = ("_dynamo/eval_frame.py", "torch/_compile.py")
"""What keeps `torch.compile` out of a dispatch mode, and lies between it and its caller."""

_ENGINE = _engine_run_backward.__code__
_CREATE_GRAPH = 2
"""Which argument of the engine, after the outputs, asks for a graph of the backward."""

ON_HOST = {"_scaled_dot_product_efficient_attention": 2}
"""By operation: how many of its last results are the host's on CUDA, a generator's state that is not used."""

_DATA_DEPENDENT = frozenset({"DataDependentOutputException", "DynamicOutputShapeException"})

PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""By product: which argument's last dimension is summed over. Their overloads do not all fit the counter's formulas."""


def _flops(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    """Return an operation's FLOPs; 0 where nobody counts them."""
    if name in PRODUCTS:
        inner: int = args[PRODUCTS[name]].shape[-1]
        return 2 * int(out.numel()) * inner
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0
