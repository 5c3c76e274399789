"""Images from files to predictions: the recipe's test transform, decoded in parallel with the network."""

from __future__ import annotations

import glob
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn

_DECODERS = min(8, os.cpu_count() or 1)


def find_images(arguments: Iterable[str]) -> list[Path]:
    """Files for the given files, folders (with what is below them) and glob patterns, each once, in this order.

    A path that does not exist is kept: reading it says so.

    Raises:
        ValueError: a folder or a pattern gives no image.
    """
    found: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        pattern = not path.exists() and glob.has_magic(argument)
        matches = [Path(match) for match in sorted(glob.glob(argument, recursive=True))] if pattern else [path]
        images = [image for match in matches for image in (_images_below(match) if match.is_dir() else [match])]
        if not images:
            raise ValueError(f"no images {'match' if pattern else 'in'} {argument}")
        found += images
    return list(dict.fromkeys(found))


def image_suffixes() -> set[str]:
    """Of the files that Pillow reads: lower case, with their dot."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _images_below(folder: Path) -> list[Path]:
    suffixes = image_suffixes()
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())


def read_image(path: Path | BinaryIO, channels: int) -> Image.Image:
    """Read an image upright, in RGB (3 channels) or grey (1 channel), what is transparent in white.

    Raises:
        OSError: it cannot be opened, is no image or is truncated.
        ValueError: it has too many pixels, or ``channels`` is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, and the network takes {channels}")
    with Image.open(path) as opened:
        if Image.MAX_IMAGE_PIXELS is not None and opened.width * opened.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{opened.width}×{opened.height} pixels are more than {Image.MAX_IMAGE_PIXELS}")
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


def reason(error: BaseException) -> str:
    """What is wrong, in one line, without a path."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def prepare_image(image: Image.Image, cfg: Mapping[str, Any]) -> np.ndarray:
    """The recipe's test transform: resize, centre crop, normalize: → (channels, height, width), float32.

    Args:
        image: of the network's channels.
        cfg: ``default_cfg`` of the network.
    """
    channels, height, width = cfg["input_size"]
    # The scale that brings the short side to size / crop_pct, rounded as torchvision does.
    scale = max(int(height / cfg["crop_pct"]) / image.height, int(width / cfg["crop_pct"]) / image.width)
    # Only the middle of a long strip is enlarged, as all of it might take gigabytes.
    across, down = (
        min(n, 8 * math.ceil(wanted / scale) + n % 2) for n, wanted in ((image.width, width), (image.height, height))
    )
    before, above = (image.width - across) // 2, (image.height - down) // 2
    image = image.crop((before, above, before + across, above + down))
    size = max(width, int(image.width * scale + 1e-6)), max(height, int(image.height * scale + 1e-6))
    image = image.resize(size, Image.Resampling[cfg["interpolation"].upper()])
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 255
    pixels = pixels.reshape(height, width, channels)
    pixels = (pixels - np.float32(cfg["mean"])) / np.float32(cfg["std"])
    return pixels.transpose(2, 0, 1)


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first."""

    image: Path
    classes: list[int]
    confidences: list[float]


def predict(
    model: nn.Module,
    images: Iterable[Path],
    *,
    top_k: int = 5,
    batch_size: int = 16,
    unreadable: Callable[[Path, Exception], None] | None = None,
) -> Iterator[Prediction]:
    """Classify image files; while the network works on a batch, threads decode the next ones.

    Args:
        model: a :class:`mobilemamba.MobileMamba` in eval mode, best optimized or fused; its ``default_cfg`` says how to
            prepare images.
        images: files.
        top_k: classes an image, at most those that there are.
        batch_size: images at once.
        unreadable: called with each file that cannot be read, and why; without it the error is raised.
    """
    weight = next(model.parameters())
    dtype = torch.float32 if getattr(model, "optimized", False) else weight.dtype
    cfg: Any = model.default_cfg
    batch: list[tuple[Path, np.ndarray]] = []

    def run() -> Iterator[Prediction]:
        x = torch.from_numpy(np.stack([pixels for _, pixels in batch])).to(weight.device, dtype)
        with torch.inference_mode():
            logits = model(x.contiguous(memory_format=torch.channels_last))
        best = logits.float().softmax(1).topk(min(top_k, logits.shape[1]))
        for (path, _), classes, values in zip(batch, best.indices.tolist(), best.values.tolist(), strict=True):
            yield Prediction(path, classes, values)
        batch.clear()

    def decode(path: Path) -> np.ndarray:
        return prepare_image(read_image(path, cfg["input_size"][0]), cfg)

    for path, pixels in _in_parallel(decode, images, ahead=2 * batch_size):
        if isinstance(pixels, Exception):
            if unreadable is None:
                raise pixels
            unreadable(path, pixels)
            continue
        batch.append((path, pixels))
        if len(batch) == batch_size:
            yield from run()
    if batch:
        yield from run()


def _in_parallel(
    function: Callable[[Path], np.ndarray], paths: Iterable[Path], ahead: int
) -> Iterator[tuple[Path, np.ndarray | Exception]]:
    """Results, or errors, in order, with at most ``ahead`` in memory."""
    remaining = iter(paths)
    pool = ThreadPoolExecutor(_DECODERS)
    try:
        pending = deque((path, pool.submit(function, path)) for path in islice(remaining, ahead))
        while pending:
            path, future = pending.popleft()
            result: np.ndarray | Exception
            try:
                result = future.result()
            except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error, …
                result = error
            yield path, result
            pending.extend((path, pool.submit(function, path)) for path in islice(remaining, 1))
    finally:
        pool.shutdown(cancel_futures=True)
