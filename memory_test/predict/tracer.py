"""Writes the log of a step that is only imagined.

Operations run on tensors without data (`FakeTensorMode`). A tensor belongs to the device if it came there by `.to`, or
was made by an operation on one that does; all others are the host's and not logged.
"""

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memory_test.predict.asker import a_model_asks
from memory_test.predict.flops import KERNELS, count_bytes, count_flops
from memory_test.predict.known import Key, KnownResults, call_key
from memory_test.predict.trace import Operation, Storage, Temporaries, Temporary, Trace


@dataclass(frozen=True)
class _Stretch:
    """A part of a trace that left nothing behind but its result, to be written again.

    Attributes:
        storages, operations: Born and run in it.
        events: Index into `storages` and the number of operations begun, by event.
        result: Index into `storages` of the result's; `None`: there is no result.
        like: Shape, stride and dtype of the result.
    """

    storages: list[Storage]
    operations: list[Operation]
    events: list[tuple[int, int]]
    result: int | None
    like: tuple[Any, ...]


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
        self._weight = 1
        self._silent = False
        self._stretches: dict[Any, _Stretch] = {}
        self._results = KnownResults()
        self._operations: dict[Key | None, Operation] = {}
        self._sum: tuple[int | None, int | None] = (None, None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE:  # asked more often than anything is computed
            return _CPU
        with torch._C.DisableTorchFunction():  # what a device means by calls of torch, it said above
            return self._log(func, types, args, kwargs or {})

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Have no compiler kept out at every call: there is none."""
        return False

    def _log(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation and log what it makes."""
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a tensor around others, such as a rank's shard: what it does with them comes here
        name = func._schema.name.removeprefix("aten::")
        tensors: list[Tensor] = []
        key = call_key(func, args, kwargs, tensors)
        out = self._run(func, name, args, kwargs, key, tensors)
        if self._silent or _is_view(func):
            return out
        if not self._host_too and (self._on_host or not self._on_device(tensors)):
            return out
        leaves = [out] if isinstance(out, Tensor) else tree_leaves(out)
        results = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not _is_meta(leaf)]
        results = results[: len(results) - ON_HOST.get(name, 0)]
        found = self._temporaries(name, args, _in_backward()) if self._temporaries else []
        self._note_operation(func, name, args, kwargs, out, tensors, results, key)
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

    def _run(self, func: Any, name: str, args: Any, kwargs: Any, key: Key | None, tensors: list[Tensor]) -> Any:
        """Run the operation; where its result depends on data, return the stand-in's, but to a model's own code."""
        try:
            return self._results.run(func, args, kwargs, key, tensors)
        except Exception as error:
            if name in self._stand_ins and type(error).__name__ in _DATA_DEPENDENT and not a_model_asks():
                return self._stand_ins[name](*args, **kwargs)
            raise

    def _note_operation(
        self,
        func: Any,
        name: str,
        args: Any,
        kwargs: Any,
        out: Any,
        tensors: list[Tensor],
        results: list[Tensor],
        key: Key | None,
    ) -> None:
        if not (results or name in KERNELS or func._schema.is_mutable):
            return
        operation = self._operations.get(key)
        if operation is None:
            flops = count_flops(func, name, args, kwargs, out)
            num_bytes = count_bytes(func, name, args, kwargs, tensors, results)
            # a kernel's class goes by its operands, whatever their products are summed in
            first = results if results and name not in KERNELS else tensors
            operation = Operation(name, flops, num_bytes, first[0].dtype)
            if key is not None:
                self._operations[key] = operation
        self._repeat([operation])

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
        if storage._cdata in self._live:
            self.resized(storage)
        elif storage.nbytes():
            self._follow(storage, self._bear(Storage(storage.nbytes(), self._scope > 0)))

    def resized(self, storage: Any) -> None:
        """Log that a storage of the device may have another size now: the old memory goes, new memory comes."""
        key, size = storage._cdata, storage.nbytes()
        known = self._live.get(key)
        if known is not None and self.trace.storages[known[0]].num_bytes != size:
            self._bury(key, known[0])
            self._follow(storage, self._bear(Storage(size, self._scope > 0)))

    def _follow(self, storage: Any, index: int) -> None:
        """Log the death of a storage that was born as number `index`, when it comes."""
        key = storage._cdata
        self._live[key] = (index, weakref.ref(storage, lambda _: self._bury(key, index)))

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

    @contextlib.contextmanager
    def silence(self) -> Iterator[None]:
        """What is born meanwhile stands for no memory."""
        before, self._silent = self._silent, True
        try:
            yield
        finally:
            self._silent = before

    # --- what is alike is traced once -------------------------------------------------------------------------

    def rounds(self, count: int) -> Iterator[int]:
        """Yield the first two rounds of a loop and the last; the second counts for all that are left out."""
        for index in range(count) if count <= 3 else (0, 1, count - 1):
            before, self._weight = self._weight, self._weight * (count - 2 if index == 1 and count > 3 else 1)
            try:
                yield index
            finally:
                self._weight = before

    def apply(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Return what a function returns; for arguments of shapes that were seen, write its stretch again."""
        key = (function.__code__, self._scope > 0, *map(_described, args))
        try:
            known = self._stretches.get(key)
        except TypeError:  # an argument that cannot be compared
            return function(*args)
        if known is not None and (known.result is None or not torch.is_grad_enabled()):
            return self._write_again(known)
        begin = (len(self.trace.storages), len(self.trace.events), len(self.trace.operations))
        out = function(*args)
        stretch = self._cut(begin, out)
        if stretch is not None:
            self._stretches[key] = stretch
        return out

    def _cut(self, begin: tuple[int, int, int], out: Any) -> _Stretch | None:
        """Return what was written since `begin`, if all that was born in it, but the result, died in it.

        A library's workspace, which stays, is taken once and belongs to no stretch.
        """
        storage, event, operation = begin
        result = self.index(out) if isinstance(out, Tensor) else None
        if (result is None) != (out is None):
            return None
        stay = {i for i in range(storage, len(self.trace.storages)) if _stays(self.trace.storages[i])}
        numbers = {i: n for n, i in enumerate(i for i in range(storage, len(self.trace.storages)) if i not in stay)}
        events, begun = [], []
        for index, count in zip(self.trace.events[event:], self.trace.event_operations[event:], strict=True):
            if index not in stay:
                events.append(index)
                begun.append(count - operation)
        lasting = {index for index, count in Counter(events).items() if count == 1}
        if lasting != ({result} - {None}) or any(index not in numbers for index in events):
            return None
        return _Stretch(
            storages=[self.trace.storages[index] for index in numbers],
            operations=self.trace.operations[operation:],
            events=[(numbers[index], count) for index, count in zip(events, begun, strict=True)],
            result=None if result is None else numbers[result],
            like=() if out is None else _shape(out),
        )

    def _write_again(self, stretch: _Stretch) -> Tensor | None:
        first, run = len(self.trace.storages), 0
        self.trace.storages += stretch.storages
        for index, begun in stretch.events:
            self._repeat(stretch.operations[run:begun])
            run = begun
            self.trace.add(first + index)
        self._repeat(stretch.operations[run:])
        if stretch.result is None:
            return None
        shape, stride, dtype = stretch.like
        with self.silence():
            made = torch.empty_strided(shape, stride, dtype=dtype)
        self._follow(made.untyped_storage(), first + stretch.result)
        return made

    def _repeat(self, operations: list[Operation]) -> None:
        weight = self._weight
        self.trace.operations += [each if each.count == weight else replace(each, count=weight) for each in operations]

    def stop(self) -> None:
        """Log no more: what dies now dies with the program."""
        self._live = {}


@cache
def _is_view(func: Any) -> bool:
    """Return whether an operation makes no storage and does no work."""
    return bool(func.is_view)


def _stays(storage: Storage) -> bool:
    return storage.temporary is not None and storage.temporary.stays


def _described(value: Any) -> Any:
    """Return an argument with shapes in the place of its tensors."""
    if isinstance(value, Mapping):
        return tuple((name, _described(each)) for name, each in value.items())
    if isinstance(value, tuple):
        return tuple(map(_described, value))
    return _shape(value) if isinstance(value, Tensor) else value


def _shape(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _is_meta(tensor: Tensor) -> bool:
    """Return whether a tensor is on no device at all; to ask a fake one itself is an operation."""
    return tensor.fake_device.type == "meta" if isinstance(tensor, FakeTensor) else tensor.is_meta


def _in_backward() -> bool:
    """Return whether autograd's engine runs: on CUDA in a thread of its own, with its own library handles."""
    task: int = torch._C._current_graph_task_id()
    return task >= 0


_DEVICE, _CPU = torch.ops.prim.device.default, torch.device("cpu")


def _by_autograd() -> bool:
    """Return whether autograd's engine adds: no Python lies between it and the tracer, and no graph is made."""
    frame = sys._getframe(3)
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
