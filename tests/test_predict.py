import csv
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread

import dsets
import models
import predict
from conftest import PROJECT, Tiny, make_small_pictures, run
from dsets import CLIP_SAMPLES, SAMPLE_RATE
from util import report, waveforms
from util.errors import UserError

pytestmark = pytest.mark.usefixtures("tiny", "small_pictures")  # cnn8 is tiny here
PROGRAM = "import conftest, models, predict, sys; models.MODELS['cnn8'] = conftest.Tiny; sys.exit(predict.main(sys.argv[1:]))"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(PROJECT)}


WIDE_PARAMS = dsets.FeatureParams(f_max=16_000.0, crop_mels=50, crop_frames=300)


def train_tiny(run_dir: Path, *flags) -> Path:
    """A short run in fp32, as the fixture `tiny` makes it possible, for fixtures that live longer."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "cnn8", Tiny)
        make_small_pictures(patch)
        run(*flags, "--precision", "fp32", "--run-dir", run_dir)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    return run_dir


@pytest.fixture(scope="module")
def run_dir(shared_root, tmp_path_factory) -> Path:
    """Folds 1 and 2 of a short training; its networks have learned something, but not everything."""
    return train_tiny(tmp_path_factory.mktemp("predict") / "run", "--data", shared_root, "--epochs", 2, "--views", 2, "--fold", 1,
                      2, "--batch-size", 8)


@pytest.fixture(scope="module")
def other_run_dir(shared_root, tmp_path_factory) -> Path:
    """Fold 1 by other features: mels up to 16 kHz, of which the network sees 50."""
    return train_tiny(tmp_path_factory.mktemp("other") / "run", "--data", shared_root, "--epochs", 1, "--views", 1, "--lr",
                      "1e-4", "--f-max", 16_000, "--crop-mels", 50, "--crop-frames", 300)


@pytest.fixture
def one(run_dir) -> Path:
    return run_dir / "seed-42" / "fold-1"


@pytest.fixture
def wav(shared_root) -> Path:
    return sorted((shared_root / "audio").glob("*.wav"))[0]


def call(capsys, *arguments, status: int = 0) -> tuple[str, str]:
    """What predict.py with these arguments prints, on the CPU unless they say otherwise: stdout, stderr."""
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert predict.main([*map(str, arguments), *device]) == status
    captured = capsys.readouterr()
    return captured.out, captured.err


def call_json(capsys, *arguments, status: int = 0) -> list[dict]:
    return json.loads(call(capsys, *arguments, "--format", "json", status=status)[0])


def refuse(capsys, *arguments, words: str) -> None:
    """Nothing on stdout, and one line on stderr that holds the words."""
    out, err = call(capsys, *arguments, status=2)
    assert out == "" and err.startswith("predict.py: ") and err.count("\n") == 1 and words in err


def noise(seconds: float, rate: int = SAMPLE_RATE, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, (round(seconds * rate), channels)).astype(np.float32)


def accuracy_of_predictions(capsys, root: Path, run_dir: Path) -> float:
    """The accuracy of predict.py on the WAV files of fold 1."""
    dataset = dsets.ESC50(root)
    _, validation = dataset.split(1)
    found = call_json(capsys, run_dir, *(root / "audio" / dataset.table["filename"][int(index)] for index in validation))
    right = [entry["top"][0]["class"] == dataset.classes[dataset.targets[index]] for entry, index in zip(found, validation)]
    return sum(right) / len(right)


# --- agreement --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("precision, recipe, tta_crops", [
    ("fp32", "blog", 9), pytest.param("bf16", "blog", 1, marks=pytest.mark.slow), ("bf16", "strong", 3)])
def test_predictions_give_the_runs_own_accuracy(shared_root, tmp_path, capsys, precision, recipe, tta_crops):
    run("--data", shared_root, "--epochs", 1, "--views", 1, "--lr", "3e-5", "--precision", precision, "--recipe", recipe,
        "--ema", 0, "--tta-crops", tta_crops, "--run-dir", tmp_path / "run")
    expected = json.loads((tmp_path / "run" / "summary.json").read_text())["trainings"][0]["accuracy"]
    capsys.readouterr()
    assert accuracy_of_predictions(capsys, shared_root, tmp_path / "run") == expected
    assert 0 < expected < 1, "a case that tells nothing"


@pytest.mark.slow
def test_predictions_use_the_features_of_the_checkpoint(shared_root, other_run_dir, capsys):
    path = other_run_dir / "seed-42" / "fold-1" / "last.pt"
    predictor = predict.Network(path)
    assert predictor.params == WIDE_PARAMS
    waveform = dsets.load_waveform(sorted((shared_root / "audio").glob("*.wav"))[0])
    features = predictor.features(waveform[None])
    assert torch.equal(features[0], dsets.LogMel(WIDE_PARAMS)(waveform))
    checkpoint = torch.load(path, weights_only=True)
    expected = (checkpoint["predictions"] == dsets.ESC50(shared_root).targets[:8]).double().mean()  # fold 1 comes first
    assert accuracy_of_predictions(capsys, shared_root, other_run_dir) == expected
    assert 0 < expected < 1, "a case that tells nothing"


@pytest.mark.slow
def test_networks_of_other_features_do_not_predict_together(run_dir, other_run_dir, wav, tmp_path, capsys):
    shutil.copytree(run_dir, tmp_path / "run")
    shutil.copy(other_run_dir / "seed-42" / "fold-1" / "last.pt", tmp_path / "run" / "seed-42" / "fold-2")
    assert "f_max 16000.0, here 8000.0" in call(capsys, tmp_path / "run", wav, status=2)[1]


def test_a_predictor_says_of_a_file_what_it_says_of_its_windows(run_dir, one, tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(8), SAMPLE_RATE)
    for path in (str(run_dir), one / "last.pt"):
        predictor = predict.Predictor(path, "cpu")
        found = predictor(tmp_path / "a.wav", hop=2.0)
        assert found["starts"].tolist() == [0, 2, 4] and found["ends"].tolist() == [5, 7, 8] and found["notes"] == []
        batch = torch.stack([waveform for *_, waveform in waveforms.windows(tmp_path / "a.wav", 2 * SAMPLE_RATE)])
        probabilities = predictor(batch)
        assert probabilities.shape == (3, 4) and found["file"] == str(tmp_path / "a.wav")
        torch.testing.assert_close(found["probabilities"], probabilities)
        torch.testing.assert_close(found["mean"], (probabilities * torch.tensor([5, 5, 4.0])[:, None]).sum(dim=0) / 14)
    with pytest.raises(UserError, match="absent.wav"):
        predictor("absent.wav")
    for hop in (0, -1, 10, float("nan")):
        with pytest.raises(UserError, match="--hop"):
            predictor(tmp_path / "a.wav", hop=hop)
    for shape in ((CLIP_SAMPLES,), (1, CLIP_SAMPLES), (2, 2, CLIP_SAMPLES), (1, 1, 44_100)):
        with pytest.raises(UserError, match="Predictor"):
            predictor(torch.zeros(shape))
    not_finite = torch.zeros(2, 1, CLIP_SAMPLES).index_fill(0, torch.tensor([1]), torch.nan)
    for waveform in (np.zeros((1, 1, CLIP_SAMPLES), np.float32), [0.0] * CLIP_SAMPLES, torch.tensor(0.0), None, not_finite):
        with pytest.raises(UserError, match="Predictor"):
            predictor(waveform)


def test_a_window_is_predicted_alike_alone_and_among_others(one):
    ensemble = predict.Predictor(one, "cpu")
    waveforms = torch.from_numpy(noise(5 * 3).reshape(3, 1, -1))
    together = ensemble(waveforms)
    assert torch.allclose(together, torch.cat([ensemble(waveform[None]) for waveform in waveforms]), atol=1e-6)
    assert torch.allclose(together.sum(dim=1), torch.ones(3))


def test_the_trainings_of_a_run_predict_by_their_mean(run_dir, wav, capsys):
    each = [call_json(capsys, run_dir / "seed-42" / f"fold-{fold}", wav)[0] for fold in (1, 2)]
    out, err = call(capsys, run_dir, wav, "--format", "json")
    assert err == f"predict.py: note: {run_dir}: its finished trainings predict together, by their mean: 2; not finished: 0\n"
    expected = {}
    for entry in each:
        for guess in entry["top"]:
            expected[guess["class"]] = expected.get(guess["class"], 0) + guess["probability"] / 2
    assert {guess["class"]: guess["probability"] for guess in json.loads(out)[0]["top"]} == pytest.approx(expected, abs=1e-6)


def test_trainings_that_are_not_finished_do_not_predict(run_dir, wav, tmp_path, capsys):
    shutil.copytree(run_dir, tmp_path / "run")
    first, second = (tmp_path / "run" / "seed-42" / f"fold-{fold}" for fold in (1, 2))
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    content["flags"]["fold"].append(3)  # has not begun
    (tmp_path / "run" / "run.json").write_text(json.dumps(content))
    (second / "report.csv").unlink()
    alone, err = call(capsys, first, wav)
    assert err == ""
    out, err = call(capsys, tmp_path / "run", wav)
    assert out == alone and "mean: 1; not finished: 2" in err
    (first / "last.pt").unlink()
    refuse(capsys, tmp_path / "run", wav, words=f"no training of 3 is finished; wait, or name one ({second})")
    assert call(capsys, second, wav)[1] == "", "by its name it predicts"


# --- windows ----------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(frames=st.integers(1, 900_000), hop=st.integers(4_410, 220_500))
def test_windows_lie_a_hop_apart_and_reach_the_end_once(tmp_path_factory, frames, hop):
    path = tmp_path_factory.mktemp("windows") / "a.wav"
    samples = noise(frames / SAMPLE_RATE)[:, 0]
    soundfile.write(path, samples, SAMPLE_RATE, subtype="FLOAT")
    found = list(waveforms.windows(str(path), hop))
    assert [start for start, _, _ in found] == [hop * i for i in range(len(found))]
    for start, length, waveform in found:
        assert waveform.shape == (1, 220_500)
        assert np.array_equal(waveform[0, :length].numpy(), samples[start:start + 220_500])
        assert not waveform[0, length:].any()
    left = [frames - start - length for start, length, _ in found]  # samples after each window
    assert 0 <= left[-1] < SAMPLE_RATE / 10
    assert all(samples >= SAMPLE_RATE / 10 for samples in left[:-1]), "only the last window reaches the end"


def test_a_clip_of_a_few_milliseconds_more_than_5_s_is_one_window(one, tmp_path, capsys):
    for seconds, windows, duration in ((5, 1, 5), (5.026, 1, 5), (5.1, 2, 5.1), (5.2, 2, 5.2)):
        soundfile.write(tmp_path / "a.wav", noise(seconds), SAMPLE_RATE)
        found = call_json(capsys, one, tmp_path / "a.wav", "--hop", "0.1" if seconds == 5.1 else "2.5")[0]
        assert len(found["windows"]) == windows and found["duration_s"] == pytest.approx(duration)


@pytest.mark.parametrize("rate, channels", [(22_050, 1), (48_000, 2), (8_000, 1)])
def test_other_rates_and_channels_give_what_training_hears(tmp_path, rate, channels):
    t = np.arange(round(7.3 * rate)) / rate  # s
    samples = 0.4 * np.sin(2 * np.pi * 440 * t)[:, None] * np.linspace(1, 0.5, channels)
    soundfile.write(tmp_path / "a.flac", samples, rate)
    _, _, waveform = next(waveforms.windows(str(tmp_path / "a.flac"), 2 * SAMPLE_RATE))
    assert torch.allclose(waveform, dsets.load_waveform(tmp_path / "a.flac"), atol=1e-4)
    *_, (start, length, _) = waveforms.windows(str(tmp_path / "a.flac"), 2 * SAMPLE_RATE)
    assert start + length == pytest.approx(7.3 * SAMPLE_RATE, abs=2)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.aiff"])
def test_common_formats_are_predicted_whole(one, tmp_path, capsys, name):
    soundfile.write(tmp_path / name, noise(6, 48_000), 48_000)
    entry, = call_json(capsys, one, tmp_path / name)
    assert entry["duration_s"] == pytest.approx(6, abs=0.1)
    assert [window["start_s"] for window in entry["windows"]] == [0, 2.5]


@pytest.mark.slow
def test_the_command_says_of_standard_input_what_it_says_of_the_file(one, wav, capsys):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(one), "-", "--format", "json", "--device", "cpu"],
                          input=wav.read_bytes(), stdout=subprocess.PIPE, cwd=Path(__file__).parent, env=ENVIRONMENT)
    assert done.returncode == 0
    entry, = json.loads(done.stdout)
    named, = call_json(capsys, one, wav)
    assert entry["file"] == "-" and entry["top"] == named["top"]


# --- standard input ---------------------------------------------------------------------------------------------------

class Pipe(io.BytesIO):
    """Bytes that can only be read forward."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_):
        raise OSError("a pipe")


@pytest.fixture
def pipe(tmp_path, monkeypatch):
    """A file of 8 s, which is also standard input."""
    soundfile.write(tmp_path / "a.wav", noise(8), SAMPLE_RATE)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Pipe((tmp_path / "a.wav").read_bytes())))
    monkeypatch.setattr(predict, "BATCH_WINDOWS", 1)  # as of standard input: other batches have other last bits
    return tmp_path / "a.wav"


@pytest.mark.parametrize("form", ["table", "csv", "json", "jsonl", "labels"])
def test_standard_input_gives_what_a_file_gives(one, pipe, capsys, form):
    file = call(capsys, one, pipe, "--format", form)[0].replace(str(pipe), "-")
    heard = call(capsys, one, "-", "--format", form)[0]
    lines = heard.splitlines()
    if form == "table":
        assert lines[0] == "-" and sorted(["- (8.0 s)", *lines[1:]]) == sorted(file.splitlines())
        assert ["mean" in line for line in lines] == [False, False, False, False, True]
    elif form in ("csv", "jsonl"):
        assert sorted(lines) == sorted(file.splitlines()) and "mean" in lines[-1] and "mean" not in lines[1]
    else:
        assert heard == file


def test_of_standard_input_each_window_is_predicted_alone_and_at_once(one, monkeypatch):
    asked = []

    def endless(*_):
        for start in itertools.count(step=SAMPLE_RATE):
            asked.append(start)
            yield start, dsets.CLIP_SAMPLES, torch.zeros(1, dsets.CLIP_SAMPLES)

    monkeypatch.setattr(waveforms, "windows", endless)
    rows = predict.predict(predict.Predictor(one, "cpu"), "-", SAMPLE_RATE, top=1)
    for window in range(3):
        assert next(rows)["window"] == window and len(asked) == window + 1


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_stream_is_printed_as_it_is_heard_and_an_interrupt_gives_the_mean(one, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", noise(60), SAMPLE_RATE, subtype="PCM_16")
    data = (tmp_path / "a.wav").read_bytes()
    command = [sys.executable, "-c", PROGRAM, str(one), "-", "--format", "jsonl", "--device", "cpu"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          cwd=Path(__file__).parent, env=ENVIRONMENT) as process:
        lines = []
        for begin, end in ((0, 6.5), (6.5, 9)):  # s; nothing more comes until the windows of 0 to 5 and 2.5 to 7.5 s are there
            process.stdin.write(data[int(2 * SAMPLE_RATE * begin):int(2 * SAMPLE_RATE * end)])
            process.stdin.flush()
            lines.append(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        lines += process.stdout.readlines()
        assert (process.wait(), process.stderr.read()) == (130, b"")
    *windows, mean = map(json.loads, lines)
    assert [row["start_s"] for row in windows] == [0, 2.5, 5] and mean["window"] == "mean" and mean["notes"] == []
    assert [row["end_s"] for row in windows[:2]] == [5, 7.5] and 7.5 < windows[2]["end_s"] == mean["end_s"] <= 9
    named = call_json(capsys, one, tmp_path / "a.wav")[0]["windows"]
    assert windows[1]["top"][0]["probability"] == pytest.approx(named[1]["top"][0]["probability"], abs=1e-4)
    for guess in mean["top"]:
        heard = sum((row["end_s"] - row["start_s"]) * other["probability"] for row in windows for other in row["top"]
                    if other["class"] == guess["class"])
        assert guess["probability"] == pytest.approx(heard / sum(row["end_s"] - row["start_s"] for row in windows), abs=1e-6)


def test_the_command_works_in_a_thread(one, pipe, capsys):
    threads, status = threading.active_count(), []
    expected = call(capsys, one, pipe, "--format", "json")[0]
    thread = threading.Thread(target=lambda: status.append(
        predict.main([str(one), str(pipe), "-", "--format", "json", "--device", "cpu"])))
    thread.start()
    thread.join()
    file, heard = json.loads(capsys.readouterr().out)
    assert status == [0] and threading.active_count() == threads
    assert [file] == json.loads(expected) and heard == file | {"file": "-"}


# --- output -----------------------------------------------------------------------------------------------------------

def test_the_three_formats_say_the_same(one, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", noise(8), SAMPLE_RATE)
    entry, = call_json(capsys, one, tmp_path / "a.wav", "--top", 3)
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


def test_a_folders_files_come_by_name(one, tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    for name in ("b.wav", "a.WAV", "sub/c.flac"):
        soundfile.write(tmp_path / name, noise(1), SAMPLE_RATE)
    (tmp_path / "notes.txt").write_text("not a sound")
    names = [entry["file"] for entry in call_json(capsys, one, tmp_path)]
    assert names == [str(tmp_path / name) for name in ("a.WAV", "b.wav", "sub/c.flac")]


class Fake:
    """Instead of an ensemble: of three classes "c" has 0.05 in every window; "a" has what FAKE says of the window."""

    PROBABILITIES = [0.9, 0.8, 0.3, 0.55]
    classes = ["a", "b", "c"]

    def __init__(self, *_):
        self.left = list(self.PROBABILITIES)

    def __call__(self, waveforms: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[p, 0.95 - p, 0.05] for p in (self.left.pop(0) for _ in waveforms)])


@pytest.fixture
def fake(monkeypatch, tmp_path) -> Path:
    """A recording of 11 s: windows of 0 to 5, 2.5 to 7.5, 5 to 10 and 7.5 to 11 s are a, a, b and a."""
    monkeypatch.setattr(predict, "Predictor", Fake)
    soundfile.write(tmp_path / "a.wav", noise(11), SAMPLE_RATE)
    return tmp_path / "a.wav"


@pytest.mark.parametrize("flags, expected", [
    ([], "0.000000\t6.250000\ta\n6.250000\t8.750000\tb\n8.750000\t11.000000\ta\n"),
    (["--threshold", "0.6"], "0.000000\t6.250000\ta\n6.250000\t8.750000\tb\n"),
    (["--threshold", "0.7"], "0.000000\t6.250000\ta\n"),
    (["--threshold", "1"], ""),
    (["--hop", "5"], "0.000000\t10.000000\ta\n10.000000\t11.000000\tb\n")])  # 0 to 5, 5 to 10 and 10 to 11 s
def test_labels_lie_around_the_middles_and_neighbors_of_one_class_are_joined(one, fake, capsys, flags, expected):
    assert call(capsys, one, fake, "--format", "labels", *flags)[0] == expected


def test_below_the_threshold_no_class_is_named(one, fake, capsys):
    flags = [one, fake, "--top", 2, "--threshold", 0.6]  # mean of a: (5 * 0.9 + 5 * 0.8 + 5 * 0.3 + 3.5 * 0.55) / 18.5 = 0.645
    table = call(capsys, *flags)[0].splitlines()
    assert [line.split("  ")[-1] for line in table[1:]] == ["a 64.5%, b 30.5%", "a 90.0%, b 5.0%", "a 80.0%, b 15.0%",
                                                            "b 65.0%, a 30.0%", "-"]
    rows = list(csv.DictReader(io.StringIO(call(capsys, *flags, "--format", "csv")[0])))
    assert [row["class"] for row in rows if row["window"] == "3"] == ["-"] and len(rows) == 9
    entry, = call_json(capsys, *flags)
    assert [guess["class"] for guess in entry["windows"][3]["top"]] == ["-"] and entry["top"][0]["class"] == "a"
    entry, = call_json(capsys, *flags, "--threshold", 0.65)
    assert entry["top"] == [{"class": "-", "probability": pytest.approx(0.645, abs=1e-3)}]
    assert call_json(capsys, *flags, "--threshold", 0) == call_json(capsys, one, fake, "--top", 2)


def test_json_lines_say_what_json_says(one, wav, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", noise(8), SAMPLE_RATE)
    entries = call_json(capsys, one, wav, tmp_path / "a.wav")
    rows = [json.loads(line) for line in call(capsys, one, wav, tmp_path / "a.wav", "--format", "jsonl")[0].splitlines()]
    expected = [{"file": entry["file"]} | part for entry in entries for part in (
        {"window": "mean", "start_s": 0, "end_s": entry["duration_s"], "top": entry["top"], "notes": entry["notes"]},
        *({"window": number} | window for number, window in enumerate(entry["windows"])))]
    assert rows == expected


def test_notes_on_a_recording_are_told(one, wav, capsys, monkeypatch):
    windows = waveforms.windows

    def windows_with_note(path, hop, notes):
        yield from windows(path, hop)
        notes.append("is odd")

    monkeypatch.setattr(waveforms, "windows", windows_with_note)
    for form in ("table", "csv", "json", "jsonl", "labels"):
        out, err = call(capsys, one, wav, "--format", form)
        assert err == f"predict.py: note: {wav}: is odd\n" and ("is odd" in out) == (form in ("json", "jsonl"))
    assert call_json(capsys, one, wav)[0]["notes"] == ["is odd"]


# --- the picture ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seconds, columns", [
    (0.005, 1), (5, 430), pytest.param(61.7, 2000, marks=pytest.mark.slow)])
def test_the_picture_shows_every_moment_of_a_recording(one, tmp_path, capsys, monkeypatch, seconds, columns):
    samples = 1e-3 * noise(seconds)[:, 0]
    clicks = [second for second in (0, 0.5, 4.99, 5, 7.3, 61.65) if second < seconds]
    samples[[round(second * SAMPLE_RATE) for second in clicks]] = 1.0
    soundfile.write(tmp_path / "a.wav", samples, SAMPLE_RATE, subtype="FLOAT")
    seen = []
    figure = report.recording_figure
    monkeypatch.setattr(report, "recording_figure", lambda *arguments: seen.append(arguments) or figure(*arguments))
    table, _ = call(capsys, one, tmp_path / "a.wav", "--plot", tmp_path / "a.png")
    assert table == call(capsys, one, tmp_path / "a.wav")[0]
    picture, _, edges, probabilities, classes = seen[0]
    assert picture.shape == (128, columns) and np.isfinite(picture).all()
    assert edges[0] == 0 and edges[-1] == pytest.approx(seconds, abs=1e-4) and len(edges) == len(probabilities) + 1
    assert probabilities.sum(axis=1) == pytest.approx(1) and len(classes) == probabilities.shape[1]
    levels = picture.mean(axis=0)
    width = 1024 / SAMPLE_RATE * columns / seconds + 1.5  # of half a window, in columns
    loud = np.zeros(columns, bool)
    for second in clicks:
        near = np.abs(np.arange(columns) + 0.5 - second / seconds * columns) <= width
        assert levels[near].max() > levels.min() + 10 or near.all()
        loud |= near
    assert not (levels[~loud] > levels.min() + 10).any()
    assert min(imread(tmp_path / "a.png").shape[:2]) >= 400


def test_the_picture_has_no_gap_at_its_end(one, tmp_path, capsys, monkeypatch):
    soundfile.write(tmp_path / "a.wav", noise(10.09), SAMPLE_RATE)  # windows of 0 to 5, 3 to 8, 6 to 10.09 s; drawn up to 10 s
    seen = []
    monkeypatch.setattr(report, "recording_figure", lambda picture, *_: seen.append(picture) or Figure(figsize=(0.2, 0.2)))
    call(capsys, one, tmp_path / "a.wav", "--hop", 3, "--plot", tmp_path / "a.png")
    assert np.isfinite(seen[0]).all()


def test_one_recording_is_drawn_or_labeled(one, wav, pipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "recording_figure", lambda *arguments: Figure(figsize=(0.2, 0.2)))
    refuse(capsys, one, wav, pipe, "--plot", "a.png", words="--plot: expected one recording, found 2")
    refuse(capsys, one, wav.parent, "--format", "labels", words="--format labels: expected one recording, found 24")
    refuse(capsys, one, "-", "--plot", "a.png", words="--plot: cannot draw standard input")
    assert not Path("a.png").exists()
    assert "absent" in call(capsys, one, wav, "--plot", Path("absent", "a.png"), status=2)[1]
    call(capsys, one, tmp_path, "--format", "labels", "--plot", "a.png")  # a folder that holds one
    assert Path("a.png").exists()


# --- refusals ---------------------------------------------------------------------------------------------------------

def test_a_bad_file_is_named_and_the_rest_go_on(one, wav, tmp_path, capsys):
    (tmp_path / "bad.wav").write_bytes(b"RIFF nonsense")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), SAMPLE_RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(9 * SAMPLE_RATE, np.nan), SAMPLE_RATE, subtype="FLOAT")
    names = [tmp_path / "bad.wav", wav, tmp_path / "none.wav", tmp_path / "absent.wav", tmp_path / "nan.wav"]
    out, err = call(capsys, one, *names, "--format", "json", status=2)
    assert [entry["file"] for entry in json.loads(out)] == [str(wav)]
    lines = err.splitlines()
    assert len(lines) == 5 and all(line.startswith("predict.py: ") for line in lines)
    for line, words in zip(lines, ["bad.wav", "none.wav", "absent.wav", "nan.wav", "4 of 5"]):
        assert words in line
    assert call_json(capsys, one, tmp_path / "bad.wav", status=2) == []


@pytest.mark.parametrize("flags, words", [
    (["--hop", "0"], "--hop 0"), (["--hop", "6"], "--hop 6"), (["--hop", "nan"], "--hop nan"), (["--top", "0"], "--top 0"),
    (["--format", "xml"], "--format"), (["--device", "tpu"], "--device"), (["--threshold", "-0.1"], "--threshold -0.1"),
    (["--threshold", "50"], "--threshold 50"), (["--threshold", "nan"], "--threshold nan"), (["--plot", "a.wav"], "--plot a.wav"),
    (["--plot", ""], "--plot"), (["--onnx", "a.wav"], "--onnx a.wav"), (["--onnx", ""], "--onnx"), ([""], "FILE_OR_FOLDER"),
    (["--tops", "1"], "--tops")])
def test_bad_flags_are_refused_in_one_line(one, wav, capsys, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    refuse(capsys, one, *([] if flags == [""] else [wav]), *flags, words=words)
    assert not list(tmp_path.iterdir())


def test_several_networks_are_refused_as_one_graph(run_dir, tmp_path, capsys):
    _, err = call(capsys, run_dir, "--onnx", tmp_path / "a.onnx", status=2)
    assert f"expected one network, {run_dir} holds several" in err
    assert not list(tmp_path.iterdir())


def test_in_a_folder_what_cannot_be_decoded_is_named_and_what_is_no_recording_is_not(one, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", noise(1), SAMPLE_RATE)
    for name in ("damaged.m4a", "photo.jpg"):
        (tmp_path / name).write_bytes(b"no sound at all " * 100)
    out, err = call(capsys, one, tmp_path, "--format", "json", status=2)
    assert [entry["file"] for entry in json.loads(out)] == [str(tmp_path / "a.wav")]
    assert "damaged.m4a" in err and "1 of 2" in err and "photo" not in err


def test_names_that_cannot_be_are_named_and_the_rest_go_on(one, wav, capsys):
    out, err = call(capsys, one, "a" * 300 + ".wav", wav, "--format", "json", status=2)
    assert len(json.loads(out)) == 1 and err.count("no such file") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no file can have such a name")
def test_a_name_that_is_not_utf8_is_predicted(one, tmp_path, capsys):
    path = tmp_path / os.fsdecode(b"\xe9.wav")
    soundfile.write(tmp_path / "a.wav", noise(1), SAMPLE_RATE)
    (tmp_path / "a.wav").rename(path)
    for name in (path, tmp_path):
        for form in ("table", "csv", "jsonl"):
            assert "\\udce9.wav" in call(capsys, one, name, "--format", form)[0]
        entry, = call_json(capsys, one, name)
        assert os.fsencode(entry["file"]) == os.fsencode(path)


@pytest.mark.skipif(sys.platform == "win32", reason="no file can have such a name there")
def test_control_characters_of_a_name_are_shown_and_not_obeyed(one, tmp_path, capsys):
    path = tmp_path / "\x1b[31m\n.wav"
    soundfile.write(tmp_path / "a.wav", noise(1), SAMPLE_RATE)
    (tmp_path / "a.wav").rename(path)
    out, _ = call(capsys, one, path)
    assert out.startswith(rf"{tmp_path}/\x1b[31m\n.wav (1.0 s)" + "\n") and out.replace("\n", "").isprintable()
    row, *_ = csv.DictReader(io.StringIO(call(capsys, one, path, "--format", "csv")[0]))
    assert row["file"] == str(path), "for programs, the name as it is"


@pytest.mark.slow
def test_names_that_the_terminal_cannot_show_are_predicted(one, tmp_path):
    soundfile.write(tmp_path / "ü.wav", noise(1), SAMPLE_RATE)
    names = [str(tmp_path / "ü.wav"), str(tmp_path / "ö.wav")]  # the second is not there
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(one), *names, "--format", "csv", "--device", "cpu"],
                          cwd=Path(__file__).parent, capture_output=True, env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert b"\\xfc.wav,mean" in done.stdout and b"\\xf6.wav: no such file" in done.stderr


def test_what_is_odd_about_a_recording_is_told_and_it_is_predicted(one, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", noise(8) * 0, SAMPLE_RATE)
    (tmp_path / "a.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:-200_000])
    out, err = call(capsys, one, tmp_path / "a.wav", "--format", "json")
    assert json.loads(out)[0]["duration_s"] == pytest.approx(8 - 100_000 / SAMPLE_RATE)
    notes = [f"predict.py: note: {tmp_path / 'a.wav'}: {note}" for note in
             ("lacks 2.3 of its 8.0 s, cut short or damaged; copy it again", "is silent")]
    assert err.splitlines() == notes
    predictor, name = predict.Predictor(one, "cpu"), str(tmp_path / "a.wav")
    *_, mean = predict.predict(predictor, name, SAMPLE_RATE, top=1, interrupts=[signal.SIGINT])
    assert mean["notes"] == ["is silent"], "that the rest is missing is known"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="shell redirections")
@pytest.mark.parametrize("redirection", [">/dev/full", "| true"])
def test_output_that_cannot_be_written_is_one_line(one, redirection):
    done = subprocess.run(["bash", "-c", f'set -o pipefail; sleep 0.1; "$@" {redirection}', "bash", sys.executable, "-c", PROGRAM,
                           str(one), "absent.wav", "--format", "csv", "--device", "cpu"], cwd=Path(__file__).parent,
                          capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2 and "Exception" not in done.stderr
    line, = [line for line in done.stderr.splitlines() if "absent.wav" not in line]
    assert line.startswith("predict.py: output: ")


def test_models_that_cannot_predict_are_refused(run_dir, one, wav, tmp_path, capsys):
    refuse(capsys, run_dir / "seed-42", wav, words="seed-42: holds no checkpoint")
    refuse(capsys, tmp_path / "absent", wav, words="absent")
    refuse(capsys, tmp_path / "absent.pt", wav, words="absent.pt: no such file")
    refuse(capsys, run_dir.parent, wav, words=f"did you mean {run_dir}?")
    refuse(capsys, wav, one, words=f"{one}: is a run")
    refuse(capsys, one, tmp_path, words=f"{tmp_path}: holds no recordings")
    refuse(capsys, one, words="FILE_OR_FOLDER")
    refuse(capsys, words="FILE_OR_FOLDER")


def test_a_folder_of_recordings_may_hold_a_run(one, wav, tmp_path, capsys):
    shutil.copytree(one, tmp_path / "sounds" / "runs" / "one")
    shutil.copy(wav, tmp_path / "sounds" / "a.wav")
    found, = call_json(capsys, one, tmp_path / "sounds")
    assert found["file"] == str(tmp_path / "sounds" / "a.wav")


def test_without_a_run_the_weights_that_come_with_the_program_predict(one, wav, tmp_path, capsys, monkeypatch):
    expected, _ = call(capsys, one, wav)
    weights = shutil.copy(one / "last.pt", tmp_path / "own.pt")
    monkeypatch.setattr(predict, "WEIGHTS", weights)
    (tmp_path / "absent").mkdir()
    shutil.copy(wav, tmp_path / "absent" / "no-ending")
    for name in (wav, tmp_path / "absent"):
        out, err = call(capsys, name)
        assert out.splitlines()[1:] == expected.splitlines()[1:]
        assert err.count("\n") == 1 and str(weights) in err
    out, err = call(capsys, tmp_path / "absent.wav", wav, status=2)
    assert out == expected and err.splitlines()[1].startswith(f"predict.py: {tmp_path / 'absent.wav'}: ")


def change(checkpoint: dict, kind: str) -> dict:
    weight, features = checkpoint["model"]["conv.weight"], checkpoint["features"]
    return checkpoint | {
        "nan": {"model": checkpoint["model"] | {"conv.weight": torch.full_like(weight, torch.nan)}},
        "shape": {"model": checkpoint["model"] | {"conv.weight": weight[:2]}},
        "variance": {"model": checkpoint["model"] | {"bn.running_var": -torch.ones(4)}},
        "missing": {"model": {}}, "no dict": {"model": 5}, "fewer classes": {"classes": ["a"]}, "no list": {"classes": None},
        "more classes": {"classes": list("abcde")}, "no names": {"classes": [1, 2, 3, 4]},
        "name": {"model_name": "vgg"}, "name list": {"model_name": []},
        "no such feature": {"features": features | {"colour": 1}}, "feature's type": {"features": features | {"n_fft": "2048"}},
        "feature's value": {"features": features | {"n_mels": 0}},
        "feature nan": {"features": features | {"top_db": float("nan")}},
        "other crop": {"features": features | {"crop_mels": 50}},
        "std 0": {"mean_std": [0.0, 0.0]}, "mean nan": {"mean_std": [float("nan"), 1.0]}, "no mean": {"mean_std": []},
        "no number": {"mean_std": ["a", "b"]}, "crops": {"flags": {"tta_crops": 2}}, "no flags": {"flags": {}},
    }[kind]


@pytest.mark.parametrize("kind, words", [
    ("nan", "conv.weight"), ("variance", "bn.running_var"), ("shape", "conv.weight"), ("missing", "conv.weight"),
    ("no dict", "model"), ("fewer classes", "fc.bias"), ("more classes", "fc.bias"), ("no names", "classes"),
    ("no list", "classes"), ("name", "vgg"),
    ("name list", "model_name"), ("no such feature", "colour"), ("feature's type", "n_fft"), ("feature's value", "n_mels"),
    ("feature nan", "top_db"), ("other crop", "fc.weight"), ("std 0", "std 0.0"), ("mean nan", "mean nan"),
    ("no mean", ""), ("no number", ""), ("crops", "2 crops"), ("no flags", "tta_crops")])
def test_checkpoints_whose_parts_do_not_fit_are_refused(one, wav, tmp_path, capsys, kind, words):
    checkpoint = torch.load(one / "last.pt", weights_only=True)
    torch.save(change(checkpoint, kind), tmp_path / "changed.pt")
    refuse(capsys, tmp_path / "changed.pt", wav, words=words)


@pytest.mark.filterwarnings("ignore:At least one mel filterbank")
@pytest.mark.parametrize("features", [
    {"n_fft": 32, "hop_length": 32, "n_mels": 16, "f_max": 1.0, "crop_mels": 16},  # no frequency bin below 1 Hz but 0
    {"n_fft": 32_768, "hop_length": 16_384, "n_mels": 16_384, "crop_frames": 14}])  # 6 GB of filters
def test_features_that_cannot_be_computed_are_refused(one, wav, tmp_path, capsys, monkeypatch, features):
    monkeypatch.setitem(models.MODELS, "cnn8", models.CNN8)  # takes examples of any size
    checkpoint = torch.load(one / "last.pt", weights_only=True)
    torch.save(checkpoint | {"model": models.CNN8(4).state_dict(), "features": features}, tmp_path / "changed.pt")
    refuse(capsys, tmp_path / "changed.pt", wav, words=str(tmp_path / "changed.pt"))


@pytest.mark.parametrize("content", [b"", b"garbage", "half"])
def test_files_that_are_no_checkpoints_are_refused(one, wav, tmp_path, capsys, content):
    whole = (one / "last.pt").read_bytes()
    (tmp_path / "other.pt").write_bytes(whole[:len(whole) // 2] if content == "half" else content)
    refuse(capsys, tmp_path / "other.pt", wav, words=str(tmp_path / "other.pt"))


def test_networks_of_other_classes_do_not_predict_together(run_dir, wav, tmp_path, capsys):
    shutil.copytree(run_dir, tmp_path / "run")
    path = tmp_path / "run" / "seed-42" / "fold-2" / "last.pt"
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | {"classes": checkpoint["classes"][::-1]}, path)
    assert f"{path}: cannot predict together" in call(capsys, tmp_path / "run", wav, status=2)[1]


def test_a_plot_into_no_folder_is_refused_before_anything_is_predicted(one, wav, tmp_path, capsys):
    out, err = call(capsys, one, wav, "--plot", tmp_path / "absent" / "a.png", status=2)
    assert out == "" and "--plot" in err and str(tmp_path / "absent") in err


def test_the_readmes_lines_for_python_run(run_dir, shared_root, tmp_path, monkeypatch):
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    >>> (.*)", readme[readme.index("From Python:"):readme.index("## Your own sounds")], re.MULTILINE)
    (tmp_path / "RUN_DIR").symlink_to(run_dir)
    (tmp_path / "my_sounds").symlink_to(shared_root)
    soundfile.write(tmp_path / "a.wav", noise(8), SAMPLE_RATE)
    (tmp_path / "a.wav").rename(tmp_path / "recording.m4a")  # what it is counts, not its name
    monkeypatch.chdir(tmp_path)
    names = {}
    exec("\n".join(lines), names)
    assert len(lines) == 5 and names["found"]["probabilities"].shape == (3, 4) and len(names["ds"]) == 24
