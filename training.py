"""Teach a convolutional network to recognise environmental sounds (ESC-50) and report how well it does.

    python training.py --demo        synthetic sounds, nothing to fetch
    python training.py --download    fetch ESC-50 (600 MB), then train on it
    python training.py --fold all    cross-validation
    python training.py --help        every flag and its default
"""
import contextlib
import math
import os
import reprlib
import shlex
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # importing torch takes seconds: an interrupt then ends without a word, nothing is begun yet
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from util import config as cli
import dsets
from util import device as machine
import models
from util import optim
from util import report as plots
from util import download as roots
from util import rundir as runs
from util.dist import Ranks, end, is_lost_rank, launcher
from util.cache import UserError, first_line, one_line


class Interrupted(KeyboardInterrupt):
    """The first Ctrl-C or SIGTERM. Nothing half-done needs saving: every epoch ends with a whole checkpoint."""

    def __init__(self, signum: int):
        self.signum = signum


def interrupt(signum, frame):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    raise Interrupted(signum)


# --- what the machine and the data have --------------------------------------------------------------------------------

def choose_folds(wanted: list, folds: list[int]) -> list[int]:
    """The folds that --fold names. Raises UserError for one that the data has not."""
    if wanted == ["all"]:
        return folds
    for fold in wanted:
        if str(fold) not in map(str, folds):
            raise UserError(f"--fold {fold}: expected all alone, or some of {' '.join(map(str, folds))}, the folds of the data")
    return list(dict.fromkeys(int(fold) for fold in wanted))  # each once, in the order given


# --- one epoch --------------------------------------------------------------------------------------------------------

def train_epoch(model, optimizer, batches, steps: int, precision: str, ranks: Ranks, *, label_smoothing: float = 0.0,
                rates: list[float] | None = None, average: optim.WeightAverage | None = None):
    """One pass of weight updates. Returns losses (N,), predictions (N,) and targets (N,) of its examples, on the CPU.

    rates: the learning rate of each step, or None to leave it; average: to be kept up with the weights. The results are of
    the pass itself: each batch as the weights were before its step. Nothing waits for the device before the end of the
    epoch.
    """
    model.train()
    results = []
    for step, batch in enumerate(tqdm(batches, "training", steps, leave=False, disable=ranks.rank > 0 or None,
                                      unit=" steps")):
        if rates:
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
        losses, predictions = forward(model, batch.examples, batch.targets, precision, batch.shares, batch.others,
                                      label_smoothing)
        count = len(batch.positions)
        # gradients are averaged over ranks: so many times its part of the batch is what a rank's mean weighs
        (losses.mean() * (count * ranks.size / batch.size)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average:
            average.update()
        results.append((losses.detach()[:count], predictions[:count], batch.targets[:count], batch.positions))
    return gather(results, ranks)


@torch.inference_mode()
def validate(model, batches, precision: str, ranks: Ranks):
    """Losses (N,), predictions (N,) and targets (N,) of a validation set, on the CPU; no weight changes."""
    model.eval()
    return gather([(*forward(model, examples, targets, precision), targets, positions)
                   for examples, targets, positions in batches], ranks)


def forward(model, examples, targets, precision: str, shares=None, others=None, label_smoothing: float = 0.0):
    """Cross-entropy loss (B,) and predicted class (B,) of examples (B, 1, 100, 384).

    Of several crops of each example (crops * B, 1, 100, 384) the logits are averaged. shares, others (B,): `dsets.Batch`.
    """
    examples = examples.contiguous(memory_format=torch.channels_last)
    with torch.autocast(examples.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits = model(examples)  # -> (B, classes)
    logits = logits.float()
    if len(logits) > len(targets):
        logits = logits.unflatten(0, (-1, len(targets))).mean(dim=0)  # (crops * B, classes) -> (B, classes)
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    if shares is not None:
        losses = shares * losses + (1 - shares) * F.cross_entropy(logits, others, reduction="none",
                                                                 label_smoothing=label_smoothing)
    return losses, logits.detach().argmax(dim=1)


def gather(results: list[tuple], ranks: Ranks):
    """Losses, predictions and targets (N,) of all ranks' results, each a batch's columns and, last, their positions."""
    if results:
        *columns, positions = (torch.cat(column).cpu() for column in zip(*results))
        rows = torch.stack([column.double() for column in columns], dim=1)  # (n, 3); exact: class indices are small
    else:  # fewer batches than ranks
        rows, positions = torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    losses, predictions, targets = ranks.collect(rows, positions).unbind(dim=1)
    return losses.float(), predictions.long(), targets.long()


def compute_metrics(losses: torch.Tensor, predictions: torch.Tensor, targets: torch.Tensor) -> dict:
    """Mean loss, accuracy, and macro precision, recall and F1 in [0, 1], over the whole set at once (scikit-learn)."""
    precision, recall, f1, _ = precision_recall_fscore_support(targets, predictions, average="macro", zero_division=0)
    return {"loss": losses.double().mean().item(), "accuracy": float(accuracy_score(targets, predictions)),
            "precision": float(precision), "recall": float(recall), "f1": float(f1)}


# --- one training -----------------------------------------------------------------------------------------------------

def train(folder: Path, dataset: dsets.ESC50, flags: dict, seed: int, fold: int, precision: str, ranks: Ranks) -> None:
    """Train one seed and fold in `folder`, from its last checkpoint if there is one, to the last epoch; rank 0 writes.

    Raises UserError if the loss stops being finite.
    """
    training, validation = dataset.split(fold)
    statistics = dataset.statistics(training)
    constants = {"model_name": flags["model"], "classes": dataset.classes, "seed": seed, "fold": fold, "flags": flags,
                 "features": dsets.FEATURES, "normalisation": {"mean": statistics[0], "std": statistics[1]},
                 "versions": runs.environment()["versions"], "precision": precision}
    resumed = (folder / "last.pt").exists()
    model = start_model(flags | ({"pretrained": None} if resumed else {}), len(dataset.classes), seed, fold)
    model = model.to(ranks.device, memory_format=torch.channels_last)
    network = ranks.together(model)
    network = machine.compile_network(network) if flags["compile"] else network
    optimizer = optim.OPTIMIZERS[flags["optimizer"]](model.parameters(), flags["lr"], weight_decay=flags["weight_decay"], fused=True)
    examples_per_epoch = len(training) * flags["views"]
    steps = math.ceil(examples_per_epoch / flags["batch_size"])
    average = optim.WeightAverage(model, flags["average"]) if flags["average"] else None
    judged = average.model if average else model  # what is validated, kept and predicts
    state = {"epoch": 0, "history": [], "best": None, "predictions": None}
    if resumed:
        checkpoint = load_last(folder / "last.pt", constants, len(validation))
        state = {name: checkpoint[name] for name in state}
        try:
            judged.load_state_dict(checkpoint["model"])
            if average:
                model.load_state_dict(checkpoint["trained_model"])
                average.updates = steps * state["epoch"]
            optim.load_state(optimizer, checkpoint["optimizer"])
        except (RuntimeError, ValueError) as error:  # what load_state_dict misses stands in its last line
            raise UserError(f"{folder / 'last.pt'}: does not fit {flags['model']} ({str(error).splitlines()[-1].strip()[:300]}); "
                            f"remove it, and --resume begins this training anew") from error
    print(f"\nseed {seed} fold {fold}: {len(training)} training clips x {flags['views']} views, {len(validation)} "
          f"validation clips, normalised by mean {statistics[0]:.2f} dB, deviation {statistics[1]:.2f} dB"
          + (f"; going on after epoch {state['epoch']}" if state["epoch"] else ""))
    print(f"{'epoch':>9} | {ROW_HEAD.format('training')} examples/s | {ROW_HEAD.format('validation')}", flush=True)

    with open_board(folder) if ranks.rank == 0 else contextlib.nullcontext() as board:
        if ranks.rank == 0:
            board.add_figure("augmented examples", first_examples(dataset, training, statistics, flags, seed, fold), 0)
            board.flush()  # nothing is left for the board's own thread to write while weights are saved
            for row in state["history"]:  # an interrupted run's events are written anew
                add_scalars(board, row, flags, steps, examples_per_epoch)
        for epoch in range(state["epoch"] + 1, flags["epochs"] + 1):
            batches = dsets.training_batches(
                dataset, training, statistics, views=flags["views"], batch_size=flags["batch_size"], seed=seed, fold=fold,
                epoch=epoch, device=ranks.device, rank=ranks.rank, ranks=ranks.size,
                **{name: flags[name] for name in cli.AUGMENTATIONS})
            begin = time.perf_counter()
            losses, predictions, targets = train_epoch(
                network, optimizer, batches, steps, precision, ranks, label_smoothing=flags["label_smoothing"],
                rates=optim.learning_rates(flags, epoch, steps), average=average)
            seconds = time.perf_counter() - begin
            refuse_not_finite(losses, "step", folder, epoch, flags)
            train_row = {"seed": seed, "fold": fold, "epoch": epoch, "phase": "training",
                         **compute_metrics(losses, predictions, targets), "seconds": round(seconds, 3)}

            batches = dsets.validation_batches(dataset, validation, statistics, batch_size=flags["batch_size"],
                                               device=ranks.device, crops=flags["crops"], rank=ranks.rank,
                                               ranks=ranks.size)
            ranks.take_statistics(judged)
            begin = time.perf_counter()
            losses, predictions, targets = validate(judged if average else network, batches, precision, ranks)
            refuse_not_finite(losses, "validation batch", folder, epoch, flags)
            row = {"seed": seed, "fold": fold, "epoch": epoch, "phase": "validation",
                   **compute_metrics(losses, predictions, targets), "seconds": round(time.perf_counter() - begin, 3)}
            if ranks.rank > 0:
                continue

            is_best = state["best"] is None or row["loss"] < state["best"]["loss"]
            state = {"epoch": epoch, "history": [*state["history"], train_row, row], "predictions": predictions,
                     "best": row if is_best else state["best"]}
            checkpoint = {"model": judged.state_dict(), **state, **constants}
            if is_best:
                runs.save_checkpoint(folder / "best.pt", checkpoint)
            to_go_on = {"optimizer": optimizer.state_dict()} | ({"trained_model": model.state_dict()} if average else {})
            runs.save_checkpoint(folder / "last.pt", {**checkpoint, **to_go_on})
            runs.write_metrics(folder, state["history"])
            add_scalars(board, train_row, flags, steps, examples_per_epoch)
            add_scalars(board, row, flags, steps, examples_per_epoch)
            print(f"{epoch:>4}/{flags['epochs']:<4} | {row_text(train_row)} {examples_per_epoch / seconds:>10.0f} | "
                  f"{row_text(row)}", flush=True)
        if ranks.rank > 0:
            return
        runs.write_metrics(folder, state["history"])
        results = dataset.targets[validation], state["predictions"], dataset.classes
        confusion = runs.write_pictures(folder, state["history"], *results)
        board.add_figure("confusion", confusion, flags["epochs"] * examples_per_epoch)
        board.add_hparams({name: value if isinstance(value, (int, float)) else str(value) for name, value in
                           {**flags, "seed": seed, "fold": fold, "precision": precision}.items()},
                          {f"final/{metric}": state["history"][-1][metric] for metric in runs.METRICS}, run_name=".")
        board.flush()
        runs.write_report(folder, *results)  # the last file of a finished training


def open_board(folder: Path) -> SummaryWriter:
    """TensorBoard's writer of a training that begins or goes on: what it wrote before, and report.csv, are gone."""
    (folder / "report.csv").unlink(missing_ok=True)  # it would say that the training is finished
    for stale in folder.glob("events.out.tfevents.*"):
        stale.unlink()
    return SummaryWriter(str(folder))


def load_last(path: Path, constants: dict, num_clips: int) -> dict:
    """The checkpoint to go on from. constants: of this training's checkpoints. Raises UserError if it is not one of them."""
    flags = constants["flags"]
    try:
        checkpoint = runs.load_checkpoint(path)
        if checkpoint["epoch"] > flags["epochs"]:
            raise UserError(f"{path}: is of epoch {checkpoint['epoch']}, the run has {flags['epochs']}")
        for part in ("optimizer", *(["trained_model"] if flags["average"] else [])):
            if part not in checkpoint:
                raise UserError(f"{path}: holds no {part}, which a training needs to go on")
        if len(checkpoint["predictions"]) != num_clips:
            raise UserError(f"{path}: predicts {len(checkpoint['predictions'])} clips, the fold has {num_clips}")
        own = ("seed", "fold", "precision", "model_name", "classes", "features")
        now, then = ({**cli.OFF, **one["flags"], **{name: one[name] for name in own}} for one in (constants, checkpoint))
        for name in sorted(now.keys() - cli.WHERE_ONLY - {"epochs"}):
            if now[name] != then.get(name):
                raise UserError(f"{path}: was trained with {name} {reprlib.repr(then.get(name))}, the run has "
                                f"{reprlib.repr(now[name])}; if run.json was changed, put it right there")
    except UserError as error:
        raise UserError(f"{error}; remove it, and --resume begins this training anew") from error
    return checkpoint


def start_model(flags: dict, num_classes: int, seed: int, fold: int) -> torch.nn.Module:
    """The network with the weights that (seed, fold) give, or pretrained ones beneath a head that they give."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(dsets.generator_for(seed, fold, 0, "weights").initial_seed())
        model = models.build_model(flags["model"], num_classes)
    if flags["pretrained"]:
        try:
            models.load_pretrained(model, flags["pretrained"])
        except ValueError as error:
            raise UserError(str(error)) from error
    return model


def refuse_not_finite(losses: torch.Tensor, step_name: str, folder: Path, epoch: int, flags: dict) -> None:
    """Raise UserError if a loss (N,) of an epoch is not finite; nothing of the epoch is saved then."""
    if not losses.isfinite().all():
        step = int((~losses.isfinite()).nonzero()[0]) // flags["batch_size"] + 1
        good = f"{folder / 'last.pt'} (epoch {epoch - 1})" if epoch > 1 else "none yet"
        raise UserError(f"--lr {flags['lr']:g}: the loss is not finite in epoch {epoch}, {step_name} {step} of {folder}; "
                        f"last good checkpoint: {good}; start a new run with a lower --lr")


ROW_HEAD = "{:>10}: loss  acc%  prec%   rec%    F1%      s"


def row_text(row: dict) -> str:
    """The columns under ROW_HEAD."""
    return (f"{row['loss']:>16.4f} {100 * row['accuracy']:>5.1f} {100 * row['precision']:>6.1f} "
            f"{100 * row['recall']:>6.1f} {100 * row['f1']:>6.1f} {row['seconds']:>6.1f}")


def add_scalars(board: SummaryWriter, row: dict, flags: dict, steps: int, examples_per_epoch: int) -> None:
    """A row's metrics over the number of examples seen, as the write-up plotted them; the learning rate of the last step."""
    seen = row["epoch"] * examples_per_epoch
    for metric in runs.METRICS:
        board.add_scalar(f"{metric}/{row['phase']}", row[metric], seen)
    if row["phase"] == "training":
        rates = optim.learning_rates(flags, row["epoch"], steps)
        board.add_scalar("learning rate", rates[-1] if rates else flags["lr"], seen)
        board.add_scalar("examples per s", examples_per_epoch / max(row["seconds"], 1e-3), seen)
    board.flush()


def first_examples(dataset: dsets.ESC50, training: torch.Tensor, statistics: tuple[float, float], flags: dict, seed: int,
                   fold: int):
    """A picture of the first examples of the first epoch (with --mix: of other partners, as the batch is smaller)."""
    batch = next(dsets.training_batches(
        dataset, training, statistics, views=flags["views"], batch_size=min(8, flags["batch_size"]), seed=seed, fold=fold,
        epoch=1, device=torch.device("cpu"), **{name: flags[name] for name in cli.AUGMENTATIONS}))
    return plots.examples_figure(batch.examples.numpy(), [dataset.classes[target] for target in batch.targets])


# --- the command ------------------------------------------------------------------------------------------------------

def run(argv: list[str], ranks: Ranks, progress: dict) -> None:
    """Everything the command does. progress["run_dir"] is set once there is a run that --resume can go on with."""
    flags, given = cli.parse_flags(argv)
    again = given.get("resume") or given.get("rerun")
    recorded = runs.read_run(Path(again)) if again else None
    old = recorded if "resume" in given else None
    progress["run_dir"] = Path(again) if old else None
    device = machine.choose_device(old["device"] if old else flags["device"])
    precision = old["precision"] if old else machine.choose_precision(flags["precision"], device)
    ranks.meet(device)
    if old and old["hardware"]["ranks"] != ranks.size:
        raise UserError(f"--resume {again}: was begun with {old['hardware']['ranks']} processes, here are {ranks.size}; "
                        f"launch as many again (torchrun --nproc-per-node), or start a new run")
    machine.make_deterministic()
    machine.keep_freed_memory()
    if recorded:
        torch.set_num_threads(recorded["hardware"]["threads"])  # before this process describes itself

    root = Path(flags["data"])
    with ranks.rank_0_first():
        if flags["demo"] and ranks.rank == 0:
            roots.write_demo(root)
        if flags["download"] and ranks.rank == 0:
            roots.download(root)
        dataset = dsets.ESC50(root, esc10=flags["esc10"])  # rank 0 computes the features, the others find them
    flags["fold"] = choose_folds(flags["fold"], dataset.folds)
    for fold in flags["fold"]:
        dataset.split(fold)  # refuses an empty side before anything is trained
    begun = begin_run(argv, flags, old, again, device, precision, dataset, ranks) if ranks.rank == 0 else ""
    progress["run_dir"] = run_dir = Path(ranks.agree(str(begun)))
    record = runs.read_run(run_dir)
    torch.set_num_threads(record["hardware"]["threads"])  # sums are split by thread: as many as the run began with
    with torch.device("meta"):  # shapes alone
        parameters = sum(p.numel() for p in models.build_model(flags["model"], len(dataset.classes)).parameters())
    print(f"run    {run_dir / 'run.json'}\ndata   {dataset}\nmodel  {flags['model']}, {parameters:,} parameters, {precision} "
          f"on {device}, processes: {ranks.size}, threads of each: {torch.get_num_threads()}", flush=True)
    if device.type == "cuda" and dataset.features.nbytes < torch.cuda.mem_get_info()[0] / 2:
        dataset.features = dataset.features.to(ranks.device)  # else they stay on disk, and crops of them are copied

    for seed in flags["seed"]:
        for fold in flags["fold"]:
            folder = runs.training_dir(run_dir, seed, fold)
            finished = runs.is_finished(folder, flags["epochs"])
            ranks.wait()  # all have looked before one of them writes
            if finished:
                continue
            with runs.locked(folder) if ranks.rank == 0 else contextlib.nullcontext():
                train(folder, dataset, flags, seed, fold, precision, ranks)
            if ranks.rank == 0:
                runs.update_summary(run_dir, flags["epochs"])
    if ranks.rank > 0:
        return
    summary = runs.update_summary(run_dir, flags["epochs"])
    targets = {fold: dataset.targets[dataset.split(fold)[1]] for fold in dataset.folds}
    runs.write_overall(run_dir, summary["trainings"], targets, dataset.classes)
    print(f"\n{runs.summary_table(summary)}\n\nsummary {run_dir / 'summary.json'}")
    if "rerun" in given:
        print(f"\ncompared with {again}:", *runs.compare_runs(Path(again), run_dir), sep="\n")


def begin_run(argv: list[str], flags: dict, old: dict | None, again: str | None, device: torch.device, precision: str,
              dataset: dsets.ESC50, ranks: Ranks) -> Path:
    """The run's folder, with its run.json. old: the record of a run to go on with, if there is one."""
    environment = runs.environment()
    environment["hardware"]["ranks"] = ranks.size
    record = {"command": ["training.py", *argv], "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "flags": flags,
              "device": str(device), "precision": precision, **environment,
              "data": {"root": str(dataset.root.resolve()), "clips": len(dataset), "classes": dataset.classes,
                       "fingerprint": dataset.fingerprint()}, "went_on": []}  # what --resume or another command ran on
    if old:
        run_dir = Path(again)
        runs.refuse_other_data_or_versions(run_dir, old, record)
        if not all(runs.is_finished(runs.training_dir(run_dir, seed, fold), flags["epochs"])
                   for seed in flags["seed"] for fold in flags["fold"]):  # a look at the table leaves no trace
            runs.grow_run(run_dir, record)
        return run_dir
    if flags["pretrained"]:
        start_model(flags, len(dataset.classes), 0, 0)  # refuses unfit weights before a folder is made
    run_dir = Path(flags["run_dir"]) if flags["run_dir"] else runs.new_run_dir(flags["tb_prefix"], flags["comment"])
    runs.open_run(run_dir, record, may_differ=cli.WHERE_ONLY, off=cli.OFF)
    return run_dir


def remedy(progress: dict) -> str:
    """How to go on after a run was stopped from outside."""
    if not progress.get("run_dir"):
        return "no training was begun, the same command begins anew"
    return f"all whole epochs are saved; go on with: {launcher()} training.py --resume {shlex.quote(str(progress['run_dir']))}"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 2 something the user can mend, 130 or 143 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    ranks, progress, status = None, {}, 2
    try:
        ranks = Ranks()
        if ranks.rank > 0:
            sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
        run(argv, ranks, progress)
        ranks.leave()
        return 0
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # or the exit would stumble over it again
        message = f"output: nobody reads it any more; {remedy(progress)}"
    except OSError as error:
        message = f"{error.filename or 'output'}: {error.strerror or error}; {remedy(progress)}"
    except (torch.OutOfMemoryError, MemoryError):
        message = "--batch-size: the memory does not hold it; choose a smaller one"
    except RuntimeError as error:
        if is_lost_rank(error):
            message = f"torchrun: one of the processes ended before the training did; {remedy(progress)}"
        elif "allocate memory" in str(error):  # how torch's CPU allocator says it
            message = "--batch-size: the memory does not hold it; choose a smaller one"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            message = f"--compile: torch cannot compile here ({first_line(error)}); leave it out"
        else:
            raise
    except Interrupted as interruption:
        message, status = f"interrupted; {remedy(progress)}", 128 + interruption.signum
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if ranks is None or ranks.may_speak():
        print(f"{'' if status == 2 else chr(10)}training.py: {one_line(message)}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    end(main())
