"""The pictures of a run. Every function returns a matplotlib Figure; nothing here opens a window."""
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from util.cache import MEL

TRAINING_COLOUR, VALIDATION_COLOUR = "#0072B2", "#D55E00"  # blue and vermilion of Okabe & Ito: colour-blind safe


def curves_figure(rows: list[dict]) -> Figure:
    """Loss and accuracy over the epochs, both phases; of several trainings the mean, in a band of one deviation.

    rows: the objects of metrics.jsonl of one training or of several.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    trainings = len({(row["seed"], row["fold"]) for row in rows})
    for axes, metric, scale in zip(figure.subplots(1, 2), ("loss", "accuracy"), (1, 100)):
        for phase, colour, style in (("training", TRAINING_COLOUR, "--"), ("validation", VALIDATION_COLOUR, "-")):
            values = {}  # epoch -> one value a training
            for row in rows:
                if row["phase"] == phase:
                    values.setdefault(row["epoch"], []).append(scale * row[metric])
            mean = np.array([np.mean(of_epoch) for of_epoch in values.values()])
            axes.plot(values.keys(), mean, color=colour, linestyle=style, label=phase,
                      marker="o" if len(mean) == 1 else None)
            if trainings > 1:
                deviation = np.array([np.std(of_epoch, ddof=1) for of_epoch in values.values()])
                axes.fill_between(values.keys(), mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_ylabel("cross-entropy loss (nats)" if metric == "loss" else "accuracy (%)")
        axes.grid(alpha=0.3)
        axes.legend(title=f"mean of {trainings}, band +- 1 sd" if trainings > 1 else None)
    return figure


def confusion_figure(confusion: np.ndarray, classes: list[str]) -> Figure:
    """Confusion matrix (classes, classes) of clip counts: a row per true class, a column per predicted class."""
    count = len(classes)
    side = max(5.0, 0.24 * count + 2.5)  # inches; 0.24 leaves room for one line of 7-point text a class
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(confusion, cmap="Blues", vmin=0)  # one hue that only darkens: readable in grey
    axes.set_xticks(range(count), classes, rotation=90, fontsize=7, parse_math=False)  # a $ is a $
    axes.set_yticks(range(count), classes, fontsize=7, parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    dark = confusion.max() / 2
    for row, column in zip(*np.nonzero(confusion)):
        value = confusion[row, column]
        axes.text(column, row, str(value), ha="center", va="center", fontsize=6,
                  color="white" if value > dark else "black")
    figure.colorbar(image, ax=axes, shrink=0.6, label="clips", ticks=MaxNLocator(integer=True))
    return figure


def draw_mel(axes, feature: np.ndarray, low: int = 0, first: int = 0, **options):
    """A mel-spectrogram (mels, frames), or a crop whose corner is (low, first), with axes in s and Hz.

    options: those of imshow, vmin and vmax above all. Returns the image, for a colour bar.
    """
    mels, frames = feature.shape
    seconds = MEL["hop_length"] / MEL["sample_rate"]  # a frame
    image = axes.imshow(feature, origin="lower", aspect="auto", cmap="magma",  # evenly darker, in grey too
                        extent=(seconds * (first - 0.5), seconds * (first + frames - 0.5), low - 0.5, low + mels - 0.5),
                        **options)
    # HTK's mel scale: 128 filters' centres lie evenly between the mels of f_min and f_max
    hertz = np.array([100, 300, 700, 1500, 3000, 6000])
    ends = 2595 * np.log10(1 + np.array([MEL["f_min"], MEL["f_max"]]) / 700)
    positions = (2595 * np.log10(1 + hertz / 700) - ends[0]) / (ends[1] - ends[0]) * (MEL["n_mels"] + 1) - 1
    shown = (positions > low - 0.5) & (positions < low + mels - 0.5)
    axes.set_yticks(positions[shown], hertz[shown])
    axes.set_xlabel("time (s)")
    axes.set_ylabel("frequency (Hz)")
    return image


def examples_figure(examples: np.ndarray, titles: list[str]) -> Figure:
    """Normalised examples (B, 1, mels, frames) as a network sees them, four in a row; 0 is the mean, and the masks."""
    rows = -(-len(examples) // 4)
    figure = Figure(figsize=(12, 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, 4, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(examples):]:
        axes.set_visible(False)
    for axes, example, title in zip(grid.flat, examples, titles):
        image = axes.imshow(example[0], origin="lower", aspect="auto", cmap="magma", vmin=-3, vmax=3)
        axes.set_title(title, fontsize=9, parse_math=False)
    figure.supxlabel("frame of the crop (11.6 ms each)", fontsize=9)
    figure.supylabel("mel of the crop", fontsize=9)
    figure.colorbar(image, ax=grid, label="standard deviations from the mean")
    return figure
