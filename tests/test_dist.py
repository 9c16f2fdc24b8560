"""Several processes at one training, as torchrun launches them; and jobs that share a run's folder.

This file is also the program that torchrun launches here: test_dist.py {train,agree} ARGUMENTS.
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dsets
import models
import training
from conftest import CPU, error_line, make_small_pictures, PROJECT, results_of, run, Tiny, write_root
from util import dist
from util.checkpoint import load_checkpoint
from util.errors import UserError

FLAGS = ["--device", "cpu", "--precision", "fp32", "--recipe", "strong", "--tta-crops", 3, "--views", 3,
         "--batch-size", 4, "--epochs", 3]


# --- what the launched processes do -----------------------------------------------------------------------------------

def train(*argv) -> None:
    """training.py with a network small enough for a test. Rank DIES kills itself in epoch 2, rank LATE starts a little later."""
    models.MODELS["cnn8"] = Tiny
    make_small_pictures(pytest.MonkeyPatch())
    calls, evaluate, run_training, claim_message = [], training.evaluate, training.run, dist.claim_message

    def dying(*arguments):
        calls.append(1)
        if os.environ.get("DIES") == os.environ.get("RANK", "0") and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluate(*arguments)

    def late(*arguments):
        if os.environ.get("LATE") == os.environ.get("RANK", "0"):
            time.sleep(5)
        return run_training(*arguments)

    def slow():
        time.sleep(1)  # meanwhile, torchrun ends the other ranks of one that died
        return claim_message()
    training.evaluate, training.run, dist.claim_message = dying, late, slow
    dist.end(training.main(list(argv)))


def agree(root: str, path: str) -> None:
    """Save the gradients of an epoch's steps, the last batch of which is short, and what training and evaluation return.

    Batch statistics are frozen: those of a rank's part of a batch are not those of the batch.
    """
    torch.set_num_threads(1)
    dist.init()
    dataset = dsets.ESC50(root)
    torch.manual_seed(0)
    raw_model, gradients = Tiny(3), []
    model = dist.parallel(raw_model) if dist.world_size() > 1 else raw_model
    model.eval()
    model.train = lambda mode=True: model

    class Keep(torch.optim.SGD):
        def step(self):
            gradients.append([parameter.grad.clone() for parameter in raw_model.parameters()])
    ranks = {"device": CPU, "rank": dist.rank(), "world_size": dist.world_size()}
    batches = dsets.training_batches(dataset, torch.arange(9), (-40.0, 20.0), views=1, batch_size=4, seed=1, fold=1, epoch=1,
                                     mixup=1.0, **ranks)
    trained = training.train_one_epoch(model, Keep(raw_model.parameters()), batches, [0.1] * 3, "fp32", label_smoothing=0.1)
    batches = dsets.validation_batches(dataset, torch.arange(9), (-40.0, 20.0), batch_size=2, tta_crops=3, **ranks)
    evaluated = training.evaluate(model, batches, "fp32")
    if dist.rank() == 0:
        torch.save([gradients, trained, evaluated], path)
    dist.barrier()
    dist.end(0)


# --- launching them ---------------------------------------------------------------------------------------------------

def command(*arguments, ranks: int) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *torchrun, __file__, *map(str, arguments)]


def environment(**variables) -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT), **variables}


def launch(*arguments, ranks: int = 2, **variables) -> subprocess.CompletedProcess:
    """Run this file with torchrun, or with python for one rank; some minutes at most, whatever hangs."""
    return subprocess.run(command(*arguments, ranks=ranks), capture_output=True, text=True, timeout=240,
                          env=environment(**variables))


def messages(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("training.py:")]


@pytest.fixture(scope="module")
def ranks_root(tmp_path_factory) -> Path:
    """18 clips: 3 classes, 3 folds. Without features: the first training computes them."""
    return write_root(tmp_path_factory.mktemp("ranks") / "root", num_classes=3, folds=3)


@pytest.fixture
def one_thread():
    """As the launched processes have: with other threads, sums have other last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check_evaluation(root: Path, path: Path) -> None:
    """The last evaluation, which the ranks shared out, is what one process finds with the weights that were saved."""
    checkpoint = load_checkpoint(path)
    params = dsets.FeatureParams(**checkpoint["features"])
    dataset, model = dsets.ESC50(root, params=params), Tiny(3, params.input_shape)
    model.load_state_dict(checkpoint["model"])
    batches = dsets.validation_batches(dataset, dataset.split(1)[1], checkpoint["mean_std"], batch_size=4, device=CPU,
                                       tta_crops=3)
    losses, predictions, *_ = training.evaluate(model, batches, "fp32")
    assert torch.equal(predictions, checkpoint["predictions"])
    assert losses.double().mean().item() == pytest.approx(checkpoint["history"][-1]["loss"], rel=1e-6)


# --- tests ------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.usefixtures("tiny", "one_thread")
def test_three_ranks_train_die_and_resume_to_the_same_bits(ranks_root, tmp_path, capsys):
    """Three: of two, a sum does not depend on the order."""
    flags = [*FLAGS, "--data", ranks_root, "--fold", 1, 2]
    whole = launch("train", *flags, "--run-dir", tmp_path / "whole", ranks=3)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("\nmean ") == 1 and "processes: 3, threads of each: 1" in whole.stdout  # rank 0 alone prints
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["hardware"]["world_size"] == 3
    check_evaluation(ranks_root, tmp_path / "whole" / "seed-42" / "fold-1" / "last.pt")

    run_dir = tmp_path / "killed"
    killed = launch("train", *flags, "--run-dir", run_dir, ranks=3, DIES="0")  # the rank that prints and writes
    assert killed.returncode != 0
    line, = messages(killed)
    assert line.endswith(f"torchrun --standalone --nproc-per-node=3 training.py --resume {run_dir}")
    assert load_checkpoint(run_dir / "seed-42" / "fold-1" / "last.pt")["epoch"] == 1

    run("--resume", run_dir, status=2)  # as one process
    assert "processes 3, here 1" in error_line(capsys)
    resumed = launch("train", "--resume", run_dir, ranks=3)
    assert resumed.returncode == 0, resumed.stderr
    assert results_of(run_dir) == results_of(tmp_path / "whole")


@pytest.mark.slow
def test_an_error_of_the_user_is_printed_once_by_whichever_rank_finds_it_first(tmp_path):
    refused = launch("train", "--device", "cpu", "--run-dir", tmp_path / "run", "--epochs", 0, LATE="0")
    line, = messages(refused)
    assert refused.returncode != 0 and "--epochs" in line


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_gradients_and_evaluation_of_several_ranks_are_those_of_one(ranks_root, tmp_path):
    with pytest.raises(SystemExit):
        agree(str(ranks_root), str(tmp_path / "1.pt"))
    done = launch("agree", ranks_root, tmp_path / "3.pt", ranks=3)
    assert done.returncode == 0, done.stderr
    (gradients, trained, evaluated), (ranks_gradients, ranks_trained, ranks_evaluated) = (
        torch.load(tmp_path / name, weights_only=True) for name in ("1.pt", "3.pt"))
    assert len(gradients) == 3  # batches of 4, 4 and 1: of the last, two ranks get nothing
    for step, ranks_step in zip(gradients, ranks_gradients, strict=True):
        for gradient, ranks_gradient in zip(step, ranks_step, strict=True):
            torch.testing.assert_close(ranks_gradient, gradient, rtol=0, atol=1e-6)
    for column, ranks_column in zip(trained, ranks_trained, strict=True):
        torch.testing.assert_close(ranks_column, column, rtol=0, atol=1e-6)
    assert all(torch.equal(column, ranks_column) for column, ranks_column in zip(evaluated, ranks_evaluated, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("tiny", "one_thread", "small_pictures")
def test_jobs_of_an_array_share_a_folder_and_what_one_lost_is_resumed(ranks_root, tmp_path, capsys):
    flags, run_dir = [*FLAGS, "--data", ranks_root], tmp_path / "shared"
    jobs = [subprocess.Popen(command("train", *flags, "--run-dir", run_dir, "--fold", fold, ranks=1), stdout=subprocess.DEVNULL,
                             env=environment(DIES="0" if fold == 2 else "nobody")) for fold in (1, 2)]
    assert [job.wait(timeout=240) for job in jobs] == [0, -signal.SIGKILL]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [training["fold"] for training in summary["trainings"]] == [1]
    run("--resume", run_dir, "--fold", "all")  # fold 3's job never began
    out = capsys.readouterr().out
    assert "seed 42 fold 1:" not in out and "seed 42 fold 2:" in out and "resumed after epoch 1" in out
    run(*flags, "--run-dir", tmp_path / "alone", "--fold", 1, 2, 3)
    assert results_of(run_dir) == results_of(tmp_path / "alone")


def test_one_process_without_torchrun_is_rank_0_of_1():
    dist.init()
    assert (dist.rank(), dist.world_size(), dist.launcher()) == (0, 1, "python")
    rows = torch.rand(3, 2)
    assert torch.equal(dist.all_gather(rows, torch.arange(3)), rows) and dist.broadcast("a") == "a"
    assert dist.claim_message() and dist.own_device(torch.device("cuda")) == torch.device("cuda")


def test_of_several_ranks_one_claims_the_message(monkeypatch):
    monkeypatch.setattr(dist, "store", torch.distributed.HashStore())
    assert [dist.claim_message() for _ in range(3)] == [True, False, False]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    for name, value in (("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"--device {device}: .*--nproc-per-node"):
            dist.own_device(torch.device(device))
    assert dist.own_device(CPU) == CPU


if __name__ == "__main__":
    {"train": train, "agree": agree}[sys.argv[1]](*sys.argv[2:])
