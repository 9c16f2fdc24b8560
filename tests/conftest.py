"""Small ESC-50 roots, made here; and real recordings where a folder of them lies beside the project."""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

import dsets
import models

REAL = Path(__file__).resolve().parents[2] / "shared" / "esc" / "audio"


def write_root(root: Path, num_classes: int = 4, folds: int = 3, clips: int = 2) -> Path:
    """A root of tones with noise: `clips` clips of every class in every fold; a class is a pitch."""
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


class Tiny(torch.nn.Module):
    """A network small enough for a test, with batch statistics as the real ones have."""

    def __init__(self, num_classes: int = 50):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 9, stride=8, bias=False)
        self.bn = torch.nn.BatchNorm2d(4)
        self.fc = torch.nn.Linear(4 * 12 * 47, num_classes)

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x))).flatten(1))


@pytest.fixture
def tiny(monkeypatch):
    """cnn8 is tiny here; the deterministic switches are put back."""
    monkeypatch.setitem(models.MODELS, "cnn8", Tiny)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shared_root(tmp_path_factory) -> Path:
    """24 clips: 4 classes, 3 folds. Shared: a test that changes a root makes its own."""
    return write_root(tmp_path_factory.mktemp("esc") / "root")


@pytest.fixture(scope="session")
def dataset(shared_root) -> dsets.ESC50:
    return dsets.ESC50(shared_root)


@pytest.fixture
def own_root(tmp_path) -> Path:
    """A root of a test's own: 2 classes, 2 folds, 1 clip each."""
    return write_root(tmp_path / "root", num_classes=2, folds=2, clips=1)


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
