"""Batches for training and validation. What a batch holds depends on the recipe's seed and the batch's number alone,
not on workers, processes or where a run was interrupted."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mobilemamba.predict import prepare_image, read_image, reason
from mobilemamba.training.recipe import Recipe
from mobilemamba.training.sources import Source


@dataclass
class Batch:
    """Images (n, channels, size, size), float32, normalized; labels (n), int64; and what could not be read."""

    images: Tensor
    labels: Tensor
    number: int
    unreadable: list[str]

    def pin_memory(self) -> Batch:
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.number, self.unreadable)


def seed_all(*numbers: int) -> None:
    """Start Python's, NumPy's and PyTorch's generators from these numbers."""
    words = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


class Images(Dataset):
    """A source's images to validate on: (image or None, label, "" or why there is none).

    Args:
        transform: an image to an array or tensor (channels, height, width).
        channels: 1 or 3.
    """

    def __init__(self, source: Source, transform: Callable[[Image.Image], Any], channels: int) -> None:
        self.source, self.transform, self.channels = source, transform, channels

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> tuple[Tensor | None, int, str]:
        label = int(self.source.labels[index])
        try:
            image = read_image(self.source.open(index), self.channels)
        except Exception as error:  # Pillow's decoders raise many kinds on files that are not theirs
            return None, label, f"{self.source.name(index)}: {reason(error)}"
        return torch.as_tensor(self.transform(image)), label, ""


class DistortedImages(Images):
    """Images to train on, asked for as (batch, epoch, index): (image, label, why others are not there, batch).

    Distorted at random, from the seed, the epoch and the index. An image that cannot be read gives its place to the
    next one of the source, so that batches keep their size; where a hundred in a row cannot, there is None.
    """

    def __init__(self, source: Source, transform: Callable[[Image.Image], Any], channels: int, seed: int) -> None:
        super().__init__(source, transform, channels)
        self.seed = seed

    def __getitem__(self, item: Any) -> Any:
        batch, epoch, index = item
        unreadable: list[str] = []
        seed_all(self.seed, epoch, index)
        while len(unreadable) < min(len(self), _IN_A_ROW):
            image, label, why = super().__getitem__((index + len(unreadable)) % len(self))
            if image is not None:
                return image, label, unreadable, batch
            unreadable.append(why)
        return None, -1, unreadable, batch


_IN_A_ROW = 100


class TrainingLoader(DataLoader):
    """The rest of an epoch at each iteration, from `position` on: the batches that were taken already, in all epochs.
    Whoever takes them counts it up.

    The images of an epoch are shuffled; batch after batch goes to the first process, the second, and so on. What is
    left at the end, too little for a step of ``accumulate`` batches a process, waits for another epoch.

    Raises:
        ValueError: there are fewer images than a step takes.
        OSError: from the iteration: a hundred images in a row cannot be read.
    """

    def __init__(
        self,
        images: DistortedImages,
        batch_size: int,
        seed: int,
        rank: int,
        processes: int,
        workers: int,
        accumulate: int = 1,
        **options: Any,
    ) -> None:
        self._batches = _Batches(len(images), batch_size, seed, rank, processes, accumulate)
        super().__init__(images, batch_sampler=self._batches, num_workers=workers, collate_fn=collate, **options)

    @property
    def position(self) -> int:
        return self._batches.position

    @position.setter
    def position(self, position: int) -> None:
        self._batches.position = position

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        return map(self._checked, super().__iter__())

    def _checked(self, batch: Batch) -> Batch:
        # Raised here and not by a worker, from which an error comes with its traceback for a text.
        if not len(batch.labels):
            count = min(self._batches.count, _IN_A_ROW)
            raise OSError(f"{count} images in a row cannot be read, such as {batch.unreadable[-1]}: repair the data")
        return batch


def steps_an_epoch(images: int, batch_size: int, processes: int, accumulate: int) -> int:
    """Optimizer steps, of ``accumulate`` batches in each process.

    Raises:
        ValueError: there are fewer images than one takes.
    """
    if images < batch_size * processes * accumulate:
        raise ValueError(
            f"{images} training images are fewer than a step's {batch_size} × {processes * accumulate}: lower the "
            "batch size"
        )
    return images // (batch_size * processes * accumulate)


class _Batches:
    """A process's batches of an epoch, as lists of (batch's number, epoch, index)."""

    def __init__(self, count: int, batch_size: int, seed: int, rank: int, processes: int, accumulate: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.processes = rank, processes
        self.position = 0
        self._length = steps_an_epoch(count, batch_size, processes, accumulate) * accumulate

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch, start = divmod(self.position, len(self))
        order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
        for step in range(start, len(self)):
            batch = step * self.processes + self.rank
            number = epoch * len(self) * self.processes + batch
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(number, epoch, int(index)) for index in indices]


def collate(items: list[tuple[Tensor | None, int, list[str], int]]) -> Batch:
    """The images of a batch; none of them where one is missing."""
    images, labels, unreadable, numbers = zip(*items, strict=True)
    whole = all(image is not None for image in images)
    return Batch(
        torch.stack(images) if whole else torch.empty(0),
        torch.tensor(labels if whole else [], dtype=torch.int64),
        numbers[0],
        [why for whys in unreadable for why in whys],
    )


def check_unreadable(unreadable: list[str], most: int) -> None:
    """
    Raises:
        RuntimeError: more than ``most`` images cannot be read.
    """
    if len(unreadable) > most:
        raise RuntimeError(
            f"{len(unreadable)} images cannot be read, more than the {most} allowed: repair them, or allow more with "
            "--max-unreadable"
        )


def collate_readable(items: list[tuple[Tensor | None, int, str]]) -> Batch:
    """The images that could be read."""
    read = [(image, label) for image, label, _ in items if image is not None]
    images = torch.stack([image for image, _ in read]) if read else torch.empty(0)
    labels = torch.tensor([label for _, label in read], dtype=torch.int64)
    return Batch(images, labels, 0, [why for _, _, why in items if why])


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's, which makes images black at its strongest. Pillow refuses that from version 13 on."""
    return posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


def training_loader(
    source: Source, recipe: Recipe, cfg: dict[str, Any], workers: int, rank: int = 0, processes: int = 1, **options: Any
) -> TrainingLoader:
    """Batches with the recipe's distortions, by timm.

    Args:
        cfg: the network's ``default_cfg``.
    """
    try:
        transform = create_transform(
            recipe.image_size,
            is_training=True,
            scale=recipe.crop_scale,
            hflip=recipe.hflip,
            color_jitter=recipe.color_jitter,
            auto_augment=recipe.auto_augment or None,
            interpolation=cfg["interpolation"],
            mean=cfg["mean"],
            std=cfg["std"],
            re_prob=recipe.random_erasing,
            re_mode="pixel",
        )
    except Exception as error:  # timm asserts
        raise ValueError(f"auto_augment must be a name that timm knows, but is {recipe.auto_augment!r}") from error
    for operation in (op for part in transform.transforms for op in getattr(part, "ops", ())):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    images = DistortedImages(source, transform, recipe.in_chans, recipe.seed)
    return TrainingLoader(
        images, recipe.batch_size, recipe.seed, rank, processes, workers, recipe.accumulate, **options
    )


def validation_loader(
    source: Source,
    cfg: dict[str, Any],
    batch_size: int,
    workers: int,
    rank: int = 0,
    processes: int = 1,
    **options: Any,
) -> DataLoader:
    """Every image once, as :func:`mobilemamba.predict.prepare_image` prepares it; those that can be read."""
    images = Images(source, partial(prepare_image, cfg=cfg), cfg["input_size"][0])
    return DataLoader(
        images,
        batch_size,
        sampler=range(rank, len(images), processes),
        num_workers=workers,
        collate_fn=collate_readable,
        **options,
    )


def default_workers() -> int:
    return min(8, os.cpu_count() or 1)
