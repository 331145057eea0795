"""Every notebook in experiments/ runs from top to bottom; the assert cells in it check what it claims."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
NOTEBOOKS = sorted(EXPERIMENTS.glob("*.ipynb"))


def execute(notebook: Any, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run all cells in a kernel of this very interpreter, whichever kernels the machine has; raises on a cell's error."""
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    spec |= {"display_name": "this", "language": "python"}
    folder = kernels / "kernels" / "this"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(str(spec).replace("'", '"'))
    monkeypatch.setenv("JUPYTER_PATH", str(kernels))
    return NotebookClient(notebook, timeout=300, kernel_name="this", resources={"metadata": {"path": EXPERIMENTS}}).execute()


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = execute(nbformat.read(path, as_version=4), tmp_path, monkeypatch)
    assert any(cell.source.lstrip().startswith("assert") or "\nassert" in cell.source for cell in code(notebook))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_with_its_outputs(path: Path) -> None:
    cells = code(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


def test_a_false_claim_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 + 1 == 3")])
    with pytest.raises(Exception, match="AssertionError"):
        execute(notebook, tmp_path, monkeypatch)
