"""Does a run survive being killed? Short two-fold trainings, killed with SIGKILL at random moments and resumed.

    python benchmarks/survive.py [--runs 100] [--kills 3] [--seed 0]

Every run is killed up to --kills times, each time at a moment drawn uniformly from the next half of a run's length,
resumed until it is done, and compared with a run that was never killed: weights, metrics (times aside), summary. Odd
runs in bf16, even ones in fp32. Exit status 1 if an epoch was lost or a bit differs. Needs fork (Linux, macOS): a process
that has imported everything already is killed in the program itself, not in its imports.
"""
import argparse
import importlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dsets
import training
from util import checkpoint as checkpoints
from util import report, rundir
from util.tables import COLUMNS

for name in ("matplotlib.backends.backend_agg", "sklearn.metrics", "torch._dynamo", "torch.utils.tensorboard", "torchaudio"):
    importlib.import_module(name)  # what training.py imports when it is used

FLAGS = ["--device", "cpu", "--fold", "1", "2", "--epochs", "3", "--views", "2", "--batch-size", "4"]


def write_small_root(root: Path) -> None:
    """16 clips of noise: 4 classes, 2 folds, 2 clips each."""
    for folder in ("audio", "meta"):
        (root / folder).mkdir(parents=True)
    rows = [(f"{fold}-{take}-A-{target}.wav", fold, target, f"noise_{target}", False)
            for fold in (1, 2) for target in range(4) for take in (0, 1)]
    for number, row in enumerate(rows):
        samples = np.random.default_rng(number).uniform(-1, 1, dsets.CLIP_SAMPLES) * 0.1 * (row[2] + 1)
        soundfile.write(root / "audio" / row[0], samples, dsets.SAMPLE_RATE, subtype="PCM_16")
    pd.DataFrame(rows, columns=COLUMNS).to_csv(root / "meta" / "esc50.csv", index=False)


def start(log: Path, function, *arguments) -> int:
    """Run function(*arguments) in a forked process, its output into `log`; the process id.

    The parent itself computes nothing with torch: OpenMP's threads do not survive a fork.
    """
    pid = os.fork()
    if pid == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = 1
        try:
            status = function(*arguments)
            sys.stdout.flush()
        finally:
            os._exit(status)
    return pid


def wait(pid: int, seconds: float = float("inf")) -> int | None:
    """The exit status of a process, or None if it still runs after that many seconds."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def lost_epochs(run_dir: Path, log: Path) -> int:
    """How many epochs the log reports as done that the checkpoints do not hold."""
    lost, folder, epoch = 0, None, 0
    for line in [*log.read_text().splitlines(), "seed 0 fold 0:"]:
        if training_line := re.match(r"seed (\d+) fold (\d+):", line):
            if folder and epoch:
                lost += max(0, epoch - checkpoints.load_checkpoint(folder / "last.pt")["epoch"])
            folder, epoch = rundir.training_dir(run_dir, int(training_line[1]), int(training_line[2])), 0
        elif epoch_line := re.match(r" +(\d+)/\d+ +\|", line):
            epoch = int(epoch_line[1])
    return lost


def compare(reference: Path, run_dir: Path) -> int:
    """0 if weights, metrics and summary are the same to the last bit, else 1."""
    lines = report.compare_runs(reference, run_dir)
    same = len(lines) == 1 and lines[0].startswith("identical to the last bit")
    return 0 if same and (reference / "summary.json").read_bytes() == (run_dir / "summary.json").read_bytes() else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--kills", type=int, default=3, help="kills a run, at most (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (default 0)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    counts = {"runs": 0, "kills": 0, "resumes": 0, "epochs lost": 0, "runs that differ": 0}
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        write_small_root(base / "root")
        references, seconds = {}, {}
        for precision in ("fp32", "bf16"):
            references[precision] = base / f"reference-{precision}"
            begin = time.perf_counter()
            status = wait(start(base / "log", training.main, ["--data", str(base / "root"), "--precision", precision,
                                                              "--run-dir", str(references[precision]), *FLAGS]))
            assert status == 0, (base / "log").read_text()
            seconds[precision] = time.perf_counter() - begin
        for number in range(args.runs):
            precision = ("fp32", "bf16")[number % 2]
            run_dir, log = base / f"run-{number}", base / "log"
            if rng.random() < 0.2:  # now and then the features are computed anew, and that is interrupted too
                for path in (base / "root" / "features").iterdir():
                    path.unlink()
            begun, kills, status = False, 0, None
            while status != 0:
                flags = ["--resume", str(run_dir)] if begun else [
                    "--data", str(base / "root"), "--precision", precision, "--run-dir", str(run_dir), *FLAGS]
                pid = start(log, training.main, flags)
                counts["resumes"] += begun
                status = wait(pid, rng.uniform(0, seconds[precision] / 2)) if kills < args.kills else wait(pid)
                if status is None:
                    os.kill(pid, signal.SIGKILL)
                    wait(pid)
                    kills += 1
                elif status != 0:
                    raise SystemExit(f"run {number} cannot be resumed, status {status}: {log.read_text()}")
                counts["epochs lost"] += lost_epochs(run_dir, log)
                begun = (run_dir / "run.json").exists()
            counts["runs"] += 1
            counts["kills"] += kills
            counts["runs that differ"] += wait(start(log, compare, references[precision], run_dir)) != 0
            if sys.stderr.isatty():
                print(f"\r{counts}", end="", file=sys.stderr, flush=True)
    print(json.dumps(counts))
    return 1 if counts["epochs lost"] or counts["runs that differ"] else 0


if __name__ == "__main__":
    sys.exit(main())
