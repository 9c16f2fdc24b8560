"""The notebooks, executed from top to bottom on a small root and a short run; and what is kept of them."""
import os
from pathlib import Path

import nbclient
import nbformat
import pytest

import training

NOTEBOOKS = Path(training.__file__).parent / "notebooks"
NAMES = ["spectrograms", "augmentation", "results"]


@pytest.fixture(scope="module")
def runs_dir(shared_root, tmp_path_factory) -> Path:
    """Two runs of the real cnn8, one of them of two folds."""
    runs_dir = tmp_path_factory.mktemp("notebooks") / "runs"
    for name, folds in (("first", ["1", "2"]), ("second", ["1"])):
        assert training.main(["--data", str(shared_root), "--epochs", "1", "--views", "1", "--fold", *folds, "--run-dir",
                              str(runs_dir / name)]) == 0
    return runs_dir


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_run_from_top_to_bottom(name, shared_root, runs_dir, monkeypatch):
    monkeypatch.setenv("ESC50_DATA", str(shared_root))
    monkeypatch.setenv("ESC50_RUNS", str(runs_dir))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_are_kept_with_small_outputs(name):
    path = NOTEBOOKS / f"{name}.ipynb"
    assert os.path.getsize(path) < 10 ** 6, "a code host does not show a larger one"
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "executed once, in order"
