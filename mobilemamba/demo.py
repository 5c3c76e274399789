"""The demo: a small MobileMamba learns handwritten digits, is used, and is measured. Needs the extra ``train``."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mobilemamba import bench
from mobilemamba.bench_network import ENGINES, Setting
from mobilemamba.checkpoints import model_from_checkpoint
from mobilemamba.inference import fuse
from mobilemamba.model import MobileMamba
from mobilemamba.predict import prepare_image
from mobilemamba.profile import count_parameters
from mobilemamba.training import Recipe, train
from mobilemamba.training.module import build_network
from mobilemamba.training.pictures import BLUE, GREY, INK, RED, pyplot, save
from mobilemamba.training.sources import Source, digits, split
from mobilemamba_kernels.testing import cases

REQUIRED_ACCURACY = 0.97
EPOCHS = 16
SIZE = 128  # the stem has stride 16: 8×8 positions in the first stage, one for each pixel of a scan
# Every stage keeps its three branches: 32 + 9 + 7, 48 + 12 + 4 and 48 + 24 + 8 channels (global, local, untouched).
OPTIONS: dict[str, Any] = {"widths": (48, 64, 80), "depths": (1, 1, 1)}


def digits_recipe(**changes: Any) -> Recipe:
    """The paper's in small. Digits are neither mirrored nor cropped to a twelfth, and have no colours."""
    fields: dict[str, Any] = {
        "options": OPTIONS,
        "batch_size": 64,
        "learning_rate": 0.064,
        "auto_augment": "",
        "color_jitter": 0.0,
        "random_erasing": 0.0,
        "crop_scale": (0.6, 1.0),
        "hflip": 0.0,
    }
    return Recipe.paper("mobilemamba_t2", **(fields | changes))


def recipe(epochs: int) -> Recipe:
    """Of whole scans, which are few and need no mixing."""
    return digits_recipe(in_chans=1, image_size=SIZE, epochs=epochs, mixup=0.0, cutmix=0.0)


@dataclass(frozen=True)
class Digits:
    """The held-out scans, and those to learn from as a plain classifier gets them."""

    train_pixels: np.ndarray  # (n, 64), from 0 to 1
    train_labels: np.ndarray  # (n)
    test_images: np.ndarray  # (n, 8, 8), uint8
    test_labels: Tensor


def load(sources: tuple[Source, Source]) -> Digits:
    train_images, test_images = (
        np.stack([np.asarray(Image.open(source.open(i))) for i in range(len(source.labels))]) for source in sources
    )
    labels = [source.labels for source in sources]
    return Digits(train_images.reshape(-1, 64) / 255, labels[0], test_images, torch.from_numpy(labels[1]))


def prepare(images: np.ndarray, model: MobileMamba) -> Tensor:
    """Scans as the command line prepares image files: (n, 1, 128, 128)."""
    prepared = [prepare_image(Image.fromarray(image), model.default_cfg) for image in images]
    return torch.from_numpy(np.stack(prepared)).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def classify(model: MobileMamba, x: Tensor) -> Tensor:
    """Probabilities (n, 10)."""
    return torch.cat([model(part) for part in x.split(64)]).softmax(1)


def run(output: Path, quick: bool = False) -> None:
    """Run the demo and write its checkpoint and pictures into ``output``.

    Raises:
        RuntimeError: the network learns too little, or a reloaded or fused network is not the one that was trained.
        OSError: ``output`` cannot be written.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    output.mkdir(parents=True, exist_ok=True)
    learnt, unseen = digits()
    held_out = load((learnt, unseen))
    sources = split(learnt, 0.1, seed=0)  # the second part chooses the epoch
    chosen = recipe(2 if quick else EPOCHS)
    parameters = count_parameters(build_network(chosen, sources[0].classes))
    console.print(
        f"[bold]1[/]  A MobileMamba of {parameters:,} parameters learns {len(learnt.labels)} scans of handwritten "
        f"digits; {len(held_out.test_labels)} are held out."
    )
    shutil.rmtree(output / "run", ignore_errors=True)
    result = train(sources, chosen, output / "run", accelerator="cpu", show=lambda line: console.print(f"   {line}"))
    console.print(f"   trained in {result.seconds:.0f} s")

    checkpoint = output / "digits.pth"
    shutil.copy(result.best, checkpoint)
    shutil.copy(output / "run" / "curves.png", output / "curves.png")
    model = model_from_checkpoint(checkpoint)
    fused = fuse(model)
    images = prepare(held_out.test_images, model)
    probabilities, fused_probabilities = classify(model, images), classify(fused, images)
    if (fused_probabilities - probabilities).abs().max() > 1e-3:
        raise RuntimeError("the fused network gives other predictions")
    console.print(f"[bold]2[/]  Saved to {checkpoint}, read back, and fused (no batch norm left).")

    accuracy = (fused_probabilities.argmax(1) == held_out.test_labels).double().mean().item()
    plain = LogisticRegression(max_iter=1000).fit(held_out.train_pixels, held_out.train_labels)
    baseline = float(plain.score(held_out.test_images.reshape(-1, 64) / 255, held_out.test_labels))
    console.print(
        f"[bold]3[/]  Held-out digits: MobileMamba [bold green]{accuracy:.1%}[/], logistic regression {baseline:.1%}."
    )
    examples = output / "digits"
    examples.mkdir(exist_ok=True)
    for i, (image, label) in enumerate(zip(held_out.test_images[:12], held_out.test_labels.tolist(), strict=False)):
        Image.fromarray(image).save(examples / f"{i:02}-is-{label}.png")
    written = [output / "curves.png", draw_predictions(held_out, fused_probabilities, output / "predictions.png")]

    try:
        bench.refuse_fallback()
    except RuntimeError as error:
        console.print(f"[bold]4[/]  No speeds: {error}.")
    else:
        speeds = measure_speeds(0.05 if quick else 1.0)
        console.print("[bold]4[/]  Speed beside plain PyTorch, float32:")
        for name, timings in speeds.items():
            ms = [1e3 * timing.median for timing in timings]
            console.print(f"   {name:<36} {ms[0]:8.2f} ms, plain {ms[1]:8.2f} ms: [bold]{ms[1] / ms[0]:.1f}×[/]")
        written.append(draw_speeds(speeds, output / "speeds.png"))

    console.print(f"[bold]5[/]  Pictures: {', '.join(map(str, written))}", soft_wrap=True)
    console.print(f"   Try: mobilemamba predict {examples} --checkpoint {checkpoint} --top-k 1", soft_wrap=True)
    if not quick and accuracy < REQUIRED_ACCURACY:
        raise RuntimeError(f"the network learnt too little: {accuracy:.1%} where {REQUIRED_ACCURACY:.0%} are expected")
    if not quick and accuracy <= baseline:
        raise RuntimeError(f"the network, {accuracy:.1%}, is not above the logistic regression, {baseline:.1%}")


def measure_speeds(budget_s: float) -> dict[str, tuple[bench.Timing, bench.Timing]]:
    """Kernel and plain PyTorch on the network's first stage, and on the whole network."""
    wanted = {
        ("bidirectional_selective_scan", "forward"): "scan, both directions",
        ("bidirectional_selective_scan", "backward"): "its gradient",
        ("wavelet_depthwise_conv2d", "forward"): "wavelet convolution 7×7",
        ("depthwise_conv2d_act", "forward"): "depthwise convolution 3×3",
    }
    first = {op: cases(op, benchmark=True)[0] for op, _ in wanted}
    speeds = {}
    for case, direction in bench.measured_cases():
        if case is first.get(case.op) and (case.op, direction) in wanted:
            op = bench.bench_op(case, direction, budget_s=budget_s)
            speeds[wanted[case.op, direction]] = (op.kernel, op.plain)
    for batch in (16, 1):
        setting = Setting("mobilemamba_s6", batch)
        engines = [ENGINES[name].build(setting) for name in ("float32", "plain")]
        ours, plain = bench.time_in_turn(engines, budget_s=3 * budget_s)
        speeds[f"MobileMamba-S6, {batch} image{'s' * (batch > 1)}"] = (ours, plain)
    return speeds


def draw_predictions(digits: Digits, probabilities: Tensor, path: Path) -> Path:
    """Forty held-out digits with prediction and confidence, every mistake among them."""
    confidences, predicted = probabilities.max(1)
    wrong = (predicted != digits.test_labels).nonzero().flatten().tolist()[:16]
    right = [i for i in range(len(predicted)) if predicted[i] == digits.test_labels[i]]
    shown = [*right[: 40 - len(wrong)], *wrong]
    figure, axes = pyplot().subplots(5, 8, figsize=(11, 8.4), layout="constrained")
    for ax, i in zip(axes.flat, shown, strict=True):
        ax.imshow(digits.test_images[i], cmap="gray_r", interpolation="bicubic")  # as the network sees it
        ax.set(xticks=[], yticks=[])
        colour = RED if i in wrong else INK
        text = f"{predicted[i]}  ·  {confidences[i]:.0%}"
        ax.set_title(text + (f"  (is {digits.test_labels[i]})" if i in wrong else ""), fontsize=11, color=colour)
        for spine in ax.spines.values():
            spine.set(color=colour if i in wrong else "#e4e7eb", linewidth=1.5)
    correct = int((predicted == digits.test_labels).sum())
    figure.suptitle(
        "Held-out handwritten digits: prediction and confidence\n"
        f"{correct} of {len(predicted)} are right ({correct / len(predicted):.1%})\n",
        fontsize=15,
        color=INK,
    )
    return save(figure, path)


def draw_speeds(speeds: dict[str, tuple[bench.Timing, bench.Timing]], path: Path) -> Path:
    """How many times faster than plain PyTorch, with the milliseconds of both."""
    ratios = [plain.median / kernel.median for kernel, plain in speeds.values()]
    figure, ax = pyplot().subplots(figsize=(10, 0.75 * len(speeds) + 1.8), layout="constrained")
    # On a logarithmic axis from 1: to the right is faster, to the left slower, by length alike.
    ax.barh(range(len(speeds)), [ratio - 1 for ratio in ratios], left=1, color=BLUE, height=0.6)
    for row, ((kernel, plain), ratio) in enumerate(zip(speeds.values(), ratios, strict=True)):
        text = f"{ratio:.1f}×   {_milliseconds(plain)} → {_milliseconds(kernel)}"
        ax.annotate(text, (max(1, ratio), row), (6, 0), textcoords="offset points", va="center", color=INK)
    ax.axvline(1, color=GREY, linewidth=1.2)
    ax.annotate("plain PyTorch", (1, -0.5), (4, 4), textcoords="offset points", fontsize=9, color=GREY)
    ax.set_yticks(range(len(speeds)), list(speeds), fontsize=11, color=INK)
    ax.set(xscale="log", xlim=(min(0.9, *ratios), 4 * max(ratios)), ylim=(len(speeds) - 0.4, -0.8))
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if 0.9 * min(1, *ratios) < tick < 2 * max(ratios)]
    ax.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel("times faster than plain PyTorch (float32, medians)", color=INK)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    environment = bench.environment()
    ax.set_title(
        f"MobileMamba's kernels\n{environment['cpu']}, threads: {environment['threads']}, torch {environment['torch']}",
        fontsize=13,
        color=INK,
        loc="left",
    )
    return save(figure, path)


def _milliseconds(timing: bench.Timing) -> str:
    ms = 1e3 * timing.median
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms"
