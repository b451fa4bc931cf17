from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.factories import grid, record, write_folder

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "explore_results.ipynb"


@pytest.fixture
def notebook(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return nbformat.read(NOTEBOOK, as_version=4)


def run(notebook, folder):
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_outputs_are_stripped(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_every_figure_is_redrawn_from_the_folder_named(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("RESULTS", str(write_folder(tmp_path / "records", grid())))
    outputs = run(notebook, tmp_path)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6
    assert not [output for output in outputs if output.output_type in ("error", "stream")]


def test_the_first_folder_below_results_is_the_default(notebook, tmp_path, monkeypatch):
    monkeypatch.delenv("RESULTS", raising=False)
    write_folder(tmp_path / "results" / "machine", [record("vanilla"), record("ghost"), record("ghost", 8)])
    outputs = run(notebook, tmp_path)
    assert any("Records: 3; groups: 1" in output.get("data", {}).get("text/markdown", "") for output in outputs)
