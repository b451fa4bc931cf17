"""What an operation returns is remembered by the shapes it was given, and is what torch would have returned."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from memory_test.predict.known import KnownResults, call_key

aten = torch.ops.aten

CALLS: dict[str, Callable[[Tensor], tuple[Any, tuple[Any, ...]]]] = {
    "new": lambda x: (aten.mul.Tensor, (x, x)),
    "in place": lambda x: (aten.add_.Tensor, (x, 1)),
    "view": lambda x: (aten.slice.Tensor, (x, 0, 1, 3)),
    "unsafe view": lambda x: (aten._unsafe_view.default, (x, [2, 12])),
    "views": lambda x: (aten.split.Tensor, (x, 2)),
    "several": lambda x: (aten.native_layer_norm.default, (x, [6], None, None, 1e-5)),
    "of a list": lambda x: (aten.cat.default, ([x, x], 1)),
    "nothing": lambda x: (aten._foreach_add_.Scalar, ([x, x], 1)),
    "constructor": lambda x: (aten.zeros.default, ([3],)),
    "some missing": lambda x: (
        aten.convolution_backward.default,
        (
            *[x[None, None]] * 2,
            x[None, None, :1, :1],
            [1],
            [1, 1],
            [0, 0],
            [1, 1],
            False,
            [0, 0],
            1,
            [True, False, True],
        ),
    ),
}


def described(out: Any, x: Tensor) -> Any:
    if isinstance(out, (list, tuple)):
        return type(out), [described(each, x) for each in out]
    if not isinstance(out, Tensor):
        return out
    storage = out.untyped_storage()
    shares = storage._cdata == x.untyped_storage()._cdata
    return out is x, shares, out.shape, out.stride(), out.storage_offset(), out.dtype, out.device, storage.nbytes()


@pytest.mark.parametrize("name", CALLS)
def test_what_is_remembered_is_what_torch_returns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = KnownResults()

    def run(x: Tensor) -> Any:
        func, args = CALLS[name](x)
        tensors: list[Tensor] = []
        key = call_key(func, args, {}, tensors)
        asked: list[Any] = []

        def ask(*args: Any) -> Any:
            asked.append(args)
            return func(*args)

        ask._schema, ask.tags = func._schema, func.tags  # type: ignore[attr-defined]
        return described(known.run(ask, args, {}, key, tensors), x), len(asked)

    with FakeTensorMode():
        first, again = (run(torch.ones(4, 6)) for _ in range(2))
        other, _ = run(torch.ones(4, 6, dtype=torch.float64))
    assert first == (again[0], 1)
    assert again[1] == 0
    assert name in ("nothing", "constructor") or other != again[0]


def test_calls_that_look_alike_are_told_apart() -> None:
    with FakeTensorMode():
        x = torch.ones(4, 6)
        calls: list[tuple[Any, ...]] = [
            (x, 1), (x, 1.0), (x, x), (x.t(), 1), (x[1:], 1), (x[:3], 1), ([x], 1),
            (torch.ones(6)[None].expand(4, 6), 1), (torch.ones(4, 6, requires_grad=True), 1),
        ]  # fmt: skip
        keys = [call_key(aten.mul.Tensor, call, {}, []) for call in calls]
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_what_data_decides_and_what_is_no_fake_tensor_is_asked_each_time() -> None:
    known = KnownResults()
    assert call_key(aten.mul.Tensor, (torch.ones(2), 1), {}, []) is None
    with FakeTensorMode():
        assert call_key(aten.mul.Tensor, (torch.tensor(2.0), 1), {}, []) is None, "a constant is computed with"
        x = torch.ones(2, 3)
        for func, args in ((aten.unsqueeze_.default, (x, 0)), (aten.resize_.default, (x, [7]))):
            key = call_key(func, args, {}, [])
            known.run(func, args, {}, key, [x])
            assert known._known[key] is None
