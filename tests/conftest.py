"""Small data folders, made here, a small network, and training.py as a function.

Every test names its device: a machine with a GPU tests the same as one without.
"""
import hashlib
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from matplotlib.figure import Figure

import dsets
import models
import training
from util import report, rundir
from util.checkpoint import load_checkpoint
from util.errors import UserError

signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it, and so would what is tested
torch.set_num_threads(1)  # small networks are faster so, also beside other programs

PROJECT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
OTHER_PARAMS = dsets.FeatureParams(n_mels=64, hop_length=1024, f_max=16_000.0, crop_mels=60, crop_frames=200)  # of 64 x 216
REAL = PROJECT.parent / "shared" / "esc" / "audio"  # real recordings, where a folder of them lies beside the project


def write_root(root: Path, num_classes: int = 4, folds: int = 3, clips: int = 2) -> Path:
    """A data folder of tones with noise: `clips` clips of every class in every fold; a class is a pitch."""
    (root / "audio").mkdir(parents=True)
    (root / "meta").mkdir()
    rows = []
    t = np.arange(dsets.CLIP_SAMPLES) / dsets.SAMPLE_RATE
    for fold in range(1, folds + 1):
        for target in range(num_classes):
            for take in range(clips):
                name = f"{fold}-{take}-A-{target}.wav"
                rng = np.random.default_rng([fold, target, take])
                samples = 0.3 * np.sin(2 * np.pi * 200 * 2 ** target * t) + 0.01 * rng.standard_normal(len(t))
                soundfile.write(root / "audio" / name, samples, dsets.SAMPLE_RATE, subtype="PCM_16")
                rows.append((name, fold, target, f"sound_{target}", target < 2, "0", "A"))
    table = pd.DataFrame(rows, columns=["filename", "fold", "target", "category", "esc10", "src_file", "take"])
    table.to_csv(root / "meta" / "esc50.csv", index=False)
    return root


def change_table(root: Path, change) -> Path:
    """Replace a data folder's table by change(table), or by the table where `change` changes it itself; returns its path."""
    path = root / "meta" / "esc50.csv"
    table = pd.read_csv(path, dtype=str)
    changed = change(table)
    (table if changed is None else changed).to_csv(path, index=False)
    return path


def run(*flags, status: int = 0) -> None:
    """training.py with these flags, in this process, on the CPU unless they say otherwise."""
    flags = [str(flag) for flag in flags]
    device = [] if {"--device", "--resume", "--rerun"} & set(flags) else ["--device", "cpu"]  # those take the run's own
    assert training.main([*flags, *device]) == status


def train_in(run_dir: Path, root: Path, *flags) -> Path:
    """A run of 2 epochs in `run_dir`."""
    run("--data", root, "--run-dir", run_dir, "--epochs", 2, "--views", 2, "--batch-size", 4, *flags)
    return run_dir


def last_checkpoint(run_dir: Path, seed: int = 42, fold: int | str = 1) -> dict:
    return load_checkpoint(rundir.training_dir(run_dir, seed, fold) / "last.pt")


class Tiny(torch.nn.Module):
    """A network small enough for a test, with batch statistics as the real ones have."""

    def __init__(self, num_classes: int = 50, input_shape: tuple[int, int, int] = (1, 100, 384)):
        super().__init__()
        mels, frames = ((size - 9) // 8 + 1 for size in input_shape[1:])
        self.conv = torch.nn.Conv2d(1, 4, 9, stride=8, bias=False)
        self.bn = torch.nn.BatchNorm2d(4)
        self.fc = torch.nn.Linear(4 * mels * frames, num_classes)

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x))).flatten(1))


@pytest.fixture
def tiny(monkeypatch):
    """cnn8 is tiny here; the deterministic switches and the number of threads are put back."""
    monkeypatch.setitem(models.MODELS, "cnn8", Tiny)
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared_root(tmp_path_factory) -> Path:
    """24 clips: 4 classes, 3 folds. Shared: a test that changes a data folder makes its own."""
    return write_root(tmp_path_factory.mktemp("esc") / "root")


@pytest.fixture(scope="session")
def dataset(shared_root) -> dsets.ESC50:
    return dsets.ESC50(shared_root)


@pytest.fixture(scope="session")
def other_dataset(shared_root) -> dsets.ESC50:
    """The same clips with other features and crops."""
    return dsets.ESC50(shared_root, params=OTHER_PARAMS)


@pytest.fixture
def own_root(tmp_path) -> Path:
    """A data folder of a test's own: 2 classes, 2 folds, 1 clip each."""
    return write_root(tmp_path / "root", num_classes=2, folds=2, clips=1)


@pytest.fixture(scope="session")
def pristine_root(tmp_path_factory) -> Path:
    """12 clips: 2 classes, 3 folds. Shared."""
    return write_root(tmp_path_factory.mktemp("pristine") / "root", num_classes=2, folds=3, clips=2)


def tone(seconds: float, rate: int, hertz: float = 1000.0) -> np.ndarray:
    """Samples of a tone at half of full scale."""
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


@pytest.fixture
def root(pristine_root, tmp_path) -> Path:
    """A copy of pristine_root of a test's own, to train on."""
    return shutil.copytree(pristine_root, tmp_path / "root")


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def real_waveforms() -> torch.Tensor:
    """Waveforms (clips, 1, 220500) of real recordings: every 16th there is."""
    paths = sorted(REAL.glob("*.flac"))[::16]
    if not paths:
        pytest.skip("no real recordings beside the project")
    return torch.stack([dsets.load_waveform(path) for path in paths])


# --- small runs -------------------------------------------------------------------------------------------------------

def make_small_pictures(monkeypatch) -> None:
    """Pictures of a few empty pixels: drawing takes most of the time of a small run."""
    for name in ("curves_figure", "confusion_figure", "examples_figure"):
        monkeypatch.setattr(report, name, lambda *arguments: Figure(figsize=(0.2, 0.2)))


@pytest.fixture
def small_pictures(monkeypatch):
    make_small_pictures(monkeypatch)


@pytest.fixture(scope="session")
def shared_run(pristine_root, tmp_path_factory) -> Path:
    """A run never interrupted: 2 seeds x 2 folds x 2 epochs. Shared: a test that changes a run takes `reference`."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(models.MODELS, "cnn8", Tiny)
        make_small_pictures(monkeypatch)
        run_dir = train_in(tmp_path_factory.mktemp("shared") / "run", pristine_root, "--fold", 1, 3, "--seed", 1, 2)
    torch.use_deterministic_algorithms(False)
    return run_dir


@pytest.fixture
def reference(shared_run, tmp_path) -> Path:
    """A copy of shared_run, of a test's own."""
    return shutil.copytree(shared_run, tmp_path / "reference")


def results_of(run_dir: Path) -> dict:
    """All that must not depend on interruptions or the clock: weights, metrics but for the seconds, reports, the summary."""
    results = {"summary": (run_dir / "summary.json").read_text()}
    for folder in sorted(run_dir.glob("seed-*/fold-*")):
        rows = [{name: value for name, value in row.items() if name != "seconds"} for row in rundir.read_metrics(folder)]
        weights = [{key: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
                    for key, tensor in load_checkpoint(folder / name)["model"].items()} for name in ("last.pt", "best.pt")]
        tables = [(folder / name).read_text() for name in ("report.csv", "predictions.csv")]
        results[folder.parent.name, folder.name] = rows, tables, weights
    return results


def error_line(capsys) -> str:
    """The one line on stderr."""
    error = capsys.readouterr().err
    assert error.startswith("training.py: ") and error.count("\n") == 1
    return error


def refused(function, *arguments) -> str:
    """The message of the UserError that a call raises, of one line."""
    with pytest.raises(UserError) as refusal:
        function(*arguments)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)
