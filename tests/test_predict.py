import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsets
import models
from util import export as onnx_graph
import predict
from util import cache as recordings
import training
from conftest import Tiny

pytestmark = pytest.mark.usefixtures("tiny")  # cnn8 is tiny here
CPU = torch.device("cpu")
ROOT = Path(predict.__file__).parent
SECOND = recordings.SAMPLE_RATE


@pytest.fixture(scope="module")
def run_dir(shared_root, tmp_path_factory) -> Path:
    """Folds 1 and 2 of a short training; its networks have learnt something, but not everything."""
    patch = pytest.MonkeyPatch()
    patch.setitem(models.MODELS, "cnn8", Tiny)
    run_dir = tmp_path_factory.mktemp("predict") / "run"
    try:
        assert training.main(["--data", str(shared_root), "--epochs", "2", "--views", "2", "--fold", "1", "2", "--batch-size",
                              "8", "--precision", "fp32", "--run-dir", str(run_dir)]) == 0
    finally:
        patch.undo()
        torch.use_deterministic_algorithms(False)
    return run_dir


@pytest.fixture
def one(run_dir) -> Path:
    return run_dir / "seed-42" / "fold-1"


@pytest.fixture
def wav(shared_root) -> Path:
    return sorted((shared_root / "audio").glob("*.wav"))[0]


def call(capsys, *arguments, status: int = 0) -> tuple[str, str]:
    assert predict.main([str(argument) for argument in arguments]) == status
    captured = capsys.readouterr()
    return captured.out, captured.err


def noise(seconds: float, rate: int = SECOND, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (round(seconds * rate), channels)).astype(np.float32)


# --- agreement --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("precision, recipe", [("fp32", "blog"), ("bf16", "blog"), ("bf16", "strong")])
def test_predictions_give_the_runs_own_accuracy(shared_root, tmp_path, capsys, precision, recipe):
    training.main(["--data", str(shared_root), "--epochs", "1", "--views", "1", "--lr", "3e-5", "--precision", precision,
                   "--recipe", recipe, "--average", "0", "--run-dir", str(tmp_path / "run")])
    expected = json.loads((tmp_path / "run" / "summary.json").read_text())["trainings"][0]["accuracy"]
    dataset = dsets.ESC50(shared_root)
    _, validation = dataset.split(1)
    capsys.readouterr()
    paths = [shared_root / "audio" / dataset.table["filename"][int(index)] for index in validation]
    found = json.loads(call(capsys, tmp_path / "run", *paths, "--format", "json")[0])
    right = [entry["top"][0]["class"] == dataset.classes[dataset.targets[index]] for entry, index in zip(found, validation)]
    assert sum(right) / len(right) == expected
    assert 0 < expected < 1, "a case that tells nothing"


def test_a_window_is_predicted_alike_alone_and_among_others(one):
    ensemble = predict.Ensemble([one / "last.pt"], CPU)
    waveforms = torch.from_numpy(noise(5 * 3).reshape(3, 1, -1))
    together = ensemble(waveforms)
    assert torch.allclose(together, torch.cat([ensemble(waveform[None]) for waveform in waveforms]), atol=1e-6)
    assert torch.allclose(together.sum(dim=1), torch.ones(3))


def test_an_ensemble_is_the_mean_of_its_networks(run_dir, wav, capsys):
    each = [json.loads(call(capsys, run_dir / "seed-42" / f"fold-{fold}", wav, "--format", "json")[0])[0] for fold in (1, 2)]
    both = json.loads(call(capsys, run_dir, wav, "--format", "json", "--ensemble")[0])[0]
    expected = {}
    for entry in each:
        for guess in entry["top"]:
            expected[guess["class"]] = expected.get(guess["class"], 0) + guess["probability"] / 2
    assert {guess["class"]: guess["probability"] for guess in both["top"]} == pytest.approx(expected, abs=1e-6)


# --- windows ----------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(frames=st.integers(1, 900_000), hop=st.integers(4_410, 220_500))
def test_windows_lie_a_hop_apart_and_reach_the_end_once(tmp_path_factory, frames, hop):
    path = tmp_path_factory.mktemp("windows") / "a.wav"
    samples = noise(frames / SECOND)[:, 0]
    soundfile.write(path, samples, SECOND, subtype="FLOAT")
    found = list(predict.windows(str(path), hop))
    assert [start for start, _, _ in found] == [hop * i for i in range(len(found))]
    for start, length, waveform in found:
        assert waveform.shape == (1, 220_500)
        assert np.array_equal(waveform[0, :length].numpy(), samples[start:start + 220_500])
        assert not waveform[0, length:].any()
    ends = [start + length for start, length, _ in found]
    assert ends[-1] == frames and frames not in ends[:-1], "only the last window reaches the end"


@pytest.mark.parametrize("rate, channels", [(22_050, 1), (48_000, 2), (8_000, 1)])
def test_other_rates_and_channels_give_what_training_hears(tmp_path, rate, channels):
    t = np.arange(round(7.3 * rate)) / rate  # s
    samples = 0.4 * np.sin(2 * np.pi * 440 * t)[:, None] * np.linspace(1, 0.5, channels)
    soundfile.write(tmp_path / "a.flac", samples, rate)
    _, _, waveform = next(predict.windows(str(tmp_path / "a.flac"), 2 * SECOND))
    assert torch.allclose(waveform, recordings.load_waveform(tmp_path / "a.flac"), atol=1e-4)
    *_, (start, length, _) = predict.windows(str(tmp_path / "a.flac"), 2 * SECOND)
    assert start + length == pytest.approx(7.3 * SECOND, abs=2)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.aiff"])
def test_formats_that_libsndfile_reads(one, tmp_path, capsys, name):
    soundfile.write(tmp_path / name, noise(6, 48_000), 48_000)
    entry, = json.loads(call(capsys, one, tmp_path / name, "--format", "json")[0])
    assert entry["duration_s"] == pytest.approx(6, abs=0.1)
    assert [window["start_s"] for window in entry["windows"]] == [0, 2.5]


def test_standard_input(one, wav, capsys):
    program = ("import conftest, models, predict, sys; models.MODELS['cnn8'] = conftest.Tiny; "
               "sys.exit(predict.main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", program, str(one), "-", "--format", "json"], input=wav.read_bytes(),
                          stdout=subprocess.PIPE, cwd=Path(__file__).parent, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0
    entry, = json.loads(done.stdout)
    named, = json.loads(call(capsys, one, wav, "--format", "json")[0])
    assert entry["file"] == "-" and entry["top"] == named["top"]


# --- output -----------------------------------------------------------------------------------------------------------

def test_the_three_formats_say_the_same(one, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", noise(8), SECOND)
    entry, = json.loads(call(capsys, one, tmp_path / "a.wav", "--format", "json", "--top", 3)[0])
    assert [(window["start_s"], window["end_s"]) for window in entry["windows"]] == [(0, 5), (2.5, 7.5), (5, 8)]
    assert all(len(part["top"]) == 3 for part in (entry, *entry["windows"]))
    for guess in entry["top"]:
        assert 0 <= guess["probability"] <= 1
    rows = list(csv.DictReader(io.StringIO(call(capsys, one, tmp_path / "a.wav", "--format", "csv", "--top", 3)[0])))
    parts = [("mean", entry), *((str(i), window) for i, window in enumerate(entry["windows"]))]
    expected = [(window, str(rank), guess["class"], f"{guess['probability']:.6f}")
                for window, part in parts for rank, guess in enumerate(part["top"], start=1)]
    assert [(row["window"], row["rank"], row["class"], row["probability"]) for row in rows] == expected
    table = call(capsys, one, tmp_path / "a.wav", "--top", 3)[0].splitlines()
    assert table[0] == f"{tmp_path / 'a.wav'} (8.0 s)" and len(table) == 5
    assert table[3].split()[:4] == ["2.5", "-", "7.5", "s"]
    assert f"{entry['top'][0]['class']} {100 * entry['top'][0]['probability']:.1f}%" in table[1]


def test_the_mean_is_over_the_windows_by_their_length(one, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", noise(8), SECOND)  # 0 to 5, 2.5 to 7.5 and 5 to 8 s
    entry, = json.loads(call(capsys, one, tmp_path / "a.wav", "--format", "json", "--top", 50)[0])
    for guess in entry["top"]:
        windows = [other["probability"] for window in entry["windows"] for other in window["top"]
                   if other["class"] == guess["class"]]
        assert guess["probability"] == pytest.approx((5 * windows[0] + 5 * windows[1] + 3 * windows[2]) / 13, abs=1e-6)


def test_a_folders_files_come_by_name(one, tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    for name in ("b.wav", "a.WAV", "sub/c.flac"):
        soundfile.write(tmp_path / name, noise(1), SECOND)
    (tmp_path / "notes.txt").write_text("not a sound")
    names = [entry["file"] for entry in json.loads(call(capsys, one, tmp_path, "--format", "json")[0])]
    assert names == [str(tmp_path / name) for name in ("a.WAV", "b.wav", "sub/c.flac")]


# --- refusals ---------------------------------------------------------------------------------------------------------

def test_a_bad_file_is_named_and_the_rest_go_on(one, wav, tmp_path, capsys):
    (tmp_path / "bad.wav").write_bytes(b"RIFF nonsense")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), SECOND)
    soundfile.write(tmp_path / "nan.wav", np.full(9 * SECOND, np.nan), SECOND, subtype="FLOAT")
    names = [tmp_path / "bad.wav", wav, tmp_path / "none.wav", tmp_path / "absent.wav", tmp_path / "nan.wav"]
    out, err = call(capsys, one, *names, "--format", "json", status=2)
    assert [entry["file"] for entry in json.loads(out)] == [str(wav)]
    lines = err.splitlines()
    assert len(lines) == 5 and all(line.startswith("predict.py: ") for line in lines)
    for line, words in zip(lines, ["bad.wav: cannot be decoded as audio", "none.wav: holds no samples",
                                   "absent.wav: no such file", "nan.wav: holds samples that are not finite numbers",
                                   "4 of 5 recordings could not be used"]):
        assert words in line
    assert json.loads(call(capsys, one, tmp_path / "bad.wav", "--format", "json", status=2)[0]) == []


@pytest.mark.parametrize("flags, words", [
    (["--hop", "0"], "--hop 0: expected seconds from 0.1 to 5"), (["--hop", "6"], "--hop 6: expected"),
    (["--hop", "nan"], "--hop nan: expected"), (["--top", "0"], "--top 0: expected 1 or more"),
    (["--format", "xml"], "argument --format: invalid choice: 'xml'"), (["--device", "tpu"], "argument --device"),
    (["--onnx", "a.onnx", "--ensemble"], "--onnx: writes one network"),
    (["--onnx", "a.wav"], "--onnx a.wav: expected a name that ends in .onnx"), (["--onnx", ""], "--onnx : expected a name"),
    (["--onnx", "absent/a.onnx"], "--onnx absent/a.onnx: cannot be a file there"), ([""], "FILE_OR_FOLDER: is empty")])
def test_bad_flags_are_refused_in_one_line(run_dir, one, wav, capsys, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    out, err = call(capsys, run_dir if "--ensemble" in flags else one, wav, *flags, status=2)
    assert out == "" and err.startswith(f"predict.py: {words}") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_names_that_cannot_be_are_named_and_the_rest_go_on(one, wav, capsys):
    out, err = call(capsys, one, "a" * 300 + ".wav", wav, "--format", "json", status=2)
    assert len(json.loads(out)) == 1 and err.count("no such file") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no file can have such a name")
def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / os.fsdecode(b"\xe9.wav")
    soundfile.write(tmp_path / "a.wav", noise(1), SECOND)
    (tmp_path / "a.wav").rename(path)
    with pytest.raises(recordings.UserError, match="cannot be decoded as audio"):
        list(predict.windows(str(path), SECOND))


@pytest.mark.skipif(os.name != "posix", reason="shell redirections")
@pytest.mark.parametrize("redirection, words", [(">/dev/full", "output: No space left"), ("| true", "output: nobody reads")])
def test_output_that_cannot_be_written_is_one_line(one, redirection, words):
    program = "import conftest, models, predict, sys; models.MODELS['cnn8'] = conftest.Tiny; sys.exit(predict.main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)
    done = subprocess.run(["bash", "-c", f'set -o pipefail; sleep 0.1; "$@" {redirection}', "bash", sys.executable, "-c", program,
                           str(one), "absent.wav", "--format", "csv"], cwd=Path(__file__).parent, capture_output=True,
                          text=True, env=environment)
    assert done.returncode == 2 and words in done.stderr and "Exception" not in done.stderr


def test_models_that_cannot_be_meant_are_refused(run_dir, one, wav, tmp_path, capsys):
    assert "holds 2 trainings; name one of them" in call(capsys, run_dir, wav, status=2)[1]
    assert "no such run or checkpoint" in call(capsys, tmp_path / "absent", wav, status=2)[1]
    assert "holds no checkpoint" in call(capsys, tmp_path, wav, status=2)[1]
    assert "holds no audio files" in call(capsys, one, tmp_path, status=2)[1]
    assert "FILE_OR_FOLDER: is missing" in call(capsys, one, status=2)[1]


def change(checkpoint: dict, kind: str) -> dict:
    weight = checkpoint["model"]["conv.weight"]
    return checkpoint | {
        "nan": {"model": checkpoint["model"] | {"conv.weight": torch.full_like(weight, torch.nan)}},
        "shape": {"model": checkpoint["model"] | {"conv.weight": weight[:2]}},
        "variance": {"model": checkpoint["model"] | {"bn.running_var": -torch.ones(4)}},
        "missing": {"model": {}}, "no dict": {"model": 5}, "classes": {"classes": ["a"]}, "no list": {"classes": None},
        "more classes": {"classes": list("abcde")}, "class twice": {"classes": ["a", "a"]},
        "name": {"model_name": "vgg"}, "name list": {"model_name": []}, "features": {"features": {"n_fft": 1024}},
        "statistics": {"normalisation": {"mean": 0.0, "std": 0.0}}, "no statistics": {"normalisation": {}},
    }[kind]


@pytest.mark.parametrize("kind, words", [
    ("nan", "conv.weight holds numbers that are not finite"), ("variance", "bn.running_var holds variances below 0"),
    ("shape", "size mismatch for conv.weight"), ("missing", "Missing key"), ("no dict", "is not a whole checkpoint"),
    ("classes", "predictions are not indices of classes"), ("more classes", "size mismatch for fc.bias"),
    ("class twice", "classes are not different names"), ("no list", "is not a whole"),
    ("name", "model 'vgg': expected one of"), ("name list", "is not a whole checkpoint"), ("features", "knows other features"),
    ("statistics", "not by two finite numbers"), ("no statistics", "is not a whole checkpoint")])
def test_checkpoints_whose_parts_do_not_fit_are_refused(one, wav, tmp_path, capsys, kind, words):
    checkpoint = torch.load(one / "last.pt", weights_only=True)
    torch.save(change(checkpoint, kind), tmp_path / "changed.pt")
    out, err = call(capsys, tmp_path / "changed.pt", wav, status=2)
    assert out == "" and words in err and err.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"garbage", "half"])
def test_files_that_are_no_checkpoints_are_refused(one, wav, tmp_path, capsys, content):
    whole = (one / "last.pt").read_bytes()
    (tmp_path / "other.pt").write_bytes(whole[:len(whole) // 2] if content == "half" else content)
    err = call(capsys, tmp_path / "other.pt", wav, status=2)[1]
    assert "cannot be read as a checkpoint" in err and "; name another checkpoint" in err and err.count("\n") == 1


def test_networks_of_other_classes_do_not_predict_together(run_dir, wav, tmp_path, capsys):
    shutil.copytree(run_dir, tmp_path / "run")
    path = tmp_path / "run" / "seed-42" / "fold-2" / "last.pt"
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | {"classes": checkpoint["classes"][::-1]}, path)
    assert "knows other classes than" in call(capsys, tmp_path / "run", wav, "--ensemble", status=2)[1]


# --- ONNX -------------------------------------------------------------------------------------------------------------

def test_the_onnx_graph_is_the_whole_way_from_waveform_to_probabilities(one, shared_root, tmp_path, capsys):
    import onnxruntime
    path = tmp_path / "graphs" / "a.onnx"
    path.parent.mkdir()
    out, err = call(capsys, one, "--onnx", path)
    assert out == "" and "waveform (batch, 220500) -> probabilities (batch, classes)" in err
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    waveforms = torch.stack([recordings.load_waveform(path) for path in sorted((shared_root / "audio").glob("*.wav"))[:3]])
    found, = session.run(None, {"waveform": waveforms[:, 0].numpy()})
    expected = predict.Ensemble([one / "last.pt"], CPU)(waveforms)
    assert np.abs(found - expected.numpy()).max() < 1e-4
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == [f"sound_{i}" for i in range(4)] and metadata["sample_rate_hz"] == "44100"
    assert list(path.parent.iterdir()) == [path]


def test_the_onnx_graph_of_nine_crops(shared_root, tmp_path, capsys):
    training.main(["--data", str(shared_root), "--recipe", "strong", "--epochs", "1", "--run-dir", str(tmp_path / "run")])
    call(capsys, tmp_path / "run", "--onnx", tmp_path / "a.onnx")  # compares the two itself


def test_an_onnx_graph_that_disagrees_is_not_written(one, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "POWER_FLOOR", 1e-2)
    with pytest.raises(RuntimeError, match="onnxruntime differs from torch"):
        predict.main([str(one), "--onnx", str(tmp_path / "a.onnx")])
    assert not list(tmp_path.iterdir())
