"""Several processes at one training: as torchrun launches them."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dsets
from util import dist as processes
from util import rundir as runs
import training
from conftest import Tiny, write_root
from util.cache import UserError

PROJECT = Path(__file__).resolve().parents[1]

# training.py with a network small enough for a test. The rank that DIES names kills itself in epoch 2, that of LATE starts late.
TINY_TRAINING = """
import os, signal, sys, time
sys.path[:0] = [{project!r}, {tests!r}]
import models, training
from util import dist as processes
from conftest import Tiny
models.MODELS["cnn8"] = Tiny
compute = training.compute_metrics
calls = []
def dying(*arguments):
    calls.append(1)
    if os.environ.get("DIES") == os.environ.get("RANK", "0") and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(*arguments)
training.compute_metrics = dying
if os.environ.get("LATE") == os.environ.get("RANK", "0"):
    time.sleep(5)
processes.end(training.main())
"""


def launch(script: Path, *arguments, ranks: int = 2, **environment) -> subprocess.CompletedProcess:
    """Run a script with torchrun, or with python for one rank; some minutes at most, whatever hangs."""
    command = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else [])]
    return subprocess.run([*command, str(script), *map(str, arguments)], capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


@pytest.fixture(scope="module")
def tiny_training(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("script") / "training.py"
    path.write_text(TINY_TRAINING.format(project=str(PROJECT), tests=str(PROJECT / "tests")))
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """18 clips: 3 classes, 3 folds. Without features: the first training computes them."""
    return write_root(tmp_path_factory.mktemp("ranks") / "root", num_classes=3, folds=3)


FLAGS = ["--recipe", "strong", "--views", 3, "--batch-size", 4, "--epochs", 3, "--precision", "fp32", "--fold", 1, 2]


def results_of(run_dir: Path) -> list:
    rows = [{name: value for name, value in row.items() if name != "seconds"}
            for fold in (1, 2) for row in runs.read_metrics(run_dir / "seed-42" / f"fold-{fold}")]
    weights = [runs.load_checkpoint(run_dir / "seed-42" / f"fold-{fold}" / "last.pt")["model"] for fold in (1, 2)]
    return [rows, [{name: tensor.tolist() for name, tensor in state.items()} for state in weights]]


def check_validation(root: Path, path: Path) -> None:
    """The last validation, which the ranks shared out, is what one process finds with the weights that were kept."""
    checkpoint, dataset = runs.load_checkpoint(path), dsets.ESC50(root)
    model = Tiny(3)
    model.load_state_dict(checkpoint["model"])
    stats = (checkpoint["normalisation"]["mean"], checkpoint["normalisation"]["std"])
    batches = dsets.validation_batches(dataset, dataset.split(1)[1], stats, batch_size=4, device=torch.device("cpu"), crops=9)
    losses, predictions, _ = training.validate(model, batches, "fp32", processes.Ranks())
    assert torch.equal(predictions, checkpoint["predictions"])
    assert losses.double().mean().item() == pytest.approx(checkpoint["history"][-1]["loss"], rel=1e-6)


def test_two_ranks_train_die_and_go_on_to_the_same_bits(tiny_training, root, tmp_path):
    whole = launch(tiny_training, "--data", root, "--run-dir", tmp_path / "whole", *FLAGS)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("mean +- std") == 1 and "processes: 2, threads of each: 1" in whole.stdout  # rank 0 alone speaks
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["hardware"]["ranks"] == 2
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert [done["fold"] for done in summary["trainings"]] == [1, 2]
    check_validation(root, tmp_path / "whole" / "seed-42" / "fold-1" / "last.pt")

    for rank in ("0", "1"):
        run_dir = tmp_path / f"killed-{rank}"
        killed = launch(tiny_training, "--data", root, "--run-dir", run_dir, *FLAGS, DIES=rank)
        assert killed.returncode != 0
        lines = [line for line in killed.stderr.splitlines() if line.startswith("training.py:")]
        assert len(lines) == 1 and lines[0].endswith(f"--resume {run_dir}"), killed.stderr
        assert "go on with: torchrun --standalone --nproc-per-node=2 training.py" in lines[0]
        assert runs.load_checkpoint(run_dir / "seed-42" / "fold-1" / "last.pt")["epoch"] == 1
        if rank == "1":
            refused = launch(tiny_training, "--resume", run_dir, ranks=1)
            assert refused.returncode == 2 and refused.stderr.count("\n") == 1
            assert "was begun with 2 processes, here are 1; launch as many again" in refused.stderr
            resumed = launch(tiny_training, "--resume", run_dir)
            assert resumed.returncode == 0, resumed.stderr
            assert results_of(run_dir) == results_of(tmp_path / "whole")


def test_a_mistake_of_the_user_is_told_once(tiny_training, root, tmp_path):
    for flags, words, late in ((["--epochs", 0], "--epochs: '0'", "0"), (["--epochs", 0], "--epochs: '0'", "1"),
                               (["--data", root, "--fold", 7], "--fold 7: ", "nobody")):  # whichever rank finds it first
        refused = launch(tiny_training, "--run-dir", tmp_path / "run", *flags, LATE=late)
        lines = [line for line in refused.stderr.splitlines() if line.startswith("training.py:")]
        assert refused.returncode != 0 and len(lines) == 1 and words in lines[0], refused.stderr


# Two ranks and one process on the same weights, with batch statistics frozen: gradients of a short batch, validation.
AGREEMENT = """
import sys
sys.path[:0] = [{project!r}, {tests!r}]
import torch
import dsets, training
from util import dist as processes
from conftest import Tiny
torch.set_num_threads(1)
ranks = processes.Ranks()
ranks.meet(torch.device("cpu"))
dataset = dsets.ESC50({root!r})
torch.manual_seed(0)
model = Tiny(3)
network = ranks.together(model)
class Frozen(torch.nn.Module):  # stays in evaluation mode, as train_epoch would change it
    def train(self, mode=True):
        return self
    def forward(self, x):
        return network(x)
network.eval()
class Keep(torch.optim.SGD):
    def step(self):
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
gradients = []
batches = list(dsets.training_batches(dataset, torch.arange(9), (-40.0, 20.0), views=1, batch_size=4, seed=1, fold=1, epoch=1,
                                      device=ranks.device, mix=1.0, rank=ranks.rank, ranks=ranks.size))
losses = training.train_epoch(Frozen(), Keep(model.parameters()), batches, 3, "fp32", ranks, label_smoothing=0.1)
validated = training.validate(model, dsets.validation_batches(dataset, torch.arange(9), (-40.0, 20.0), batch_size=2, crops=9,
                              device=ranks.device, rank=ranks.rank, ranks=ranks.size), "fp32", ranks)
if ranks.rank == 0:
    torch.save([gradients, losses, validated], sys.argv[1])
ranks.leave()
processes.end(0)
"""


def test_gradients_and_validation_of_several_ranks_are_those_of_one(root, tmp_path):
    script = tmp_path / "agreement.py"
    script.write_text(AGREEMENT.format(project=str(PROJECT), tests=str(PROJECT / "tests"), root=str(root)))
    found = []
    for ranks in (1, 3):
        done = launch(script, tmp_path / f"{ranks}.pt", ranks=ranks)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(tmp_path / f"{ranks}.pt", weights_only=True))
    (gradients, losses, validated), (shared_gradients, shared_losses, shared_validated) = found
    assert len(gradients) == 3  # batches of 4, 4 and 1: of the last, two ranks get nothing
    for step, shared_step in zip(gradients, shared_gradients, strict=True):
        for gradient, shared in zip(step, shared_step, strict=True):
            torch.testing.assert_close(shared, gradient, rtol=0, atol=1e-6)
    for column, shared in zip(losses, shared_losses, strict=True):
        torch.testing.assert_close(shared, column, rtol=0, atol=1e-6)
    assert all(torch.equal(column, shared) for column, shared in zip(validated, shared_validated, strict=True))


def test_jobs_of_an_array_share_a_folder_and_what_one_lost_is_resumed(tiny_training, root, tmp_path):
    flags = [*FLAGS[:-3], "--run-dir", tmp_path / "shared", "--data", root]
    jobs = [subprocess.Popen([sys.executable, str(tiny_training), *map(str, flags), "--fold", str(fold)], stdout=subprocess.DEVNULL,
                             env={**os.environ, "OMP_NUM_THREADS": "1", "DIES": "0" if fold == 2 else "nobody"})
            for fold in (1, 2)]
    assert [job.wait(timeout=240) for job in jobs] == [0, -signal.SIGKILL]
    summary = json.loads((tmp_path / "shared" / "summary.json").read_text())
    assert [done["fold"] for done in summary["trainings"]] == [1]  # fold 3's job never began
    resumed = launch(tiny_training, "--resume", tmp_path / "shared", "--fold", "all", ranks=1)  # or what had not joined is lost
    assert resumed.returncode == 0 and "seed 42 fold 2" in resumed.stdout and "going on after epoch 1" in resumed.stdout
    assert "seed 42 fold 1" not in resumed.stdout and "mean +- std" in resumed.stdout
    alone = launch(tiny_training, *flags[:-4], "--run-dir", tmp_path / "alone", "--data", root, "--fold", 1, 2, 3, ranks=1)
    assert alone.returncode == 0, alone.stderr
    assert results_of(tmp_path / "shared") == results_of(tmp_path / "alone")
    assert json.loads((tmp_path / "shared" / "summary.json").read_text())["mean"] == json.loads(
        (tmp_path / "alone" / "summary.json").read_text())["mean"]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    ranks = processes.Ranks()
    ranks.store = object()  # as if torchrun had launched it
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--nproc-per-node 2: there are 1 GPUs here; launch as many processes"):
        ranks.meet(torch.device("cuda"))
    with pytest.raises(UserError, match="--device mps: several processes train on cpu or cuda"):
        ranks.meet(torch.device("mps"))
