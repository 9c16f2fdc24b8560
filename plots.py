"""The pictures of a run. Every function returns a matplotlib Figure; nothing here opens a window."""
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

TRAINING_COLOUR, VALIDATION_COLOUR = "#0072B2", "#D55E00"  # blue and vermilion of Okabe & Ito: colour-blind safe


def curves_figure(rows: list[dict]) -> Figure:
    """Loss and accuracy over the epochs, both phases. rows: the objects of metrics.jsonl of one training."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, metric, scale in zip(figure.subplots(1, 2), ("loss", "accuracy"), (1, 100)):
        for phase, colour, style in (("training", TRAINING_COLOUR, "--"), ("validation", VALIDATION_COLOUR, "-")):
            points = [(row["epoch"], scale * row[metric]) for row in rows if row["phase"] == phase]
            axes.plot(*zip(*points), color=colour, linestyle=style, label=phase,
                      marker="o" if len(points) == 1 else None)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("cross-entropy loss (nats)" if metric == "loss" else "accuracy (%)")
        axes.grid(alpha=0.3)
        axes.legend()
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
