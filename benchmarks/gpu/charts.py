"""Charts of the JSON lines, drawn wherever matplotlib is, on the machine that measured or on another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_COLOURS = ("#c44e52", "#dd8452", "#8c9bb0", "#4c72b0", "#55a868", "#8172b3", "#937860", "#64b5cd")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw(folder: Path) -> list[Path]:
    """Draw ``operators.jsonl`` and ``networks.jsonl`` of a folder, as far as they are there; the charts' paths.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    drawn = []
    for name, kind in (("operators", "operator"), ("networks", "network")):
        path = folder / f"{name}.jsonl"
        rows = read(path) if path.exists() else []
        passed = [row for row in rows if row["kind"] == kind and row["check"] == "passed"]
        for dtype in dict.fromkeys(row["dtype"] for row in passed):
            chosen = [row for row in passed if row["dtype"] == dtype]
            title = f"{rows[0]['device']}, torch {rows[0]['torch']}, {dtype}"
            drawn.append(folder / f"{name}-{dtype}.png")
            (_draw_operators if kind == "operator" else _draw_networks)(chosen, title, drawn[-1])
    return drawn


def _bars(axis: Any, groups: dict[str, dict[str, float]], series: Sequence[str]) -> int:
    """A bar a value, one below the other, groups a bar apart; how many bars high that is."""
    ticks, y = [], 0
    places: dict[str, list[tuple[int, float]]] = {name: [] for name in series}
    for group in groups.values():
        present = [name for name in series if name in group]
        ticks.append(y + (len(present) - 1) / 2)
        for name in present:
            places[name].append((y, group[name]))
            y += 1
        y += 1
    for i, (name, found) in enumerate(places.items()):
        if not found:
            continue
        axis.barh([at for at, _ in found], [v for _, v in found], 1, label=name, color=_COLOURS[i % len(_COLOURS)])
    axis.set_yticks(ticks, list(groups), fontsize=7)
    axis.set_ylim(y - 0.5, -1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7)
    return y


def _draw_operators(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Share of the lower ceiling, a panel for each direction."""
    from matplotlib import pyplot as plt

    series = list(dict.fromkeys(row["engine"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(17, 1.5 + 0.13 * len(rows)), layout="constrained")
    heights = []
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        groups: dict[str, dict[str, float]] = {}
        for row in (r for r in rows if r["direction"] == direction):
            groups.setdefault(f"{row['op']}\n{row['case']}", {})[row["engine"]] = 100 * row["share_of_floor"]
        heights.append(_bars(axis, groups, series))
        axis.set_title(direction, fontsize=10)
        axis.set_xlabel("% of the lower of copy bandwidth and arithmetic ceiling")
    for axis in axes:
        axis.set_ylim(max(heights) - 0.5, -1)  # bars of one height in both panels
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_networks(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Images a second, a panel for each batch size."""
    from matplotlib import pyplot as plt

    series = list(dict.fromkeys(f"{row['engine']}, {row['mode']}" for row in rows))
    batches = sorted({row["batch"] for row in rows})
    figure, axes = plt.subplots(1, len(batches), figsize=(6 * len(batches), 4), squeeze=False, layout="constrained")
    for axis, batch in zip(axes.flat, batches, strict=True):
        groups: dict[str, dict[str, float]] = {}
        for row in (r for r in rows if r["batch"] == batch):
            groups.setdefault(row["model"], {})[f"{row['engine']}, {row['mode']}"] = row["images_per_s"]
        _bars(axis, groups, series)
        axis.set_title(f"batch {batch}", fontsize=10)
        axis.set_xlabel("images a second")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
