"""What a run shows: pictures, report.csv, the summary and its table, TensorBoard, the comparison of two runs."""
import functools
import io
import json
import math
import shutil
import threading
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dsets
import models
import training
from conftest import error_line, run, Tiny, train_in
from util import checkpoint as checkpoints
from util import report, rundir

small = pytest.mark.usefixtures("tiny", "small_pictures")  # for tests that train


def metrics_rows(losses: list[float], seed: int = 1, fold: int = 1, accuracy: float = 0.5) -> list[dict]:
    """Rows of metrics.jsonl with these validation losses."""
    return [{"seed": seed, "fold": fold, "epoch": epoch, "phase": phase, "loss": loss, "accuracy": accuracy, "precision": 0.25,
             "recall": 0.5, "f1": 1 / 3, "seconds": 1.0, "lr": 0.1}
            for epoch, loss in enumerate(losses, start=1) for phase in ("training", "validation")]


def write_training(run_dir: Path, rows: list[dict]) -> None:
    folder = rundir.training_dir(run_dir, rows[0]["seed"], rows[0]["fold"])
    folder.mkdir(parents=True)
    rundir.write_metrics(folder, rows)


# --- pictures ---------------------------------------------------------------------------------------------------------

def test_curves_of_several_trainings_are_their_mean_in_a_band():
    rows = [row for fold in (1, 3) for row in metrics_rows([fold, 2 * fold], fold=fold, accuracy=fold / 10)]
    loss, accuracy = report.curves_figure(rows).axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[2, 4], [2, 4]]
    band = loss.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((2 - 2 ** 0.5, 4 + 2 * 2 ** 0.5))
    assert list(accuracy.lines[0].get_ydata()) == pytest.approx([20, 20])
    assert not report.curves_figure(rows[:4]).axes[0].collections, "one training has no band"


def test_a_confusion_matrix_shows_counts_and_class_names():
    confusion = np.array([[3, 0], [1, 2]])
    axes = report.confusion_figure(confusion, ["rain", "$5$ coin"]).axes[0]
    assert {text.get_position()[::-1]: text.get_text() for text in axes.texts} == {(0, 0): "3", (1, 0): "1", (1, 1): "2"}
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["rain", "$5$ coin"] and not labels[1].get_parse_math()
    assert axes.get_ylabel() == "true class"


def test_rows_of_the_confusion_matrix_are_true_classes(tmp_path, monkeypatch):
    seen, small_figure = [], functools.partial(Figure, figsize=(0.2, 0.2))
    monkeypatch.setattr(report, "curves_figure", lambda rows: small_figure())
    monkeypatch.setattr(report, "confusion_figure", lambda matrix, classes: seen.append(matrix.tolist()) or small_figure())
    report.write_pictures(tmp_path, [], torch.tensor([0, 1, 1]), torch.tensor([0, 0, 0]), ["a", "b", "c"])
    assert seen == [[[1, 0, 0], [2, 0, 0], [0, 0, 0]]]


def test_a_confusion_matrix_of_many_classes_is_not_drawn_ever_larger():
    figures = [report.confusion_figure(np.eye(count, dtype=int), [""] * count) for count in (50, 300, 400)]
    sides = [figure.get_figwidth() for figure in figures]
    assert sides[0] < sides[1] == sides[2]


def test_examples_are_drawn_with_their_titles():
    figure = report.examples_figure(np.zeros((5, 1, 100, 384)), list("abcde"))
    visible = [axes for axes in figure.axes if axes.get_visible() and axes.get_title()]
    assert [axes.get_title() for axes in visible] == list("abcde")


@pytest.mark.parametrize("params", [dsets.FeatureParams(), dsets.FeatureParams(n_mels=64, f_min=50.0, f_max=16e3, crop_mels=60)])
def test_a_tone_is_drawn_at_its_frequency_and_time(params):
    t = np.arange(dsets.CLIP_SAMPLES) / dsets.SAMPLE_RATE
    tone = np.sin(2 * np.pi * 1500 * t) * ((t > 2) & (t < 3))
    feature = dsets.LogMel(params)(torch.from_numpy(tone.astype(np.float32))).numpy()
    frame = int(feature.max(axis=0).argmax())
    power = 10 ** (feature[:, frame] / 10)
    mel = (power * np.arange(len(power))).sum() / power.sum()  # between two filters
    for low, first in ((0, 0), (5, 100)):
        axes = Figure().subplots()
        image = report.draw_mel(axes, feature[low:, first:], params, low, first)
        ticks = {label.get_text(): position for label, position in zip(axes.get_yticklabels(), axes.get_yticks())}
        left, right, bottom, top = image.get_extent()
        height, width = feature[low:, first:].shape
        assert ticks["1500"] == pytest.approx(mel, abs=0.2)
        assert bottom + (mel - low + 0.5) * (top - bottom) / height == pytest.approx(mel)  # where row mel - low is drawn
        assert 2 <= left + (frame - first + 0.5) * (right - left) / width <= 3


@pytest.mark.parametrize("seconds, unit, end", [(5, "s", 5), (3600, "min", 60), (36_000, "h", 10)])
def test_a_recording_is_drawn_over_its_likeliest_classes(seconds, unit, end):
    windows = seconds // 2
    short = windows // 4 * 2 + 1  # an odd one: never the first of several that are drawn as one
    probabilities = np.full((windows, 12), 0.01)
    probabilities[:, 3] = 0.5
    probabilities[short, 7] = 0.9  # one moment of all, which may be less than a pixel
    edges = list(np.linspace(0, seconds, windows + 1))
    params, classes = dsets.FeatureParams(), [f"${number}" for number in range(12)]
    upper, lower, *_ = report.recording_figure(np.zeros((128, 50)), params, edges, probabilities, classes).axes
    assert upper.get_xlim() == lower.get_xlim() == (0, end) and lower.get_xlabel() == f"time ({unit})"
    labels = lower.get_yticklabels()
    assert [label.get_text() for label in labels][:2] == ["$7", "$3"] and len(labels) == 8 and not labels[0].get_parse_math()
    mesh, = lower.collections
    values, times = np.asarray(mesh.get_array()), mesh.get_coordinates()[0, :, 0]
    moment = int(values[0].argmax())
    assert values[0, moment] == 0.9 and times[moment] <= edges[short] * end / seconds < times[moment + 1]
    assert (values[1] == 0.5).all() and values.shape[1] <= 1000
    assert lower.transData.transform((0, 0.5))[1] > lower.transData.transform((0, 1.5))[1], "the likeliest on top"


def test_silence_is_drawn_dark():
    upper = report.recording_figure(np.full((128, 50), -100.0), dsets.FeatureParams(), [0, 5], np.ones((1, 1)), ["a"]).axes[0]
    assert upper.images[0].norm(-100.0) == 0


@pytest.mark.parametrize("name, mel, frame", [("cnn8", 48, 160), ("resnet18", 64, 160)])
def test_a_class_activation_map_is_drawn_where_the_network_heard_it(name, mel, frame):
    model = models.build_model(name, 1).eval()
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 1 / parameter[0].numel())  # all kernels are averages: the map peaks above a peak
    example = torch.zeros(1, 1, 100, 384)
    example[0, 0, mel, frame] = 1
    with torch.inference_mode():
        activations = models.class_activation_maps(model, example)[0, 0].numpy()
    axes, params = Figure().subplots(), dsets.FeatureParams()
    image = report.draw_activation_map(axes, example[0, 0].numpy(), activations, params, 14, 23, 1.0)
    row, column = np.unravel_index(activations.argmax(), activations.shape)
    left, right, bottom, top = image.get_extent()
    assert bottom + (row + 0.5) * (top - bottom) / activations.shape[0] == pytest.approx(14 + mel)
    seconds = params.hop_length / dsets.SAMPLE_RATE
    assert left + (column + 0.5) * (right - left) / activations.shape[1] == pytest.approx((23 + frame) * seconds)
    assert [*axes.get_xlim(), *axes.get_ylim()] == pytest.approx(axes.images[0].get_extent()), "the crop alone is in sight"


# --- a run with its real pictures -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def drawn(pristine_root, tmp_path_factory) -> Path:
    """The folder of a training of 8 clips x 2 views in batches of 4, 3 epochs."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(models.MODELS, "cnn8", Tiny)
        flags = ["--epochs", 3, "--lr-schedule", "cosine", "--lr", 0.5]
        run_dir = train_in(tmp_path_factory.mktemp("drawn") / "run", pristine_root, *flags)
    torch.use_deterministic_algorithms(False)
    return run_dir / "seed-42" / "fold-1"


def test_pictures_are_there_and_not_empty(drawn):
    for name in ("curves.png", "confusion.png"):
        image = imread(drawn / name)
        assert min(image.shape[:2]) >= 400 and image.std() > 0.05
    assert not (drawn.parents[1] / "confusion.png").exists(), "of one training, there is nothing to draw together"


def test_tensorboard_has_scalars_over_the_examples_seen(drawn):
    events, rows = EventAccumulator(str(drawn)).Reload(), rundir.read_metrics(drawn)
    for phase in ("training", "validation"):
        scalars = events.Scalars(f"accuracy/{phase}")
        assert [event.step for event in scalars] == [16, 32, 48]
        assert [event.value for event in scalars] == pytest.approx([row["accuracy"] for row in rows if row["phase"] == phase])
    assert [event.value for event in events.Scalars("learning rate")] == pytest.approx(  # of each epoch's last step
        [training.lr_at_step(4 * epoch - 1, 12, 0.5, "cosine") for epoch in (1, 2, 3)])
    assert all(event.value > 0 for event in events.Scalars("examples per s"))


def test_tensorboard_has_pictures_flags_and_final_metrics(drawn):
    events, rows = EventAccumulator(str(drawn)).Reload(), rundir.read_metrics(drawn)
    assert events.Tags()["images"] == ["augmented examples", "confusion"]
    assert events.Scalars("final/accuracy")[-1].value == pytest.approx(rows[-1]["accuracy"])
    assert "_hparams_/experiment" in events.summary_metadata


@small
def test_tensorboard_has_each_epoch_once_after_resuming(reference):
    run("--resume", reference, "--epochs", 3)
    events = EventAccumulator(str(reference / "seed-2" / "fold-1")).Reload()
    assert [event.step for event in events.Scalars("loss/validation")] == [16, 32, 48]


# --- tables -----------------------------------------------------------------------------------------------------------

def test_report_csv_has_a_row_a_class(tmp_path):
    report.write_report(tmp_path, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), ["rain", "dog, large", "never"])
    table = pd.read_csv(tmp_path / "report.csv")
    assert list(table.columns) == ["class", "precision", "recall", "f1", "clips", "number"]
    assert table["number"].tolist() == [0, 1, 2]
    assert table["class"].tolist() == ["rain", "dog, large", "never"] and table["clips"].tolist() == [2, 2, 0]
    assert table["precision"].tolist() == pytest.approx([1, 2 / 3, 0], abs=1e-4) and table["recall"].tolist() == [0.5, 1, 0]


def test_the_report_of_a_training_is_that_of_its_last_epoch(shared_run):
    for folder in shared_run.glob("seed-*/fold-*"):
        table, last = pd.read_csv(folder / "report.csv"), rundir.read_metrics(folder)[-1]
        assert table["class"].tolist() == ["sound_0", "sound_1"] and table["clips"].sum() == 4
        for metric in ("precision", "recall", "f1"):
            assert table[metric].mean() == pytest.approx(last[metric], abs=1e-4)


@small
def test_several_trainings_have_pictures_and_a_report_of_them_all(pristine_root, reference):
    names = ("curves.png", "confusion.png", "report.csv")
    assert all((reference / name).exists() for name in names)
    each = [pd.read_csv(folder / "report.csv") for folder in reference.glob("seed-*/fold-*")]
    table = pd.read_csv(reference / "report.csv")
    assert list(table["clips"]) == list(sum(one["clips"] for one in each))
    # every fold has as many clips of a class as the others: pooled recall is the mean recall
    assert list(table["recall"]) == pytest.approx(list(sum(one["recall"] for one in each) / 4), abs=1e-3)
    (reference / "report.csv").unlink()
    (reference / "seed-1" / "fold-3" / "last.pt").unlink()
    run("--resume", reference)  # what a user removes is not missed; the table is still printed
    assert not (reference / "report.csv").exists()


def test_the_summary_is_of_finished_trainings_with_their_mean_and_std(tmp_path):
    write_training(tmp_path, metrics_rows([3.0, 1.0, 2.0], seed=10, accuracy=0.5))
    write_training(tmp_path, metrics_rows([2.0, 2.0, 4.0], seed=9, fold=2, accuracy=0.75))
    write_training(tmp_path, metrics_rows([0.1, 0.1], seed=9, fold=1, accuracy=0.0))  # not finished
    shutil.copytree(tmp_path / "seed-9" / "fold-2", tmp_path / "seed-9" / "fold-2 copy")
    summary = report.summarize(tmp_path, 3)
    assert [(each["seed"], each["fold"]) for each in summary["trainings"]] == [(9, 2), (10, 1)]
    assert [(each["loss"], each["best_epoch"], each["best_loss"]) for each in summary["trainings"]] == [(4, 1, 2), (2, 2, 1)]
    assert summary["mean"]["loss"] == 3.0 and summary["mean"]["best_loss"] == 1.5 and summary["mean"]["accuracy"] == 0.625
    assert (summary["std"]["loss"], summary["std"]["accuracy"]) == pytest.approx((math.sqrt(2), 0.125 * math.sqrt(2)))
    lines = report.summary_table(summary).splitlines()
    assert lines[1].split() == ["9", "2", "75.00", "25.00", "50.00", "33.33", "1", "75.00"]
    assert lines[3].split()[:2] == ["mean", "62.50"] and lines[4].split()[:2] == ["std", "17.68"]
    assert set(report.summarize(tmp_path, 2)["std"].values()) == {0.0}, "of one training"


def test_a_run_ends_with_its_summary(shared_run):
    summary = json.loads((shared_run / "summary.json").read_text())
    assert summary == report.summarize(shared_run, 2)
    assert [(each["seed"], each["fold"]) for each in summary["trainings"]] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    for each in summary["trainings"]:
        last = rundir.read_metrics(rundir.training_dir(shared_run, each["seed"], each["fold"]))[-1]
        assert {metric: each[metric] for metric in report.METRICS} == {metric: last[metric] for metric in report.METRICS}


@small
def test_the_summary_waits_for_the_folders_lock(pristine_root, reference):
    """Of two jobs that end at once, the last one sees both trainings."""
    (reference / "summary.json").unlink()
    dataset = dsets.ESC50(pristine_root)
    targets = {fold: dataset.targets[dataset.split(fold)[1]] for fold in dataset.folds}
    with filelock.FileLock(reference / "lock"):
        writer = threading.Thread(target=report.write_summary, args=(reference, 2, targets, dataset.classes))
        writer.start()
        writer.join(timeout=0.3)
        assert writer.is_alive() and not (reference / "summary.json").exists()
    writer.join()
    assert len(json.loads((reference / "summary.json").read_text())["trainings"]) == 4


# --- the comparison of two runs ---------------------------------------------------------------------------------------

def change_rows(run_dir: Path, seed: int, fold: int, changes: dict[int, dict]) -> None:
    """Give rows of a training's metrics.jsonl other entries."""
    folder = rundir.training_dir(run_dir, seed, fold)
    rundir.write_metrics(folder, [row | changes.get(number, {}) for number, row in enumerate(rundir.read_metrics(folder))])


def test_a_copy_is_identical_whatever_time_it_took(shared_run, reference):
    change_rows(reference, 1, 1, {0: {"seconds": 9.0}})
    line, = report.compare_runs(shared_run, reference)
    assert "identical" in line and "not" not in line


def test_a_comparison_names_the_trainings_and_the_first_row_that_differ(shared_run, reference):
    change_rows(reference, 1, 3, {1: {"loss": 9.0}, 2: {"accuracy": 9.0}})
    last = reference / "seed-2" / "fold-1" / "last.pt"
    checkpoint = checkpoints.load_checkpoint(last)
    checkpoint["model"]["fc.bias"][0] += 1e-6
    checkpoints.save_checkpoint(last, checkpoint)
    (reference / "seed-2" / "fold-3" / "last.pt").unlink()
    unfinished = rundir.training_dir(reference, 1, 1)
    rundir.write_metrics(unfinished, rundir.read_metrics(unfinished)[:2])
    fewer, metrics, weights, missing, *rest = report.compare_runs(shared_run, reference)
    assert fewer.startswith("seed 1 fold 1: 4 rows of metrics then, 2 now")
    assert metrics.startswith("seed 1 fold 3: 2 of 4 rows") and "epoch 1 (validation)" in metrics
    assert weights.startswith("seed 2 fold 1: weights")
    assert missing.startswith("seed 2 fold 3: ") and str(reference / "seed-2" / "fold-3" / "last.pt") in missing
    assert rest[0].startswith("not identical") and len(rest) == 2 and "nothing" in rest[1]


def test_a_comparison_names_what_could_explain_the_difference(shared_run, reference):
    change_rows(reference, 1, 1, {3: {"f1": 9.0}})
    content = json.loads((reference / "run.json").read_text())
    content["versions"]["numpy"] = "1.0"
    content["flags"] |= {"device": "cuda", "comment": "another", "data": "elsewhere"}
    content["git"]["commit"] = "abc"
    content["hardware"]["cpu"] = "Z80"
    (reference / "run.json").write_text(json.dumps(content))
    lines = report.compare_runs(shared_run, reference)
    changes = lines[2:]
    assert [line.split(":")[0] for line in changes] == ["flags device", "git commit", "hardware cpu", "versions numpy"]
    assert "cpu then, cuda now" in changes[0] and f"{np.__version__} then, 1.0 now" in changes[3]


@small
def test_rerun_prints_the_comparison(reference, tmp_path, capsys):
    change_rows(reference, 2, 1, {0: {"loss": 9.0}})
    run("--rerun", reference, "--run-dir", tmp_path / "again")
    assert capsys.readouterr().out.endswith("\n".join(report.compare_runs(reference, tmp_path / "again")) + "\n")
    run("--rerun", reference, "--lr", 1, status=2)
    assert "--lr" in error_line(capsys)


def test_class_names_of_any_script_appear_or_their_numbers_do(monkeypatch, recwarn):
    names = ["rain", "été", "\U0001faa2 knot", "雨"]  # the third is an emoji that few fonts have
    from matplotlib import font_manager
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [font for font in font_manager.fontManager.ttflist
                                                              if font.name == "DejaVu Sans"])
    drawn, families = report.drawable(names)
    assert drawn == ["rain", "été", "2", "3"] and families == ["DejaVu Sans"]
    figure = report.confusion_figure(np.eye(4, dtype=int), names)
    figure.savefig(io.BytesIO(), format="png")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == drawn
    report.examples_figure(np.zeros((2, 1, 10, 10)), names[2:]).savefig(io.BytesIO(), format="png")
    assert not recwarn.list


def test_examples_of_a_class_that_no_font_has_are_titled_by_its_number(dataset, monkeypatch):
    from matplotlib import font_manager
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    monkeypatch.setattr(dataset, "classes", ["a", "b", "c", "雨"])
    indices, options = (dataset.targets == 3).nonzero().flatten(), {"views": 2, "seed": 1, "fold": 1}
    figure = training.first_examples(dataset, indices, (0.0, 1.0), 4, options)
    assert {axes.get_title() for axes in figure.axes[:4]} == {"3"}


def test_predictions_csv_holds_any_name_and_exact_starts(tmp_path):
    clips = pd.DataFrame({"file": ["caf\udce9.wav", "a.wav"], "start": [12_345.28, 0.0], "fold": 1})  # Latin-1 on the disk
    report.write_predictions(tmp_path, clips, torch.tensor([0, 1]), torch.tensor([1, 1]), ["a", "b"],
                             torch.tensor([[0.75, 1 / 3], [1e-9, 1.0]]))
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert table["file"].tolist() == ["caf\\udce9.wav", "a.wav"] and table["start"].tolist() == [12_345.28, 0]
    assert table["probability"].tolist() == pytest.approx([0.75, 1e-9]) and table["true_probability"][0] == 0.333333


def test_a_font_that_has_the_letters_and_is_still_there_is_used(tmp_path, monkeypatch):
    from matplotlib import font_manager, ft2font
    other = tmp_path / "other.ttf"
    other.touch()
    fonts = [font_manager.FontEntry(fname=str(tmp_path / "gone.ttf"), name="Gone"),  # matplotlib remembers those of earlier days
             font_manager.FontEntry(fname=str(other), name="Other")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    real = ft2font.FT2Font

    class Font:
        def __new__(cls, path):
            return real(path) if path != str(other) else type("Other", (), {"get_charmap": lambda self: {ord("雨"): 1}})()
    monkeypatch.setattr(ft2font, "FT2Font", Font)
    assert report.drawable(["雨", "rain"]) == (["雨", "rain"], ["DejaVu Sans", "Other"])
