"""A run's folder: what was run on what, checkpoints, metrics and their summary. Knows nothing of models or training.

    run.json             flags, command line, git commit, versions, hardware, fingerprint of the data
    seed-S/fold-K/       one training, complete in itself; last.pt is its truth, all else follows from it
    summary.json         the finished trainings, their mean and standard deviation
    confusion.png ...    of all finished trainings together

Every file (but TensorBoard's events, which --resume writes anew) is written aside and renamed: whatever kills the
program, it is there whole or not at all.
"""
import contextlib
import json
import math
import os
import platform
import reprlib
import statistics
import subprocess
import time
from pathlib import Path

import filelock
import numpy
import pandas
import sklearn
import soundfile
import soxr
import torch
import torchaudio
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from util import report as plots
from util.cache import UserError, check_weights, load_tensors, read_json, write_whole

METRICS = ("accuracy", "precision", "recall", "f1", "loss")
ROW_KEYS = ("seed", "fold", "epoch", "phase", "loss", "accuracy", "precision", "recall", "f1", "seconds")
CHECKPOINT_FORMAT = 1  # raised when the meaning of a checkpoint's keys changes
CHECKPOINT_TYPES = {"format": int, "model": dict, "model_name": str, "classes": list, "features": dict, "normalisation": dict,
                    "flags": dict, "versions": dict, "seed": int, "fold": int, "precision": str, "epoch": int,
                    "history": list, "best": dict, "predictions": torch.Tensor}
MAX_THREADS = 1024  # more cores than a machine has
RECORD_TYPES = {"flags": dict, "flags.seed": list, "flags.fold": list, "device": str, "precision": str, "data.root": str,
                "data.fingerprint": str, "versions": dict, "hardware.threads": int, "git": dict}


# --- run.json ---------------------------------------------------------------------------------------------------------

def environment() -> dict:
    """Versions, hardware and code of this process, for run.json."""
    libraries = {"torch": torch, "torchaudio": torchaudio, "numpy": numpy, "scikit-learn": sklearn, "pandas": pandas,
                 "soundfile": soundfile, "soxr": soxr}
    versions = {"python": platform.python_version(), "libsndfile": soundfile.__libsndfile_version__,
                **{name: str(library.__version__) for name, library in libraries.items()}}
    hardware = {"system": platform.platform(), "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
                "instructions": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
    commit = git("rev-parse", "HEAD")
    return {"versions": versions, "hardware": hardware,
            "git": {"commit": commit, "dirty": bool(git("status", "--porcelain")) if commit else None}}


def git(*arguments: str) -> str | None:
    """What git says of this program's folder, or None without git or outside a repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def new_run_dir(tb_prefix: str, comment: str) -> Path:
    """A fresh folder runs/<tb-prefix>/<time>_<comment>; a number is added if that name is taken."""
    name = time.strftime("%Y-%m-%d_%H.%M.%S") + (f"_{comment}" if comment else "")
    attempt = 0
    while True:
        run_dir = Path("runs") / tb_prefix / (f"{name}-{attempt}" if attempt else name)
        try:
            run_dir.mkdir(parents=True)
            return run_dir
        except FileExistsError:
            attempt += 1
        except OSError as error:
            raise UserError(f"--run-dir: {run_dir} cannot be made ({error.strerror}); name another folder") from error


def write_json(path: Path, content: dict) -> None:
    write_whole(path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n"))


def read_run(run_dir: Path) -> dict:
    """run.json of a run's folder. Raises UserError where the folder is none."""
    path = run_dir / "run.json"
    try:
        record = read_json(path)
    except ValueError as error:
        raise UserError(f"{run_dir}: is not a run's folder: run.json cannot be read ({error})") from error
    remedy = "put it right there, or name the folder of a run that training.py made"
    for names, kind in RECORD_TYPES.items():
        value = record
        for name in names.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{path}: {names} is {reprlib.repr(value)}, expected a {kind.__name__}; {remedy}")
    for name in ("seed", "fold"):
        if any(type(value) is not int for value in record["flags"][name]):
            raise UserError(f"{path}: flags.{name} is {reprlib.repr(record['flags'][name])}, expected whole numbers; {remedy}")
    if record["precision"] not in ("fp32", "bf16") or not 1 <= record["hardware"]["threads"] <= MAX_THREADS:
        raise UserError(f"{path}: precision {reprlib.repr(record['precision'])} and {record['hardware']['threads']} threads; "
                        f"expected fp32 or bf16, and 1 to {MAX_THREADS} threads; {remedy}")
    went_on = record.setdefault("went_on", [])
    if not isinstance(went_on, list) or not all(isinstance(later, dict) and isinstance(later.get("hardware"), dict)
                                                and isinstance(later.get("git"), dict) for later in went_on):
        raise UserError(f"{path}: went_on is {reprlib.repr(went_on)}, expected what later commands ran on; {remedy}")
    ranks = record["hardware"].setdefault("ranks", 1)
    if type(ranks) is not int or ranks < 1:
        raise UserError(f"{path}: hardware.ranks is {reprlib.repr(ranks)}, expected the number of processes; {remedy}")
    return record


def grow_run(run_dir: Path, now: dict) -> None:
    """Write into run.json that a command goes on with the run, perhaps to further epochs. now: the command's record."""
    with filelock.FileLock(run_dir / "lock"):  # other commands may join at the same moment
        grown = grow_record(read_run(run_dir), now)
        grown["flags"]["epochs"] = now["flags"]["epochs"]
        write_json(run_dir / "run.json", grown)


def grow_record(record: dict, now: dict) -> dict:
    """A run's record with the seeds and folds of another command, and what that one runs on."""
    flags = {name: sorted({*record["flags"][name], *now["flags"][name]}) for name in ("seed", "fold")}
    later = {name: now[name] for name in ("started", "command", "hardware", "git")}
    later["hardware"] = now["hardware"] | {"threads": record["hardware"]["threads"]}  # it keeps to them
    return {**record, "flags": record["flags"] | flags, "went_on": [*record["went_on"], later]}


def open_run(run_dir: Path, record: dict, may_differ: set[str], off: dict) -> None:
    """Make run.json of a new run, or join the run already in the folder with further seeds and folds.

    off: the values of flags that an older run.json lacks. Raises UserError if the run there was begun with other flags
    (those in `may_differ` aside), other data or other versions, or if it has begun one of these trainings already.
    """
    flags = record["flags"]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: cannot be made ({error.strerror}); name another folder") from error
    with filelock.FileLock(run_dir / "lock"):  # two commands may join at once
        for seed in flags["seed"]:
            for fold in flags["fold"]:
                if training_dir(run_dir, seed, fold).exists():
                    raise UserError(f"--run-dir {run_dir}: seed {seed} fold {fold} has begun there; go on with "
                                    f"--resume {run_dir}, or name another folder")
        if (run_dir / "run.json").exists():
            there = read_run(run_dir)
            for name in sorted(flags.keys() - may_differ - {"seed", "fold", "device", "precision"}):
                then = there["flags"].get(name, off.get(name))
                if then != flags[name]:
                    raise UserError(f"--{name.replace('_', '-')}: the run in {run_dir} has {then}, here it is "
                                    f"{flags[name]}; use the same flags, or another --run-dir")
            for name in ("device", "precision"):  # what auto became
                if there[name] != record[name]:
                    raise UserError(f"--{name} {record[name]}: the run in {run_dir} has {there[name]}; use the same, or "
                                    f"another --run-dir")
            if there["hardware"]["ranks"] != record["hardware"]["ranks"]:
                raise UserError(f"--run-dir {run_dir}: the run there trains with {there['hardware']['ranks']} "
                                f"processes, here are {record['hardware']['ranks']}; launch as many (torchrun "
                                f"--nproc-per-node), or name another folder")
            refuse_other_data_or_versions(run_dir, there, record)
            record = grow_record(there, record)
        write_json(run_dir / "run.json", record)


def refuse_other_data_or_versions(run_dir: Path, record: dict, now: dict) -> None:
    """Raise UserError where a run cannot go on to the same figures: other data, other versions of the libraries."""
    if now["data"]["fingerprint"] != record["data"]["fingerprint"]:
        raise UserError(f"--data {now['data']['root']}: is not the data that the run in {run_dir} began with (its "
                        f"fingerprint differs); name the right folder with --data")
    for name, version in record["versions"].items():
        if name != "python" and now["versions"].get(name) != version:
            raise UserError(f"{run_dir}: was begun with {name} {version}, here is {now['versions'].get(name)}; install "
                            f"the former, or start a new run")


# --- one training -----------------------------------------------------------------------------------------------------

def training_dir(run_dir: Path, seed: int, fold: int) -> Path:
    return run_dir / f"seed-{seed}" / f"fold-{fold}"


@contextlib.contextmanager
def locked(folder: Path):
    """Hold the training in `folder`; the system lets go when the process dies, however it does.

    Raises UserError if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(folder / "lock")
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{folder}: another process is at this training; wait for it, or take another --seed or "
                        f"--fold") from None
    try:
        for part in folder.glob(".*.part"):  # left by a killed process
            part.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def save_checkpoint(path: Path, content: dict) -> None:
    def write(part: Path) -> None:
        with open(part, "wb") as file:
            try:
                torch.save({"format": CHECKPOINT_FORMAT, **content}, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # torch's zip writer covers the disk's own error
                    raise error.__context__ from None
                raise
    write_whole(path, write)


def load_checkpoint(path: Path) -> dict:
    """A checkpoint that training.py wrote, on the CPU. Raises UserError for any other file; executes nothing in it."""
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    try:
        content = load_tensors(path)
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as a checkpoint ({error})") from error
    if not isinstance(content, dict) or not CHECKPOINT_TYPES.keys() <= content.keys():
        raise UserError(f"{path}: is not a checkpoint of this program")
    if type(content["format"]) is not int or content["format"] != CHECKPOINT_FORMAT:
        raise UserError(f"{path}: has checkpoint format {reprlib.repr(content['format'])}, expected {CHECKPOINT_FORMAT}; "
                        f"use the version of this program that wrote it")
    try:
        check_checkpoint(content)
    except ValueError as error:
        raise UserError(f"{path}: is not a whole checkpoint ({error})") from error
    return content


def check_checkpoint(content: dict) -> None:
    """Raise ValueError, with one line, unless the parts of a checkpoint are what they should be."""
    for name, kind in CHECKPOINT_TYPES.items():
        if not isinstance(content[name], kind):
            raise ValueError(f"{name} is a {type(content[name]).__name__}")
        if kind in (dict, list) and name != "model":
            try:
                json.dumps(content[name])  # fails for tensors in it, and for what holds itself
            except (TypeError, ValueError, RecursionError):
                raise ValueError(f"{name} holds more than plain values") from None
    for name in ("model", "trained_model"):
        if name in content:
            check_weights(content[name])
    classes, predictions = content["classes"], content["predictions"]
    if not classes or not all(isinstance(name, str) for name in classes) or len(set(classes)) < len(classes):
        raise ValueError("classes are not different names")
    mean, std = (content["normalisation"].get(name) for name in ("mean", "std"))
    if not (isinstance(mean, float) and isinstance(std, float) and math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(f"normalisation is not by two finite numbers, but {reprlib.repr(mean)} and {reprlib.repr(std)}")
    if content["precision"] not in ("fp32", "bf16"):
        raise ValueError(f"precision is {reprlib.repr(content['precision'])}, expected fp32 or bf16")
    if content["flags"].get("crops") not in (1, 9):
        raise ValueError(f"flags.crops is {reprlib.repr(content['flags'].get('crops'))}, expected 1 or 9")
    check_weights({"predictions": predictions})
    if predictions.dtype != torch.int64 or predictions.ndim != 1 or not ((0 <= predictions) & (predictions < len(classes))).all():
        raise ValueError("predictions are not indices of classes")
    for index, row in enumerate(content["history"]):
        check_row(row, index, content["seed"], content["fold"])
    if content["best"] not in content["history"]:
        raise ValueError("best is no row of its history")
    if len(content["history"]) != 2 * content["epoch"]:
        raise ValueError(f"epoch is {content['epoch']}, with {len(content['history'])} rows of metrics, expected two an epoch")


def check_row(row, index: int, seed: int, fold: int) -> dict:
    """Row `index` of a training's metrics, if it is that. Raises ValueError with one line otherwise."""
    expected = {"seed": seed, "fold": fold, "epoch": index // 2 + 1, "phase": ("training", "validation")[index % 2]}
    if not isinstance(row, dict) or not set(ROW_KEYS) <= row.keys() or {name: row[name] for name in expected} != expected \
            or not all(type(row[name]) in (int, float) and 0 <= row[name] <= 1 for name in METRICS if name != "loss") \
            or not all(type(row[name]) in (int, float) and 0 <= row[name] < 1e300 for name in ("loss", "seconds")):
        raise ValueError(f"{reprlib.repr(row)} is not row {index + 1} of the metrics of seed {seed} fold {fold}")
    return {name: row[name] for name in ROW_KEYS}


def write_metrics(folder: Path, history: list[dict]) -> None:
    """metrics.jsonl: an object an epoch and phase."""
    text = "".join(json.dumps(row) + "\n" for row in history)
    write_whole(folder / "metrics.jsonl", lambda part: part.write_text(text))


def read_metrics(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl; a last line that is not whole is left out, no file gives no rows.

    Raises UserError for any other line that is not a row.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    seed, fold = (int(name.split("-")[1]) for name in (folder.parent.name, folder.name))  # seed-S/fold-K
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(check_row(json.loads(line), number - 1, seed, fold))
        except (ValueError, RecursionError):
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not this training's row of metrics; remove the file: --resume "
                                f"writes it anew from last.pt") from None
    return rows


def write_pictures(folder: Path, rows: list[dict], targets: torch.Tensor, predictions: torch.Tensor,
                   classes: list[str]) -> Figure:
    """curves.png and confusion.png of one training or of several together; returns the confusion matrix's figure.

    rows: of metrics.jsonl; targets, predictions: class indices (N,) of the validation clips in the last epoch.
    """
    confusion = plots.confusion_figure(confusion_matrix(targets, predictions, labels=range(len(classes))), classes)
    for name, figure in (("confusion.png", confusion), ("curves.png", plots.curves_figure(rows))):
        write_whole(folder / name, lambda part: figure.savefig(part, format="png", dpi=100))
    return confusion


def write_report(folder: Path, targets: torch.Tensor, predictions: torch.Tensor, classes: list[str]) -> None:
    """report.csv, per class. It comes last: a training that has it is finished. Arguments: `write_pictures`."""
    precision, recall, f1, clips = precision_recall_fscore_support(targets, predictions, labels=range(len(classes)),
                                                                   zero_division=0)
    report = pandas.DataFrame({"class": classes, "precision": precision, "recall": recall, "f1": f1, "clips": clips})
    write_whole(folder / "report.csv", lambda part: report.to_csv(part, index=False, float_format="%.4f"))


def write_overall(run_dir: Path, trainings: list[dict], targets: dict[int, torch.Tensor], classes: list[str]) -> None:
    """The same files over all finished trainings, if there are several: mean curves, pooled predictions.

    trainings: of summary.json; targets: class indices (N,) of each fold's validation clips.
    """
    folders = [training_dir(run_dir, training["seed"], training["fold"]) for training in trainings]
    if len(folders) < 2 or not all((folder / "last.pt").exists() for folder in folders):  # some user threw them away
        return
    with filelock.FileLock(run_dir / "lock"):  # one process at a time, as for the summary
        predictions = torch.cat([load_checkpoint(folder / "last.pt")["predictions"] for folder in folders])
        results = torch.cat([targets[training["fold"]] for training in trainings]), predictions, classes
        write_pictures(run_dir, [row for folder in folders for row in read_metrics(folder)], *results)
        write_report(run_dir, *results)


def is_finished(folder: Path, epochs: int) -> bool:
    """Whether a training has done its last epoch and written all its files."""
    return len(read_metrics(folder)) == 2 * epochs and (folder / "report.csv").exists()


# --- the summary ------------------------------------------------------------------------------------------------------

def summarise(run_dir: Path, epochs: int) -> dict:
    """summary.json's content: every training of the folder that has its last epoch, then mean and deviation.

    The standard deviation is the sample's (n - 1), and 0 for one training.
    """
    trainings = []
    for folder in run_dir.glob("seed-*/fold-*"):
        rows = [row for row in read_metrics(folder) if row["phase"] == "validation"]
        if not rows or rows[-1]["epoch"] != epochs:
            continue
        last, best = rows[-1], min(rows, key=lambda row: row["loss"])  # the first of equals
        trainings.append({"seed": last["seed"], "fold": last["fold"], "epochs": epochs,
                          **{metric: last[metric] for metric in METRICS}, "best_epoch": best["epoch"],
                          **{f"best_{metric}": best[metric] for metric in METRICS}})
    trainings.sort(key=lambda training: (training["seed"], training["fold"]))
    columns = {key: [training[key] for training in trainings]
               for key in (*METRICS, *(f"best_{metric}" for metric in METRICS)) if trainings}
    return {"trainings": trainings,
            "mean": {key: statistics.fmean(values) for key, values in columns.items()},
            "std": {key: statistics.stdev(values) if len(values) > 1 else 0.0 for key, values in columns.items()}}


def update_summary(run_dir: Path, epochs: int) -> dict:
    """Write summary.json anew and return it; one process at a time, so that the last one has seen all trainings."""
    with filelock.FileLock(run_dir / "lock"):
        for part in run_dir.glob(".*.part"):  # left by a killed process
            part.unlink(missing_ok=True)
        summary = summarise(run_dir, epochs)
        write_json(run_dir / "summary.json", summary)
    return summary


def summary_table(summary: dict) -> str:
    """The table a run ends with, in %: last epoch of each training, the best epoch beside it, mean +- deviation."""
    head = "".join(f"{name:>15}" for name in ("accuracy", "precision", "recall", "F1"))
    lines = [f"{'seed':>6}{'fold':>6}{head}{'':>6}best epoch: accuracy (chosen on the validation fold, so flattering)"]
    for row in summary["trainings"]:
        figures = "".join(f"{100 * row[metric]:>15.2f}" for metric in METRICS[:4])
        lines.append(f"{row['seed']:>6}{row['fold']:>6}{figures}{row['best_epoch']:>16}: "
                     f"{100 * row['best_accuracy']:.2f}")
    mean, std = summary["mean"], summary["std"]
    if mean:
        figures = "".join(f"{100 * mean[metric]:>8.2f} +-{100 * std[metric]:>4.1f}" for metric in METRICS[:4])
        lines.append(f"{'mean +- std':>12}{figures}{'':>16}  {100 * mean['best_accuracy']:.2f} "
                     f"+- {100 * std['best_accuracy']:.1f}")
    return "\n".join(lines)


# --- rerun ------------------------------------------------------------------------------------------------------------

def compare_runs(run_dir: Path, other_dir: Path) -> list[str]:
    """Lines that say, metric by metric, whether two runs are identical, and if not, what could explain it."""
    lines, identical = [], True
    record, other = read_run(run_dir), read_run(other_dir)
    for name in [Path(f"seed-{seed}") / f"fold-{fold}" for seed in record["flags"]["seed"]
                 for fold in record["flags"]["fold"]]:
        missing = [str(base / name) for base in (run_dir, other_dir) if not (base / name / "last.pt").exists()]
        if missing:
            lines.append(f"{name}: cannot be compared, there is no {' and no '.join(missing)}/last.pt")
            identical = False
            continue
        rows, other_rows = read_metrics(run_dir / name), read_metrics(other_dir / name)
        for metric in METRICS:
            pairs = [(row[metric], other_row[metric]) for row, other_row in zip(rows, other_rows)]
            differing = [i for i, (a, b) in enumerate(pairs) if a != b]
            if differing:
                row = rows[differing[0]]
                lines.append(f"{name} {metric}: differs in {len(differing)} of {len(rows)} rows, first in epoch "
                             f"{row['epoch']} ({row['phase']}): {pairs[differing[0]][0]} then, "
                             f"{pairs[differing[0]][1]} now")
            elif len(rows) != len(other_rows):
                lines.append(f"{name} {metric}: {len(rows)} rows then, {len(other_rows)} now")
            else:
                lines.append(f"{name} {metric}: identical in {len(rows)} rows")
                continue
            identical = False
        weights, other_weights = (load_checkpoint(base / name / "last.pt")["model"] for base in (run_dir, other_dir))
        same = weights.keys() == other_weights.keys() and all(
            torch.equal(tensor, other_weights[key]) for key, tensor in weights.items())
        lines.append(f"{name} weights: {'identical' if same else 'differ'}")
        identical &= same
    if identical:
        return [*lines, "identical to the last bit"]
    changes = [f"{part} {name}: {record[part].get(name)} then, {other[part].get(name)} now"
               for part in ("versions", "hardware", "git", "data") for name in record[part]
               if name != "root" and record[part].get(name) != other[part].get(name)]
    changes += [f"{name}: {record[name]} then, {other[name]} now" for name in ("device", "precision")
                if record[name] != other[name]]
    changes += [f"{part} {name}: {value} ({when}, from {later.get('started')} on)"
                for when, one in (("then", record), ("now", other)) for later in one["went_on"]
                for part in ("hardware", "git") for name, value in later[part].items() if value != one[part].get(name)]
    changes += [f"the code had changes that were not committed ({when})"
                for when, one in (("then", record), ("now", other)) if one["git"].get("dirty")]
    return [*lines, "not identical; what could explain it:", *(changes or ["nothing that was recorded differs"])]
