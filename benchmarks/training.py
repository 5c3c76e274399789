"""The committed report of training, benchmarks/results/training/: what small runs on real images come to.

    python benchmarks/training.py [--output FOLDER] [--seeds 10]

Digits (64×64) by the paper's recipe, shortened; the same network fine-tuned on photographs; what a teacher gives where
there are few labels; receptive fields at random weights. Needs the extra ``train``. About half an hour on two
cores. Parts that the folder has already are not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.callbacks import Callback

from mobilemamba import bench, fuse, model_from_checkpoint
from mobilemamba.checkpoints import write_file
from mobilemamba.demo import OPTIONS, digits_recipe
from mobilemamba.training import Recipe, Result, train
from mobilemamba.training.pictures import BLUE, GREEN, INK, pyplot, save
from mobilemamba.training.sources import Source, Subset, digits, open_data
from mobilemamba_kernels import use_backend

SIZE, EPOCHS = 64, 30
LABELS, SHOWN = 10, 10  # images of each class, and how often an epoch, in the study of distillation
STEPS = 9  # of an epoch that are timed, behind the first one


def few_labels(source: Source, seed: int) -> Subset:
    """LABELS images of each class, SHOWN times an epoch."""
    random = np.random.default_rng(seed)
    of_class = [random.permutation(np.flatnonzero(source.labels == label))[:LABELS] for label in range(10)]
    return Subset(source, np.tile(np.concatenate(of_class), SHOWN))


def run(folder: Path, data: Any, recipe: Recipe, **options: Any) -> dict[str, Any]:
    """A run, or what it came to where it is finished already."""
    done = folder / "result.json"
    if not done.exists():
        result: Result = train(data, recipe, folder, resume=True, workers=1, **options)
        numbers = {"top1": result.top1, "top5": result.top5, "weights": result.weights, "epoch": result.epoch}
        numbers |= {"seconds": result.seconds, "images_per_s": result.images_per_s, "waiting": result.waiting}
        write_file(done, lambda file: file.write(json.dumps(numbers, indent=2).encode()))
    with open(folder / "history.csv") as file:
        last = list(csv.DictReader(file))[-1]
    # Of the last epoch's averaged weights: the best epoch was chosen by the images that it is measured on.
    return json.loads(done.read_text()) | {"last epoch's top1": float(last["top1_averaged"])}


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean, and the half width of its 95 % interval (Student's t)."""
    from scipy.stats import t

    return float(values.mean()), float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def study(folder: Path, teacher_weights: Path, seeds: int) -> list[dict[str, Any]]:
    """Students of ten labels a class, each seed with its own, with and without the teacher."""
    train_images, val_images = digits()
    teacher = fuse(model_from_checkpoint(teacher_weights))
    rows = []
    for seed in range(seeds):
        data = few_labels(train_images, seed), val_images
        recipe = digits_recipe(image_size=SIZE, epochs=6, batch_size=50, seed=seed)
        row: dict[str, Any] = {"seed": seed}
        for name, options in (("alone", {}), ("taught", {"teacher": teacher})):
            row[name] = run(folder / f"{name}-{seed}", data, recipe, show=lambda line: None, **options)[
                "last epoch's top1"
            ]
        print(row, flush=True)
        rows.append(row)
    return rows


class StepTimes(Callback):
    """Seconds from the end of a step to the end of the next one, waiting for images included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if batch_idx:
            self.seconds.append(now - self.last)
        self.last = now


def speed(folder: Path, photos: Path) -> dict[str, Any]:
    """Whole steps of S6 at 224, 16 images, by the paper's recipe: with the kernels and on plain PyTorch, in turn."""
    times = {"kernels": StepTimes(), "plain PyTorch": StepTimes()}
    waiting = []
    train_images, val_images = open_data(photos, 0.1)
    images = Subset(train_images, np.arange(16 * (STEPS + 1))), Subset(val_images, np.arange(4))
    recipe = Recipe.paper("mobilemamba_s6", epochs=1, batch_size=16)
    for turn in range(3):
        for name, backend in (("kernels", contextlib.nullcontext()), ("plain PyTorch", use_backend("reference"))):
            with backend:
                place = folder / f"{name}-{turn}"
                result = train(images, recipe, place, workers=1, profile=True, callbacks=[times[name]],
                               show=lambda line: None)  # fmt: skip
            shutil.rmtree(place)
            if name == "kernels":
                waiting.append(result.waiting)
    found = {
        name: dict(zip(("median", "p10", "p90"), np.percentile(t.seconds, [50, 10, 90]).tolist(), strict=True))
        for name, t in times.items()
    }
    ratio = found["plain PyTorch"]["median"] / found["kernels"]["median"]
    return {"seconds a step": found, "ratio": ratio, "waiting": float(np.median(waiting))}


def draw_study(rows: list[dict[str, Any]], path: Path) -> None:
    figure, ax = pyplot().subplots(figsize=(6, 4.5), layout="constrained")
    for column, (name, colour) in enumerate((("alone", BLUE), ("taught", GREEN))):
        values = np.array([row[name] for row in rows])
        mean, half = interval(values)
        ax.errorbar(column, mean, half, fmt="D", color=INK, capsize=8, markersize=7, zorder=3)
        ax.plot([column] * len(values), values, "o", color=colour, alpha=0.6)
        ax.annotate(f"{mean:.2f} ± {half:.2f}", (column, mean), (14, 0), textcoords="offset points", va="center")
    for row in rows:
        ax.plot([0, 1], [row["alone"], row["taught"]], color="#cbd2d9", linewidth=1, zorder=0)
    ax.set_xticks([0, 1], ["labels alone", "labels and teacher"])
    ax.set(xlim=(-0.4, 1.7), ylabel="top-1, percent")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(f"{LABELS} labels a class, {len(rows)} seeds; mean, 95 % interval", loc="left", color=INK)
    save(figure, path)


def command(*arguments: Any) -> str:
    """What a command of this package prints."""
    line = [sys.executable, "-m", "mobilemamba", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line[2:])} failed: {done.stderr}")
    return done.stdout


def text_of(results: dict[str, Any]) -> str:
    """The report."""
    environment, digits_run = results["environment"], results["digits"]
    steps, validated = results["steps of S6, 224, 16 images"], results["digits validated, fused"]
    parts = results["distillation"]
    seconds = {name: timing["median"] for name, timing in steps["seconds a step"].items()}

    def spread(name: str) -> str:
        return f"{parts[name]['mean']:.2f} ± {parts[name]['half width of the 95 % interval']:.2f}"

    return f"""# Training on what every machine has

By `python benchmarks/training.py` on {environment["cpu"]}, {environment["instruction_set"]}, {environment["threads"]}
threads, torch {environment["torch"]}; numbers in [results.json](results.json). Accuracies are those of the averaged
weights after the last epoch, on images that were not trained on.

## Digits, 64×64

A network of {OPTIONS["widths"]} channels, {EPOCHS} epochs of the paper's recipe without mirroring and colours:
{digits_run["last epoch's top1"]:.2f} % (the best epoch had {digits_run["top1"]:.2f} %, and validates with
{validated["top1"]:.2f} % as optimized network). {100 * digits_run["waiting"]:.1f} % of the steps' time was waiting.

![losses and accuracies](curves.png)
![confusion](confusion.png)

## The same network, fine-tuned on pieces of two photographs

{results["photographs, fine-tuned"]["last epoch's top1"]:.2f} % after 15 epochs, from random weights
{results["photographs, from scratch"]["last epoch's top1"]:.2f} %: pieces of a flower and of a palace are not hard to
tell apart.

![losses and accuracies](curves-photos.png)

## A teacher where there are few labels

{len(parts["rows"])} seeds, each with {LABELS} labelled digits a class of its own, shown {6 * SHOWN} times; the teacher
is the network above, which has seen all labels. Top-1, mean and 95 % interval: {spread("alone")} % without it,
{spread("taught")} % with it; the difference within a seed is {spread("difference")}.

![every seed](distillation.png)

## Steps of S6 at 224², 16 images

{1e3 * seconds["kernels"]:.0f} ms a step on the kernels, {1e3 * seconds["plain PyTorch"]:.0f} ms on plain PyTorch,
{steps["ratio"]:.2f} times; a process beside it decodes and distorts images of 384×384, for which steps wait
{100 * steps["waiting"]:.1f} % of the time.

## Effective receptive fields

With random weights, as no trained ones are at hand.

![effective receptive fields](erf.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("training-report"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    runs, report = options.output, Path(__file__).parent / "results" / "training"
    report.mkdir(parents=True, exist_ok=True)
    images = runs / "images"
    if not images.exists():
        script = Path(__file__).parents[1] / "examples" / "sample_images.py"
        subprocess.run([sys.executable, str(script), str(images)], check=True)
        subprocess.run([sys.executable, str(script), str(images / "large"), "--size", "384"], check=True)

    learnt = run(runs / "digits", digits(), digits_recipe(image_size=SIZE, epochs=EPOCHS), profile=True)
    weights = runs / "digits" / "best.pth"
    validated = json.loads(
        command("validate", images / "digits", "--checkpoint", weights, "--output", report / "confusion.png", "--json")
    )
    recipe = Recipe.finetune(
        "mobilemamba_t2",
        str(weights),
        options=OPTIONS,
        image_size=SIZE,
        epochs=15,
        batch_size=16,
        learning_rate=0.064,
        val_fraction=0.3,
    )
    tuned = run(runs / "photos", images / "photos", recipe)
    recipe = digits_recipe(image_size=SIZE, epochs=15, batch_size=16, hflip=0.5, val_fraction=0.3)
    scratch = run(runs / "photos-scratch", images / "photos", recipe)
    steps = speed(runs / "speed", images / "large" / "photos")
    rows = study(runs / "study", weights, options.seeds)
    draw_study(rows, report / "distillation.png")
    command("erf", "--model", "mobilemamba_s6", "--beside", "mobilenetv3_small_100", "--output", report / "erf.png")
    shutil.copy(runs / "digits" / "curves.png", report / "curves.png")
    shutil.copy(runs / "photos" / "curves.png", report / "curves-photos.png")
    alone, taught = (np.array([row[name] for row in rows]) for name in ("alone", "taught"))
    results = {
        "environment": bench.environment(),
        "digits": learnt,
        "digits validated, fused": {name: validated[name] for name in ("top1", "top5", "images_per_s")},
        "photographs, fine-tuned": tuned,
        "photographs, from scratch": scratch,
        "steps of S6, 224, 16 images": steps,
        "distillation": {"rows": rows} | {
            name: dict(zip(("mean", "half width of the 95 % interval"), interval(values), strict=True))
            for name, values in (("alone", alone), ("taught", taught), ("difference", taught - alone))
        },
    }  # fmt: skip
    (report / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (report / "README.md").write_text(text_of(results))
    print(json.dumps(results["distillation"], indent=2))


if __name__ == "__main__":
    main()
