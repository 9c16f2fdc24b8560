"""Teach a convolutional network to recognize environmental sounds (ESC-50) and report how well it does.

    python training.py --demo        synthetic sounds, nothing to fetch
    python training.py --download    fetch ESC-50 (600 MB), then train on it
    python training.py --fold all    cross-validation
    python training.py --help        every flag and its default
"""
import contextlib
import copy
import functools
import itertools
import math
import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # until there is something to save, an interrupt ends the program without a word
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from util import rundir
from util.config import LOCATION_FLAGS, Config, parse_args
from util.errors import UserError, as_argument, exit_on_error, printable, reason

if "RANK" in os.environ:  # under torchrun, where one of the processes answers a wrong flag (main)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else torch warns of what dist.parallel needs
elif __name__ == "__main__":  # --help and a wrong flag are answered before torch is imported, which takes seconds
    exit_on_error("training.py", parse_args, sys.argv[1:])

import torch
import torch.nn.functional as F
from tqdm import tqdm

import dsets
import models
from util import checkpoint as checkpoints
from util import device as machine
from util import command, dist, report


# --- one epoch --------------------------------------------------------------------------------------------------------

def train_one_epoch(model, optimizer, batches, lrs: list[float], precision: str, *, label_smoothing: float = 0.0,
                    class_weights=None, ema=None, recorder=None):
    """One pass of weight updates. Returns losses (N,), predictions (N,) and targets (N,) of its examples, on the CPU.

    batches: of dsets.training_batches; lrs: the learning rate of each step; class_weights (classes,): of the loss; ema: an
    `EMA` to update; recorder: a `machine.Recorder` of the step. The results are of the pass itself, each batch before its
    step. Nothing waits for the device before the end of the epoch.
    """
    recorder = recorder or machine.Recorder(enabled=False)

    def step(scale, examples, targets, lam=None, other_targets=None):
        losses, logits = forward(model, examples, targets, precision, lam, other_targets, label_smoothing, class_weights)
        (losses.mean() * scale).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return losses.detach(), logits.detach().argmax(dim=1)

    model.train()
    results = []
    for batch, lr in zip(tqdm(batches, "training", len(lrs), leave=False, disable=dist.rank() > 0 or None, unit=" steps"), lrs):
        set_lr(optimizer, lr)
        count = len(batch.positions)
        # gradients are averaged over ranks: a rank's mean weighs world_size times its part of the batch; for one process 1
        scale = count * dist.world_size() / batch.size
        mixed = () if batch.lam is None else (batch.lam, batch.other_targets)
        losses, predictions = recorder(functools.partial(step, scale), batch.examples, batch.targets, *mixed)
        if ema:
            ema.update()
        results.append((losses[:count], predictions[:count], batch.targets[:count], batch.positions))
    return gather(results)


@torch.inference_mode()
def evaluate(model, batches, precision: str):
    """Losses, predictions, targets and the predictions' probabilities, (N,) each, of a validation set, on the CPU."""
    model.eval()
    results = []
    for examples, targets, positions in batches:
        losses, logits = forward(model, examples, targets, precision)
        results.append((losses, logits.argmax(dim=1), targets, logits.softmax(dim=1).amax(dim=1), positions))
    return gather(results, columns=4)


def forward(model, examples, targets, precision: str, lam=None, other_targets=None, label_smoothing: float = 0.0,
            class_weights=None):
    """Cross-entropy losses (B,) and logits (B, classes) of examples (B, 1, 100, 384).

    Of several crops of each example (crops * B, 1, 100, 384) the logits are averaged. lam, other_targets (B,): of mixup,
    see `dsets.Batch`. class_weights (classes,): what the loss of a target of each class is multiplied by.
    """
    logits = models.average_logits(model, examples, len(targets), precision)  # -> (B, classes)

    def cross_entropy(targets):
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)  # -> (B,)
        # F.cross_entropy's own weight would weigh the smoothing's part by each class, and draw all examples to the rarest
        return losses if class_weights is None else class_weights[targets] * losses

    losses = cross_entropy(targets)
    if lam is not None:
        losses = lam * losses + (1 - lam) * cross_entropy(other_targets)
    return losses, logits


def gather(results: list[tuple], columns: int = 3):
    """All ranks' results in their places: columns (N,) of batches, which are losses, predictions, targets ... and positions."""
    if results:
        *parts, positions = (torch.cat(part).cpu() for part in zip(*results))
        rows = torch.stack([part.double() for part in parts], dim=1)  # (n, columns); exact: class indices are small
    else:  # fewer batches than ranks
        rows, positions = torch.zeros(0, columns, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    losses, predictions, targets, *others = dist.all_gather(rows, positions).unbind(dim=1)  # (N, columns) -> (N,) each
    return losses.float(), predictions.long(), targets.long(), *(other.float() for other in others)


def compute_metrics(losses: torch.Tensor, predictions: torch.Tensor, targets: torch.Tensor) -> dict:
    """Mean loss, accuracy, and macro precision, recall and F1 in [0, 1], over the whole set at once (scikit-learn)."""
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support  # here: it takes a second to import
    precision, recall, f1, _ = precision_recall_fscore_support(targets, predictions, average="macro", zero_division=0)
    return {"loss": losses.double().mean().item(), "accuracy": float(accuracy_score(targets, predictions)),
            "precision": float(precision), "recall": float(recall), "f1": float(f1)}


# --- how weights move -------------------------------------------------------------------------------------------------

def lr_at_step(step: int, total_steps: int, lr: float, lr_schedule: str) -> float:
    """The learning rate of a step, counted from 0.

    cosine: a linear warm-up to lr over the first tenth of all steps (Goyal et al., "Accurate, large minibatch SGD", 2017),
    then half a cosine down to 0 (Loshchilov & Hutter, "SGDR", ICLR 2017, without restarts).
    """
    warm_up = max(1, total_steps // 10)
    if lr_schedule == "constant":
        return lr
    if step < warm_up:
        return lr * (step + 1) / warm_up
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (total_steps - warm_up)))


OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def build_optimizer(model: torch.nn.Module, config: Config, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of the flags; on CUDA one that a `machine.Recorder` can record, its learning rate a tensor."""
    options = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if device.type == "cuda":
        options |= {"lr": torch.tensor(config.lr, device=device), "capturable": True}
    return OPTIMIZERS[config.optimizer](model.parameters(), **options)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)  # in place: a recorded step reads it there
        else:
            group["lr"] = lr


class EMA:
    """An exponential moving average of a model's weights and batch statistics, in `model`, for evaluation and prediction.

    ema_decay: how much of the average stays at each step (Tarvainen & Valpola, "Mean teachers", NeurIPS 2017); 1 - 1/n at the
    n-th step while that is less, as in their code: the untrained weights are gone after the first step.
    """

    def __init__(self, raw_model: torch.nn.Module, ema_decay: float):
        self.ema_decay, self.updates, self.model = ema_decay, 0, copy.deepcopy(raw_model)
        tensors = [list(model.state_dict().values()) for model in (self.model, raw_model)]
        self.floats = [[tensor for tensor in each if tensor.is_floating_point()] for each in tensors]
        self.counters = [[tensor for tensor in each if not tensor.is_floating_point()] for each in tensors]  # of BatchNorm

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        torch._foreach_lerp_(*self.floats, max(1 - self.ema_decay, 1 / self.updates))
        if self.counters[0]:
            torch._foreach_copy_(*self.counters)


# --- one training -----------------------------------------------------------------------------------------------------

AUGMENTATIONS = ("views", "freq_mask", "time_mask", "mixup", "time_shift", "time_stretch", "freq_shift", "gain",
                 "filter_augment")  # of training_batches
ROW_HEAD = "{:>10}: loss  acc%  prec%   rec%    F1%      s"


def feature_params(config: Config) -> dsets.FeatureParams:
    """The features that --f-max, --crop-mels and --crop-frames ask for."""
    return dsets.FeatureParams(f_max=config.f_max, crop_mels=config.crop_mels, crop_frames=config.crop_frames)


def train(folder: Path, dataset: dsets.ESC50, config: Config, seed: int, fold: int | str, device: torch.device) -> None:
    """Train one seed and fold in `folder`, from its last checkpoint if there is one, to the last epoch; rank 0 writes.

    Raises UserError if the loss stops being finite.
    """
    begin = time.perf_counter()
    training, validation = dataset.split(fold)  # with fold "none", no clip is for validation
    mean_std = dataset.mean_std(training)
    constants = {"model_name": config.model, "classes": dataset.classes, "seed": seed, "fold": fold,
                 "precision": config.precision, "features": vars(dataset.params), "mean_std": list(mean_std),
                 "flags": vars(config)}
    resume_from = folder / "last.pt" if (folder / "last.pt").exists() else None
    raw_model = start_model(config.model, None if resume_from else config.pretrained, dataset, seed, fold)
    raw_model = raw_model.to(device, memory_format=torch.channels_last)
    model = dist.parallel(raw_model) if dist.world_size() > 1 else raw_model
    model = machine.compile_model(model) if config.compile else model
    optimizer = build_optimizer(raw_model, config, device)
    recorder = machine.Recorder(device.type == "cuda" and dist.world_size() == 1)
    examples_per_epoch = len(training) * config.views
    steps = math.ceil(examples_per_epoch / config.batch_size)
    ema = EMA(raw_model, config.ema) if config.ema else None
    eval_model = ema.model if ema else raw_model  # what is evaluated, saved and predicts
    epoch, history, best, predictions, probabilities = 0, [], None, None, None
    if resume_from:
        epoch, history, best, predictions, probabilities = resume(resume_from, constants, raw_model, eval_model, optimizer)
        if ema:
            ema.updates = steps * epoch
    first_row = len(history)
    resumed = f"; resumed after epoch {epoch}" if epoch else ""
    print(f"\nseed {seed} fold {fold}: {len(training)} training clips x {config.views} views, {len(validation)} validation "
          f"clips, normalized by mean {mean_std[0]:.2f} dB, std {mean_std[1]:.2f} dB{resumed}")
    print(f"{'epoch':>9} | {ROW_HEAD.format('training')} examples/s | {ROW_HEAD.format('validation')}", flush=True)
    options = {name: getattr(config, name) for name in AUGMENTATIONS} | {"seed": seed, "fold": fold}
    class_weights = balanced_weights(dataset.targets[training], len(dataset.classes)).to(device) if config.class_weights else None
    ranks = {"rank": dist.rank(), "world_size": dist.world_size()}
    for name in ("report.csv", "curves.png") if dist.rank() == 0 else ():
        (folder / name).unlink(missing_ok=True)  # they would say that the training is finished
    board = report.Board(folder, history, examples_per_epoch,
                         lambda: first_examples(dataset, training, mean_std, config.batch_size, options))

    for epoch in range(epoch + 1, config.epochs + 1):
        batches = dsets.training_batches(dataset, training, mean_std, batch_size=config.batch_size, epoch=epoch, device=device,
                                         **options, **ranks)
        lrs = [lr_at_step(step, config.epochs * steps, config.lr, config.lr_schedule)
               for step in range((epoch - 1) * steps, epoch * steps)]
        start = time.perf_counter()
        with seeded(seed, fold, epoch, f"network, rank {dist.rank()}", device):  # what it draws itself, as nn.Dropout does
            trained = train_one_epoch(model, optimizer, batches, lrs, config.precision, label_smoothing=config.label_smoothing,
                                      class_weights=class_weights, ema=ema, recorder=recorder)
        middle = time.perf_counter()
        batches = dsets.validation_batches(dataset, validation, mean_std, batch_size=config.batch_size, device=device,
                                           tta_crops=config.tta_crops, **ranks)
        for buffer in eval_model.buffers():
            dist.broadcast(buffer)  # rank 0's running batch statistics
        evaluated = evaluate(eval_model if ema else model, batches, config.precision)
        end = time.perf_counter()
        rows, phases = [], [("training", trained, middle - start), ("validation", evaluated[:3], end - middle)]
        for phase, outcome, seconds in phases if len(validation) else phases[:1]:
            if not outcome[0].isfinite().all():
                step = int((~outcome[0].isfinite()).nonzero()[0]) // config.batch_size + 1
                raise UserError(f"--lr {config.lr:g}: the loss is not finite in epoch {epoch}, {phase} step {step} of {folder} "
                                f"(epochs saved in last.pt: {epoch - 1}); start a new run with a lower --lr")
            rows.append({"seed": seed, "fold": fold, "epoch": epoch, "phase": phase, **compute_metrics(*outcome),
                         "seconds": round(seconds, 3), "lr": lrs[-1]})
        if dist.rank() > 0:
            continue

        history = [*history, *rows]
        is_best = len(validation) > 0 and (best is None or rows[1]["loss"] < best["loss"])
        best = rows[1] if is_best else best
        predictions, probabilities = evaluated[1], torch.stack([evaluated[3], (-evaluated[0]).exp()], dim=1)  # (N,), (N, 2)
        checkpoint = {"model": eval_model.state_dict(), "epoch": epoch, "history": history, "best": best,
                      "predictions": predictions, "probabilities": probabilities, **constants}
        if is_best:
            checkpoints.save_checkpoint(folder / "best.pt", checkpoint)
        checkpoint |= {"optimizer": optimizer.state_dict(), "raw_model": raw_model.state_dict() if ema else None}
        checkpoints.save_checkpoint(folder / "last.pt", checkpoint)
        rundir.write_metrics(folder, history)
        board.add_rows(rows)
        examples_per_s = examples_per_epoch / (middle - start)
        validated = row_text(rows[1]) if len(validation) else "none"
        print(f"{epoch:>4}/{config.epochs:<4} | {row_text(rows[0])} {examples_per_s:>10.0f} | {validated}", flush=True)
    if dist.rank() > 0:
        return
    rundir.write_metrics(folder, history)  # again: a training that was killed after its last epoch may lack it
    results = dataset.targets[validation], predictions, dataset.classes
    report.write_predictions(folder, dataset.table.iloc[validation.numpy()], *results, probabilities)
    confusion = report.write_pictures(folder, history, *results)
    board.add_results(confusion, vars(config) | {"seed": seed, "fold": fold}, history[-1])
    if len(validation):
        report.write_report(folder, *results)  # the last file of a finished training
    training_s, validation_s = (sum(row["seconds"] for row in history[first_row:] if row["phase"] == phase)
                                for phase in ("training", "validation"))
    print(f"{training_s:.1f} s of training, {validation_s:.1f} s of validation, {time.perf_counter() - begin:.1f} s with all the "
          f"rest")


def balanced_weights(targets: torch.Tensor, num_classes: int) -> torch.Tensor:
    """What each class's loss is multiplied by (classes,) to weigh as much as the others: scikit-learn's compute_class_weight."""
    counts = torch.bincount(targets, minlength=num_classes)
    return len(targets) / ((counts > 0).sum() * counts.clamp(min=1))  # -> (classes,) float32


@contextlib.contextmanager
def seeded(seed: int, fold: int | str, epoch: int, purpose: str, device: torch.device):
    """Within it, torch's global generators begin as `dsets.generator_for` says; those of CPU and `device` are restored after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(dsets.generator_for(seed, fold, epoch, purpose).initial_seed())
        yield


def start_model(name: str, pretrained: str | None, dataset: dsets.ESC50, seed: int, fold: int | str) -> torch.nn.Module:
    """The model with the weights that (seed, fold) give, or pretrained ones below a last layer that they give."""
    with seeded(seed, fold, 0, "weights", torch.device("cpu")):
        try:
            model = models.build_model(name, len(dataset.classes), dataset.params.input_shape)
        except ValueError as error:
            raise UserError(f"--model {name}: cannot be built ({error}); choose another model or other features") from error
    if pretrained:
        checkpoints.load_pretrained(model, pretrained, vars(dataset.params))
    return model


def resume(path: Path, constants: dict, raw_model, eval_model, optimizer) -> tuple:
    """Load last.pt into the models and the optimizer; returns its epoch, history, best row, predictions and probabilities.

    constants: what this training's checkpoints hold. Raises UserError if last.pt is another training's or damaged.
    """
    try:
        checkpoint = checkpoints.load_checkpoint(path)
        names = ("seed", "fold", "model_name", "classes", "precision", "features")
        then, now = ({name: each[name] for name in names} for each in (checkpoint, constants))
        rundir.check_same(f"{path}: is another training's", then, now)
        checkpoints.load_weights(eval_model, checkpoint["model"], path)
        if eval_model is not raw_model:
            checkpoints.load_weights(raw_model, checkpoint["raw_model"], path)
        # moments alone: the options are those of the flags, and the learning rate on a GPU stays a tensor there
        optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizer"]["state"]})
        return tuple(checkpoint[name] for name in ("epoch", "history", "best", "predictions", "probabilities"))
    except (KeyError, TypeError, ValueError) as error:
        message = str(error) if isinstance(error, UserError) else f"{path}: is damaged ({reason(error)})"
        raise UserError(f"{message}; remove it, and --resume starts this training again") from error


def row_text(row: dict) -> str:
    """The columns under ROW_HEAD."""
    percent = [100 * row[name] for name in ("accuracy", "precision", "recall", "f1")]
    return "{:>16.4f} {:>5.1f} {:>6.1f} {:>6.1f} {:>6.1f} {:>6.1f}".format(row["loss"], *percent, row["seconds"])


def first_examples(dataset: dsets.ESC50, training: torch.Tensor, mean_std: tuple[float, float], batch_size: int, options: dict):
    """A figure of the first examples of the first epoch (with mixup: of other partners, as the batch is smaller)."""
    batch = next(dsets.training_batches(dataset, training, mean_std, batch_size=min(8, batch_size), epoch=1,
                                        device=torch.device("cpu"), **options))
    names, _ = report.drawable(dataset.classes)
    return report.examples_figure(batch.examples.numpy(), [names[target] for target in batch.targets])


# --- all trainings ----------------------------------------------------------------------------------------------------

def run(argv: list[str], progress: dict) -> None:
    """Everything the command does. progress["run_dir"] is set once there is a run that --resume can continue."""
    config = parse_args(argv)
    recorded = rundir.read_run_config(Path(config.resume or config.rerun)) if config.resume or config.rerun else None
    device = machine.choose_device(config.device)
    config.device, config.precision = device.type, machine.choose_precision(config.precision, device)
    device = dist.own_device(device)
    machine.check_usable(device)
    machine.make_deterministic()
    machine.keep_freed_memory()
    note = "" if recorded else machine.busy_note()
    if recorded:
        torch.set_num_threads(recorded["hardware"]["threads"])  # before this process describes itself

    with dist.main_process_first():  # rank 0 computes the features, the others find them
        if config.demo and dist.rank() == 0:
            from util.demo import write_demo
            write_demo(Path(config.data))
        if config.download and dist.rank() == 0:
            from util.download import download
            download(Path(config.data))
        dataset = dsets.ESC50(config.data, config.esc10, params=feature_params(config), folds=config.folds,
                              split_long=config.split_long)
    config.data, config.download = str(dataset.root.resolve()), False  # as --resume will find them
    if config.pretrained and config.pretrained != "imagenet":
        config.pretrained = str(Path(config.pretrained).resolve())
    if "all" in config.fold:
        config.fold = list(dict.fromkeys([*dataset.folds, *(fold for fold in config.fold if fold != "all")]))
    for fold in config.fold:
        dataset.split(fold)  # refuses a fold that the data does not have, before anything is trained
    model = start_model(config.model, None, dataset, 0, 0)  # refused before a folder is made; its size is printed
    run_dir = start_run(argv, config, dataset, model) if dist.rank() == 0 else ""
    progress["run_dir"] = run_dir = Path(dist.broadcast(str(run_dir)))
    torch.set_num_threads(rundir.read_run_config(run_dir)["hardware"]["threads"])  # sums are split by thread: as many as at first
    counts, parameters = dataset.table["category"].value_counts(), sum(parameter.numel() for parameter in model.parameters())
    sizes = f"{counts.min()} clips of {counts.idxmin()} to {counts.max()} of {counts.idxmax()}"
    sizes = printable(sizes if counts.nunique() > 1 else f"{counts.max()} clips of each class")
    print(f"run    {as_argument(run_dir)}\ndata   {dataset}; {sizes}\nmodel  {config.model}, {parameters:,} "
          f"parameters, {config.precision} on {config.device}, processes: {dist.world_size()}, threads of each: "
          f"{torch.get_num_threads()}{note}", *(f"note   {printable(text)}" for text in dataset.notes), sep="\n", flush=True)
    with machine.own_stream(device):
        if device.type == "cuda" and dataset.features.nbytes < torch.cuda.mem_get_info()[0] / 2:
            dataset.features = dataset.features.to(device)  # else they stay on disk, and crops of them are copied
        for seed, fold in itertools.product(config.seed, config.fold):
            folder = rundir.training_dir(run_dir, seed, fold)
            finished = rundir.is_finished(folder, config.epochs)
            dist.barrier()  # all have looked before one of them writes
            if not finished:
                with rundir.lock_training(folder) if dist.rank() == 0 else contextlib.nullcontext():
                    train(folder, dataset, config, seed, fold, device)
                if dist.rank() == 0:
                    report.write_summary(run_dir, config.epochs)  # the pictures of all load every checkpoint: once, at the end
    if dist.rank() > 0:
        return
    folds = dataset.folds if len(dataset.folds) > 1 else []  # of one alone nothing was validated
    targets = {fold: dataset.targets[dataset.split(fold)[1]] for fold in folds}
    summary = report.write_summary(run_dir, config.epochs, targets, dataset.classes)
    if "none" in config.fold:
        print(f"\nfold none validates nothing; predict with: python predict.py {as_argument(run_dir)} RECORDING")
    if summary["trainings"]:
        print(f"\n{report.summary_table(summary)}\n\nsummary {as_argument(run_dir / 'summary.json')}")
    if config.rerun:
        print(f"\ncompared with {config.rerun}:", *report.compare_runs(Path(config.rerun), run_dir), sep="\n")


def start_run(argv: list[str], config: Config, dataset: dsets.ESC50, model: torch.nn.Module) -> Path:
    """The folder of a run that starts, is joined or is resumed, with its run.json. model: of the flags, to try --pretrained."""
    run_config = {"command": ["training.py", *argv], "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                  "flags": vars(config) | {"run_dir": None, "resume": None, "rerun": None}, "features": vars(dataset.params),
                  **rundir.environment(dist.world_size()),
                  "data": {"clips": len(dataset), "classes": dataset.classes, "fingerprint": dataset.fingerprint()},
                  "pretrained": checkpoints.fingerprint(config.pretrained),
                  "sessions": []}  # later commands that train in the folder
    if config.pretrained and not config.resume:
        known = checkpoints.load_pretrained(model, config.pretrained, vars(dataset.params))  # refused before a folder is made
        if all(name in known for name in dataset.classes):
            dataset.notes.append(f"{config.pretrained} knows all these classes; if it learned from clips that are validated "
                                 f"here, accuracy is too high")
    given = config.resume or config.run_dir
    run_dir = Path(given) if given else rundir.new_run_dir(config.tb_prefix, config.comment)
    trainings = [rundir.training_dir(run_dir, seed, fold) for seed in config.seed for fold in config.fold]
    if config.resume and all(rundir.is_finished(folder, config.epochs) for folder in trainings):  # only the table is printed
        rundir.check_same_data(run_dir, rundir.read_run_config(run_dir), run_config)
    else:
        rundir.record_run(run_dir, run_config, LOCATION_FLAGS, bool(config.resume))
    return run_dir


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 2 something the user can fix, 130 or 143 interrupted."""
    return command.train_and_report(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    dist.end(main())
