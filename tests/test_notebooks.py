"""The notebooks, from start to end in a kernel of their own, at the size of the smoke recipe."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from fake_adbd import have_adb
from nbclient import NotebookClient

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
SMALL = {
    "own_model": {"EPOCHS": 1, "HEAD_EPOCHS": 1},
    "phones": {"RECIPE": "smoke"},
    "quickstart": {"RECIPE": "smoke"},
}


def test_every_notebook_is_run_here():
    assert [path.stem for path in NOTEBOOKS] == sorted(SMALL)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_cleared(path):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert cells
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_pictures(path, tmp_path, monkeypatch):
    if path.stem == "phones" and not have_adb():
        pytest.skip("needs the adb client: Debian package adb")
    notebook = nbformat.read(path, 4)
    for name, value in SMALL[path.stem].items():
        replaced = 0
        for cell in notebook.cells:
            cell.source, count = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value!r} ", cell.source, flags=re.MULTILINE)
            replaced += count
        assert replaced == 1, name
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tflite")]))
    # A cell that fails is often the heir of a command that failed before it: what the commands printed belongs to the message.
    NotebookClient(notebook, timeout=900, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "Traceback" not in printed, printed[-3000:]
    assert not [output.evalue for output in outputs if output.output_type == "error"], printed[-3000:]
    shown = [output["data"] for output in outputs if output.output_type == "display_data"]
    assert any("image/png" in each or "<iframe srcdoc=" in each.get("text/html", "") for each in shown), printed[-3000:]
