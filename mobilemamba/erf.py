"""Effective receptive fields (Luo et al. 2016, arXiv 1701.04128): what each pixel contributes to a map's centre.

The contributions and the ratio r are those of RepLKNet (arXiv 2203.06717) as its published script computes them, the
networks any with timm's ``forward_intermediates``. Pictures need matplotlib, the sample images scikit-learn.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mobilemamba import checkpoints
from mobilemamba.factory import create_model
from mobilemamba.predict import prepare_image

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)
_SQUARES = {0.5: "-", 0.99: "--"}  # the thresholds in the picture, and their lines
_LEAST = 1e-4  # of the greatest contribution, where the colours begin


def effective_receptive_field(model: Any, images: Tensor, stage: int) -> np.ndarray:
    """The contribution of every pixel to the central position of a stage's map: (H, W), float64, at least 0.

    The gradient, with respect to the image, of the positive values at position (h // 2, w // 2) of the map, added up
    over its channels; of the gradient the positive part, added up over the image's channels, the mean of the images.
    Where h is odd, that position lies half a stride from the image's centre: at 256² never, at 224² from stride 32 on.

    Args:
        model: a network in eval mode with timm's ``forward_intermediates``.
        images: prepared images (N, C, H, W), on the model's device; they are computed one by one.
        stage: index of the map, as ``forward_intermediates`` counts; for one map of each stride see :func:`stages`.

    Raises:
        ValueError: there is no image, or the stage's result is no map (1, channels, h, w).
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images must be (N, C, H, W) with N of at least 1, but are {tuple(images.shape)}")
    contributions = torch.zeros(images.shape[2:], dtype=torch.float64, device=images.device)
    for image in images.detach().split(1):
        image.requires_grad_()
        (features,) = model.forward_intermediates(
            image, indices=[stage], stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        if features.ndim != 4:
            raise ValueError(f"stage {stage} gives no map (1, channels, h, w), but {tuple(features.shape)}")
        height, width = features.shape[2:]
        (gradient,) = torch.autograd.grad(features[:, :, height // 2, width // 2].relu().sum(), image)
        contributions += gradient.relu().sum((0, 1), dtype=torch.float64)
    return (contributions / len(images)).cpu().numpy()


def high_contribution_ratio(erf: np.ndarray, thresholds: Sequence[float] = THRESHOLDS) -> dict[float, float]:
    """RepLKNet's r for each threshold t: the share of the image's area that holds a share t of all contributions.

    The area is the smallest square of 2 k + 1 pixels around pixel (H // 2, W // 2) that holds them, cut off at the
    image's edges. A large r means a wide field. The contributions are taken as they are; RepLKNet's script measures
    log10(erf + 1) instead, which depends on the scale of the gradients: give that for its figures.

    Args:
        erf: contributions (H, W), as :func:`effective_receptive_field` gives them.
        thresholds: shares t, above 0 and at most 1.

    Raises:
        ValueError: a threshold is out of range, or the contributions are negative, not finite, or all 0.
    """
    height, width = erf.shape
    sides = {t: 2 * _radius(erf, t) + 1 for t in thresholds}
    return {t: min(side, height) * min(side, width) / (height * width) for t, side in sides.items()}


def _radius(erf: np.ndarray, threshold: float) -> int:
    """k of the smallest square of 2 k + 1 pixels in the centre that holds the share ``threshold``."""
    if not 0 < threshold <= 1:
        raise ValueError(f"a threshold must be above 0 and at most 1, but is {threshold}")
    if erf.ndim != 2 or not np.isfinite(erf).all() or (erf < 0).any() or not erf.any():
        raise ValueError("contributions must be (H, W), finite, none negative, and not all 0")
    rows, columns = (np.abs(np.arange(n) - n // 2) for n in erf.shape)
    rings = np.maximum(rows[:, None], columns)
    held = np.cumsum(np.bincount(rings.ravel(), erf.ravel()))
    return int(np.searchsorted(held, threshold * held[-1]))


def stages(model: Any) -> dict[int, int]:
    """The last map of each stride: stride → index for ``forward_intermediates``."""
    return {info["reduction"]: index for index, info in enumerate(model.feature_info)}


@dataclass(frozen=True)
class Network:
    """A network in eval mode, in float32, and whose weights it has."""

    name: str
    model: Any
    checkpoint: str | None
    """The file of the weights; None where they are random."""

    @property
    def weights(self) -> str:
        return "random weights" if self.checkpoint is None else self.checkpoint


@dataclass(frozen=True)
class Field:
    """The field of one stage of a network."""

    network: Network
    stage: int
    """From 1, in the order of the strides."""
    stride: int
    erf: np.ndarray
    """(H, W)."""
    ratios: dict[float, float]


def measure(network: Network, images: Tensor, stride: int) -> Field:
    """The field of the stage of this stride, from images that :func:`prepare` gave.

    Raises:
        ValueError: the contributions are not finite, or all 0.
    """
    indices = stages(network.model)
    stage = 1 + list(indices).index(stride)
    erf = effective_receptive_field(network.model, images, indices[stride])
    if not np.isfinite(erf).all() or not erf.any():
        raise ValueError(f"{network.name} has no finite gradient at stage {stage}: give more images, or larger ones")
    return Field(network, stage, stride, erf, high_contribution_ratio(erf))


def our_network(name: str | None, checkpoint: str | os.PathLike[str] | None = None) -> Network:
    """A MobileMamba by name, with random weights or a checkpoint's, or the one that a checkpoint describes.

    Raises:
        OSError, ValueError: see :func:`mobilemamba.load_checkpoint`.
    """
    if name is None and checkpoint is not None:
        model = checkpoints.model_from_checkpoint(checkpoint)
    else:
        model = create_model(name or "mobilemamba_s6")
        if checkpoint is not None:
            checkpoints.load_checkpoint(model, checkpoint, adapt_head=True)
    label = None if checkpoint is None else Path(checkpoint).name
    return Network(model.default_cfg["architecture"], model.float().eval(), label)


def timm_network(name: str, size: int, checkpoint: str | None = None) -> Network:
    """A network of timm for images of size × size pixels, with random weights or a checkpoint's.

    Raises:
        ModuleNotFoundError: timm is not installed.
        OSError: the checkpoint cannot be opened.
        ValueError: timm has no such network, it gives no maps or takes no images of this size, or the checkpoint is not
            of this network.
    """
    import timm

    if not timm.is_model(name):
        raise ValueError(f"timm {timm.__version__} has no network {name!r}: timm.list_models() gives the names")
    cfg: Any = timm.get_pretrained_cfg(name)
    usual = cfg.input_size[-1]
    try:
        options: dict[str, Any] = {"img_size": size} if cfg.fixed_input_size and size != usual else {}
        model: Any = timm.create_model(name, num_classes=0, **options).eval()
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(f"{name} of timm {timm.__version__} cannot give its stages' maps: choose another network")
        with torch.no_grad():
            model.forward_intermediates(torch.zeros(1, cfg.input_size[0], size, size), intermediates_only=True)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name} takes no images of {size} pixels: give --size {usual} ({error})") from error
    if checkpoint is not None:
        _load(model, name, checkpoint)
    return Network(name, model, None if checkpoint is None else Path(checkpoint).name)


def _load(model: nn.Module, name: str, checkpoint: str) -> None:
    from timm.models import load_checkpoint

    open(checkpoint, "rb").close()  # timm's own errors do not say which file, or why
    try:
        missing = load_checkpoint(model, checkpoint, strict=False, weights_only=True).missing_keys
    except Exception as error:  # unpickling raises what it likes
        raise ValueError(f"{checkpoint} holds no weights of {name}: {str(error).split('. ')[0]}") from error
    if missing:
        raise ValueError(f"{checkpoint} holds no weights of {name}: {len(missing)} are missing, such as {missing[0]}")


def sample_images(count: int) -> list[Image.Image]:
    """At most 16 square crops from scikit-learn's two photographs, of each in turn.

    Raises:
        RuntimeError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError as error:
        needs = "sample images need scikit-learn: pip install mobilemamba[train], or name images of your own (--images)"
        raise RuntimeError(needs) from error
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    side = min(photos[0].size) // 2
    corners = [(left, top) for top in (0, side) for left in range(0, 3 * side, side * 2 // 3)][:8]
    return [p.crop((left, top, left + side, top + side)) for left, top in corners for p in photos][:count]


def crop(image: Image.Image, size: int) -> Tensor:
    """The recipe's test transform without the normalization: an RGB image → (3, size, size), from 0 to 1."""
    cfg = {"input_size": (3, size, size), "crop_pct": 0.875, "interpolation": "bicubic"}
    return torch.from_numpy(prepare_image(image, cfg | {"mean": (0, 0, 0), "std": (1, 1, 1)}))


def prepare(network: Network, pixels: Tensor) -> Tensor:
    """Crops (N, 3, H, W) as the network wants them: (N, 3 or 1, H, W). Makes an untrained network fit to be measured.

    At a recipe's start the batch norms that end residual branches have the weight 0, so that blocks are identities, and
    no batch norm has statistics. Here such weights become 1, and the statistics those of 16 crops; few are turned too.

    Raises:
        ValueError: the network takes another number of channels.
    """
    cfg: Any = network.model.default_cfg
    channels = cfg["input_size"][0]
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, and {network.name} takes {channels}")
    if channels == 1:
        pixels = pixels.mean(1, keepdim=True)
    mean, std = (torch.tensor(cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    images = (pixels - mean) / std
    if network.checkpoint is None:
        for norm in network.model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.train().momentum = None
                norm.reset_running_stats()
                if not norm.weight.any():
                    nn.init.ones_(norm.weight)
        turned = [images.rot90(quarters, (2, 3)) for quarters in range(4)]
        with torch.no_grad():
            network.model.forward_intermediates(
                torch.cat([*turned, *(image.mT for image in turned)])[:16], intermediates_only=True
            )
        network.model.eval()
    return images


def check_picture(path: Path) -> None:
    """See now, and not after the measurement, whether :func:`draw` can write this file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: its folder does not exist, or its suffix is of no known format.
    """
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"the picture's name must end in one of {', '.join(formats)}, but is {path}")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} for the picture")


def draw(fields: Sequence[Field], images: int, path: Path) -> None:
    """Draw the fields, a row for each network and a column for each stride, on one logarithmic scale of colours.

    Every field is divided by its greatest contribution. Squares are those of :func:`high_contribution_ratio`.

    Args:
        fields: what :func:`measure` gave, of images of one size.
        images: how many there were; for the title.
        path: the file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError, ValueError: the file cannot be written.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    networks = list(dict.fromkeys(field.network for field in fields))
    strides = sorted({field.stride for field in fields})
    figure = Figure(figsize=(2.9 * len(strides) + 1.6, 3.1 * len(networks) + 1.1), layout="constrained")
    axes = figure.subplots(len(networks), len(strides), squeeze=False)
    scale = LogNorm(_LEAST, 1, clip=True)
    for row, network in zip(axes, networks, strict=True):
        for ax, stride in zip(row, strides, strict=True):
            ax.set(xticks=[], yticks=[], box_aspect=1)
            ax.spines[:].set_visible(False)
            if stride not in stages(network.model):
                ax.text(
                    0.5, 0.5, f"no stage\nof stride {stride}", color="#9aa5b1", fontsize=9, ha="center", va="center"
                )
        row[0].set_ylabel(f"{network.name}\n{network.weights}\n", fontsize=9)
    for field in fields:
        ax = axes[networks.index(field.network), strides.index(field.stride)]
        height, width = field.erf.shape
        extent = (0, width, height, 0)
        image = ax.imshow(field.erf / field.erf.max(), cmap="magma", norm=scale, extent=extent, interpolation="nearest")
        for threshold, line in _SQUARES.items():
            k = _radius(field.erf, threshold)
            corner, side = (width // 2 - k, height // 2 - k), 2 * k + 1
            ax.add_patch(Rectangle(corner, side, side, fill=False, color="#7dd3fc", linestyle=line))
        ax.set(xticks=[0, width // 2, width], yticks=[0, height // 2, height], xlim=(0, width), ylim=(height, 0))
        ax.set_xlabel("pixels", fontsize=9)
        ax.set_ylabel(f"{ax.get_ylabel()}\npixels".lstrip(), fontsize=9)
        ax.tick_params(labelsize=8)
        shares = ", ".join(f"{100 * t:g} % in {_percent(field.ratios[t])}" for t in _SQUARES)
        ax.set_title(f"stage {field.stage}, stride {field.stride}\n{shares}", fontsize=9)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, aspect=30, extend="min")
    bar.set_label("contribution ÷ the greatest", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    lines = "solid and dashed squares: where 50 % and 99 % of all contributions lie, and their share of the image"
    notes = [f"Effective receptive fields, mean of {images} image{'s' * (images > 1)}", lines]
    if any(field.network.checkpoint is None for field in fields):
        notes.append("random weights: batch norms have the images' statistics, and their weights of 0 are 1")
    figure.suptitle("\n".join(notes), fontsize=10)
    figure.savefig(path, dpi=130, facecolor="white")


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.01 else f"{100 * share:.3g} %"
