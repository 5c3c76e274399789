"""The pictures of a run and of a validation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import PowerNorm

from mobilemamba.checkpoints import write_file

INK, GREY, BLUE, RED, GREEN = "#1f2933", "#9aa5b1", "#2563eb", "#dc2626", "#059669"


def draw_history(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Losses and accuracies by epoch, of the weights and of their average."""
    figure, (losses, accuracies) = pyplot().subplots(1, 2, figsize=(11, 4), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    marker = "o" if len(rows) == 1 else ""
    losses.plot(epochs, [row["train_loss"] for row in rows], GREY, marker=marker, label="training, smoothed and mixed")
    for name, colour in (("raw", BLUE), ("averaged", GREEN)):
        losses.plot(epochs, [row[f"loss_{name}"] for row in rows], colour, marker=marker, label=f"validation, {name}")
        for measure, style in (("top1", "-"), ("top5", ":")):
            values = [row[f"{measure}_{name}"] for row in rows]
            label = f"top-{measure[-1]}, {name}"
            accuracies.plot(epochs, values, colour, linestyle=style, marker=marker, label=label)
    best = max(max(row["top1_raw"], row["top1_averaged"]) for row in rows)
    losses.set_title("Loss", loc="left", color=INK)
    accuracies.set_title(f"Accuracy, percent; best top-1 {best:.2f}", loc="left", color=INK)
    accuracies.set_ylim(top=101)
    for ax in (losses, accuracies):
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.legend(frameon=False, fontsize=9)
    return save(figure, path)


def draw_confusion(counts: np.ndarray, classes: Sequence[str], path: Path, most: int = 40) -> Path:
    """Shares of each class's images by predicted class, right ones blue, wrong ones red; of many classes those that are
    confused the most.

    Args:
        counts: (classes, classes): rows are what images are, columns what they were taken for.
    """
    images = counts.sum(1)
    wrong = images + counts.sum(0) - 2 * counts.diagonal()
    present = np.flatnonzero(images + counts.sum(0))
    shown = np.sort(present[np.argsort(-wrong[present], kind="stable")[:most]])
    percent = 100 * counts[np.ix_(shown, shown)] / np.maximum(images[shown, None], 1)
    names = [classes[i].encode(errors="replace").decode() for i in shown]  # of folders, names may be no Unicode
    names = [name if len(name) < 25 else name[:23] + "…" for name in names]
    rows, few = names, len(shown) <= 15
    side = max(4.5, 0.3 * len(shown) + 2)
    figure, ax = pyplot().subplots(figsize=(side + 1, side), layout="constrained")
    scale = PowerNorm(0.5, 0, 100)  # so that a few percent can be seen
    diagonal = np.eye(len(shown), dtype=bool)
    ax.imshow(np.ma.masked_where(~diagonal, percent), cmap="Blues", norm=scale)
    red = ax.imshow(np.ma.masked_where(diagonal | (percent == 0), percent), cmap="Reds", norm=scale)
    if few:
        for (row, column), value in np.ndenumerate(percent):
            if value:
                text = f"{value:.0f}" if value >= 0.5 else "<1"
                colour = "white" if scale(value) > 0.6 else INK
                ax.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
    else:
        figure.colorbar(red, ax=ax, shrink=0.5, label="percent of a class's images taken for another")
        right = (f"{p:.0f} %" if n else "no images" for p, n in zip(percent.diagonal(), images[shown], strict=True))
        rows = [f"{name}  {share}" for name, share in zip(names, right, strict=True)]
    ax.set_yticks(range(len(shown)), rows, fontsize=9, parse_math=False)
    short = max(map(len, names)) < 4
    slant: dict[str, Any] = {} if short else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(range(len(shown)), names, fontsize=9, parse_math=False, **slant)
    ax.set_xticks(np.arange(len(shown) + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(shown) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color=GREY, linewidth=0.3)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="predicted class", ylabel="class")
    which = f"the {len(shown)} of {len(present)} classes confused the most; " if len(shown) < len(present) else ""
    unit = "in the cells: percent of the class's images" if few else "beside each class: percent that are right"
    title = f"{100 * counts.trace() / counts.sum():.1f} % of {counts.sum()} images are right"
    ax.set_title(f"{title}\n{which}{unit}", loc="left", color=INK, fontsize=11)
    return save(figure, path)


def pyplot() -> Any:
    matplotlib.use("Agg")  # pictures go to files: no display is needed
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> Path:
    """In the format of the path's suffix."""
    options: dict[str, Any] = {"format": path.suffix[1:], "dpi": 150, "facecolor": "white", "bbox_inches": "tight"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # names in scripts that the font lacks
        write_file(path, lambda file: figure.savefig(file, **options))
    pyplot().close(figure)
    return path
