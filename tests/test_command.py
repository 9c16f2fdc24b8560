"""How the commands end: errors, signals and output that nobody reads, in one line and with a status."""
import io
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

import dsets
import training
from conftest import error_line, last_checkpoint, PROJECT, run, Tiny
from util import rundir

pytestmark = pytest.mark.usefixtures("tiny", "small_pictures")  # cnn8 is tiny here


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory_names_the_batch_size(pristine_root, tmp_path, capsys, monkeypatch, error):
    def forward(self, x):
        raise error
    monkeypatch.setattr(Tiny, "forward", forward)
    run("--data", pristine_root, "--run-dir", tmp_path / "run", status=2)
    assert "--batch-size" in error_line(capsys)


def test_errors_of_the_program_are_loud(pristine_root, tmp_path, monkeypatch):
    def forward(self, x):
        raise RuntimeError("a bug")
    monkeypatch.setattr(Tiny, "forward", forward)
    with pytest.raises(RuntimeError, match="a bug"):
        run("--data", pristine_root, "--run-dir", tmp_path / "run")


def test_output_that_nobody_reads_ends_the_run_with_the_line_that_resumes_it(pristine_root, tmp_path, capsys, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            if "1/2" in text:
                raise BrokenPipeError
    with monkeypatch.context() as context:
        context.setattr(sys, "stdout", Closed())
        run("--data", pristine_root, "--run-dir", tmp_path / "run", "--epochs", 2, status=2)
    assert error_line(capsys).endswith(f"python training.py --resume {tmp_path / 'run'}\n")
    assert last_checkpoint(tmp_path / "run")["epoch"] == 1


def test_a_path_that_the_terminal_cannot_show_is_escaped(pristine_root, tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    code = ("import models, sys, training; from conftest import Tiny; models.MODELS['cnn8'] = Tiny; "
            "sys.exit(training.main(sys.argv[1:]))")
    flags = ["--data", pristine_root, "--run-dir", tmp_path / "Läufe", "--epochs", 1, "--views", 1, "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, flags)], cwd=PROJECT, capture_output=True,
                          env=environment | {"PYTHONPATH": str(PROJECT / "tests")})
    assert done.returncode == 0 and done.stderr == b"" and rb"L\xe4ufe" in done.stdout


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_the_line_that_resumes_it(pristine_root, tmp_path, capsys, monkeypatch, signum, status):
    evaluate, handlers = training.evaluate, []

    def interrupted(*arguments):
        if (tmp_path / "run" / "seed-42" / "fold-1" / "last.pt").exists():
            try:
                os.kill(os.getpid(), signum)
            finally:
                handlers.extend(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))
        return evaluate(*arguments)
    monkeypatch.setattr(training, "evaluate", interrupted)
    before = signal.getsignal(signum)
    run("--data", pristine_root, "--run-dir", tmp_path / "run", "--epochs", 2, status=status)
    error = capsys.readouterr().err
    assert re.fullmatch("\ntraining.py: .*", error.rstrip("\n"))  # on a line of its own, after the terminal's ^C
    assert error.endswith(f"python training.py --resume {tmp_path / 'run'}\n")
    assert last_checkpoint(tmp_path / "run")["epoch"] == 1
    assert len(rundir.read_metrics(tmp_path / "run" / "seed-42" / "fold-1")) == 2
    assert handlers == [signal.SIG_DFL] * 2, "a second signal ends the process at once"
    assert signal.getsignal(signum) == before


def test_a_signal_that_is_ignored_stays_ignored(pristine_root, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "row_text", lambda row: os.kill(os.getpid(), signal.SIGINT) or "")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run("--data", pristine_root, "--run-dir", tmp_path / "run", "--epochs", 1)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_before_there_is_a_run_says_so(pristine_root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dsets, "ESC50", lambda *arguments, **options: os.kill(os.getpid(), signal.SIGINT))
    run("--data", pristine_root, "--run-dir", tmp_path / "run", status=130)
    error = capsys.readouterr().err
    assert error.count("\n") == 2 and "--resume" not in error and not (tmp_path / "run").exists()
