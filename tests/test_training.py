import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.metrics import f1_score, precision_score, recall_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util import config as cli
import dsets
from util import device as machine
import models
from util import optim
from util import report as plots
from util import dist as processes
from util import rundir as runs
import training
from conftest import Tiny, write_root

pytestmark = pytest.mark.usefixtures("tiny")  # cnn8 is tiny here

CPU = torch.device("cpu")
ONE = processes.Ranks()
PROGRAM = Path(training.__file__)


@pytest.fixture(scope="module")
def pristine_root(tmp_path_factory) -> Path:
    """12 clips: 2 classes, 3 folds."""
    return write_root(tmp_path_factory.mktemp("pristine") / "root", num_classes=2, folds=3, clips=2)


@pytest.fixture
def root(pristine_root, tmp_path) -> Path:
    return shutil.copytree(pristine_root, tmp_path / "root")


def run(*flags, status: int = 0) -> None:
    assert training.main([str(flag) for flag in flags]) == status


def train_in(run_dir: Path, root: Path, *flags) -> Path:
    run("--data", root, "--run-dir", run_dir, "--epochs", 2, "--views", 2, "--batch-size", 4, *flags)
    return run_dir


def weights_of(run_dir: Path, seed: int = 42, fold: int = 1, name: str = "last.pt") -> dict:
    return runs.load_checkpoint(run_dir / f"seed-{seed}" / f"fold-{fold}" / name)["model"]


def same_weights(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def results_of(run_dir: Path) -> dict:
    """All that must not depend on interruptions or the clock: weights, metrics but for the seconds, the summary."""
    results = {"summary": (run_dir / "summary.json").read_text()}
    for folder in sorted(run_dir.glob("seed-*/fold-*")):
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in runs.read_metrics(folder)]
        results[folder.name, folder.parent.name] = (
            rows, (folder / "report.csv").read_text(),
            {name: {key: tensor.tolist() for key, tensor in runs.load_checkpoint(folder / name)["model"].items()}
             for name in ("last.pt", "best.pt")})
    return results


# --- metrics ----------------------------------------------------------------------------------------------------------

def test_metrics_of_a_case_worked_by_hand():
    metrics = training.compute_metrics(torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([0, 0, 1, 0]),
                                       torch.tensor([0, 1, 1, 2]))
    # class 0: precision 1/3, recall 1; class 1: precision 1, recall 1/2; class 2: never predicted
    assert metrics == pytest.approx({"loss": 3.0, "accuracy": 0.5, "precision": (1 / 3 + 1 + 0) / 3,
                                     "recall": (1 + 0.5 + 0) / 3, "f1": (0.5 + 2 / 3 + 0) / 3})


def test_metrics_are_scikit_learns():
    rng = np.random.default_rng(0)
    targets, predictions = torch.tensor(rng.integers(0, 9, 200)), torch.tensor(rng.integers(0, 9, 200))
    metrics = training.compute_metrics(torch.rand(200), predictions, targets)
    for name, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        assert metrics[name] == pytest.approx(score(targets, predictions, average="macro", zero_division=0))


def test_validation_metrics_do_not_depend_on_the_batch_size(dataset):
    torch.manual_seed(0)
    model = Tiny(4)
    _, validation = dataset.split(1)
    results = [training.compute_metrics(*training.validate(
        model, dsets.validation_batches(dataset, validation, (-40.0, 20.0), batch_size=size, device=CPU), "fp32", ONE))
        for size in (1, 3, 8)]
    for metrics in results[1:]:
        assert metrics == pytest.approx(results[0], rel=1e-5)


def test_training_metrics_are_those_of_the_pass_itself(dataset):
    torch.manual_seed(0)
    model = Tiny(4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training_clips, _ = dataset.split(1)
    batch = next(iter(dsets.training_batches(dataset, training_clips, (-40.0, 20.0), views=1, batch_size=16, seed=1,
                                             fold=1, epoch=1, device=CPU)))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    losses, predictions, targets = training.train_epoch(model, optimizer, [batch], 1, "fp32", ONE)
    first = Tiny(4)
    first.load_state_dict(before)
    logits = first(batch[0].contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(losses, F.cross_entropy(logits, batch[1], reduction="none").detach())
    assert torch.equal(predictions, logits.argmax(dim=1)) and torch.equal(targets, batch[1])
    assert not torch.equal(model.fc.weight, before["fc.weight"])


def test_validation_changes_nothing_in_the_model(dataset):
    model = Tiny(4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = dsets.validation_batches(dataset, torch.arange(8), (-40.0, 20.0), batch_size=3, device=CPU)
    training.validate(model, batches, "fp32", ONE)
    assert same_weights(before, model.state_dict())


@pytest.mark.parametrize("network", [models.CNN8, models.CNN4, models.ResNet18])
def test_each_network_learns_eight_clips_by_heart(dataset, network):
    torch.manual_seed(0)
    model = network(8).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 3e-4, fused=True)
    examples = dsets.normalise(dataset.features[:8, :, :100, :384], -40.0, 20.0)
    batches = [dsets.Batch(examples, torch.arange(8), None, None, torch.arange(8), 8)]
    passes = [training.train_epoch(model, optimizer, batches, 1, "fp32", ONE) for _ in range(20)]
    assert passes[0][0].mean() > 1.5 and passes[-1][0].mean() < 0.5
    assert torch.equal(passes[-1][1], torch.arange(8))


# --- the run's folder -------------------------------------------------------------------------------------------------

STRONG = ["--recipe", "strong", "--epochs", 2, "--views", 2, "--batch-size", 4]


def test_losses_of_mixed_examples_are_shared_between_their_targets():
    class Fixed(torch.nn.Module):
        def forward(self, examples):
            return logits
    logits, shares = torch.randn(3, 5), torch.tensor([0.5, 0.75, 1.0])
    targets, others = torch.tensor([0, 3, 3]), torch.tensor([4, 0, 2])
    losses, predictions = training.forward(Fixed(), torch.zeros(3, 1, 100, 384), targets, "fp32", shares, others, 0.1)
    soft = shares[:, None] * F.one_hot(targets, 5) + (1 - shares[:, None]) * F.one_hot(others, 5)
    torch.testing.assert_close(losses, F.cross_entropy(logits, soft, reduction="none", label_smoothing=0.1))
    assert torch.equal(predictions, logits.argmax(dim=1))


def test_logits_of_several_crops_are_averaged():
    class Each(torch.nn.Module):
        def forward(self, examples):
            return examples[:, 0, 0, :3]  # an example's own first numbers
    examples = torch.randn(6, 1, 100, 384)
    targets = torch.tensor([2, 0])
    losses, predictions = training.forward(Each(), examples, targets, "fp32")
    logits = torch.stack([examples[[i, i + 2, i + 4], 0, 0, :3].mean(dim=0) for i in range(2)])
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(predictions, logits.argmax(dim=1))


def test_the_average_of_weights_follows_its_formula():
    model = Tiny(4)
    average = optim.WeightAverage(model, 0.9)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in range(1, 13):
        share = max(0.1, 1 / step)  # a plain mean at first
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1
        model.train()(torch.randn(2, 1, 100, 384))  # the batch statistics move too
        average.update()
        for name, tensor in model.state_dict().items():
            floating = tensor.is_floating_point()
            expected[name] = (1 - share) * expected[name] + share * tensor if floating else tensor.clone()
    for name, tensor in average.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


def test_the_cosine_schedule_rises_for_a_tenth_and_falls_to_nothing():
    flags = {"schedule": "cosine", "lr": 2.0, "epochs": 10}
    rates = [rate for epoch in range(1, 11) for rate in optim.learning_rates(flags, epoch, 20)]
    assert rates[:20] == pytest.approx([2.0 * (step + 1) / 20 for step in range(20)])
    assert rates[20] == 2.0 and rates[110] == pytest.approx(1.0) and 0 < rates[-1] < 0.001
    assert all(a > b for a, b in zip(rates[20:], rates[21:]))
    assert optim.learning_rates(flags | {"schedule": "constant"}, 1, 20) is None


def test_what_is_judged_and_kept_are_the_averaged_weights(root, tmp_path):
    run_dir = train_in(tmp_path / "run", root, *STRONG[:2], "--average", 0.5)
    checkpoint = runs.load_checkpoint(run_dir / "seed-42" / "fold-1" / "last.pt")
    assert not same_weights(checkpoint["model"], checkpoint["trained_model"])
    assert "trained_model" not in runs.load_checkpoint(run_dir / "seed-42" / "fold-1" / "best.pt")
    dataset = dsets.ESC50(root)
    model = Tiny(2)
    model.load_state_dict(checkpoint["model"])
    statistics = (checkpoint["normalisation"]["mean"], checkpoint["normalisation"]["std"])
    batches = dsets.validation_batches(dataset, dataset.split(1)[1], statistics, batch_size=4, device=CPU, crops=9)
    losses, predictions, _ = training.validate(model, batches, checkpoint["precision"], ONE)
    assert torch.equal(predictions, checkpoint["predictions"])
    assert losses.double().mean().item() == pytest.approx(checkpoint["history"][-1]["loss"], rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_strong_training_repeats_and_resumes_to_the_last_bit(root, tmp_path, monkeypatch, precision):
    flags = [*STRONG, "--epochs", 4, "--precision", precision]
    first = train_in(tmp_path / "first", root, *flags)
    validate, calls = training.validate, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return validate(*arguments)
    monkeypatch.setattr(training, "validate", killed)
    with pytest.raises(KeyboardInterrupt):
        training.main(list(map(str, ["--data", root, "--run-dir", tmp_path / "second", *flags])))
    monkeypatch.setattr(training, "validate", validate)
    run("--resume", tmp_path / "second")
    assert results_of(first) == results_of(tmp_path / "second")
    assert same_weights(weights_of(first), weights_of(tmp_path / "second"))


def test_a_schedule_that_has_ended_has_no_further_epochs(root, tmp_path, capsys):
    run_dir = train_in(tmp_path / "run", root, *STRONG)
    capsys.readouterr()
    run("--resume", run_dir, "--epochs", 3, status=2)
    assert "--epochs 3: the cosine schedule of the run ends after 2 epochs" in capsys.readouterr().err


def test_a_run_leaves_what_the_design_promises(root, tmp_path, capsys):
    run_dir = train_in(tmp_path / "run", root, "--fold", "all", "--seed", 1, 2)
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["run", str(run_dir / "run.json")]
    record = json.loads((run_dir / "run.json").read_text())
    assert record["flags"] | {"fold": [1, 2, 3], "seed": [1, 2], "model": "cnn8", "epochs": 2} == record["flags"]
    assert record["data"]["fingerprint"] == dsets.ESC50(root).fingerprint()
    assert record["versions"]["torch"] == torch.__version__ and record["hardware"]["threads"] >= 1
    assert record["command"][:2] == ["training.py", "--data"]
    for seed in (1, 2):
        for fold in (1, 2, 3):
            folder = run_dir / f"seed-{seed}" / f"fold-{fold}"
            names = {path.name for path in folder.iterdir()}
            assert {"metrics.jsonl", "last.pt", "best.pt", "report.csv", "confusion.png", "curves.png"} <= names
            assert any(name.startswith("events.out.tfevents") for name in names)
            assert not any(name.endswith(".part") for name in names)
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            assert [(row["epoch"], row["phase"]) for row in rows] == [
                (1, "training"), (1, "validation"), (2, "training"), (2, "validation")]
            for row in rows:
                assert list(row) == ["seed", "fold", "epoch", "phase", "loss", "accuracy", "precision", "recall", "f1",
                                     "seconds"]
                assert row["seed"] == seed and row["fold"] == fold
            report = pd.read_csv(folder / "report.csv")
            assert list(report.columns) == ["class", "precision", "recall", "f1", "clips"]
            assert report["class"].tolist() == ["sound_0", "sound_1"] and report["clips"].sum() == 4
            assert report["recall"].mean() == pytest.approx(rows[-1]["recall"], abs=1e-4)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [(row["seed"], row["fold"]) for row in summary["trainings"]] == [(s, f) for s in (1, 2) for f in (1, 2, 3)]
    for key in ("accuracy", "precision", "recall", "f1", "loss", "best_accuracy", "best_loss"):
        values = [row[key] for row in summary["trainings"]]
        assert summary["mean"][key] == pytest.approx(np.mean(values))
        assert summary["std"][key] == pytest.approx(np.std(values, ddof=1))
    assert f"{100 * summary['mean']['accuracy']:.2f} +-" in out


def test_the_headline_is_the_last_epoch_and_the_best_stands_beside_it(root, tmp_path):
    run_dir = train_in(tmp_path / "run", root, "--epochs", 4, "--lr", 0.05)
    rows = [row for row in runs.read_metrics(run_dir / "seed-42" / "fold-1") if row["phase"] == "validation"]
    training_summary, = json.loads((run_dir / "summary.json").read_text())["trainings"]
    best = min(rows, key=lambda row: row["loss"])
    assert training_summary["loss"] == rows[-1]["loss"] and training_summary["epochs"] == 4
    assert training_summary["best_loss"] == best["loss"] and training_summary["best_epoch"] == best["epoch"]
    checkpoint = runs.load_checkpoint(run_dir / "seed-42" / "fold-1" / "best.pt")
    assert checkpoint["epoch"] == best["epoch"]


def test_a_checkpoint_holds_all_that_a_prediction_needs(root, tmp_path):
    run_dir = train_in(tmp_path / "run", root)
    checkpoint = runs.load_checkpoint(run_dir / "seed-42" / "fold-1" / "last.pt")
    assert checkpoint["classes"] == ["sound_0", "sound_1"] and checkpoint["model_name"] == "cnn8"
    dataset = dsets.ESC50(root)
    training_clips, validation = dataset.split(1)
    mean, std = dataset.statistics(training_clips)
    assert checkpoint["normalisation"] == {"mean": mean, "std": std}
    assert checkpoint["features"] == {**dsets.MEL, "top_db": 80.0, "crop": [100, 384]}
    model = Tiny(2)
    model.load_state_dict(checkpoint["model"])
    batches = dsets.validation_batches(dataset, validation, (mean, std), batch_size=4, device=CPU)
    precision = json.loads((run_dir / "run.json").read_text())["precision"]
    _, predictions, targets = training.validate(model, batches, precision, ONE)
    row = runs.read_metrics(run_dir / "seed-42" / "fold-1")[-1]
    assert (predictions == targets).float().mean().item() == row["accuracy"]


def test_scalars_stand_over_the_examples_seen(root, tmp_path):
    folder = train_in(tmp_path / "run", root) / "seed-42" / "fold-1"
    events = EventAccumulator(str(folder))
    events.Reload()
    rows = runs.read_metrics(folder)
    for phase in ("training", "validation"):
        scalars = events.Scalars(f"accuracy/{phase}")
        assert [event.step for event in scalars] == [16, 32]  # 8 clips x 2 views
        assert [event.value for event in scalars] == pytest.approx(
            [row["accuracy"] for row in rows if row["phase"] == phase])
    assert [event.value for event in events.Scalars("learning rate")] == pytest.approx([3e-4, 3e-4])
    assert all(event.value > 0 for event in events.Scalars("examples per s"))
    assert events.Tags()["images"] == ["augmented examples", "confusion"]
    assert events.Scalars("final/accuracy")[-1].value == pytest.approx(rows[-1]["accuracy"])
    assert "_hparams_/experiment" in events.summary_metadata


def test_tensorboard_shows_the_learning_rate_of_each_epochs_last_step(root, tmp_path):
    folder = train_in(tmp_path / "run", root, "--schedule", "cosine", "--lr", "0.5", "--epochs", "3") / "seed-42" / "fold-1"
    events = EventAccumulator(str(folder)).Reload()
    flags = {"schedule": "cosine", "lr": 0.5, "epochs": 3}  # 8 clips x 2 views in batches of 4
    assert [event.value for event in events.Scalars("learning rate")] == pytest.approx(
        [optim.learning_rates(flags, epoch, 4)[-1] for epoch in (1, 2, 3)])


def test_several_trainings_have_pictures_of_them_all(root, tmp_path):
    run_dir = train_in(tmp_path / "one", root)
    assert not (run_dir / "report.csv").exists()
    run_dir = train_in(tmp_path / "run", root, "--fold", "all")
    names = ("curves.png", "confusion.png", "report.csv")
    assert all((run_dir / name).exists() for name in names)
    each = [pd.read_csv(run_dir / "seed-42" / f"fold-{fold}" / "report.csv") for fold in (1, 2, 3)]
    report = pd.read_csv(run_dir / "report.csv")
    assert list(report["clips"]) == list(sum(one["clips"] for one in each))
    # every fold has as many clips of a class as the others: pooled recall is the mean recall
    assert list(report["recall"]) == pytest.approx(list(sum(one["recall"] for one in each) / 3), abs=1e-3)
    (run_dir / "report.csv").unlink()
    (run_dir / "seed-42" / "fold-2" / "last.pt").unlink()
    run("--resume", run_dir)  # what is gone is gone; the table is still printed
    assert not (run_dir / "report.csv").exists()


def test_pictures_over_all_trainings_wait_for_the_lock(root, tmp_path):
    run_dir = train_in(tmp_path / "run", root, "--fold", "1", "2")
    (run_dir / "report.csv").unlink()
    dataset = dsets.ESC50(root)
    targets = {fold: dataset.targets[dataset.split(fold)[1]] for fold in dataset.folds}
    trainings = runs.summarise(run_dir, 2)["trainings"]
    with filelock.FileLock(run_dir / "lock"):
        writer = threading.Thread(target=runs.write_overall, args=(run_dir, trainings, targets, dataset.classes))
        writer.start()
        writer.join(timeout=1)
        assert writer.is_alive() and not (run_dir / "report.csv").exists()
    writer.join()
    assert (run_dir / "report.csv").exists()


def test_curves_of_several_trainings_are_their_mean_in_a_band():
    rows = [{"seed": 1, "fold": fold, "epoch": epoch, "phase": phase, "loss": fold * epoch, "accuracy": fold / 10}
            for fold in (1, 3) for epoch in (1, 2) for phase in ("training", "validation")]
    loss, accuracy = plots.curves_figure(rows).axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[2, 4], [2, 4]]
    band = loss.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((2 - 2 ** 0.5, 4 + 2 * 2 ** 0.5))
    assert list(accuracy.lines[0].get_ydata()) == pytest.approx([20, 20])
    assert not plots.curves_figure(rows[:4]).axes[0].collections, "one training has no band"


# --- flags ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    (["--epochs", "0"], "argument --epochs: '0' is not a whole number from 1 to 1000000"),
    (["--epochs", "many"], "argument --epochs: 'many' is not a whole number from 1"),
    (["--batch-size", "-3"], "argument --batch-size: '-3' is not a whole number from 1"),
    (["--lr", "nan"], "argument --lr: 'nan' is not a number from 0 to 1000"),
    (["--seed", "-1"], "argument --seed: '-1' is not a whole number from 0"),
    (["--views", "1.5"], "argument --views: '1.5' is not a whole number from 1 to 1000"),
    (["--model", "vgg"], "argument --model: invalid choice: 'vgg'"),
    (["--recipe", "soup"], "argument --recipe: invalid choice: 'soup'"),
    (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    (["--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
    (["--epoch", "3"], "unrecognized arguments: --epoch"),
    (["--pretrained", "imagenet"], "--pretrained: there are weights for resnet18 alone, not for cnn8; add --model resnet18"),
    (["--demo", "--download"], "--download: fetches ESC-50, --demo writes sounds of its own; leave one of them out"),
    (["a/b"], "comment 'a/b': names a folder, expected printable letters and no /"),
    (["caf\udce9"], "names a folder, expected printable letters"),
    (["two\nlines"], "names a folder, expected printable letters"),
    (["--run-dir", ""], "--run-dir: is empty; give it a value, or leave it out"),
    (["--pretrained", "", "--model", "resnet18"], "--pretrained: is empty"),
    (["--batch-size", "1" + "0" * 26], "is not a whole number from 1 to 1000000"),
    (["--tb-prefix", ".."], "--tb-prefix '..': names a folder"),
    (["--data", "nowhere"], "--data nowhere: has no meta/esc50.csv; name an ESC-50 folder, fetch it with --download"),
    (["--resume", "nowhere"], "nowhere: is not a run's folder: run.json cannot be read"),
    (["--rerun", "nowhere"], "nowhere: is not a run's folder: run.json cannot be read"),
    (["--rerun", "a", "--resume", "b"], "--rerun: runs anew, --resume goes on; leave one of them out"),
])
def test_bad_flags_are_refused_in_one_line(flags, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*flags, status=2)
    error = capsys.readouterr().err
    assert words in error and error.startswith("training.py: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_absent_device_is_refused(root, capsys):
    run("--data", root, "--device", "cuda", status=2)
    assert "--device cuda: torch finds none here; expected one of " in capsys.readouterr().err


@pytest.mark.parametrize("fold", ["4", "x", "0"])
def test_a_fold_the_data_has_not_is_refused(root, capsys, fold):
    run("--data", root, "--fold", 1, fold, status=2)
    assert f"--fold {fold}: expected all alone, or some of 1 2 3, the folds of the data" in capsys.readouterr().err


def test_help_is_grouped_and_says_every_default():
    text = cli.build_parser().format_help()
    for group in ("data:", "model:", "experiment:", "machine:", "output:", "again:"):
        assert f"\n{group}\n" in text
    for words in ("default data/ESC-50", "default cnn8", "default 1)", "default 42", "default 40", "default 0.0003",
                  "default 0.001", "default 5;", "strong 0.05)", "default auto", "default runs/<tb-prefix>/<time>_<comment>"):
        assert words in " ".join(text.split()), words


def test_recipes_fill_in_and_flags_win():
    flags, _ = cli.parse_flags(["--lr", "0.1", "named"])
    assert flags["lr"] == 0.1 and flags["epochs"] == 40 and flags["weight_decay"] == 1e-3 and flags["views"] == 5
    assert flags["comment"] == "named" and flags["data"] == "data/ESC-50"
    flags, _ = cli.parse_flags(["--recipe", "strong", "--mix", "0"])
    assert flags["mix"] == 0 and flags["optimizer"] == "adamw" and flags["crops"] == 9
    assert cli.RECIPES["strong"].keys() == cli.RECIPES["blog"].keys()
    assert flags["lr"] == 2e-3
    assert cli.parse_flags(["--recipe", "strong", "--model", "cnn4"])[0]["lr"] == 5e-4
    assert cli.parse_flags(["--recipe", "strong", "--model", "cnn4", "--lr", "0.1"])[0]["lr"] == 0.1
    assert cli.parse_flags(["--model", "cnn4"])[0]["lr"] == 3e-4
    flags, _ = cli.parse_flags(["--demo", "--epochs", "7"])
    assert flags["epochs"] == 7 and flags["data"] == "data/demo" and flags["views"] == cli.DEMO["views"]


def test_the_default_run_folder(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # twice within a second, perhaps: two folders
        run("first", "--data", root, "--epochs", 1, "--views", 1, "--tb-prefix", "mine")
    folders = list((tmp_path / "runs" / "mine").iterdir())
    assert len(folders) == 2
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d\.\d\d\.\d\d_first(-1)?", folder.name) for folder in folders)


def test_demo_goes_the_same_way(tmp_path, monkeypatch, capsys):
    from util import download as roots
    monkeypatch.setattr(roots, "DEMO_CLIPS_PER_CLASS", 2)
    run("--demo", "--data", tmp_path / "demo", "--run-dir", tmp_path / "run", "--epochs", 1)
    assert "100 clips, 50 classes, folds 1, 2" in capsys.readouterr().out


def test_download_then_train(root, tmp_path, monkeypatch):
    from util import download as roots
    asked = []
    monkeypatch.setattr(roots, "download", asked.append)
    run("--download", "--data", root, "--run-dir", tmp_path / "run", "--epochs", 1)
    assert asked == [root]
    run("--resume", tmp_path / "run")  # fetches nothing
    assert asked == [root]
    run("--resume", tmp_path / "run", "--download")
    assert asked == [root, root]


# --- what goes wrong --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, place", [(9, "epoch 2, step 4"), (10, "epoch 2, validation batch 1")])
def test_a_loss_that_is_not_finite_stops_the_run(root, tmp_path, capsys, monkeypatch, call, place):
    calls = [0]

    def forward(self, x):  # an epoch is 4 steps and one batch of validation
        calls[0] += 1
        logits = self.fc(torch.relu(self.bn(self.conv(x))).flatten(1))
        return logits * float("nan") if calls[0] == call else logits
    monkeypatch.setattr(Tiny, "forward", forward)
    run("--data", root, "--run-dir", tmp_path / "run", "--epochs", 3, "--views", 2, "--batch-size", 4, status=2)
    folder = tmp_path / "run" / "seed-42" / "fold-1"
    assert capsys.readouterr().err == (
        f"training.py: --lr 0.0003: the loss is not finite in {place} of {folder}; last good checkpoint: "
        f"{folder / 'last.pt'} (epoch 1); start a new run with a lower --lr\n")
    assert runs.load_checkpoint(folder / "last.pt")["epoch"] == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory_names_the_batch_size(root, tmp_path, capsys, monkeypatch, error):
    def forward(self, x):
        raise error
    monkeypatch.setattr(Tiny, "forward", forward)
    run("--data", root, "--run-dir", tmp_path / "run", status=2)
    assert capsys.readouterr().err == "training.py: --batch-size: the memory does not hold it; choose a smaller one\n"


def test_our_own_mistakes_are_loud(root, tmp_path, monkeypatch):
    def forward(self, x):
        raise RuntimeError("a bug")
    monkeypatch.setattr(Tiny, "forward", forward)
    with pytest.raises(RuntimeError, match="a bug"):
        training.main(["--data", str(root), "--run-dir", str(tmp_path / "run")])


def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_whole(root, tmp_path, capsys, monkeypatch):
    resource = pytest.importorskip("resource")  # not on Windows
    monkeypatch.setattr(training, "first_examples", lambda *arguments: Figure())  # a small picture: last.pt is the largest
    run_dir = train_in(tmp_path / "run", root, "--epochs", 1)
    size = (run_dir / "seed-42" / "fold-1" / "last.pt").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 5000, limits[1]))  # no file may grow larger
    try:
        run("--resume", run_dir, "--epochs", 2, status=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert re.fullmatch(r"training.py: \S+seed-42/fold-1/last.pt: cannot be written \(File too large\); .*\n", error)
    assert runs.load_checkpoint(run_dir / "seed-42" / "fold-1" / "last.pt")["epoch"] == 1
    run("--resume", run_dir)
    assert results_of(run_dir) == results_of(train_in(tmp_path / "reference", root))


def test_a_vanished_folder_is_one_line(root, tmp_path, capsys, monkeypatch):
    validate = training.validate

    def vanishing(*arguments):
        shutil.rmtree(tmp_path / "run")
        return validate(*arguments)
    monkeypatch.setattr(training, "validate", vanishing)
    run("--data", root, "--run-dir", tmp_path / "run", "--epochs", 1, status=2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "best.pt: cannot be written (No such file or directory)" in error


# --- the same bits ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_command_gives_the_same_bits(root, tmp_path, precision):
    torch.manual_seed(1)
    one = train_in(tmp_path / "one", root, "--precision", precision)
    for cached in (root / "features").iterdir():
        cached.unlink()
    torch.manual_seed(2)
    torch.rand(1000)
    np.random.seed(3)
    two = train_in(tmp_path / "two", root, "--precision", precision)
    assert results_of(one) == results_of(two)
    assert torch.are_deterministic_algorithms_enabled()  # on the CPU it changes nothing here, on CUDA it does


def test_another_seed_gives_other_weights(root, tmp_path):
    run_dir = train_in(tmp_path / "run", root, "--seed", 1, 2)
    assert not same_weights(weights_of(run_dir, 1), weights_of(run_dir, 2))
    assert not same_weights(training.start_model({"model": "cnn8", "pretrained": None}, 2, 1, 1).state_dict(),
                            training.start_model({"model": "cnn8", "pretrained": None}, 2, 1, 2).state_dict())


PAGE_FAULTS = """
import resource, torch
from util import device as machine
machine.keep_freed_memory()
for i in range(6):
    torch.zeros(2 ** 26)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile wants a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own use of it
def test_compiled_code_is_not_that_of_another_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        torch._dynamo.reset()  # as a new process
        torch._dynamo.utils.counters.clear()
        assert machine.compile_network(torch.nn.ReLU())(torch.ones(1000))[0] == 1
        counted = torch._dynamo.utils.counters
        found.append(bool(counted["inductor"]["fxgraph_cache_hit"] or counted["aot_autograd"]["autograd_cache_hit"]))
    torch.set_num_threads(before)
    assert found == [False, False, True]


def test_freed_memory_is_used_again(tmp_path):
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS], cwd=PROGRAM.parent, capture_output=True, text=True, check=True)
    faults = list(map(int, done.stdout.split()))
    assert faults[5] - faults[3] < 100, "256 MB are 65 536 pages"


def test_a_run_leaves_the_global_generators_alone(root, tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    train_in(tmp_path / "run", root)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("order", [("1", "2"), ("2", "1")])
def test_a_training_does_not_depend_on_those_before_it(root, tmp_path, order):
    both = train_in(tmp_path / "both", root, "--fold", *order)
    alone = train_in(tmp_path / "alone", root, "--fold", "2")
    assert same_weights(weights_of(both, fold=2), weights_of(alone, fold=2))


# --- resume and rerun -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pristine_reference(pristine_root, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(models.MODELS, "cnn8", Tiny)
        return train_in(tmp_path_factory.mktemp("pristine") / "reference", pristine_root, "--fold", "1", "3", "--seed",
                        "1", "2")


@pytest.fixture
def reference(pristine_reference, tmp_path) -> Path:
    """A run never interrupted: 2 seeds x 2 folds x 2 epochs."""
    return shutil.copytree(pristine_reference, tmp_path / "reference")


class Killed(BaseException):
    """Stands for kill -9 at some point of the program: nothing after it runs."""


KILL_POINTS = [(runs, "save_checkpoint"), (runs, "write_metrics"), (runs, "write_json"), (training, "add_scalars"),
               (runs, "write_pictures"), (training.SummaryWriter, "add_hparams"), (runs, "write_report"),
               (training, "validate"), (os, "replace"), (os, "fsync")]


@pytest.mark.parametrize("module, name", KILL_POINTS, ids=lambda value: value if isinstance(value, str) else "")
def test_killed_at_any_point_a_run_ends_as_if_it_never_was(root, tmp_path, reference, monkeypatch, module, name):
    run_dir = tmp_path / "run"
    original = getattr(module, name)
    for calls in range(3, 40, 9):  # kill at the 3rd call, then at the 12th after that, ...
        count = [0]

        def counting(*arguments, **options):
            count[0] += 1
            if count[0] == calls:
                raise Killed
            return original(*arguments, **options)
        monkeypatch.setattr(module, name, counting)
        with contextlib.suppress(Killed):
            if (run_dir / "run.json").exists():
                run("--resume", run_dir)
            else:
                train_in(run_dir, root, "--fold", "1", "3", "--seed", "1", "2")
        monkeypatch.setattr(module, name, original)
    run("--resume", run_dir)
    assert results_of(run_dir) == results_of(reference)
    assert not list(run_dir.rglob(".*.part"))
    for folder in run_dir.glob("seed-*/fold-*"):
        events = EventAccumulator(str(folder)).Reload()
        assert "confusion" in events.Tags()["images"] and "final/accuracy" in events.Tags()["scalars"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_more_epochs_after_the_last_are_those_of_a_longer_run(root, tmp_path, precision):
    run_dir = train_in(tmp_path / "run", root, "--precision", precision)
    run("--resume", run_dir, "--epochs", 4)
    longer = train_in(tmp_path / "longer", root, "--precision", precision, "--epochs", 4)
    assert results_of(run_dir) == results_of(longer)
    assert json.loads((run_dir / "run.json").read_text())["flags"]["epochs"] == 4


def test_the_record_says_what_went_on_with_the_run(root, tmp_path, monkeypatch, capsys):
    run_dir = train_in(tmp_path / "run", root)
    monkeypatch.setattr(runs, "git", lambda *arguments: "another")
    train_in(run_dir, root, "--fold", "2")
    run("--resume", run_dir, "--epochs", 3)
    run("--resume", run_dir)  # only to look at the table
    record = json.loads((run_dir / "run.json").read_text())
    assert record["git"]["commit"] != "another"
    assert [later["git"]["commit"] for later in record["went_on"]] == ["another", "another"]
    assert record["went_on"][1]["command"] == ["training.py", "--resume", str(run_dir), "--epochs", "3"]
    metrics = run_dir / "seed-42" / "fold-2" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"loss": ', '"loss": 1'))
    capsys.readouterr()
    run("--rerun", run_dir, "--run-dir", tmp_path / "again")
    assert "git commit: another (then, from 2" in capsys.readouterr().out


def test_with_nothing_missing_resume_prints_the_table(reference, capsys, monkeypatch):
    monkeypatch.setattr(training, "train", None)
    before = results_of(reference)
    run("--resume", reference)
    assert "mean +- std" in capsys.readouterr().out and results_of(reference) == before


def test_a_half_written_last_line_of_the_metrics_is_recognised(reference):
    before = results_of(reference)
    path = reference / "seed-1" / "fold-1" / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text[:-40])
    assert len(runs.read_metrics(path.parent)) == 3
    run("--resume", reference)
    assert results_of(reference) == before and path.read_text() == text


def test_resume_takes_further_folds_and_seeds(root, tmp_path):
    """As after a job array of which some jobs never began."""
    run_dir = train_in(tmp_path / "run", root, "--fold", 2, "--seed", 43)
    run("--resume", run_dir, "--fold", "all", "--seed", 42)
    record = json.loads((run_dir / "run.json").read_text())
    assert record["flags"]["fold"] == [1, 2, 3] and record["flags"]["seed"] == [42, 43]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [(done["seed"], done["fold"]) for done in summary["trainings"]] == [(s, f) for s in (42, 43) for f in (1, 2, 3)]
    whole = train_in(tmp_path / "whole", root, "--fold", "all", "--seed", 42, 43)
    assert summary == json.loads((whole / "summary.json").read_text())


@pytest.mark.parametrize("flags, words", [
    (["--lr", "0.1"], r"--lr: cannot be changed with --resume \(the run has 0.0003\)"),
    (["--fold", "7"], "--fold 7: expected all alone, or some of 1 2 3"),
    (["--run-dir", "x"], "--run-dir: cannot be changed with --resume"),
    (["--model", "cnn4"], r"--model: cannot be changed with --resume \(the run has cnn8\)"),
    (["--epochs", "1"], "--epochs 1: the run has 2; with --resume it may only be raised"),
    (["other"], "comment: cannot be changed with --resume"),
])
def test_resume_refuses_flags_that_would_change_the_result(reference, capsys, flags, words):
    run("--resume", reference, *flags, status=2)
    error = capsys.readouterr().err
    assert re.search(words, error) and error.count("\n") == 1


def test_resume_refuses_other_data_and_finds_moved_data(root, reference, tmp_path, capsys):
    record = json.loads((reference / "run.json").read_text())
    record["data"]["root"] = str(tmp_path / "gone")
    (reference / "run.json").write_text(json.dumps(record))
    run("--resume", reference, status=2)
    assert f"--data {tmp_path / 'gone'}: has no meta/esc50.csv" in capsys.readouterr().err
    run("--resume", reference, "--data", root)
    other = write_root(tmp_path / "other", num_classes=3, folds=3, clips=1)
    run("--resume", reference, "--data", other, status=2)
    assert re.search("--data .*other: is not the data that the run in .* began with", capsys.readouterr().err)


def test_a_run_from_before_a_flag_came_goes_on_and_is_joined(root, reference):
    record = json.loads((reference / "run.json").read_text())
    del record["flags"]["equalise"]
    (reference / "run.json").write_text(json.dumps(record))
    last = reference / "seed-1" / "fold-1" / "last.pt"
    checkpoint = torch.load(last, weights_only=True)
    del checkpoint["flags"]["equalise"]
    torch.save(checkpoint, last)
    run("--resume", reference, "--epochs", 3)
    assert torch.load(last, weights_only=True)["epoch"] == 3
    train_in(reference, root, "--fold", "2", "--seed", "7", "--epochs", "3")
    assert torch.load(reference / "seed-7" / "fold-2" / "last.pt", weights_only=True)["epoch"] == 3


def test_resume_refuses_other_versions(reference, capsys):
    record = json.loads((reference / "run.json").read_text())
    record["versions"]["torch"] = "1.0"
    (reference / "run.json").write_text(json.dumps(record))
    run("--resume", reference, status=2)
    assert "was begun with torch 1.0, here is 2." in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "{}", '{"flags": {}}', "{", "\xff"])
def test_resume_refuses_a_folder_that_is_no_run(tmp_path, capsys, content):
    (tmp_path / "run.json").write_text(content, encoding="latin-1")
    run("--resume", tmp_path, status=2)
    error = capsys.readouterr().err
    assert "run" in error and error.count("\n") == 1


@pytest.mark.parametrize("part, name, value", [
    (None, "flags", []), (None, "flags", {}), ("flags", "fold", 3), ("flags", "fold", ["9"]), ("flags", "epochs", "two"),
    ("flags", "model", "vgg"), ("flags", "lr", None), ("flags", "lr", "x"), ("flags", "seed", ["a"]), (None, "data", None),
    ("data", "root", 5), (None, "versions", 5), (None, "hardware", {}), ("hardware", "threads", 0), (None, "device", "tpu"),
    (None, "precision", "int4"), ("flags", "views", -1), ("flags", "model", "cnn4"), ("flags", "lr", 0.5),
    ("flags", "batch_size", 0), ("flags", "epochs", 0), ("flags", "model", 0), ("flags", "crops", 0), ("flags", "views", False),
    ("flags", "model", ""), ("flags", "epochs", ""), ("flags", "mix", ""), ("flags", "schedule", ""),
    ("flags", "lr", True), ("flags", "compile", 1), (None, "went_on", 5), (None, "went_on", [{}]),
])
def test_resume_refuses_a_record_edited_by_hand(reference, capsys, part, name, value):
    record = json.loads((reference / "run.json").read_text())
    (record[part] if part else record)[name] = value
    (reference / "run.json").write_text(json.dumps(record))
    run("--resume", reference, "--epochs", 3, status=2)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("content", [b"\xff\xfe\n{}\n", b"{}\n{}\n", b"[1]\n[2]\n"])
def test_resume_refuses_metrics_that_are_none(reference, capsys, content):
    (reference / "seed-1" / "fold-1" / "metrics.jsonl").write_bytes(content)
    run("--resume", reference, status=2)
    error = capsys.readouterr().err
    assert "line 1 is not this training's row of metrics; remove the file: --resume writes it anew" in error
    assert error.count("\n") == 1


def damaged(path: Path, kind: str) -> None:
    content = torch.load(path, weights_only=True)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "another program's":
        torch.save({"weights": torch.zeros(3)}, path)
    elif kind == "another version":
        torch.save({**content, "format": 99}, path)
    elif kind == "code":
        torch.save({**content, "epoch": Path("x")}, path)
    elif kind == "best":
        shutil.copy(path.with_name("best.pt"), path)
    elif kind == "another fold":
        shutil.copy(path.parents[1] / "fold-3" / "last.pt", path)


@pytest.mark.parametrize("kind, words", [
    ("truncated", "cannot be read as a checkpoint"), ("another program's", "is not a checkpoint of this program"),
    ("another version", "has checkpoint format 99, expected 1"), ("code", "holds more than tensors and plain values"),
    ("best", "holds no optimizer, which"), ("another fold", "was trained with fold 3, the run has 1"),
])
def test_resume_refuses_a_damaged_checkpoint(reference, capsys, kind, words):
    damaged(reference / "seed-1" / "fold-1" / "last.pt", kind)
    run("--resume", reference, "--epochs", 3, status=2)
    error = capsys.readouterr().err
    assert "last.pt" in error and words in error and error.count("\n") == 1
    assert "remove it, and --resume begins this training anew" in error


def test_a_second_process_on_one_training_is_refused(root, tmp_path, capsys):
    run_dir = train_in(tmp_path / "run", root)
    code = f"from util import rundir as runs; import sys; lock = runs.locked(runs.Path({str(run_dir / 'seed-42' / 'fold-1')!r})); lock.__enter__(); " \
           f"print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=PROGRAM.parent, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    run("--resume", run_dir, "--epochs", 3, status=2)
    assert "fold-1: another process is at this training; wait for it" in capsys.readouterr().err
    holder.kill()  # a dead process's lock does not block
    holder.wait()
    run("--resume", run_dir)


def test_commands_join_one_run_folder_with_folds_of_their_own(root, tmp_path, capsys):
    run_dir = train_in(tmp_path / "run", root, "--fold", "3", "--seed", "1")
    train_in(run_dir, root, "--fold", "1", "--seed", "2")
    assert json.loads((run_dir / "run.json").read_text())["flags"]["fold"] == [1, 3]
    run("--resume", run_dir)  # the other two
    reference = train_in(tmp_path / "reference", root, "--fold", "1", "3", "--seed", "1", "2")
    assert results_of(run_dir) == results_of(reference)
    run("--data", root, "--run-dir", run_dir, "--fold", 2, "--epochs", 3, status=2)
    assert re.search("--batch-size: the run in .* has 4, here it is", capsys.readouterr().err)
    run("--data", root, "--run-dir", run_dir, "--fold", 1, "--seed", 1, "--epochs", 2, "--views", 2, "--batch-size", 4,
        status=2)
    assert "seed 1 fold 1 has begun there; go on with --resume" in capsys.readouterr().err


def test_a_folder_with_trainings_but_no_record_is_refused(root, reference, capsys):
    (reference / "run.json").unlink()
    run("--data", root, "--run-dir", reference, "--fold", 1, "--seed", 1, status=2)
    assert "seed 1 fold 1 has begun there; go on with --resume" in capsys.readouterr().err


@pytest.mark.parametrize("name, value", [("seed", ["x"]), ("fold", [1.5])])
def test_a_folder_whose_trainings_are_no_numbers_is_not_joined(root, reference, capsys, name, value):
    record = json.loads((reference / "run.json").read_text())
    record["flags"][name] = value
    (reference / "run.json").write_text(json.dumps(record))
    run("--data", root, "--run-dir", reference, "--fold", 2, "--epochs", 2, "--views", 2, "--batch-size", 4, status=2)
    assert f"run.json: flags.{name} is {value}, expected whole numbers" in capsys.readouterr().err


def test_commands_with_another_precision_do_not_join(root, reference, capsys):
    record = json.loads((reference / "run.json").read_text())
    there = "fp32" if record["precision"] == "bf16" else "bf16"
    (reference / "run.json").write_text(json.dumps({**record, "precision": there}))
    run("--data", root, "--run-dir", reference, "--fold", 2, "--epochs", 2, "--views", 2, "--batch-size", 4, status=2)
    assert re.search(f"--precision {record['precision']}: the run in .* has {there}", capsys.readouterr().err)
    run("--data", root, "--run-dir", reference, "--fold", 2, "--epochs", 2, "--views", 2, "--batch-size", 4, "--precision", there)


@pytest.mark.parametrize("name", ["epochs", "model", "lr", "views"])
def test_a_record_without_a_flag_that_always_was_is_refused(reference, capsys, name):
    record = json.loads((reference / "run.json").read_text())
    del record["flags"][name]
    (reference / "run.json").write_text(json.dumps(record))
    run("--resume", reference, status=2)
    assert f"flags.{name} is None, expected a value like" in capsys.readouterr().err


def test_a_run_dir_that_cannot_be_made_is_refused(root, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    run("--data", root, "--run-dir", tmp_path / "file", status=2)
    assert "file: cannot be made (File exists); name another folder" in capsys.readouterr().err


def test_pretrained_weights_that_cannot_be_read_are_refused_before_a_folder_is_made(root, tmp_path, capsys):
    run("--data", root, "--model", "resnet18", "--pretrained", tmp_path / "none.pth", "--run-dir", tmp_path / "run", status=2)
    assert "none.pth: cannot be read as a file of tensors" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_rerun_compares_what_is_there(reference, tmp_path, capsys):
    shutil.rmtree(reference / "seed-2" / "fold-3")
    run("--rerun", reference, "--run-dir", tmp_path / "again")
    out = capsys.readouterr().out
    assert f"seed-2/fold-3: cannot be compared, there is no {reference}/seed-2/fold-3/last.pt" in out
    assert "not identical" in out


def test_rerun_is_identical_and_says_so(reference, tmp_path, capsys):
    run("--rerun", reference, "--run-dir", tmp_path / "again")
    out = capsys.readouterr().out
    assert "identical to the last bit" in out and "seed-2/fold-3 weights: identical" in out
    assert results_of(tmp_path / "again") == results_of(reference)


def test_rerun_says_what_differs_and_what_could_explain_it(reference, tmp_path, capsys):
    for path in reference.glob("seed-1/fold-1/metrics.jsonl"):
        rows = runs.read_metrics(path.parent)
        rows[1]["loss"] += 0.5
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = json.loads((reference / "run.json").read_text())
    record["versions"]["numpy"] = "1.0"
    record["git"] = {"commit": "abc", "dirty": True}
    (reference / "run.json").write_text(json.dumps(record))
    run("--rerun", reference, "--run-dir", tmp_path / "again")
    out = capsys.readouterr().out
    assert re.search(r"seed-1/fold-1 loss: differs in 1 of 4 rows, first in epoch 1 \(validation\)", out)
    assert "seed-1/fold-1 accuracy: identical" in out and "not identical; what could explain it" in out
    assert f"versions numpy: 1.0 then, {np.__version__} now" in out and "git commit: abc then" in out
    assert "the code had changes that were not committed (then)" in out
    run("--rerun", reference, "--lr", 1, status=2)
    assert "--lr: cannot be changed with --rerun" in capsys.readouterr().err


# --- real signals -----------------------------------------------------------------------------------------------------

def start(*flags) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(PROGRAM), *map(str, flags)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, bufsize=1)


def wait_for_epoch(process: subprocess.Popen, epoch: int) -> None:
    while not re.match(rf" +{epoch}/", process.stdout.readline()):
        assert process.poll() is None, process.stderr.read()


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_saved_and_resumed(root, tmp_path, signum, status):
    flags = ("--data", root, "--views", 1, "--fold", 1, 2, "--batch-size", 4)
    process = start(*flags, "--epochs", 300, "--run-dir", tmp_path / "run")
    wait_for_epoch(process, 2)
    process.send_signal(signum)
    out, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert error.strip() == (f"training.py: interrupted; all whole epochs are saved; go on with: python training.py "
                             f"--resume {tmp_path / 'run'}")
    epoch = runs.load_checkpoint(tmp_path / "run" / "seed-42" / "fold-1" / "last.pt")["epoch"]
    assert epoch >= 2
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["flags"]["epochs"] = epoch + 1  # long enough to be interrupted, short enough to be resumed in a test
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert start("--resume", tmp_path / "run").wait(120) == 0
    assert start(*flags, "--epochs", epoch + 1, "--run-dir", tmp_path / "reference").wait(120) == 0
    assert results_of(tmp_path / "run") == results_of(tmp_path / "reference")


def test_a_second_interrupt_stops_at_once_and_loses_no_whole_epoch(root, tmp_path):
    process = start("--data", root, "--views", 1, "--batch-size", 4, "--epochs", 300, "--run-dir", tmp_path / "run")
    wait_for_epoch(process, 2)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert runs.load_checkpoint(tmp_path / "run" / "seed-42" / "fold-1" / "last.pt")["epoch"] >= 2


def test_killed_for_good_and_resumed(root, tmp_path):
    flags = ("--data", root, "--views", 1, "--fold", 1, "--batch-size", 4, "--epochs", 6)
    process = start(*flags, "--run-dir", tmp_path / "run")
    wait_for_epoch(process, 2)
    process.kill()
    process.communicate()
    assert start("--resume", tmp_path / "run").wait(120) == 0
    assert start(*flags, "--run-dir", tmp_path / "reference").wait(120) == 0
    assert results_of(tmp_path / "run") == results_of(tmp_path / "reference")


def test_a_plain_run_prints_plain_lines(root, tmp_path):
    process = start("--data", root, "--views", 1, "--epochs", 1, "--run-dir", tmp_path / "run")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0 and error == ""  # no bars where stderr is no terminal
    assert re.search(r"^ +1/1 +\| +\d+\.\d{4} +\d+\.\d", out, re.MULTILINE)
