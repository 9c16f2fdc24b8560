"""The loop, metrics, learning rate and EMA; that runs repeat and resume to the last bit, whatever ends them."""
import contextlib
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score, precision_score, recall_score
from sklearn.utils.class_weight import compute_class_weight
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dsets
import models
import predict
import training
from conftest import change_table, CPU, error_line, last_checkpoint, PROJECT, refused, results_of, run, Tiny, train_in, write_root
from util import checkpoint as checkpoints
from util import demo, download, report, rundir
from util import device as machine

pytestmark = pytest.mark.usefixtures("tiny", "small_pictures")  # cnn8 is tiny here

STRONG = ["--recipe", "strong"]  # before train_in's short epochs: a flag given twice has its last value


def weights_of(run_dir: Path, seed: int = 42, fold: int | str = 1) -> dict:
    return last_checkpoint(run_dir, seed, fold)["model"]


def same_weights(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- one epoch --------------------------------------------------------------------------------------------------------

def test_metrics_of_a_case_worked_by_hand():
    metrics = training.compute_metrics(torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 1, 2]))
    # class 0: precision 1/3, recall 1; class 1: precision 1, recall 1/2; class 2: never predicted
    assert metrics == pytest.approx({"loss": 3.0, "accuracy": 0.5, "precision": (1 / 3 + 1 + 0) / 3,
                                     "recall": (1 + 0.5 + 0) / 3, "f1": (0.5 + 2 / 3 + 0) / 3})


def test_metrics_are_scikit_learns():
    rng = np.random.default_rng(0)
    targets, predictions = torch.tensor(rng.integers(0, 9, 200)), torch.tensor(rng.integers(0, 9, 200))
    metrics = training.compute_metrics(torch.rand(200), predictions, targets)
    for name, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        assert metrics[name] == pytest.approx(score(targets, predictions, average="macro", zero_division=0))


def test_metrics_of_an_evaluation_do_not_depend_on_the_batch_size(dataset):
    torch.manual_seed(0)
    model = Tiny(4)
    _, validation = dataset.split(1)
    results = [training.compute_metrics(*training.evaluate(
        model, dsets.validation_batches(dataset, validation, (-40.0, 20.0), batch_size=size, device=CPU), "fp32")[:3])
        for size in (1, 3, 8)]
    for metrics in results[1:]:
        assert metrics == pytest.approx(results[0], rel=1e-5)


def test_results_of_an_epoch_are_those_of_the_pass_itself(dataset):
    torch.manual_seed(0)
    model = Tiny(4)
    first = copy.deepcopy(model)
    training_clips, _ = dataset.split(1)
    batch = next(dsets.training_batches(dataset, training_clips, (-40.0, 20.0), views=1, batch_size=16, seed=1, fold=1, epoch=1,
                                        device=CPU))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    losses, predictions, targets = training.train_one_epoch(model, optimizer, [batch], [0.01], "fp32")
    logits = first(batch.examples.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(losses, F.cross_entropy(logits, batch.targets, reduction="none").detach())
    assert torch.equal(predictions, logits.argmax(dim=1)) and torch.equal(targets, batch.targets)
    assert not torch.equal(model.fc.weight, first.fc.weight)


def test_each_step_has_its_own_learning_rate(dataset):
    rates = []

    class Watched(torch.optim.SGD):
        def step(self):
            rates.extend(group["lr"] for group in self.param_groups)
    model = Tiny(4)
    batches = dsets.training_batches(dataset, torch.arange(6), (-40.0, 20.0), views=1, batch_size=2, seed=1, fold=1, epoch=1,
                                     device=CPU)
    training.train_one_epoch(model, Watched(model.parameters()), batches, [0.3, 0.2, 0.1], "fp32")
    assert rates == [0.3, 0.2, 0.1]


class Recording(TorchDispatchMode):
    """torch.cuda.CUDAGraph and torch.cuda.graph in one, on the CPU: the operations of a capture, run again by `replay`.

    As on a GPU, a capture itself changes nothing: `state()` lists the tensors that are put back after it.
    """

    def __init__(self, state):
        super().__init__()
        self.state, self.operations, self.replays = state, [], 0

    def __enter__(self):
        self.before = [(tensor, tensor.clone()) for tensor in self.state()]
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        with torch.no_grad():
            for tensor, value in self.before:
                tensor.copy_(value)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, result in self.operations:
            for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs))):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


@pytest.mark.parametrize("mixup", [0.0, 0.3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_recorded_step_gives_the_bits_of_one_that_is_not(dataset, monkeypatch, precision, mixup):
    """The recording of a GPU is stood in for: what it replays are the same operations on the same tensors."""
    clips, _ = dataset.split(1)
    options = {"views": 3, "batch_size": 6, "seed": 1, "fold": 1, "device": CPU, "mixup": mixup}  # 8 batches, the last one short
    lrs = torch.linspace(1e-3, 2e-3, 16, dtype=torch.float32).tolist()  # numbers that float32 holds
    clips, results = clips[:15], []
    for recorded in (False, True):
        torch.manual_seed(0)
        model = Tiny(4)
        optimizer = torch.optim.AdamW(model.parameters(), torch.tensor(1.0), fused=True)  # as build_optimizer's on CUDA
        ema, recorder, made = training.EMA(model, 0.9), machine.Recorder(recorded), []

        def state():
            return [*model.state_dict().values(), *(tensor for each in optimizer.state.values() for tensor in each.values())]

        def start():
            made.append(Recording(state))
            return made[-1]
        monkeypatch.setattr(torch.cuda, "CUDAGraph", start)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
        passes = []
        for epoch in (1, 2):
            batches = dsets.training_batches(dataset, clips, (-40.0, 20.0), epoch=epoch, **options)
            passes += training.train_one_epoch(model, optimizer, batches, lrs[8 * epoch - 8:8 * epoch], precision,
                                               label_smoothing=0.1, ema=ema, recorder=recorder)
        results.append([*passes, *state(), *ema.model.state_dict().values()])
        # of the 7 and 7 full batches, three warm up
        assert [graph.replays for graph in made] == ([11] if recorded else [])
    assert all(torch.equal(one, other) for one, other in zip(*results))


def test_an_evaluation_changes_nothing_in_the_model(dataset):
    model = Tiny(4)
    before = copy.deepcopy(model.state_dict())
    batches = dsets.validation_batches(dataset, torch.arange(8), (-40.0, 20.0), batch_size=3, device=CPU)
    training.evaluate(model, batches, "fp32")
    assert same_weights(before, model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("network", list(models.MODELS.values()))  # of before cnn8 is tiny
def test_each_network_learns_eight_clips_by_heart(dataset, network):
    torch.manual_seed(0)
    model = network(8, (1, 60, 200)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 3e-4, fused=True)
    examples = dsets.normalize(dataset.features[:8, :, :60, :200], -40.0, 20.0)
    batches = [dsets.Batch(examples, torch.arange(8), None, None, torch.arange(8), 8)]
    passes = [training.train_one_epoch(model, optimizer, batches, [3e-4], "fp32") for _ in range(16)]
    assert passes[0][0].mean() > 1.5 and passes[-1][0].mean() < 0.5
    assert torch.equal(passes[-1][1], torch.arange(8))


def test_the_loss_of_mixed_examples_is_that_of_both_targets():
    class Fixed(torch.nn.Module):
        def forward(self, examples):
            return logits
    logits, lam = torch.randn(3, 5), torch.tensor([0.5, 0.75, 1.0])
    targets, other_targets = torch.tensor([0, 3, 3]), torch.tensor([4, 0, 2])
    losses, found = training.forward(Fixed(), torch.zeros(3, 1, 100, 384), targets, "fp32", lam, other_targets, 0.1)
    soft = lam[:, None] * F.one_hot(targets, 5) + (1 - lam[:, None]) * F.one_hot(other_targets, 5)
    torch.testing.assert_close(losses, F.cross_entropy(logits, soft, reduction="none", label_smoothing=0.1))
    assert torch.equal(found, logits)


def test_logits_of_several_crops_are_averaged():
    class Each(torch.nn.Module):
        def forward(self, examples):
            return examples[:, 0, 0, :3]  # an example's own first numbers
    examples, targets = torch.randn(6, 1, 100, 384), torch.tensor([2, 0])
    losses, found = training.forward(Each(), examples, targets, "fp32")
    logits = torch.stack([examples[[clip, clip + 2, clip + 4], 0, 0, :3].mean(dim=0) for clip in range(2)])
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"))
    torch.testing.assert_close(found, logits)


# --- how weights move -------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_the_ema_is_that_of_a_plain_loop_to_the_last_bit():
    model = Tiny(4).train()
    ema = training.EMA(model, 0.9)
    expected = copy.deepcopy(model.state_dict())
    for step in range(1, 13):
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model(torch.randn(2, 1, 100, 384))  # the batch statistics move too
        ema.update()
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                expected[name] = expected[name].lerp(tensor, max(1 - 0.9, 1 / step))  # a plain mean at first
            else:
                expected[name] = tensor.clone()
    assert same_weights(ema.model.state_dict(), expected)
    assert ema.model.bn.num_batches_tracked == 12
    assert not torch.equal(ema.model.bn.running_mean, model.bn.running_mean)


def test_the_cosine_schedule_rises_for_a_tenth_and_falls_to_nothing():
    rates = [training.lr_at_step(step, 200, 2.0, "cosine") for step in range(200)]
    assert rates[:20] == pytest.approx([2.0 * (step + 1) / 20 for step in range(20)])
    assert rates[20] == 2.0 and rates[110] == pytest.approx(1.0) and 0 < rates[-1] < 0.001
    assert all(one > next_one for one, next_one in zip(rates[20:], rates[21:]))
    assert {training.lr_at_step(step, 200, 2.0, "constant") for step in range(200)} == {2.0}
    assert training.lr_at_step(0, 1, 2.0, "cosine") == 2.0, "one step in all"


def test_the_averaged_weights_are_evaluated_and_saved(pristine_root, tmp_path):
    run_dir = train_in(tmp_path / "run", pristine_root, *STRONG, "--epochs", 2, "--ema", 0.5)
    checkpoint = last_checkpoint(run_dir)
    assert not same_weights(checkpoint["model"], checkpoint["raw_model"])
    params = dsets.FeatureParams(**checkpoint["features"])
    dataset, model = dsets.ESC50(pristine_root, params=params), Tiny(2, params.input_shape)
    model.load_state_dict(checkpoint["model"])
    batches = dsets.validation_batches(dataset, dataset.split(1)[1], checkpoint["mean_std"], batch_size=4, device=CPU,
                                       tta_crops=3)
    losses, predictions, *_ = training.evaluate(model, batches, checkpoint["precision"])
    assert torch.equal(predictions, checkpoint["predictions"])
    assert losses.double().mean().item() == pytest.approx(checkpoint["history"][-1]["loss"], rel=1e-5)


# --- data that the command itself brings ------------------------------------------------------------------------------

def test_demo_writes_sounds_and_trains_on_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "NUM_CLASSES", 2)
    monkeypatch.setattr(demo, "CLIPS_PER_CLASS", 2)
    run("--demo", "--data", tmp_path / "demo", "--run-dir", tmp_path / "run", "--epochs", 1)
    assert "4 clips, 2 classes, folds 1, 2" in capsys.readouterr().out
    run("--resume", tmp_path / "run", "--fold", "all")


def test_download_fetches_first_and_resume_does_not_fetch_again(pristine_root, tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(download, "download", fetched.append)
    run("--download", "--data", pristine_root, "--run-dir", tmp_path / "run", "--epochs", 1)
    run("--resume", tmp_path / "run")
    assert fetched == [pristine_root]
    run("--resume", tmp_path / "run", "--download")
    assert fetched == [pristine_root] * 2


# --- what goes wrong --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, place", [(9, "step 4"), (10, r"validation \w+ 1")])
def test_a_loss_that_is_not_finite_stops_the_run(pristine_root, tmp_path, capsys, monkeypatch, call, place):
    calls, forward = [0], Tiny.forward

    def diverging(self, x):  # an epoch is 4 steps and one batch of validation
        calls[0] += 1
        return forward(self, x) * (float("nan") if calls[0] == call else 1)
    monkeypatch.setattr(Tiny, "forward", diverging)
    run("--data", pristine_root, "--run-dir", tmp_path / "run", "--epochs", 3, "--views", 2, "--batch-size", 4, status=2)
    error = error_line(capsys)
    assert re.search(rf"--lr .*epoch 2, .*{place} of {tmp_path / 'run'}", error)
    assert last_checkpoint(tmp_path / "run")["epoch"] == 1


def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_whole(reference, shared_run, capsys):
    resource = pytest.importorskip("resource")  # not on Windows
    last = reference / "seed-1" / "fold-1" / "last.pt"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (last.stat().st_size - 5000, limits[1]))  # no file may grow larger
    try:
        run("--resume", reference, "--epochs", 3, status=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(last) in error_line(capsys)
    assert not list(reference.rglob(".*.part"))
    assert same_weights(last_checkpoint(reference, 1, 1)["optimizer"]["state"][0],
                        last_checkpoint(shared_run, 1, 1)["optimizer"]["state"][0])
    run("--resume", reference)
    assert last_checkpoint(reference, 1, 1)["epoch"] == 3


def test_a_vanished_folder_is_one_line(pristine_root, tmp_path, capsys, monkeypatch):
    evaluate = training.evaluate

    def vanishing(*arguments):
        shutil.rmtree(tmp_path / "run")
        return evaluate(*arguments)
    monkeypatch.setattr(training, "evaluate", vanishing)
    run("--data", pristine_root, "--run-dir", tmp_path / "run", "--epochs", 1, status=2)
    assert "best.pt" in error_line(capsys)


# --- the same bits ----------------------------------------------------------------------------------------------------

def test_the_same_command_gives_the_same_bits(root, shared_run, tmp_path):
    torch.manual_seed(1)
    np.random.seed(1)
    for cached in (root / "features").iterdir():
        cached.unlink()
    run_dir = train_in(tmp_path / "run", root, "--fold", 1, 3, "--seed", 1, 2)
    assert results_of(run_dir) == results_of(shared_run)
    assert torch.are_deterministic_algorithms_enabled()  # on the CPU it changes nothing here, on CUDA it does


def test_another_seed_or_fold_starts_from_other_weights(dataset):
    def start(seed, fold):
        return training.start_model("cnn8", None, dataset, seed, fold).state_dict()
    assert same_weights(start(1, 1), start(1, 1))
    assert not same_weights(start(1, 1), start(1, 2)) and not same_weights(start(1, 1), start(2, 1))


def test_a_training_depends_neither_on_those_before_it_nor_on_the_global_generators(pristine_root, shared_run, tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    alone = train_in(tmp_path / "alone", pristine_root, "--seed", 2, "--fold", 3)
    assert same_weights(weights_of(alone, 2, 3), weights_of(shared_run, 2, 3))
    assert torch.equal(torch.get_rng_state(), state)


# --- resume and rerun -------------------------------------------------------------------------------------------------

class Killed(BaseException):
    """Stands for kill -9 at some point of the program: nothing after it runs."""


def dies_at_call(function, number: int):
    """The function, which raises Killed at its call of that number, counted from 1."""
    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return function(*arguments, **options)
    return counted


@pytest.mark.parametrize("module, name", [
    (os, "replace"), *(pytest.param(*each, marks=pytest.mark.slow) for each in (
        (os, "fsync"), (training, "evaluate"), (checkpoints, "save_checkpoint"), (rundir, "write_metrics"),
        (rundir, "write_json"), (report.Board, "add_rows"), (report.Board, "add_results"), (report, "write_pictures"),
        (report, "write_report")))],
    ids=lambda value: value if isinstance(value, str) else "")
def test_killed_at_any_point_a_run_ends_as_if_it_never_was(pristine_root, tmp_path, shared_run, monkeypatch, module, name):
    run_dir, killed = tmp_path / "run", 0
    for number in (4, 3, 12, 21):  # kill at the 4th call, then at the 3rd after that, ...
        with monkeypatch.context() as context, contextlib.suppress(Killed):
            context.setattr(module, name, dies_at_call(getattr(module, name), number))
            killed += 1
            if (run_dir / "run.json").exists():
                run("--resume", run_dir)
            else:
                train_in(run_dir, pristine_root, "--fold", 1, 3, "--seed", 1, 2)
            killed -= 1
    assert killed
    run("--resume", run_dir)
    assert results_of(run_dir) == results_of(shared_run)
    assert not list(run_dir.rglob(".*.part"))
    for folder in run_dir.glob("seed-*/fold-*"):
        events = EventAccumulator(str(folder)).Reload()
        assert "confusion" in events.Tags()["images"] and "final/accuracy" in events.Tags()["scalars"]


class DroppingOut(Tiny):
    """A network that draws numbers itself."""

    def forward(self, x):
        return super().forward(F.dropout(x, 0.2, self.training))


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_strong_training_resumes_to_the_last_bit(pristine_root, tmp_path, monkeypatch, precision):
    """With EMA, schedule, AdamW, every augmentation, and dropout."""
    monkeypatch.setitem(models.MODELS, "cnn8", DroppingOut)
    flags = [*STRONG, "--epochs", 4, "--precision", precision]
    whole = train_in(tmp_path / "whole", pristine_root, *flags)
    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr(training, "evaluate", dies_at_call(training.evaluate, 3))
        train_in(tmp_path / "run", pristine_root, *flags)
    run("--resume", tmp_path / "run")
    assert results_of(tmp_path / "run") == results_of(whole)


def test_more_epochs_after_the_last_are_those_of_a_longer_run(pristine_root, tmp_path, monkeypatch):
    run_dir = train_in(tmp_path / "run", pristine_root)
    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr(report, "write_pictures", dies_at_call(report.write_pictures, 1))
        run("--resume", run_dir, "--epochs", 4)
    assert not rundir.is_finished(run_dir / "seed-42" / "fold-1", 4)  # by the report of 2 epochs
    run("--resume", run_dir)
    assert results_of(run_dir) == results_of(train_in(tmp_path / "longer", pristine_root, "--epochs", 4))
    assert json.loads((run_dir / "run.json").read_text())["flags"]["epochs"] == 4


def test_with_nothing_missing_resume_prints_the_table(reference, capsys, monkeypatch):
    monkeypatch.setattr(training, "train", None)
    before, run_config = results_of(reference), (reference / "run.json").read_text()
    run("--resume", reference)
    assert report.summary_table(json.loads((reference / "summary.json").read_text())) in capsys.readouterr().out
    assert results_of(reference) == before and (reference / "run.json").read_text() == run_config


def test_resume_writes_removed_files_again(reference, shared_run):
    """As the message on a damaged metrics.jsonl says; report.csv makes a training finished."""
    for name in ("seed-1/fold-1/metrics.jsonl", "seed-1/fold-3/report.csv", "seed-2/fold-1/last.pt", "seed-2/fold-1/report.csv",
                 "summary.json"):
        (reference / name).unlink()
    run("--resume", reference)
    assert results_of(reference) == results_of(shared_run)


def test_rerun_gives_the_same_bits_and_says_so(reference, tmp_path, capsys):
    shutil.rmtree(reference / "seed-1")
    run_config = json.loads((reference / "run.json").read_text())
    run_config["flags"]["seed"] = [2]
    (reference / "run.json").write_text(json.dumps(run_config))
    run("--rerun", reference, "--run-dir", tmp_path / "again")
    assert "identical" in capsys.readouterr().out.splitlines()[-1]
    again, there = results_of(tmp_path / "again"), results_of(reference)
    assert again.pop("summary") != there.pop("summary") and again == there  # the one there is of both seeds


# --- interrupts -------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_process_that_a_signal_ended_is_resumed_to_the_same_bits(pristine_root, tmp_path, monkeypatch, signum, status):
    """The program itself, with the network as it is."""
    flags = ["--device", "cpu", "--data", pristine_root, "--run-dir", tmp_path / "run", "--views", 1, "--fold", 1, 2,
             "--batch-size", 4]
    command = [sys.executable, str(PROJECT / "training.py"), *map(str, flags), "--epochs", "300"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not re.match(r" +2/300 +\| +\d+\.\d{4} +\d+\.\d", process.stdout.readline()):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert error.count("\n") == (2 if signum == signal.SIGINT else 0)  # no bars where stderr is no terminal
    epoch = last_checkpoint(tmp_path / "run")["epoch"]
    assert epoch >= 2
    run_config = json.loads((tmp_path / "run" / "run.json").read_text())
    run_config["flags"]["epochs"] = epoch + 1  # long enough to be interrupted, short enough to be resumed in a test
    (tmp_path / "run" / "run.json").write_text(json.dumps(run_config))
    monkeypatch.setitem(models.MODELS, "cnn8", models.CNN8)
    run("--resume", tmp_path / "run")
    run(*flags, "--epochs", epoch + 1, "--run-dir", tmp_path / "whole")  # in the one thread that --resume took
    assert results_of(tmp_path / "run") == results_of(tmp_path / "whole")


# --- all clips, unequal classes, predictions --------------------------------------------------------------------------

def test_fold_none_trains_on_all_clips_and_validates_nothing(pristine_root, tmp_path, capsys, monkeypatch):
    run_dir = train_in(tmp_path / "run", pristine_root, "--fold", "none")
    folder = run_dir / "seed-42" / "fold-none"
    rows = rundir.read_metrics(folder)
    assert [(row["phase"], row["epoch"], row["fold"]) for row in rows] == [("training", 1, "none"), ("training", 2, "none")]
    assert not (folder / "best.pt").exists() and not (folder / "report.csv").exists()
    assert "12 training clips" in capsys.readouterr().out
    assert json.loads((run_dir / "summary.json").read_text())["trainings"] == []
    before = (folder / "last.pt").read_bytes()
    run("--resume", run_dir)  # finished: nothing is trained again
    assert (folder / "last.pt").read_bytes() == before
    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr(report, "write_pictures", dies_at_call(report.write_pictures, 1))
        run("--resume", run_dir, "--epochs", 3)
    assert not rundir.is_finished(folder, 3)  # by the curves of 2 epochs
    run("--resume", run_dir)
    longer = train_in(tmp_path / "longer", pristine_root, "--fold", "none", "--epochs", 3)
    assert same_weights(weights_of(run_dir, fold="none"), weights_of(longer, fold="none"))


def test_fold_none_has_no_place_in_a_mean(pristine_root, tmp_path):
    run_dir = train_in(tmp_path / "run", pristine_root, "--fold", "none", 1)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [training["fold"] for training in summary["trainings"]] == [1]
    assert rundir.read_run_config(run_dir)["flags"]["fold"] == ["none", 1]


def test_balanced_weights_are_scikit_learns():
    targets = torch.tensor([0] * 7 + [1] * 2 + [3])
    weights = training.balanced_weights(targets, 4)
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=targets.numpy())
    assert weights[[0, 1, 3]].tolist() == pytest.approx(expected)


def test_class_weights_multiply_the_training_loss_alone(root, tmp_path, monkeypatch):
    def one_more_validates(table):
        table.loc[(table["fold"] == "2").idxmax(), "fold"] = "1"
    change_table(root, one_more_validates)  # 3 and 4 of 11 clips train
    seen, forward = [], training.forward

    def watched(*arguments, **keywords):
        seen.append([argument for argument in arguments[7:]])
        return forward(*arguments, **keywords)
    monkeypatch.setattr(training, "forward", watched)
    train_in(tmp_path / "run", root, "--class-weights", "balanced", "--epochs", 1)
    trained = [each for each in seen if each]
    assert all(each[0].tolist() == pytest.approx([7 / 6, 7 / 8]) for each in trained)
    assert (len(trained), len(seen)) == (4, 6)  # the others validate
    logits, targets = torch.randn(3, 2), torch.tensor([0, 1, 1])
    weights = torch.tensor([2.0, 0.5])
    losses, _ = forward(lambda examples: logits, torch.zeros(3, 1, 100, 384), targets, "fp32", None, None, 0.0, weights)
    plain = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses, plain * torch.tensor([2.0, 0.5, 0.5]))
    lam, others = torch.tensor([0.75, 1.0, 0.5]), torch.tensor([1, 1, 0])
    losses, _ = forward(lambda examples: logits, torch.zeros(3, 1, 100, 384), targets, "fp32", lam, others, 0.1, weights)
    own, other = (F.cross_entropy(logits, each, reduction="none", label_smoothing=0.1) for each in (targets, others))
    expected = lam * own * torch.tensor([2.0, 0.5, 0.5]) + (1 - lam) * other * torch.tensor([0.5, 0.5, 2.0])
    torch.testing.assert_close(losses, expected)  # the smoothing's part, too, by the target's class alone


def test_flags_of_the_optimizer_the_loss_and_the_average_reach_the_training(pristine_root, tmp_path, monkeypatch):
    seen, train_one_epoch = [], training.train_one_epoch

    def watched(model, optimizer, batches, lrs, precision, **keywords):
        seen.append((optimizer, keywords))
        return train_one_epoch(model, optimizer, batches, lrs, precision, **keywords)
    monkeypatch.setattr(training, "train_one_epoch", watched)
    compiled = []
    monkeypatch.setattr(training.machine, "compile_model", lambda model: compiled.append(model) or model)
    flags = ("--optimizer", "adamw", "--weight-decay", 0.25, "--label-smoothing", 0.2, "--ema", 0.7, "--compile")
    train_in(tmp_path / "run", pristine_root, *flags, "--epochs", 1)
    train_in(tmp_path / "plain", pristine_root, "--epochs", 1)
    (optimizer, keywords), (plain, plain_keywords) = seen
    assert type(optimizer) is torch.optim.AdamW and type(plain) is torch.optim.Adam
    assert [each.param_groups[0]["weight_decay"] for each in (optimizer, plain)] == [0.25, 1e-3]
    assert (keywords["label_smoothing"], keywords["ema"].ema_decay) == (0.2, 0.7)
    assert (plain_keywords["label_smoothing"], plain_keywords["ema"]) == (0.0, None)
    assert len(compiled) == 1


def test_precision_data_and_folds_are_those_of_the_flags(shared_root, tmp_path, monkeypatch, capsys):
    seen, train_one_epoch, evaluate = [], training.train_one_epoch, training.evaluate
    monkeypatch.setattr(training, "train_one_epoch", lambda *arguments, **keywords: seen.append(arguments[4]) or
                        train_one_epoch(*arguments, **keywords))
    monkeypatch.setattr(training, "evaluate", lambda *arguments: seen.append(arguments[2]) or evaluate(*arguments))
    flags = ["--esc10", "--precision", "bf16", "--fold", "none", "all", 2, "--epochs", 1, "--views", 1]
    run_dir = train_in(tmp_path / "run", shared_root, *flags)
    assert set(seen) == {"bf16"}
    assert sorted(path.name for path in (run_dir / "seed-42").iterdir()) == ["fold-1", "fold-2", "fold-3", "fold-none"]
    assert last_checkpoint(run_dir)["classes"] == ["sound_0", "sound_1"]  # ESC-10's, of four
    capsys.readouterr()
    run("--data", shared_root, "--run-dir", tmp_path / "absent", "--fold", "all", 7, status=2)
    assert "--fold 7" in error_line(capsys) and not (tmp_path / "absent").exists()


def test_no_clip_of_the_validation_fold_is_trained_on(pristine_root, tmp_path, monkeypatch):
    folds, draws = {}, set()
    for name in ("training_batches", "validation_batches"):
        def watched(dataset, indices, mean_std, *, name=name, make=getattr(dsets, name), **options):
            folds.setdefault(name, set()).update(dataset.table["fold"][indices.numpy()])
            draws.add((options.get("seed"), options.get("fold")))
            return make(dataset, indices, mean_std, **options)
        monkeypatch.setattr(dsets, name, watched)
    train_in(tmp_path / "run", pristine_root, "--fold", 2, "--seed", 7, "--epochs", 1)
    assert folds == {"training_batches": {1, 3}, "validation_batches": {2}}
    assert draws == {(7, 2), (None, None)}


def test_predictions_csv_has_a_row_for_each_validated_clip(shared_run, pristine_root):
    tables = []
    for folder in sorted(shared_run.glob("seed-*/fold-*")):
        table, row = pd.read_csv(folder / "predictions.csv"), rundir.read_metrics(folder)[-1]
        columns = "file,start,fold,true_class,predicted_class,probability,true_probability"
        assert list(table.columns) == columns.split(",")
        assert (table["fold"] == row["fold"]).all() and len(table) == 4 and table["file"].str.startswith("audio/").all()
        right = table["true_class"] == table["predicted_class"]
        assert right.mean() == row["accuracy"]
        assert -np.log(table["true_probability"]).mean() == pytest.approx(row["loss"], rel=1e-4)
        assert (table["probability"] >= table["true_probability"] - 1e-6).all()
        assert table["probability"][right].tolist() == pytest.approx(table["true_probability"][right].tolist(), rel=1e-4)
        tables.append(table.assign(seed=row["seed"]))
    pd.testing.assert_frame_equal(pd.read_csv(shared_run / "predictions.csv"), pd.concat(tables, ignore_index=True))


# --- data of one's own ------------------------------------------------------------------------------------------------

def write_tone(path: Path, hertz: float, seconds: float, rate: int = 16_000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    soundfile.write(path, samples, rate)


def test_a_folder_of_class_folders_is_trained_and_told_about(tmp_path, capsys):
    root = tmp_path / "sounds"
    for number in range(3):
        write_tone(root / "None" / f"{number}.wav", 3000, 12.5 if number == 0 else 5)
        write_tone(root / "低い" / f"{number}.flac", 300, 2)
    flags = ["--folds", 3, "--fold", "all"]
    run_dir = train_in(tmp_path / "run", root, *flags)
    told = capsys.readouterr().out
    assert "folders " in told and "6 clips, 2 classes, folds 1, 2, 3" in told
    assert "1 recording is longer than 5 s, and its first 5 s are used (--split-long uses all): None/0.wav" in told
    assert [each["fold"] for each in json.loads((run_dir / "summary.json").read_text())["trainings"]] == [1, 2, 3]
    assert set(pd.read_csv(run_dir / "predictions.csv", keep_default_na=False)["true_class"]) == {"None", "低い"}

    train_in(tmp_path / "split", root, "--split-long", *flags)
    told = capsys.readouterr().out
    assert "8 clips, 2 classes" in told and "longer than 5 s" not in told and "3 clips of 低い to 5 of None" in told
    table = pd.read_csv(tmp_path / "split" / "predictions.csv")
    assert sorted(table[table["file"] == "None/0.wav"]["start"]) == [0, 5, 10]
    assert table[table["file"] == "None/0.wav"]["fold"].nunique() == 1


def test_fold_none_trains_on_a_table_with_one_fold(tmp_path, capsys):
    root = write_root(tmp_path / "root", num_classes=2, folds=1)
    run_dir = train_in(tmp_path / "run", root, "--fold", "none")
    assert f"predict.py {run_dir}" in capsys.readouterr().out and (run_dir / "seed-42" / "fold-none" / "last.pt").exists()


def test_a_training_starts_from_another_ones_weights_but_for_the_last_layer(pristine_root, tmp_path, monkeypatch, capsys):
    other = train_in(tmp_path / "other", pristine_root, "--epochs", 1)
    path = other / "seed-42" / "fold-1" / "last.pt"
    dataset = dsets.ESC50(pristine_root)
    plain, loaded = (training.start_model("cnn8", source, dataset, 1, 2).state_dict() for source in (None, str(path)))
    expected = weights_of(other)
    for name in plain:
        assert torch.equal(loaded[name], plain[name] if name.startswith("fc.") else expected[name])
    sources, start_model = [], training.start_model
    with monkeypatch.context() as context:
        context.setattr(training, "start_model", lambda *arguments: sources.append(arguments[1]) or start_model(*arguments))
        train_in(tmp_path / "new", pristine_root, "--pretrained", path)
    assert sources[-1] == str(path)  # of the training itself
    assert f"note   {path} knows all these classes" in capsys.readouterr().out
    checkpoints.save_checkpoint(tmp_path / "other.pt", checkpoints.load_checkpoint(path) | {"classes": ["sound_0", "another"]})
    train_in(tmp_path / "others", pristine_root, "--pretrained", tmp_path / "other.pt", "--epochs", 1)
    assert "knows all" not in capsys.readouterr().out
    monkeypatch.setattr(dataset, "params", dsets.FeatureParams(crop_frames=431))  # the layers take crops of any size
    loaded = training.start_model("cnn8", str(path), dataset, 1, 2).state_dict()
    assert torch.equal(loaded["conv.weight"], expected["conv.weight"])
    monkeypatch.setattr(dataset, "params", dsets.FeatureParams(f_max=16_000.0, crop_frames=431))
    message = refused(training.start_model, "cnn8", str(path), dataset, 1, 2)
    assert "f_max 8000.0, here 16000.0" in message and "crop" not in message
    assert "--pretrained" in refused(training.start_model, "resnet18", str(path), dsets.ESC50(pristine_root), 1, 2)


# --- unusual environments ---------------------------------------------------------------------------------------------

def test_a_thread_trains_as_the_main_thread_does(pristine_root, tmp_path, shared_run):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train_in, tmp_path / "run", pristine_root, "--fold", 1, "--seed", 1).result()
    assert same_weights(weights_of(tmp_path / "run", 1), weights_of(shared_run, 1))


def test_a_finished_run_prints_its_table_after_an_upgrade(reference, capsys):
    run_config = rundir.read_run_config(reference)
    run_config["versions"]["numpy"] = "0.1"
    rundir.write_json(reference / "run.json", run_config)
    run("--resume", reference)
    assert "mean" in capsys.readouterr().out
    run("--resume", reference, "--epochs", 3, status=2)
    assert "numpy" in error_line(capsys)


@pytest.mark.parametrize("layout", ["UrbanSound8K", "a table"])
def test_a_table_of_clips_is_trained_and_predicts(tmp_path, capsys, layout):
    root, rows = tmp_path / "sounds", []
    for number in range(6):
        name, fold = f"{number}-{number % 2}-0-0.wav", number // 2 + 1
        write_tone(root / "audio" / f"fold{fold}" / name, 300 + 2700 * (number % 2), 4)
        rows.append((name, fold, ("low", "high")[number % 2]))
    if layout == "UrbanSound8K":
        lines = ["slice_file_name,fsID,start,end,salience,fold,classID,class"]
        lines += [f"{name},{name[0]},58.5,62.5,1,{fold},{name[2]},{label}" for name, fold, label in rows]
        path = root / "metadata" / "UrbanSound8K.csv"
    else:
        lines = ["file_name,label,fold,start,end"]
        lines += [f"audio/fold{fold}/{name},{label},{fold},{start},{start + 2}" for name, fold, label in rows for start in (0, 2)]
        path = root / "metadata.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    run_dir = train_in(tmp_path / "run", root, "--fold", "all", "--epochs", 1)
    told = capsys.readouterr().out
    assert f"data   {layout} " in told and "folds 1, 2, 3;" in told and "assigned to" not in told
    table = pd.read_csv(run_dir / "predictions.csv")
    assert len(table) == (6 if layout == "UrbanSound8K" else 12) and set(table["true_class"]) == {"high", "low"}
    assert predict.main([str(run_dir), str(root / "audio" / "fold1"), "--device", "cpu", "--format", "csv"]) == 0
    assert capsys.readouterr().out.count(",mean,") == 2 * 2  # files and classes
