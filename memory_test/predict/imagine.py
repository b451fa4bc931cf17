"""A device that is not there: tensors without data stand for its own, and calls of torch mean what they would on it.

Fake tensors say they are on the CPU: autograd refuses, or dies on, fake CUDA tensors without CUDA (torch 2.11 to 2.13).
So what CUDA does otherwise is done here: attention picks CUDA's kernel, autocast follows CUDA's list, ``.to("cuda")``
brings a host's tensor to the device, and engines are told that they are on CUDA.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from dit_dp.clipping.contributions import float32
from dit_dp.clipping.hardware import Hardware, imagined
from memory_test.predict.attention import attend
from memory_test.predict.cards import Card
from memory_test.predict.fakes import workable
from memory_test.predict.tracer import Tracer

T = TypeVar("T")
Cost = Callable[[str, int, Any], float]


class ImaginedHardware(Hardware):
    """What engines are told.

    Args:
        tracer: Knows what lives on the device.
        card: Which card; `None`: the CPU of this machine.
        rule_seconds: What norm rules cost on it.
        whole: Whether trials whose result is known are made all the same, for what they take.
    """

    def __init__(self, tracer: Tracer, card: Card | None, rule_seconds: Cost, whole: bool) -> None:
        self._tracer, self._card = tracer, card
        self.rule_seconds = rule_seconds
        self.has_data = whole

    def is_cuda(self, tensor: Tensor) -> bool:
        """Return whether the device is CUDA's."""
        return self._card is not None

    def free_bytes(self, device: torch.device) -> int:
        """Return what the card has beyond what lives on it; on the CPU, what this machine has."""
        if self._card is None:
            return super().free_bytes(device)
        return self._card.usable_bytes - self._tracer.live_bytes

    def holds(self, condition: Tensor, *, usually: bool) -> bool:
        """Return the usual answer."""
        return usually

    def later(self, condition: Tensor, *, usually: bool) -> Callable[[], bool]:
        """Return who gives the usual answer."""
        return lambda: usually

    def with_data(self) -> contextlib.AbstractContextManager[object]:
        """Leave the imagined device."""
        return _as_it_is()

    def norm_scope(self) -> contextlib.AbstractContextManager[object]:
        """Tell the tracer."""
        return self._tracer.norm_scope()

    def rounds(self, count: int) -> Iterable[int]:
        """Run a few."""
        return self._tracer.rounds(count)

    def apply(self, function: Callable[..., T], *args: Any) -> T:
        """Run it once for arguments of these shapes."""
        result: T = self._tracer.apply(function, args)
        return result


@contextlib.contextmanager
def imagine(tracer: Tracer, card: Card | None, rule_seconds: Cost, *, whole: bool = True) -> Iterator[None]:
    """Run what is inside on a device that is not there.

    Args:
        tracer: Writes the log.
        card: Which card; `None`: the CPU of this machine.
        rule_seconds: What norm rules cost on it.
        whole: Whether trials whose result is known are made all the same.
    """
    calls = _Calls(tracer, card)
    with (
        workable(),
        imagined(ImaginedHardware(tracer, card, rule_seconds, whole)),
        FakeTensorMode(allow_non_fake_inputs=True),
        tracer,
        calls,
        _also_in_backward(calls),
        _resizes_seen(tracer),
    ):
        yield


@contextlib.contextmanager
def _also_in_backward(mode: TorchFunctionMode) -> Iterator[None]:
    """Have a mode see what a backward calls, recomputation and engines: to torch it is all inside one call."""
    autograd: Any = torch.autograd
    run = autograd._engine_run_backward

    def seen(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run(*args, **kwargs)

    autograd._engine_run_backward = seen
    try:
        yield
    finally:
        autograd._engine_run_backward = run


@contextlib.contextmanager
def _resizes_seen(tracer: Tracer) -> Iterator[None]:
    """Have storages that are emptied and filled again logged: it is no operation, and how FSDP2 frees what it gathered.

    **Edge cases**: a storage of no bytes is still the device's.
    """
    storage: Any = torch.UntypedStorage
    resize = storage.resize_

    def seen(self: Any, size: int) -> Any:
        result = resize(self, size)
        tracer.resized(self)
        return result

    storage.resize_ = seen
    try:
        yield
    finally:
        del storage.resize_


@contextlib.contextmanager
def _as_it_is() -> Iterator[None]:
    """Run what is inside on tensors with data."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def on_this_machine(cost: Cost) -> Cost:
    """Return a cost that is measured here, on tensors with data, also while a device is imagined."""

    def measured(rule: str, batch: int, call: Any) -> float:
        with _as_it_is():
            return cost(rule, batch, call)

    return measured


class _Calls(TorchFunctionMode):
    """Calls of torch that mean something else on the imagined device."""

    def __init__(self, tracer: Tracer, card: Card | None) -> None:
        super().__init__()
        self._tracer, self._card = tracer, card

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _MOVES:
            return self._move(func, args, kwargs)
        if func in _FACTORIES and kwargs.get("device") is None:
            with self._tracer.host():
                return func(*args, **kwargs)
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if self._card is not None:
            if func is F.scaled_dot_product_attention:
                return attend(self._card, *args, **kwargs)
            if torch.is_autocast_enabled("cpu") and func in _FLOAT32_ON_CUDA:
                args, kwargs = _raised(args), _raised(kwargs)
                with torch.autocast("cpu", enabled=False):
                    return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Bring a host's tensor to the device where a device is named; casts are as everywhere."""
        tensor, *rest = args
        if func is Tensor.cuda:
            return self._bring(tensor)
        copy: bool = kwargs.pop("copy", False)
        parsed: tuple[Any, ...] = torch._C._nn._parse_to(*rest, **kwargs)
        device, dtype = parsed[:2]
        if device is not None and device.type == "meta":
            with self._tracer.host():
                return func(*args, **kwargs)
        if device is not None:
            tensor = self._bring(tensor)
        return tensor if dtype is None and not copy else tensor.to(dtype or tensor.dtype, copy=copy)

    def _bring(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device: itself if it is there or a parameter, which stays one; else a copy."""
        known = isinstance(tensor, FakeTensor) and (
            isinstance(tensor, nn.Parameter) or tensor.requires_grad or self._tracer.index(tensor) is not None
        )
        made = tensor if known else torch.empty_like(tensor).requires_grad_(tensor.requires_grad)
        self._tracer.see(made)
        return made


_MOVES = (Tensor.to, Tensor.cuda)

_FACTORY_NAMES = (
    "empty empty_strided zeros ones full eye arange linspace logspace rand randn randint randperm normal "
    "tensor scalar_tensor as_tensor from_numpy"
)
_FACTORIES = frozenset(getattr(torch, name) for name in _FACTORY_NAMES.split())
"""Without a device named, what they make is the host's."""


def _names_cuda(device: Any) -> bool:
    return device is not None and not isinstance(device, int) and torch.device(device).type == "cuda"


def _raised(values: Any) -> Any:
    """Return arguments with half-precision tensors as float32."""
    if isinstance(values, dict):
        return {name: _raised(value) for name, value in values.items()}
    if isinstance(values, (tuple, list)):
        return type(values)(_raised(value) for value in values)
    return float32(values) if isinstance(values, Tensor) else values


_FLOAT32_NAMES = """
acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow prod sum cumprod cumsum norm renorm
dist cdist pdist softplus softmax log_softmax softmin layer_norm group_norm cosine_similarity normalize logsumexp
poisson_nll_loss cosine_embedding_loss nll_loss hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss
cross_entropy margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss
binary_cross_entropy_with_logits
"""
"""Autocast runs these in float32 on CUDA (https://docs.pytorch.org/docs/stable/amp.html), not on the CPU."""


_FLOAT32_ON_CUDA = frozenset(
    getattr(place, name) for place in (torch, F, Tensor) for name in _FLOAT32_NAMES.split() if hasattr(place, name)
) | {Tensor.__pow__, Tensor.__rpow__}
