"""Imports point one way; what only moves data loads without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = [
    {"dit_dp.errors"},
    {"dit_dp.validate", "dit_dp.console", "dit_dp.files", "dit_dp.lazy"},
    {"dit_dp.clipping", "dit_dp.models", "dit_dp.data", "dit_dp.privacy"},
    {"dit_dp.objectives", "dit_dp.frontends"},
    {"dit_dp.training"},
    {"dit_dp.workloads"},
    {"dit_dp.sampling"},
    {"dit_dp.evaluate"},
    {"dit_dp.trainer"},
    {"dit_dp.sample", "dit_dp.budget", "dit_dp.train"},
    {"dit_dp.cli"},
    {"memory_test.core"},
    {"memory_test.sweep", "memory_test.report", "memory_test.inspection"},
    {"memory_test.compare"},
    {"memory_test.predict"},
    {"memory_test.plan"},
    {"memory_test.doctor"},
    {"memory_test.campaign"},
    {"memory_test.cli"},
    {"memory_test.diffusion_profile"},
]
"""From plain data up to entry points; a layer imports only itself and what stands before it."""

WITHOUT_TORCH = [
    "dit_dp.errors",
    "dit_dp.budget",
    "dit_dp.cli",
    "dit_dp.clipping",
    "dit_dp.models",
    "dit_dp.evaluate",
    "dit_dp.evaluate.args",
    "dit_dp.privacy",
    "dit_dp.frontends",
    "dit_dp.frontends.manifest",
    "dit_dp.objectives.config",
    "dit_dp.sample",
    "dit_dp.sampling",
    "dit_dp.train",
    "dit_dp.trainer.config",
    "dit_dp.trainer.recipes",
    "dit_dp.training.checkpoint_state",
    "dit_dp.training.schedule",
    "dit_dp.workloads",
    "memory_test.campaign.campaign",
    "memory_test.campaign.grids",
    "memory_test.cli",
    "memory_test.compare.compare",
    "memory_test.core.breakdown",
    "memory_test.core.config",
    "memory_test.core.schema",
    "memory_test.core.store",
    "memory_test.core.model_args",
    "memory_test.doctor.args",
    "memory_test.doctor.facts",
    "memory_test.inspection.args",
    "memory_test.plan.args",
    "memory_test.predict.args",
    "memory_test.predict.cards",
    "memory_test.predict.garbage",
    "memory_test.predict.rates",
    "memory_test.report.report",
    "memory_test.sweep.grid",
    "memory_test.sweep.runner",
]


def layer_of(module: str) -> int | None:
    """Return a module's place in `LAYERS`."""
    for index, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return index
    return None


def imports_of(path: Path) -> set[str]:
    """Return the project's modules that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name.split(".")[0] in ("dit_dp", "memory_test")}


def modules() -> list[tuple[str, Path]]:
    """Return every module of the product with its file."""
    found = []
    for package in ("dit_dp", "memory_test"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_point_down(module: str, path: Path) -> None:
    own = layer_of(module)
    if own is None:
        assert module in ("dit_dp", "memory_test"), f"{module} has no layer; add it to LAYERS"
        return
    for imported in imports_of(path):
        place = layer_of(imported)
        if place is None:
            continue
        same_package = imported.split(".")[:2] == module.split(".")[:2]
        assert place < own or same_package or place == own == 2, f"{module} imports {imported}, which is above it"


def test_the_library_never_imports_the_suite() -> None:
    for module, path in modules():
        if module.startswith("dit_dp"):
            assert not any(name.startswith("memory_test") for name in imports_of(path)), module


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_loads_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", [p for _, p in modules()], ids=[n for n, _ in modules()])
def test_files_stay_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 420, f"{path.name} has {lines} lines; split it"
