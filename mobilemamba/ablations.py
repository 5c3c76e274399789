"""The paper's ablations (arXiv 2411.15941, Table 8 and appendix Tables A1 to A5): what is varied, and what comes of it.

A study is a variant and the rows that change it. :func:`measure` counts and times them, :func:`accuracy` trains one.
Figures of the paper stand beside the rows that are its published variants; we do not have those of the other rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mobilemamba.bench import Timing, time_in_turn
from mobilemamba.checkpoints import write_file
from mobilemamba.factory import create_model
from mobilemamba.inference import fuse
from mobilemamba.model import MobileMamba
from mobilemamba.optimized import optimize_for_inference
from mobilemamba.profile import count_macs, count_parameters
from mobilemamba.variants import VARIANTS, Options, change_options, find_variant

if TYPE_CHECKING:  # needs the packages of mobilemamba[train]
    from mobilemamba.training import Recipe

PAPER_EPOCHS = 300

# Images a second on the authors' GPU, normalizations fused; read off the chart of accuracy and speed in the authors'
# repository (assets/comparewithmamba.png), where a pixel is four images a second.
_IMAGES_PER_S = {
    "mobilemamba_t2": 21100,
    "mobilemamba_t4": 16600,
    "mobilemamba_s6": 11000,
    "mobilemamba_b1": 7000,
    "mobilemamba_b2": 3200,
    "mobilemamba_b4": 1900,
}


@dataclass(frozen=True)
class Row:
    """One line of a study."""

    label: str
    options: dict[str, Any] = field(default_factory=dict)
    """For :func:`mobilemamba.create_model`."""
    image_size: int = 0
    """Height and width of the images; 0 for the variant's."""
    distillation: bool = False
    """Whether a teacher helps in training."""
    epochs: int = PAPER_EPOCHS
    form: str = "optimized"
    """What is timed: the network as trained ("plain"), with the normalizations fused ("fused"), or "optimized"."""
    model: str = ""
    """The variant; :func:`rows` fills it in."""

    def made_of(self) -> Options:
        """All options of the network."""
        return change_options(find_variant(self.model).options, self.options)

    def folder(self) -> str:
        """A name that rows have in common exactly where they train the same network in the same way."""
        base, made = asdict(find_variant(self.model).options), asdict(self.made_of())
        changes = [f"{name}={_joined(value)}" for name, value in made.items() if value != base[name]]
        changes += ["distillation"] * self.distillation + ["longer"] * (self.epochs > PAPER_EPOCHS)
        return "-".join([self.model.removeprefix("mobilemamba_"), str(self.image_size), *changes])


@dataclass(frozen=True)
class Study:
    """One thing that is varied."""

    title: str
    table: str
    """Where the paper has it."""
    model: str
    """The variant that rows change unless another is asked for."""
    rows: tuple[Row, ...]


def _each(option: str, *values: Any, label: str = "{}") -> tuple[Row, ...]:
    return tuple(Row(label.format(_joined(value, ", ")), {option: value}) for value in values)


def _joined(value: Any, separator: str = "_") -> str:
    return separator.join(map(str, value)) if isinstance(value, tuple) else str(value)


def _ratios(label: str, *values: tuple[float, float, float] | float) -> Row:
    return Row(label, dict(zip(("global_ratio", "local_ratio"), values, strict=True)))


_APPENDIX = "appendix Tables A1 to A5"

STUDIES = {
    "scan": Study(
        "Scan directions, state size N and expansion R of the Mamba branch",
        _APPENDIX,
        "mobilemamba_s6",
        (
            *_each("scan_directions", 1, 2, 4, label="{} directions"),
            *_each("d_state", 2, 4, 16, label="2 directions, N = {}"),
            *_each("ssm_ratio", 1, label="2 directions, R = {}"),
        ),
    ),
    "wavelet": Study(
        "The wavelet branch beside the Mamba branch",
        _APPENDIX,
        "mobilemamba_s6",
        (Row("with the wavelet branch"), Row("without", {"wavelet": False})),
    ),
    "kernels": Study(
        "Kernel sizes of the stages, and groups of the local channels with kernels 3, 5, …",
        _APPENDIX,
        "mobilemamba_s6",
        (
            *_each("kernels", (3, 3, 3), (5, 5, 5), (7, 7, 7), (3, 5, 7), (7, 5, 3), label="kernels {}"),
            *_each("local_groups", 2, 3, label="kernels 7, 5, 3, local groups {}"),
        ),
    ),
    "ratios": Study(
        "Shares of global (Mamba and wavelet), local (convolution) and untouched channels",
        _APPENDIX,
        "mobilemamba_s6",
        (
            _ratios("global 0.8, 0.7, 0.6, local 0.2, 0.2, 0.3", (0.8, 0.7, 0.6), (0.2, 0.2, 0.3)),
            _ratios("no local", (0.8, 0.7, 0.6), 0.0),
            _ratios("no global", 0.0, (0.2, 0.2, 0.3)),
            _ratios("none untouched", (0.8, 0.7, 0.6), (0.2, 0.3, 0.4)),
            _ratios("global 0.6, 0.7, 0.8, local 0.3, 0.2, 0.2", (0.6, 0.7, 0.8), (0.3, 0.2, 0.2)),
            _ratios("global 0.7, local 0.2", 0.7, 0.2),
            _ratios("global 0.5, local 0.5", 0.5, 0.5),
            _ratios("global 0.3, local 0.3", 0.3, 0.3),
        ),
    ),
    "widths": Study(
        "Channels of the stages",
        _APPENDIX,
        "mobilemamba_t4",
        _each("widths", (112, 224, 320), (144, 272, 368), (160, 320, 400), (176, 368, 448), (192, 384, 448)),
    ),
    "depths": Study(
        "Blocks of the stages",
        _APPENDIX,
        "mobilemamba_b1",
        _each("depths", (1, 2, 2), (2, 2, 2), (1, 3, 2), (2, 3, 2), (2, 4, 2), (3, 3, 3)),
    ),
    "resolution": Study(
        "Sizes of the images",
        _APPENDIX,
        "mobilemamba_b1",
        tuple(Row(f"{size}²", image_size=size) for size in (192, 224, 256, 320, 384, 448, 512)),
    ),
    "drop-path": Study(
        "Rate of stochastic depth in the last block",
        _APPENDIX,
        "mobilemamba_b1",
        _each("drop_path_rate", 0.0, 0.03, 0.05, 0.1, 0.2),
    ),
    "strategies": Study(
        "Training and testing strategies, added one by one",
        "Table 8",
        "mobilemamba_s6",
        (
            Row("none", form="plain"),
            Row("+ knowledge distillation", distillation=True, form="plain"),
            Row("+ 1000 epochs for 300", distillation=True, epochs=1000, form="plain"),
            Row("+ normalization layer fusion", distillation=True, epochs=1000, form="fused"),
        ),
    ),
}


def rows(study: str, model: str | None = None) -> list[Row]:
    """The rows of a study on a variant, its own if ``model`` is None.

    Raises:
        ValueError: there is no such study or variant.
    """
    if study not in STUDIES:
        raise ValueError(f"there is no study {study!r}; the studies are {', '.join(STUDIES)}")
    model = model or STUDIES[study].model
    size = find_variant(model).image_size
    return [replace(row, model=model, image_size=row.image_size or size) for row in STUDIES[study].rows]


@dataclass(frozen=True)
class Published:
    """The paper's figures of a row; None where we do not have them."""

    parameters: float | None = None
    """Millions."""
    macs: int | None = None
    """Millions, with the scan and the normalizations."""
    images_per_s: int | None = None
    """On the authors' GPU, read off a chart to the nearest 100."""
    top1: float | None = None
    """Percent, ImageNet-1K."""


def published(row: Row) -> Published:
    """The figures of the variant that a row is, as far as it is one: drop path, for one, changes accuracy alone."""
    found, made = Published(), row.made_of()
    for name, variant in VARIANTS.items():
        if replace(variant.options, drop_path_rate=made.drop_path_rate) != made:
            continue
        found = replace(found, parameters=variant.parameters)
        if variant.image_size != row.image_size:
            continue
        accuracies = {(False, PAPER_EPOCHS): variant.top1, (True, 1000): variant.top1_strategies}
        return replace(
            found,
            macs=variant.macs,
            images_per_s=None if row.form == "plain" else _IMAGES_PER_S[name],
            top1=accuracies.get((row.distillation, row.epochs)) if variant.options == made else None,
        )
    return found


@dataclass(frozen=True)
class Measured:
    """A row's network: parameters and multiply-adds as :mod:`mobilemamba.profile` counts them, and one call's time."""

    row: Row
    parameters: int
    macs: int
    batch_size: int
    timing: Timing | None = None

    @property
    def images_per_s(self) -> float | None:
        return None if self.timing is None else self.batch_size / self.timing.median


def measure(
    rows: Sequence[Row],
    batch_size: int = 16,
    threads: int | None = None,
    device: torch.device | str = "cpu",
    speed: bool = True,
) -> list[Measured]:
    """Count the rows' parameters and multiply-adds, and time them in turn, in float32.

    Args:
        rows: what :func:`rows` gave.
        batch_size: images at once.
        threads: of the CPU; None for as many as PyTorch has.
        device: a CPU or a CUDA GPU.
        speed: whether to time at all.
    """
    counts = [_counted(replace(row.made_of(), drop_path_rate=0), row.image_size) for row in rows]
    found = [Measured(row, *count, batch_size) for row, count in zip(rows, counts, strict=True)]
    if not speed:
        return found
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        timings = time_in_turn([_call(row, batch_size, device) for row in rows])
    finally:
        torch.set_num_threads(before)
    return [replace(m, timing=timing) for m, timing in zip(found, timings, strict=True)]


@cache
def _counted(options: Options, image_size: int) -> tuple[int, int]:
    with torch.device("meta"):
        network = MobileMamba(options)
    return count_parameters(network), count_macs(network, image_size)


_FORMS: dict[str, Callable[[MobileMamba], MobileMamba]] = {
    "plain": MobileMamba.eval,
    "fused": fuse,
    "optimized": optimize_for_inference,
}


def _call(row: Row, batch_size: int, device: torch.device | str) -> Callable[[], None]:
    torch.manual_seed(0)
    network = _FORMS[row.form](create_model(row.model, **row.options).to(device))
    x = torch.randn(batch_size, 3, row.image_size, row.image_size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)

    def run() -> None:
        with torch.inference_mode():
            network(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    return run


def recipe(
    row: Row, epochs: int | None = None, teacher: str = "", teacher_checkpoint: str = "", **changes: Any
) -> Recipe:
    """How to train a row's network: the paper's recipe.

    Args:
        row: what :func:`rows` gave.
        epochs: in place of the paper's 300; what the paper trains for 1000 is trained longer in proportion.
        teacher: timm's name of a network that a row with distillation learns from.
        teacher_checkpoint: its weights; empty for timm's.
        **changes: other fields of :class:`mobilemamba.training.Recipe`.

    Raises:
        TypeError, ValueError: a row with distillation has no teacher, or a value is not possible.
    """
    from mobilemamba.training import Recipe

    if row.distillation and not teacher:
        raise ValueError(
            f"the row {row.label!r} learns from a teacher, but none is given: name one of timm's networks for these "
            "classes (the paper's, for ImageNet-1K, is tresnet_l)"
        )
    return Recipe.paper(
        model=row.model,
        options=row.options,
        image_size=row.image_size,
        epochs=row.epochs if epochs is None else round(epochs * row.epochs / PAPER_EPOCHS),
        teacher=teacher if row.distillation else "",
        teacher_checkpoint=teacher_checkpoint if row.distillation else "",
        **changes,
    )


def accuracy(row: Row, data: str, recipe: Recipe, output: str | os.PathLike[str]) -> dict[str, float]:
    """Top-1 and top-5 accuracy of a row's network, in percent: from an earlier call's result, or trained now.

    Args:
        row: what :func:`rows` gave.
        data: for :func:`mobilemamba.training.train`.
        recipe: what :func:`recipe` gave.
        output: a folder; a network has one of its own in it, with ``result.json`` once it is trained, and goes on there
            if training was interrupted.

    Returns:
        "top1" and "top5".

    Raises:
        OSError, RuntimeError, TypeError, ValueError: training fails; or ``output`` has a result of something else.
    """
    from mobilemamba.training import train

    asked = json.loads(json.dumps({"data": str(data), "recipe": asdict(recipe)}))
    folder = Path(output, row.folder())
    path = folder / "result.json"
    if path.exists():
        return _kept(path, asked)
    trained = train(data, recipe, folder, resume=True)
    result = {"top1": trained.top1, "top5": trained.top5}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"asked": asked, "result": result}, indent=2)
    write_file(path, lambda file: file.write(text.encode()))
    return result


def _kept(path: Path, asked: dict[str, Any]) -> dict[str, float]:
    try:
        kept = json.loads(path.read_text())
        result = {name: float(kept["result"][name]) for name in ("top1", "top5")}
        same = kept["asked"] == asked
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no result of an ablation: remove it, and the row is trained again") from error
    if not same:
        raise ValueError(f"{path} is of other data or another recipe: choose another folder, or remove {path.parent}")
    return result
