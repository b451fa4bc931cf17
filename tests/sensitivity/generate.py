"""Random small models of every layer kind, each with a batch and a loss per example; a seed gives the same case.

A new layer kind is one method of `_Builder` whose name is listed under the features that it takes.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dit_dp.models import DiT
from dit_dp.models.dit import randomize_zero_init_
from dit_dp.objectives import DDPMObjective
from memory_test.doctor.case import Case
from tests.sensitivity import pieces

DIT_SHARE = 0.1
"""Share of cases that are a diffusion transformer under its full loss."""

VOCABULARY = 7


@dataclass(frozen=True)
class RandomCase:
    """A case and how often each layer kind is in it."""

    case: Case
    kinds: Counter[str]


@dataclass
class _Builder:
    """Grows a chain of pieces from one kind of features to the next.

    Attributes:
        rng: Decides the architecture.
        shape: Features of one example: (D,), (T, D), (H, W, D) or (C, H, W).
        images: Whether `shape` is (C, H, W).
        kinds: Counts what was built.
    """

    rng: random.Random
    shape: tuple[int, ...]
    images: bool
    kinds: Counter[str] = field(default_factory=Counter)

    def piece(self, nested: bool = False) -> nn.Module:
        """Return a random piece for the present features, and change `shape` to what it makes of them."""
        if not nested and self.rng.random() < 0.25:
            return self._wrapped()
        return self.rng.choice(self._choices())()

    def _choices(self) -> list[Callable[[], nn.Module]]:
        if self.images:
            return [self.conv, self.conv, self.group_norm, self.to_tokens]
        anywhere = [self.linear, self.linear, self.layer_norm, self.rms_norm, self.tied, self.repeated, self.raw]
        by_rank = {1: [], 2: [self.attention, self.mixer, self.pool], 3: [self.to_tokens]}
        return [*anywhere, *by_rank[len(self.shape)]]

    def _wrapped(self) -> nn.Module:
        """Return a piece inside a residual or inside a checkpoint of either kind."""
        before, images = self.shape, self.images
        inner = self.piece(nested=True)
        kind = self.rng.choice(["residual", "checkpoint reentrant", "checkpoint non-reentrant"])
        if kind == "residual" and (self.shape, self.images) != (before, images):
            return inner
        self.kinds[kind] += 1
        if kind == "residual":
            return pieces.Residual(inner)
        return pieces.Checkpointed(inner, use_reentrant=kind == "checkpoint reentrant")

    # --- layers -----------------------------------------------------------------------------------------------

    def linear(self) -> nn.Module:
        width = self.rng.choice([4, 6, 8])
        layer = nn.Linear(self.shape[-1], width, bias=self.rng.random() < 0.8)
        self.shape = (*self.shape[:-1], width)
        self.kinds[f"Linear over {len(self.shape)} leading dimensions"] += 1
        return nn.Sequential(layer, self.rng.choice([nn.GELU(), nn.Tanh(), nn.SiLU()]))

    def conv(self) -> nn.Module:
        channels = self.shape[0]
        groups = self.rng.choice([g for g in (1, 1, 2, 4) if channels % g == 0])
        kernel = (self.rng.choice([1, 2, 3]), self.rng.choice([1, 2, 3]))
        stride, dilation = (self.rng.choice([1, 2]), self.rng.choice([1, 2])), self.rng.choice([1, 2])
        odd = all(dilation * (k - 1) % 2 == 0 for k in kernel)
        same = odd and stride == (1, 1) and self.rng.random() < 0.5
        layer = nn.Conv2d(
            channels,
            groups * self.rng.choice([1, 2]) * 2,
            kernel,
            stride=stride,
            dilation=dilation,
            groups=groups,
            padding="same" if same else self.rng.choice([1, 2, (1, 2)]),
            bias=self.rng.random() < 0.5,
        )
        name = "grouped" if groups > 1 else "strided or dilated" if dilation > 1 or stride != (1, 1) else "plain"
        self.kinds[f"Conv2d, {name}"] += 1
        self.shape = tuple(layer(torch.zeros(1, *self.shape)).shape[1:])
        return nn.Sequential(layer, nn.SiLU())

    def group_norm(self) -> nn.Module:
        affine = self.rng.random() < 0.7
        self.kinds[f"GroupNorm{'' if affine else ' without affine'}"] += 1
        return nn.GroupNorm(
            self.rng.choice([g for g in (1, 2) if self.shape[0] % g == 0]), self.shape[0], affine=affine
        )

    def layer_norm(self) -> nn.Module:
        affine, bias = self.rng.random() < 0.7, self.rng.random() < 0.7
        self.kinds[f"LayerNorm{'' if affine else ' without affine'}"] += 1
        last = self.shape[-self.rng.randint(1, len(self.shape)) :]
        return nn.LayerNorm(last, elementwise_affine=affine, bias=bias)

    def rms_norm(self) -> nn.Module:
        affine = self.rng.random() < 0.7
        self.kinds[f"RMSNorm{'' if affine else ' without affine'}"] += 1
        return nn.RMSNorm(self.shape[-1], elementwise_affine=affine)

    def attention(self) -> nn.Module:
        self.kinds["attention"] += 1
        return pieces.SelfAttention(self.shape[-1], 2)

    def mixer(self) -> nn.Module:
        self.kinds["Linear, not contiguous"] += 1
        return pieces.Mixer(nn.Linear(self.shape[0], self.shape[0]))

    def tied(self) -> nn.Module:
        self.kinds["tied weights"] += 1
        return pieces.Tied(self.shape[-1])

    def repeated(self) -> nn.Module:
        self.kinds["called more than once"] += 1
        pool = len(self.shape) == 2 and self.rng.random() < 0.5
        return pieces.Repeated(nn.Linear(self.shape[-1], self.shape[-1]), self.rng.choice([2, 3]), pool)

    def raw(self) -> nn.Module:
        """Return parameters without a layer: a scale over some of the last dimensions and a shift, or a prefix."""
        self.kinds["raw parameters"] += 1
        if len(self.shape) == 2 and self.rng.random() < 0.5:
            self.shape = (self.shape[0] + 2, self.shape[1])
            return pieces.Prefix(2, self.shape[-1])
        scale = self.shape[self.rng.randint(0, len(self.shape)) :]
        return pieces.Scaled(scale, (1, *self.shape), twice=self.rng.random() < 0.3)

    # --- from one kind of features to another -----------------------------------------------------------------

    def to_tokens(self) -> nn.Module:
        if not self.images:
            height, width, features = self.shape
            self.shape = (height * width, features)
            return pieces.Lambda(lambda x: x.flatten(1, 2))
        channels, height, width = self.shape
        self.images = False
        self.shape = (height, width, channels)
        return pieces.Lambda(lambda x: x.permute(0, 2, 3, 1))

    def pool(self) -> nn.Module:
        self.shape = self.shape[1:]
        return pieces.Lambda(lambda x: x.mean(1))


def random_case(seed: int) -> RandomCase:
    """Return the case of a seed, in float32; N is 2 to 5."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    num_examples = rng.randint(2, 5)
    build = _dit_case if rng.random() < DIT_SHARE else _chain_case
    return build(rng, generator, num_examples)


def _chain_case(rng: random.Random, generator: torch.Generator, num_examples: int) -> RandomCase:
    form = rng.choice(["vectors", "tokens", "grid", "images", "words"])
    shapes: dict[str, tuple[int, ...]] = {
        "vectors": (rng.choice([4, 6]),),
        "tokens": (rng.choice([1, 3, 9]), rng.choice([4, 6])),
        "grid": (2, 3, 4),
        "images": (rng.choice([3, 4]), rng.choice([6, 8]), 8),
        "words": (rng.choice([1, 5]), rng.choice([4, 6])),
    }
    builder = _Builder(rng, shapes[form], images=form == "images")
    start = [_words(builder)] if form == "words" else []
    chain = start + [builder.piece() for _ in range(rng.randint(1, 5))]
    outputs = rng.choice([2, 5])
    head = nn.Linear(torch.Size(builder.shape).numel(), outputs)
    unused = nn.Linear(3, 2) if rng.random() < 0.1 else None
    builder.kinds["unused layer"] += unused is not None
    model = pieces.Network(chain, head, unused)
    _freeze_some(model, rng, builder.kinds)
    ids = _units(rng, generator, num_examples)
    rows = num_examples if ids is None else len(ids)
    if form == "words":
        inputs = torch.randint(0, VOCABULARY, (rows, shapes[form][0]), generator=generator)
    else:
        inputs = torch.randn(rows, *shapes[form], generator=generator)
    target = _scales(rows, generator)[:, None] * torch.randn(rows, outputs, generator=generator)
    if ids is None:
        return RandomCase(Case(model, (inputs, target), pieces.squared_error), +builder.kinds)
    builder.kinds["units of several rows"] += 1
    batch = {"inputs": inputs, "target": target, "row_to_unit": ids}
    return RandomCase(Case(model, batch, pieces.squared_error_of_units, ids), +builder.kinds)


def _words(builder: _Builder) -> nn.Module:
    """Return embeddings of words and of labels, with or without a padding row and a tied linear."""
    padding, tied = builder.rng.random() < 0.3, builder.rng.random() < 0.3
    builder.kinds.update({"Embedding by word": 1, "Embedding by example": 1, "Embedding with padding row": padding})
    builder.kinds["Embedding tied to a Linear"] += tied
    return pieces.Words(VOCABULARY, builder.shape[-1], padding=padding, tied=tied)


def _units(rng: random.Random, generator: torch.Generator, num_units: int) -> Tensor | None:
    """Return the unit of each row for one case in six: one to three rows a unit, in order or shuffled."""
    if rng.random() > 1 / 6:
        return None
    counts = [2, *(rng.randint(1, 3) for _ in range(num_units - 1))]
    ids = torch.arange(num_units).repeat_interleave(torch.tensor(counts))
    return ids if rng.random() < 0.5 else ids[torch.randperm(len(ids), generator=generator)]


def _scales(num_examples: int, generator: torch.Generator) -> Tensor:
    """Return a scale per example over three orders of magnitude, so that some examples clip and some do not."""
    exponents = torch.linspace(-1, 2, num_examples)
    return 10 ** exponents[torch.randperm(num_examples, generator=generator)]


def _freeze_some(model: nn.Module, rng: random.Random, kinds: Counter[str]) -> None:
    """Freeze layers, or all but a layer's bias, of one model in three; something always trains."""
    if rng.random() > 1 / 3:
        return
    bias_only = rng.random() < 0.3
    for name, parameter in list(model.named_parameters()):
        is_bias = name.endswith("bias")
        frozen = not is_bias if bias_only else not name.startswith("head") and rng.random() < 0.3
        parameter.requires_grad_(not frozen)
    kinds["bias-only training" if bias_only else "frozen parts"] += 1


def _dit_case(rng: random.Random, generator: torch.Generator, num_examples: int) -> RandomCase:
    learn_sigma, channels, classes = rng.random() < 0.7, rng.choice([3, 4]), 5
    model = DiT(
        input_size=8,
        patch_size=rng.choice([2, 4, 8]),
        in_channels=channels,
        hidden_size=rng.choice([8, 24]),
        depth=rng.randint(1, 2),
        num_heads=2,
        num_classes=classes,
        learn_sigma=learn_sigma,
        activation_checkpointing=rng.random() < 0.3,
    ).train()
    randomize_zero_init_(model, generator, std=rng.choice([0.02, 0.3]))
    objective = DDPMObjective(learn_sigma=learn_sigma, class_dropout_prob=0.3)
    x0 = torch.randn(num_examples, channels, 8, 8, generator=generator).clamp(-1, 1)
    labels = torch.randint(0, classes, (num_examples,), generator=generator)
    batch = objective.draw(x0, labels, generator)
    batch["noise"] = batch["noise"] * _scales(num_examples, generator).view(-1, 1, 1, 1)
    kinds = Counter({"DiT": 1, "checkpoint non-reentrant": int(model.activation_checkpointing)})
    return RandomCase(Case(model, batch, objective), +kinds)
