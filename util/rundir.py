"""A run's folder: run.json, joining a run, locks, and what a run was run on. Imports no torch by itself.

    run.json             flags, command line, git commit, versions, hardware, fingerprint of the data
    seed-S/fold-K/       one training, complete in itself; all its other files but best.pt follow from last.pt
    summary.json         the finished trainings, their mean and standard deviation

Every file but TensorBoard's events (--resume writes those again) is there whole or not at all, whatever kills the program.
"""
import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import filelock

from util.errors import UserError, as_argument, check_regular_file, check_types, flag_name, reason, write_atomically

LIBRARIES = ("torch", "torchaudio", "numpy", "scikit-learn", "pandas", "av", "soxr")
RUN_CONFIG_TYPES = {"flags": dict, "features": dict, "versions": dict, "git": dict, "hardware": dict, "hardware.threads": int,
                    "hardware.world_size": int, "data": dict, "data.fingerprint": str, "sessions": list,
                    "flags.seed": list, "flags.fold": list, "flags.epochs": int}
ROW_TYPES = {"seed": int, "fold": (int, str), "epoch": int, "phase": str, "loss": float, "accuracy": float, "precision": float,
             "recall": float, "f1": float, "seconds": float}


def environment(world_size: int) -> dict:
    """Versions, hardware and code of this process, for run.json. world_size: the number of processes."""
    import torch
    hardware = {"system": platform.platform(), "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
                "instructions": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(),
                "threads": torch.get_num_threads(), "world_size": world_size,
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in LIBRARIES}}
    changes = git("status", "-s")
    commit = {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}
    return {"versions": versions, "hardware": hardware, "git": commit}


def git(*arguments: str) -> str | None:
    """What git says of this program's folder, or None without git or outside a repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


def read_json(path: Path, types: dict[str, type], remedy: str, lines: bool = False) -> list[dict]:
    """The object in a JSON file of this program, or those in its lines. Raises UserError if there is none or it is damaged."""
    check_regular_file(path)
    number, objects = 0, []
    try:
        text = path.read_text(encoding="utf-8")
        for number, part in enumerate(text.splitlines() if lines else [text], start=1):
            objects.append(json.loads(part))
            check_types(objects[-1], types)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        place = f"object {number}: " if lines else ""
        raise UserError(f"{path}: is damaged ({place}{reason(error)}); {remedy}") from error
    return objects


def read_run_config(run_dir: Path) -> dict:
    """run.json of a run's folder. Raises UserError if there is none or it is damaged."""
    if not (run_dir / "run.json").exists():
        raise UserError(f"{run_dir / 'run.json'}: no such file; name a run's folder, as training.py prints it first")
    return read_json(run_dir / "run.json", RUN_CONFIG_TYPES, "restore it, or start a new run")[0]


def record_run(run_dir: Path, run_config: dict, may_differ: set[str], resume: bool) -> None:
    """Write run.json of a new run; or add further seeds, folds and epochs, and a session, to the run that is there.

    Raises UserError if that run has other flags (those in `may_differ` aside), features, data or versions, or, unless it is
    to be resumed, has already begun one of these trainings.
    """
    flags = run_config["flags"]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: cannot be made ({error.strerror}); name another folder") from error
    with lock(run_dir):  # other commands may join at the same moment
        begun = [(seed, fold) for seed in flags["seed"] for fold in flags["fold"] if training_dir(run_dir, seed, fold).exists()]
        if begun and not resume:
            raise UserError(f"--run-dir {run_dir}: (seed, fold) {begun[0]} has already begun there; continue it with --resume "
                            f"{as_argument(run_dir)}, or name another folder")
        if (run_dir / "run.json").exists():
            there = read_run_config(run_dir)
            compared = flags.keys() - may_differ - {"seed", "fold", *(["epochs"] if resume else [])}
            then, now = ({flag_name(name): each.get(name) for name in compared} for each in (there["flags"], flags))
            check_same(f"--run-dir {run_dir}: the run there has other flags; use the same, or another folder", then, now)
            check_same_run(run_dir, there, run_config)
            run_config = with_session(there, run_config)
        write_json(run_dir / "run.json", run_config)


def with_session(run_config: dict, now: dict) -> dict:
    """A run_config with the seeds, folds and epochs of another command, and what that command runs on."""
    flags = {name: sorted({*run_config["flags"][name], *now["flags"][name]}, key=lambda value: (value == "none", value))
             for name in ("seed", "fold")}
    session = {name: now[name] for name in ("started", "command", "hardware", "git")}
    session["hardware"] = now["hardware"] | {"threads": run_config["hardware"]["threads"]}  # it uses as many
    flags |= {name: now["flags"][name] for name in ("epochs", "data")}  # the data may have moved
    return {**run_config, "flags": run_config["flags"] | flags, "sessions": [*run_config["sessions"], session]}


def check_same_data(run_dir: Path, then: dict, now: dict) -> None:
    if now["data"]["fingerprint"] != then["data"]["fingerprint"]:
        raise UserError(f"--data {now['flags']['data']}: is not the data that the run in {run_dir} began with (its fingerprint "
                        f"differs); name the right folder with --data")


def check_same_run(run_dir: Path, then: dict, now: dict) -> None:
    """Raise UserError where a run cannot go on to the same figures: other processes, features, versions or data."""
    sizes = [{"processes": run_config["hardware"]["world_size"]} for run_config in (then, now)]
    versions = [run_config["versions"] | {"python": ""} for run_config in (then, now)]  # another Python may continue
    check_same(f"{run_dir}: cannot continue here; launch the same number (torchrun --nproc-per-node), or start a new run", *sizes)
    check_same(f"{run_dir}: has other features; use the same, or start a new run", then["features"], now["features"])
    check_same(f"{run_dir}: cannot continue here; install the former, or start a new run", *versions)
    check_same_data(run_dir, then, now)
    if now["pretrained"] and now["pretrained"] != then.get("pretrained"):  # None: it is gone, and not needed any more
        raise UserError(f"--pretrained {now['flags']['pretrained']}: is another file than the run in {run_dir} began with (its "
                        f"SHA-256 differs); restore it, or start a new run")


def check_same(message: str, then: dict, now: dict) -> None:
    """Raise UserError that names the entries that differ, if any does."""
    differing = [f"{key} {then.get(key)}, here {now.get(key)}" for key in sorted(now.keys() | then.keys())
                 if then.get(key) != now.get(key)]
    if differing:
        raise UserError(f"{message} ({'; '.join(differing)})")


def new_run_dir(tb_prefix: str, comment: str) -> Path:
    """A new folder runs/<tb-prefix>/<time>_<comment>; a number is added if that name is taken. UserError if none can be made."""
    parent, name = Path("runs", tb_prefix), time.strftime("%Y-%m-%d_%H.%M.%S") + (f"_{comment}" if comment else "")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for attempt in itertools.count():
            run_dir = parent / (f"{name}-{attempt}" if attempt else name)
            with contextlib.suppress(FileExistsError):
                run_dir.mkdir()
                return run_dir
    except OSError as error:
        raise UserError(f"{parent}: cannot be made, or holds no new folder ({error.strerror}); name another one with "
                        f"--run-dir") from error


def training_dir(run_dir: Path, seed: int, fold: int | str) -> Path:
    return run_dir / f"seed-{seed}" / f"fold-{fold}"


@contextlib.contextmanager
def lock(folder: Path, timeout: float = -1):
    """Hold a folder's lock file, waiting for at most `timeout` s (-1: for ever); UserError where that cannot be done."""
    held = filelock.FileLock(folder / "lock", timeout=timeout)
    try:
        held.acquire()
    except (NotImplementedError, OSError) as error:
        if isinstance(error, filelock.Timeout):
            raise
        raise UserError(f"{folder}: cannot be locked ({reason(error)}); make it writable, or name another folder") from error
    try:
        yield
    finally:
        held.release()


@contextlib.contextmanager
def lock_training(folder: Path):
    """Hold the training in `folder`, at most until the process dies; UserError if another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock(folder, timeout=0):
            remove_parts(folder)
            yield
    except filelock.Timeout:
        raise UserError(f"{folder}: another process runs this training; wait for it, or take another --seed or --fold") from None


def remove_parts(folder: Path) -> None:
    """Remove the temporary files that a killed process left."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


def write_metrics(folder: Path, history: list[dict]) -> None:
    """metrics.jsonl: an object an epoch and phase."""
    write_atomically(folder / "metrics.jsonl", lambda part: part.write_text("".join(json.dumps(row) + "\n" for row in history)))


def read_metrics(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl; none if there is no file. Raises UserError if it is damaged."""
    path = folder / "metrics.jsonl"
    remedy = "remove it, and --resume writes it again from last.pt"
    return read_json(path, ROW_TYPES, remedy, lines=True) if path.exists() else []


def is_finished(folder: Path, epochs: int) -> bool:
    """Whether a training has done its last epoch and written all its files."""
    rows, last_file = (epochs, "curves.png") if folder.name == "fold-none" else (2 * epochs, "report.csv")
    return len(read_metrics(folder)) == rows and (folder / last_file).exists()
