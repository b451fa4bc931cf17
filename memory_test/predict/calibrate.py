"""`memory-test calibrate`: rates that kernels of DiT's shapes reach on the device at hand, and how well steps follow.

Each class of kernels is timed alone, by `torch.utils.benchmark`; whole steps, which took no part in that, are then
predicted with the rates and measured in workers of their own: their error is what the rates are worth.
"""

import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from dit_dp.errors import UsageError
from memory_test.core.config import ExperimentConfig
from memory_test.core.environment import capture, default_device
from memory_test.core.schema import Environment
from memory_test.core.store import write_text
from memory_test.core.units import MIB
from memory_test.predict import rates
from memory_test.predict.args import CalibrateArgs
from memory_test.predict.cards import CARDS, Card
from memory_test.predict.predict import imagined_run
from memory_test.predict.roofline import Rates, step_seconds
from memory_test.sweep.process import default_threads, work

PRODUCTS = [(4096, 1152, 4608), (4096, 1152, 1152), (2048, 384, 1536), (1024, 768, 3072)]
"""(rows, inputs, outputs) of the products that are timed: DiT's layers, at a few batches."""

ATTENTION = [(8, 16, 256, 72), (4, 6, 256, 64), (2, 16, 1024, 72)]
"""(N, heads, T, width of a head)."""

COPIED = {"cuda": 256 * MIB, "cpu": 64 * MIB}


def run_calibrate(args: CalibrateArgs) -> int:
    """Calibrate, write the file, say how well steps are predicted.

    What is finished is kept beside it (`unfinished`), so that a run that was stopped goes on there.
    """
    device = default_device() if args.device == "auto" else args.device
    if device == "cuda" and default_device() != "cuda":
        raise UsageError.for_value("device", "cuda", "cpu", "no CUDA device can be used here")
    torch.set_num_threads(1 if device == "cpu" else default_threads())
    card = _card(args.card) if device == "cuda" else None
    keeper = unfinished(args.output)
    calibration = _begun(keeper, device, card, args)
    found = Rates(**calibration.rates, calibrated=True)
    for config in _cells(device, quick=args.quick)[len(calibration.cells) :]:
        cells = [*calibration.cells, _try(config, card, found, device)]
        calibration = dataclasses.replace(calibration, cells=cells)
        write_text(keeper, rates.dump(calibration))
    write_text(args.output, rates.dump(calibration))
    keeper.unlink(missing_ok=True)
    for cell in calibration.cells:
        sys.stdout.write(
            f"{cell.experiment:<14} b{cell.batch_size:<4} {cell.dtype:<8} predicted {cell.predicted_s:.4f} s, "
            f"measured {cell.measured_s:.4f} s, off by {cell.error:.1%}\n"
        )
    sys.stdout.write(f"calibration: {args.output}\n")
    return 0


def unfinished(output: Path) -> Path:
    """Return where a calibration is kept until it is complete."""
    return output.with_name(f".{output.stem}.unfinished.json")


def _begun(keeper: Path, device: str, card: Card | None, args: CalibrateArgs) -> rates.Calibration:
    """Return a calibration that was stopped, if it is of this environment, else a new one, without cells."""
    environment = capture(device)
    if keeper.exists() and not args.quick:
        kept = rates.load(keeper)
        if Environment(**kept.environment).identity() == environment.identity():
            return kept
    found = measure_rates(device, args.seconds)
    return rates.Calibration(
        card="cpu" if card is None else card.name,
        rates={name: value for name, value in vars(found).items() if name != "calibrated"},
        cells=[],
        environment=dataclasses.asdict(environment),
    )


def measure_rates(device: str, seconds: float) -> Rates:
    """Return the median rates over the shapes of each class."""
    half = torch.bfloat16
    return Rates(
        product_float32=_median(_product_rate(shape, torch.float32, device, seconds) for shape in PRODUCTS),
        product_half=_median(_product_rate(shape, half, device, seconds) for shape in PRODUCTS),
        attention_float32=_median(_attention_rate(shape, torch.float32, device, seconds) for shape in ATTENTION),
        attention_half=_median(_attention_rate(shape, half, device, seconds) for shape in ATTENTION),
        bandwidth=_bandwidth(device, seconds),
        launch_s=_launch_seconds(device, seconds),
        calibrated=True,
    )


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def _seconds(run: Callable[[], object], seconds: float) -> float:
    """Return the median time of a call; torch's timer waits for the device."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=seconds).median)


def _product_rate(shape: tuple[int, int, int], dtype: torch.dtype, device: str, seconds: float) -> float:
    rows, inputs, outputs = shape
    a, b = (
        torch.randn(rows, inputs, device=device, dtype=dtype),
        torch.randn(inputs, outputs, device=device, dtype=dtype),
    )
    out = torch.empty(rows, outputs, device=device, dtype=dtype)
    return 2 * rows * inputs * outputs / _seconds(lambda: torch.mm(a, b, out=out), seconds)


def _attention_rate(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, seconds: float) -> float:
    """Return the rate of a forward; the backward's is close to it."""
    examples, heads, positions, width = shape
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    flops = 4 * examples * heads * positions**2 * width
    return flops / _seconds(lambda: F.scaled_dot_product_attention(q, k, v), seconds)


def _bandwidth(device: str, seconds: float) -> float:
    """Return bytes read and written a second by a sum of two arrays too large for a cache."""
    count = COPIED[device] // 4
    a, b, out = (torch.zeros(count, device=device) for _ in range(3))
    return 12 * count / _seconds(lambda: torch.add(a, b, out=out), seconds)


def _launch_seconds(device: str, seconds: float) -> float:
    """Return the host's time for an operation that has next to nothing to do."""
    x = torch.zeros(8, device=device)
    return _seconds(lambda: x.add_(1), seconds)


def _card(name: str | None) -> Card:
    """Return the card that this device is."""
    if name is not None:
        return CARDS[name]
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    near = [
        card
        for card in CARDS.values()
        if card.num_sms == properties.multi_processor_count
        and abs(card.memory_bytes - properties.total_memory) < 0.05 * properties.total_memory
    ]
    if len(near) != 1:
        raise UsageError.for_value("card", properties.name, CARDS, "say which it is, --card NAME")
    return near[0]


def _cells(device: str, *, quick: bool) -> list[ExperimentConfig]:
    """Return the whole steps that the rates are tried on."""
    sizes: dict[str, object] = {"model": "DiT-XL/2", "num_iter": 5}
    if device == "cpu":
        sizes = {"model": "DiT-S/2", "depth": 4, "num_iter": 3, "num_threads": 1}
    if quick:
        sizes = {**sizes, "model": "DiT-S/2", "depth": 1, "image_size": 128, "num_iter": 1}
    dtypes = ("float32", "bf16") if device == "cuda" else ("float32",)
    batches = [8, 16] if device == "cuda" else [2, 4]
    methods = ["vanilla", "bookkeeping", "ghost"]
    if quick:
        batches, methods = batches[:1], methods[:2]
    made = [
        {"experiment": method, "dtype": dtype, "batch_size": batch, "device": device, **sizes}
        for method in methods
        for dtype in dtypes
        for batch in batches
    ]
    return [ExperimentConfig(**values) for values in made]  # type: ignore[arg-type]


def _try(config: ExperimentConfig, card: Card | None, found: Rates, device: str) -> rates.Cell:
    """Predict a step and measure it."""
    run = imagined_run(config.resolve(device=device, num_threads=1), card, 2, whole=False, rates=found)
    outcome = work(config, "measure")
    if outcome.status != "ok" or outcome.answer is None:
        raise UsageError(f"calibrate: {config.experiment} ended in {outcome.status}: {outcome.failure().message}")
    times = outcome.answer["repeat"]["step_times_s"]
    return rates.Cell(
        experiment=config.experiment,
        batch_size=config.batch_size,
        dtype=config.dtype,
        predicted_s=step_seconds(run.trace, run.places, found),
        measured_s=statistics.median(times),
    )
