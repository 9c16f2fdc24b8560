"""What a run shows: pictures (matplotlib Figures; nothing opens a window), tables, TensorBoard, the comparison of two runs.

matplotlib, pandas, scikit-learn and TensorBoard take seconds to import: each function imports what it needs.
"""
import itertools
import os
from pathlib import Path

import torch

from util import rundir
from util.checkpoint import load_checkpoint
from util.config import LOCATION_FLAGS
from util.errors import write_atomically
from util.waveforms import SAMPLE_RATE

METRICS = ("accuracy", "precision", "recall", "f1", "loss")
LONGEST_NAME = 40  # letters of a class's name in pictures: longer ones leave them no room
PHASES = {"training": ("#0072B2", "--"), "validation": ("#D55E00", "-")}  # Okabe & Ito's blue and vermilion: color-blind safe


def drawable(names: list[str]) -> tuple[list[str], list[str]]:
    """Names as a picture can show them, and the font families that have their letters; a name without a font is its number."""
    from matplotlib import font_manager, ft2font
    families, missing = ["DejaVu Sans"], {ord(letter) for letter in "".join(names)}  # matplotlib's own font
    missing -= ft2font.FT2Font(font_manager.findfont(families[0])).get_charmap().keys()
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: (font.name, font.fname)) if missing else []:
        if font.name.startswith("Last Resort") or not os.path.exists(font.fname):  # has boxes for all letters; was uninstalled
            continue
        found = missing & ft2font.FT2Font(font.fname).get_charmap().keys()
        if found:
            families.append(font.name)
            missing -= found
    names = [name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME - 3] + "..." for name in names]
    return [str(number) if missing & set(map(ord, name)) else name for number, name in enumerate(names)], families


def curves_figure(rows: list[dict]):
    """Loss and accuracy over the epochs, from rows of metrics.jsonl; of several trainings the mean, in a band of +- 1 std."""
    import pandas as pd
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    table, figure = pd.DataFrame(rows), Figure(figsize=(10, 4), layout="constrained")
    trainings = len(table.groupby(["seed", "fold"]))
    for axes, metric, scale in zip(figure.subplots(1, 2), ("loss", "accuracy"), (1, 100)):
        for phase, (color, style) in PHASES.items():
            if not (table["phase"] == phase).any():  # --fold none validates nothing
                continue
            epochs = table[table["phase"] == phase].groupby("epoch")[metric]
            mean, std = scale * epochs.mean(), scale * epochs.std()
            axes.plot(mean.index, mean, color=color, linestyle=style, label=phase, marker="o" if len(mean) == 1 else None)
            if trainings > 1:
                axes.fill_between(mean.index, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
        axes.set(xlabel="epoch", ylabel="cross-entropy loss (nats)" if metric == "loss" else "accuracy (%)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend(title=f"mean of {trainings}, band +- 1 std" if trainings > 1 else None)
    return figure


def confusion_figure(confusion, classes: list[str]):
    """Confusion matrix (classes, classes) of clip counts: a row per true class, a column per predicted class."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    count = len(classes)
    side = min(max(5.0, 0.24 * count + 2.5), 60.0)  # inches; 0.24 for a line of 7-point text a class, up to 240 of them
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(confusion, cmap="Blues", vmin=0)  # one hue that only darkens: readable in gray
    names, families = drawable(classes)
    axes.set_xticks(range(count), names, rotation=90, fontsize=7, family=families, parse_math=False)  # a $ is a $
    axes.set_yticks(range(count), names, fontsize=7, family=families, parse_math=False)
    axes.set(xlabel="predicted class", ylabel="true class")
    for row, column in zip(*confusion.nonzero()):
        color = "white" if confusion[row, column] > confusion.max() / 2 else "black"
        axes.text(column, row, str(confusion[row, column]), ha="center", va="center", fontsize=6, color=color)
    figure.colorbar(image, ax=axes, shrink=0.6, label="clips", ticks=MaxNLocator(integer=True))
    return figure


def examples_figure(examples, titles: list[str]):
    """Normalized examples (B, 1, mels, frames) as a network sees them, four in a row; 0 is the mean, and the masks."""
    from matplotlib.figure import Figure
    rows = -(-len(examples) // 4)
    figure = Figure(figsize=(12, 2.6 * rows), layout="constrained")
    grid, (titles, families) = figure.subplots(rows, 4, sharex=True, sharey=True, squeeze=False), drawable(titles)
    for axes in grid.flat[len(examples):]:
        axes.set_visible(False)
    for axes, example, title in zip(grid.flat, examples, titles):
        image = axes.imshow(example[0], origin="lower", aspect="auto", cmap="magma", vmin=-3, vmax=3)
        axes.set_title(title, fontsize=9, family=families, parse_math=False)
    figure.supxlabel("frame of the crop", fontsize=9), figure.supylabel("mel of the crop", fontsize=9)
    figure.colorbar(image, ax=grid, label="standard deviations from the mean")
    return figure


def draw_mel(axes, feature, params, low: int = 0, first: int = 0, **options):
    """Draw a mel-spectrogram (mels, frames), or a crop with the corner (low, first), with axes in s and Hz; returns the image.

    params: the dsets.FeatureParams; options: those of imshow, as vmin, vmax and cmap.
    """
    import numpy as np
    mels, frames = feature.shape
    seconds = params.hop_length / SAMPLE_RATE  # a frame
    extent = (seconds * (first - 0.5), seconds * (first + frames - 0.5), low - 0.5, low + mels - 0.5)
    options = {"cmap": "magma", **options}  # darkens evenly in gray
    image = axes.imshow(feature, origin="lower", aspect="auto", extent=extent, **options)
    # HTK's mel scale: the filters' centers lie evenly between the mels of f_min and f_max
    hertz = np.array([100, 300, 700, 1500, 3000, 6000, 12_000])
    ends = 2595 * np.log10(1 + np.array([params.f_min, params.f_max]) / 700)
    positions = (2595 * np.log10(1 + hertz / 700) - ends[0]) / (ends[1] - ends[0]) * (params.n_mels + 1) - 1
    shown = (positions > low - 0.5) & (positions < low + mels - 0.5)
    axes.set_yticks(positions[shown], hertz[shown])
    axes.set(xlabel="time (s)", ylabel="frequency (Hz)")
    return image


def recording_figure(picture, params, edges: list[float], probabilities, classes: list[str]):
    """A recording's mel-spectrogram (mels, columns) in dB, and below it its eight likeliest classes over time.

    probabilities: (windows, classes); edges: the times (windows + 1,) in s between which each window speaks.
    """
    import numpy as np
    from matplotlib.figure import Figure
    unit, seconds = ("s", 1) if edges[-1] < 180 else ("min", 60) if edges[-1] < 3 * 3600 else ("h", 3600)
    times = np.array(edges) / seconds
    figure = Figure(figsize=(12, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    floor = 10 * np.log10(params.amin)  # dB
    loudest = max(picture.max(), floor + params.top_db)  # or silence would be as bright as what is loudest
    image = draw_mel(upper, picture, params, vmin=loudest - params.top_db, vmax=loudest)
    image.set_extent((0, times[-1], *image.get_extent()[2:]))  # a column is not a frame
    upper.set(xlabel=None, xlim=(0, times[-1]))
    figure.colorbar(image, ax=upper, label="dB", pad=0.01)
    likeliest = probabilities.max(axis=0).argsort()[::-1][:8]
    first = np.arange(0, len(probabilities), -(-len(probabilities) // 1000))  # of each column; at most 1000
    image = lower.pcolormesh(np.append(times[first], times[-1]), range(len(likeliest) + 1),
                             np.maximum.reduceat(probabilities[:, likeliest], first).T, cmap="Blues", vmin=0, vmax=1)
    names, families = drawable(classes)
    lower.set_yticks(np.arange(len(likeliest)) + 0.5, [names[index] for index in likeliest], family=families, parse_math=False)
    lower.set(xlabel=f"time ({unit})")
    lower.invert_yaxis()  # the likeliest on top
    figure.colorbar(image, ax=lower, label="probability", pad=0.01)
    return figure


def draw_activation_map(axes, feature, activations, params, low: int, first: int, limit: float):
    """Draw a crop (mels, frames) in gray with a class activation map (h, w) over it; returns the map's image.

    Red speaks for the class and blue against it, up to +-limit. A place of the map is the center of a window of the crop; the
    first one is the crop's corner, and the next lie a power of two apart: 16 mels and frames for cnn8, 32 for resnet18.
    """
    import math
    draw_mel(axes, feature, params, low, first, cmap="gray")
    left, right, bottom, top = axes.images[-1].get_extent()
    step = 2 ** math.ceil(math.log2(feature.shape[1] / activations.shape[1]))  # strides of 2 halve a size and round it up
    seconds = params.hop_length / SAMPLE_RATE  # a frame
    extent = (seconds * (first - step / 2), seconds * (first + step * (activations.shape[1] - 0.5)),
              low - step / 2, low + step * (activations.shape[0] - 0.5))
    image = axes.imshow(activations, origin="lower", aspect="auto", extent=extent, interpolation="bilinear", cmap="RdBu_r",
                        vmin=-limit, vmax=limit, alpha=(0.7 * abs(activations) / limit).clip(max=0.7))
    axes.set(xlim=(left, right), ylim=(bottom, top))
    return image


def write_pictures(folder: Path, rows: list[dict], targets: torch.Tensor, predictions: torch.Tensor, classes: list[str]):
    """confusion.png, from class indices (N,), if any, and curves.png, from rows of metrics.jsonl; the former's figure."""
    from sklearn.metrics import confusion_matrix
    figures = {"curves.png": curves_figure(rows)}
    if len(targets):
        matrix = confusion_matrix(targets, predictions, labels=range(len(classes)))
        figures = {"confusion.png": confusion_figure(matrix, classes), **figures}
    for name, figure in figures.items():
        write_atomically(folder / name, lambda part: figure.savefig(part, format="png", dpi=100))
    return figures.get("confusion.png")


def write_csv(path: Path, table, **options) -> None:
    """A pandas table as CSV; letters that are no UTF-8, as old archives' names may hold, escaped."""
    write_atomically(path, lambda part: table.to_csv(part, errors="backslashreplace", **options))


def write_predictions(folder: Path, clips, targets: torch.Tensor, predictions: torch.Tensor, classes: list[str],
                      probabilities: torch.Tensor) -> None:
    """predictions.csv, a row for each validated clip: its file, start (s) and fold, and what was predicted.

    clips: rows of the data's table; targets, predictions: class indices (N,); probabilities (N, 2): of the prediction, of the
    true class.
    """
    table = clips[["file", "start", "fold"]].assign(
        true_class=[classes[index] for index in targets], predicted_class=[classes[index] for index in predictions],
        probability=[f"{value:.6g}" for value in probabilities[:, 0].tolist()],
        true_probability=[f"{value:.6g}" for value in probabilities[:, 1].tolist()])
    write_csv(folder / "predictions.csv", table, index=False, float_format="%.10g")


def write_report(folder: Path, targets: torch.Tensor, predictions: torch.Tensor, classes: list[str]) -> None:
    """report.csv, per class, from class indices (N,). It comes last: a training that has it is finished."""
    import pandas as pd
    from sklearn.metrics import precision_recall_fscore_support
    scores = precision_recall_fscore_support(targets, predictions, labels=range(len(classes)), zero_division=0)
    report = pd.DataFrame(dict(zip(("precision", "recall", "f1", "clips"), scores)), index=pd.Index(classes, name="class"))
    report["number"] = range(len(classes))  # which stands for a name in pictures where no font has its letters
    write_csv(folder / "report.csv", report, float_format="%.4f")


def summarize(run_dir: Path, epochs: int) -> dict:
    """summary.json's content: every training with its last epoch, their mean and standard deviation (n - 1; 0 for one)."""
    import pandas as pd
    trainings = []
    for folder in run_dir.glob("seed-*/fold-*"):
        rows = [row for row in rundir.read_metrics(folder) if row["phase"] == "validation"]
        if rows and rows[-1]["epoch"] == epochs and folder == rundir.training_dir(run_dir, rows[-1]["seed"], rows[-1]["fold"]):
            last, best = rows[-1], min(rows, key=lambda row: row["loss"])  # the first of equals
            trainings.append({"seed": last["seed"], "fold": last["fold"], "epochs": epochs,
                              **{metric: last[metric] for metric in METRICS}, "best_epoch": best["epoch"],
                              **{f"best_{metric}": best[metric] for metric in METRICS}})
    trainings.sort(key=lambda training: (training["seed"], training["fold"]))
    table = pd.DataFrame(trainings).drop(columns=["seed", "fold", "epochs", "best_epoch"], errors="ignore")
    return {"trainings": trainings, "mean": table.mean().to_dict(), "std": table.std().fillna(0.0).to_dict()}


def write_summary(run_dir: Path, epochs: int, targets: dict[int, torch.Tensor] | None = None, classes: list[str] = ()) -> dict:
    """Write summary.json again and return it; with targets, of several trainings also pictures and report of all together.

    targets: class indices (N,) of each fold's validation clips. One process at a time: the last one sees all trainings.
    """
    import pandas as pd
    with rundir.lock(run_dir):
        rundir.remove_parts(run_dir)
        summary = summarize(run_dir, epochs)
        rundir.write_json(run_dir / "summary.json", summary)
        folders = [rundir.training_dir(run_dir, training["seed"], training["fold"]) for training in summary["trainings"]]
        if targets and len(folders) > 1 and all((folder / "last.pt").exists() for folder in folders):  # a user may remove them
            predictions = torch.cat([load_checkpoint(folder / "last.pt")["predictions"] for folder in folders])
            results = torch.cat([targets[training["fold"]] for training in summary["trainings"]]), predictions, classes
            write_pictures(run_dir, [row for folder in folders for row in rundir.read_metrics(folder)], *results)
            write_report(run_dir, *results)
        if folders and all((folder / "predictions.csv").exists() for folder in folders):
            tables = [pd.read_csv(folder / "predictions.csv", dtype=str, keep_default_na=False).assign(seed=training["seed"])
                      for folder, training in zip(folders, summary["trainings"])]
            write_csv(run_dir / "predictions.csv", pd.concat(tables), index=False)
    return summary


def summary_table(summary: dict) -> str:
    """The table a run ends with, in %: last epoch of each training, the best epoch beside it, mean and std."""
    import pandas as pd
    rows = summary["trainings"] + [{"seed": name, "fold": "", "best_epoch": "", **summary[name]} for name in ("mean", "std")]
    percent = ["accuracy", "precision", "recall", "f1", "best_accuracy"]
    table = pd.DataFrame(rows, columns=["seed", "fold", *percent[:4], "best_epoch", percent[4]])
    table[percent] = (100 * table[percent].astype(float)).map("{:.2f}".format)
    return (table.to_string(index=False) + "\n(%, of the last epoch. The best epoch is that of the lowest validation loss: "
            "chosen on the validation fold, its accuracy is optimistic.)")


class Board:
    """TensorBoard's writer of a training, which opens with the first rows: the first epoch does not wait for its import."""

    def __init__(self, folder: Path, history: list[dict], examples_per_epoch: int, make_figure):
        """history: rows of earlier epochs, written again; make_figure: gives a figure of the first augmented examples."""
        self.folder, self.history, self.examples_per_epoch, self.make_figure = folder, history, examples_per_epoch, make_figure
        self.writer = None

    def add_rows(self, rows: list[dict]) -> None:
        """Metrics, and in training the learning rate, over the number of examples seen, as the write-up plots them."""
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter
            for stale in self.folder.glob("events.out.tfevents.*"):
                stale.unlink()
            self.writer = SummaryWriter(str(self.folder))
            self.writer.add_figure("augmented examples", self.make_figure(), 0)
            rows = self.history + rows
        for row in rows:
            seen = row["epoch"] * self.examples_per_epoch
            for metric in METRICS:
                self.writer.add_scalar(f"{metric}/{row['phase']}", row[metric], seen)
            if row["phase"] == "training":
                self.writer.add_scalar("learning rate", row["lr"], seen)
                self.writer.add_scalar("examples per s", self.examples_per_epoch / max(row["seconds"], 1e-3), seen)
        self.writer.flush()

    def add_results(self, confusion, flags: dict, last_row: dict) -> None:
        """The confusion matrix's figure, and the flags with the final metrics (HPARAMS); closes the writer."""
        self.add_rows([])
        if confusion:
            self.writer.add_figure("confusion", confusion, last_row["epoch"] * self.examples_per_epoch)
        self.writer.add_hparams({name: value if isinstance(value, (int, float)) else str(value) for name, value in flags.items()},
                                {f"final/{metric}": last_row[metric] for metric in METRICS}, run_name=".")
        self.writer.close()


def compare_runs(run_dir: Path, other_dir: Path) -> list[str]:
    """Lines that say, training by training, whether two runs are identical, and if not, what could explain it."""
    import pandas as pd
    lines, configs = [], [rundir.read_run_config(run_dir), rundir.read_run_config(other_dir)]
    for seed, fold in itertools.product(configs[0]["flags"]["seed"], configs[0]["flags"]["fold"]):
        folders = [rundir.training_dir(base, seed, fold) for base in (run_dir, other_dir)]
        if missing := [str(folder / "last.pt") for folder in folders if not (folder / "last.pt").exists()]:
            lines.append(f"seed {seed} fold {fold}: cannot be compared, there is no {' and no '.join(missing)}")
            continue
        rows = [rundir.read_metrics(folder) for folder in folders]
        if len(rows[0]) != len(rows[1]):
            lines.append(f"seed {seed} fold {fold}: {len(rows[0])} rows of metrics then, {len(rows[1])} now (an unfinished "
                         f"training has fewer)")
        differing = [(then, now) for then, now in zip(*rows) if any(then[metric] != now[metric] for metric in METRICS)]
        if differing:
            then, now = ({metric: row[metric] for metric in METRICS} for row in differing[0])
            lines.append(f"seed {seed} fold {fold}: {len(differing)} of {len(rows[0])} rows of metrics differ, first in epoch "
                         f"{differing[0][0]['epoch']} ({differing[0][0]['phase']}): {then} then, {now} now")
        weights, others = (load_checkpoint(folder / "last.pt")["model"] for folder in folders)
        if weights.keys() != others.keys() or not all(torch.equal(weights[key], others[key]) for key in weights):
            lines.append(f"seed {seed} fold {fold}: weights differ")
    if not lines:
        return ["identical to the last bit: all metrics of all epochs, all weights"]
    names = ("flags", "features", "versions", "hardware", "git", "data", "pretrained", "sessions")
    parts = [{name: config.get(name) for name in names} for config in configs]
    then, now = (pd.json_normalize(part, sep=" ").iloc[0].to_dict() for part in parts)
    where = {f"flags {name}" for name in LOCATION_FLAGS}
    changes = [f"{key}: {then.get(key)} then, {now.get(key)} now" for key in sorted((then.keys() | now.keys()) - where)
               if then.get(key) != now.get(key)]
    return [*lines, "not identical; what could explain it:", *(changes or ["nothing that is recorded differs"])]
