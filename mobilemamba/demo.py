"""The demo: a small MobileMamba learns handwritten digits, is used, and is measured. Needs scikit-learn, matplotlib."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor

from mobilemamba import bench
from mobilemamba.bench_network import ENGINES, Setting
from mobilemamba.checkpoints import model_from_checkpoint, save_checkpoint
from mobilemamba.factory import create_model
from mobilemamba.inference import fuse
from mobilemamba.model import MobileMamba
from mobilemamba.predict import prepare_image
from mobilemamba.profile import count_parameters
from mobilemamba_kernels.testing import cases

REQUIRED_ACCURACY = 0.97
EPOCHS = 20
BATCH = 64
LEARNING_RATE = 4e-3
SIZE = 128  # the stem has stride 16: 8×8 positions in the first stage, one for each pixel of a scan
# Every stage keeps its three branches: 32 + 9 + 7, 48 + 12 + 4 and 48 + 24 + 8 channels (global, local, untouched).
OPTIONS: dict[str, Any] = {"widths": (48, 64, 80), "depths": (1, 1, 1)}


@dataclass(frozen=True)
class Digits:
    """Scans of handwritten digits from 43 people (Alpaydin and Kaynak 1998), split once and for all."""

    train_images: np.ndarray  # (n, 8, 8), uint8
    train_labels: Tensor  # (n)
    test_images: np.ndarray
    test_labels: Tensor


def load() -> Digits:
    """A quarter of scikit-learn's 1797 scans is held out, as many of each digit."""
    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    split = train_test_split(images, data.target, test_size=0.25, stratify=data.target, random_state=0)
    return Digits(split[0], torch.from_numpy(split[2]), split[1], torch.from_numpy(split[3]))


def build(digits: Digits) -> MobileMamba:
    """The network, which knows how its images are prepared and what its classes are called."""
    model = create_model("mobilemamba_t2", num_classes=10, in_chans=1, **OPTIONS)
    pixels = digits.train_images / 255
    model.default_cfg |= {"input_size": (1, SIZE, SIZE), "crop_pct": 1.0, "label_names": [str(i) for i in range(10)]}
    model.default_cfg |= {"mean": (float(pixels.mean()),), "std": (float(pixels.std()),)}
    return model


def prepare(images: np.ndarray, model: MobileMamba) -> Tensor:
    """Scans as the command line prepares image files: (n, 1, 128, 128)."""
    prepared = [prepare_image(Image.fromarray(image), model.default_cfg) for image in images]
    return torch.from_numpy(np.stack(prepared)).contiguous(memory_format=torch.channels_last)


def train(model: MobileMamba, x: Tensor, labels: Tensor, epochs: int, console: Console) -> None:
    """The recipe in small: AdamW, warm-up and cosine, label smoothing, clipped gradients, distorted images."""
    undecayed = model.no_weight_decay()
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in model.named_parameters() if p.requires_grad and n not in undecayed]},
        {"params": [p for n, p in model.named_parameters() if p.requires_grad and n in undecayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, weight_decay=0.05)
    steps = epochs * (len(x) // BATCH)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm_up), LEARNING_RATE / 100),
        ],
        [warm_up],
    )
    generator = torch.Generator().manual_seed(0)
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.fields[state]}"), TimeRemainingColumn())
    model.train()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=steps, state="")
        for epoch in range(epochs):
            losses = []
            # The last images of a shuffled epoch, too few for a batch, wait for the next one.
            for batch in torch.randperm(len(x), generator=generator)[: len(x) // BATCH * BATCH].split(BATCH):
                logits = model(distort(x[batch], generator))
                assert isinstance(logits, Tensor)
                loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                progress.update(task, advance=1, state=f"epoch {epoch + 1}/{epochs}, loss {np.mean(losses):.3f}")
            if not console.is_terminal and (epoch + 1) % 5 == 0:
                console.print(f"  epoch {epoch + 1}/{epochs}, loss {np.mean(losses):.3f}")
    model.eval()


def distort(x: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 11°, scale by up to 10 %, shift by up to 0.6 pixels of the scan: x (n, 1, 128, 128)."""
    angle, scale, dx, dy = (torch.rand(4, len(x), generator=generator) * 2 - 1).unbind()
    cos, sin = (1 + 0.1 * scale) * torch.cos(0.2 * angle), (1 + 0.1 * scale) * torch.sin(0.2 * angle)
    maps = torch.stack((cos, -sin, 0.15 * dx, sin, cos, 0.15 * dy), 1).view(-1, 2, 3)
    grid = F.affine_grid(maps, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


@torch.inference_mode()
def classify(model: MobileMamba, x: Tensor) -> Tensor:
    """Probabilities (n, 10)."""
    return torch.cat([model(part) for part in x.split(BATCH)]).softmax(1)


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
    torch.manual_seed(0)
    digits = load()
    model = build(digits)
    console.print(
        f"[bold]1[/]  A MobileMamba of {count_parameters(model):,} parameters learns {len(digits.train_labels)} scans "
        f"of handwritten digits; {len(digits.test_labels)} are held out."
    )
    start = time.perf_counter()
    train(model, prepare(digits.train_images, model), digits.train_labels, 2 if quick else EPOCHS, console)
    console.print(f"   trained in {time.perf_counter() - start:.0f} s")

    checkpoint = output / "digits.pth"
    save_checkpoint(model, checkpoint)
    reloaded = model_from_checkpoint(checkpoint)
    fused = fuse(reloaded)
    held_out = prepare(digits.test_images, model)
    probabilities = classify(model, held_out)
    if not torch.equal(probabilities, classify(reloaded, held_out)):
        raise RuntimeError("the network read back from its checkpoint gives other predictions")
    fused_probabilities = classify(fused, held_out)
    if (fused_probabilities - probabilities).abs().max() > 1e-3:
        raise RuntimeError("the fused network gives other predictions")
    console.print(f"[bold]2[/]  Saved to {checkpoint}, read back (the same bits), and fused (no batch norm left).")

    accuracy = (fused_probabilities.argmax(1) == digits.test_labels).double().mean().item()
    plain = LogisticRegression(max_iter=1000).fit(digits.train_images.reshape(-1, 64) / 255.0, digits.train_labels)
    baseline = float(plain.score(digits.test_images.reshape(-1, 64) / 255.0, digits.test_labels))
    console.print(
        f"[bold]3[/]  Held-out digits: MobileMamba [bold green]{accuracy:.1%}[/], logistic regression {baseline:.1%}."
    )
    examples = output / "digits"
    examples.mkdir(exist_ok=True)
    for i, (image, label) in enumerate(zip(digits.test_images[:12], digits.test_labels.tolist(), strict=False)):
        Image.fromarray(image).save(examples / f"{i:02}-is-{label}.png")
    written = [draw_predictions(digits, fused_probabilities, output / "predictions.png")]

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


INK, GREY, BLUE, RED = "#1f2933", "#9aa5b1", "#2563eb", "#dc2626"


def draw_predictions(digits: Digits, probabilities: Tensor, path: Path) -> Path:
    """Forty held-out digits with prediction and confidence, every mistake among them."""
    confidences, predicted = probabilities.max(1)
    wrong = (predicted != digits.test_labels).nonzero().flatten().tolist()[:16]
    right = [i for i in range(len(predicted)) if predicted[i] == digits.test_labels[i]]
    shown = [*right[: 40 - len(wrong)], *wrong]
    figure, axes = _pyplot().subplots(5, 8, figsize=(11, 8.4), layout="constrained")
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
    return _save(figure, path)


def draw_speeds(speeds: dict[str, tuple[bench.Timing, bench.Timing]], path: Path) -> Path:
    """How many times faster than plain PyTorch, with the milliseconds of both."""
    ratios = [plain.median / kernel.median for kernel, plain in speeds.values()]
    figure, ax = _pyplot().subplots(figsize=(10, 0.75 * len(speeds) + 1.8), layout="constrained")
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
    return _save(figure, path)


def _milliseconds(timing: bench.Timing) -> str:
    ms = 1e3 * timing.median
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


def _pyplot() -> Any:
    matplotlib.use("Agg")  # pictures go to files: no display is needed
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=150, facecolor="white")
    _pyplot().close(figure)
    return path
