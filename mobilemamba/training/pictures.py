"""The pictures of a run and of a validation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

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
    """Shares of each class's images by predicted class; of many classes those that are confused the most.

    Args:
        counts: (classes, classes): rows are what images are, columns what they were taken for.
    """
    wrong = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    shown = np.sort(np.argsort(-wrong, kind="stable")[:most])
    shares = counts[np.ix_(shown, shown)] / np.maximum(counts.sum(1)[shown, None], 1)
    names = [classes[i] if len(classes[i]) < 20 else classes[i][:18] + "…" for i in shown]
    side = max(5.0, 0.32 * len(shown) + 2.5)
    figure, ax = pyplot().subplots(figsize=(side + 0.8, side), layout="constrained")
    image = ax.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=ax, shrink=0.7, label="percent of the class's images")
    ax.set_xticks(range(len(shown)), names, rotation=90, fontsize=9)
    ax.set_yticks(range(len(shown)), names, fontsize=9)
    ax.set(xlabel="predicted class", ylabel="class")
    if len(shown) <= 15:
        for (row, column), share in np.ndenumerate(shares):
            if share:
                colour = "white" if share > 0.5 else INK
                ax.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    right = counts.diagonal().sum() / max(counts.sum(), 1)
    which = f"; the {len(shown)} classes confused the most" if len(shown) < len(classes) else ""
    ax.set_title(f"{right:.1%} of {counts.sum()} images are right{which}", loc="left", color=INK)
    return save(figure, path)


def pyplot() -> Any:
    matplotlib.use("Agg")  # pictures go to files: no display is needed
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> Path:
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=150, facecolor="white"))
    pyplot().close(figure)
    return path
