import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dsets
import predict
from conftest import run
from util import export
from util.errors import UserError

pytestmark = pytest.mark.usefixtures("tiny", "small_pictures")  # cnn8 is tiny here


def write_checkpoint(folder: Path, root: Path, *flags) -> Path:
    run("--data", root, "--epochs", 1, "--views", 1, "--batch-size", 8, "--precision", "fp32", "--run-dir", folder, *flags)
    return folder / "seed-42" / "fold-1" / "last.pt"


@pytest.fixture
def checkpoint(shared_root, tmp_path) -> Path:
    return write_checkpoint(tmp_path / "run", shared_root)


def waveforms_of(root: Path) -> torch.Tensor:
    """Three waveforms (3, 1, 220500)."""
    return torch.stack([dsets.load_waveform(path) for path in sorted((root / "audio").glob("*.wav"))[:3]])


def probabilities(path: Path, waveforms: torch.Tensor) -> np.ndarray:
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"waveform": waveforms[:, 0].numpy()})[0]


@pytest.mark.slow
def test_the_graph_is_the_whole_way_from_waveform_to_probabilities(checkpoint, shared_root, tmp_path, capsys):
    import onnxruntime
    path = tmp_path / "graphs" / "a.onnx"
    path.parent.mkdir()
    capsys.readouterr()
    assert predict.main([str(checkpoint), "--onnx", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "waveform (batch, 220500) -> probabilities (batch, classes)" in captured.err
    waveforms = waveforms_of(shared_root)
    assert np.abs(probabilities(path, waveforms) - predict.Network(checkpoint)(waveforms).numpy()).max() < export.TOLERANCE
    metadata = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == [f"sound_{i}" for i in range(4)] and metadata["sample_rate_hz"] == "44100"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.slow
@pytest.mark.parametrize("tta_crops, crop_mels", [(3, 128), (9, 100)])
def test_the_graph_of_several_crops(shared_root, tmp_path, tta_crops, crop_mels):
    checkpoint = write_checkpoint(tmp_path / "run", shared_root, "--tta-crops", tta_crops, "--crop-mels", crop_mels)
    waveforms = waveforms_of(shared_root)
    network = predict.Network(checkpoint)
    assert network.tta_crops == tta_crops
    assert export.export_onnx(network, tmp_path / "a.onnx") < export.TOLERANCE  # compares the two itself
    assert np.abs(probabilities(tmp_path / "a.onnx", waveforms) - network(waveforms).numpy()).max() < export.TOLERANCE


@pytest.mark.slow
def test_the_graph_has_the_features_of_the_checkpoint(shared_root, tmp_path):
    flags = ["--f-max", 16_000, "--crop-mels", 50]
    network = predict.Network(write_checkpoint(tmp_path / "run", shared_root, *flags))
    assert network.params.input_shape == (1, 50, 384)
    export.export_onnx(network, tmp_path / "a.onnx")
    waveforms = waveforms_of(shared_root)
    assert np.abs(probabilities(tmp_path / "a.onnx", waveforms) - network(waveforms).numpy()).max() < export.TOLERANCE


@pytest.mark.slow
def test_a_graph_that_disagrees_is_not_written(checkpoint, tmp_path, monkeypatch):
    class Louder(export.LogMelGraph):
        def __init__(self, log_mel):
            super().__init__(log_mel)
            self.filters = 100 * self.filters

    monkeypatch.setattr(export, "LogMelGraph", Louder)
    (tmp_path / "graphs").mkdir()
    with pytest.raises(RuntimeError, match="onnxruntime differs from torch"):
        predict.main([str(checkpoint), "--onnx", str(tmp_path / "graphs" / "a.onnx")])
    assert not list((tmp_path / "graphs").iterdir())


@pytest.mark.slow
def test_a_graph_that_cannot_be_written_is_one_line(checkpoint, tmp_path, capsys):
    assert predict.main([str(checkpoint), "--onnx", str(tmp_path / "absent" / "a.onnx")]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "absent" / "a.onnx") in line


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"--onnx.*{package}"):
        export.export_onnx(None, tmp_path / "a.onnx")
    assert not list(tmp_path.glob("*.onnx*"))
