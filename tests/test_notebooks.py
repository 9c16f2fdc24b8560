"""The notebooks, executed from top to bottom on a small data folder and short runs; and what is kept of them."""
import os
from pathlib import Path

import nbclient
import nbformat
import pytest

from conftest import PROJECT, make_small_pictures, run

NOTEBOOKS = PROJECT / "notebooks"
NAMES = ["spectrograms", "augmentation", "results"]
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def runs_dir(shared_root, pristine_root, tmp_path_factory) -> Path:
    """Three runs of the real cnn8: one of two folds, one of one, and one on other data."""
    runs_dir = tmp_path_factory.mktemp("notebooks") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        make_small_pictures(patch)
        for name, data, folds in (("other", pristine_root, [1]), ("first", shared_root, [1, 2]), ("second", shared_root, [1])):
            run("--data", data, "--epochs", 1, "--views", 1, "--fold", *folds, "--run-dir", runs_dir / name)
    return runs_dir


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebooks_run_from_top_to_bottom(name, shared_root, runs_dir, monkeypatch):
    monkeypatch.setenv("ESC50_DATA", str(shared_root))
    monkeypatch.setenv("ESC50_RUNS", str(runs_dir))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) >= 4
    widgets = [output["data"] for output in outputs if WIDGET in output.get("data", {})]
    assert len(widgets) == (name != "results") and all("image/jpeg" in data for data in widgets), "an explorer, with a picture"
    texts = "".join(str(output) for output in outputs)
    assert name != "results" or "other data" in texts, "runs on different data are compared without a word"
    assert name != "results" or "points above first" in texts and "second" in texts


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_are_kept_with_small_outputs(name):
    path = NOTEBOOKS / f"{name}.ipynb"
    assert os.path.getsize(path) < 10 ** 6, "a code host does not show a larger one"
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "executed once, in order"
    assert not [cell for cell in cells if any(output.output_type == "error" for output in cell.outputs)]
    assert "widgets" not in notebook.metadata and WIDGET not in str(cells), "a widget needs a kernel: its picture alone is kept"
    texts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for cell in cells for output in cell.outputs]
    assert not [text for text in texts if str(PROJECT) in text], "a path of one machine"
