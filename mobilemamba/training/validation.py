"""How many labelled images a network classifies right, which it confuses, and how fast."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from mobilemamba.model import MobileMamba
from mobilemamba.training.data import check_unreadable, default_workers, validation_loader
from mobilemamba.training.sources import Source, numbers


@dataclass(frozen=True)
class Validation:
    """Of the images that could be read; classes are the network's."""

    top1: float
    """Percent of the images."""
    top5: float
    """Percent; of fewer than five classes all are among the first five."""
    classes: list[str]
    counts: np.ndarray
    """Images of each class, (classes)."""
    accuracy: np.ndarray
    """Percent of each class's images, (classes); 0 where there are none."""
    confusion: np.ndarray
    """Images by class and by predicted class, (classes, classes)."""
    images_per_s: float
    """Of the whole: the network, and what reading images and preparing them takes in addition."""
    network_images_per_s: float
    """Of the network alone."""
    unreadable: list[str]
    """Names of the images that could not be read, and why."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON: of the classes those with images, of the confusion those images that were taken for others."""
        return {
            "images": int(self.counts.sum()),
            "top1": self.top1,
            "top5": self.top5,
            "images_per_s": self.images_per_s,
            "network_images_per_s": self.network_images_per_s,
            "classes": [
                {"class": self.classes[i], "images": int(self.counts[i]), "accuracy": float(self.accuracy[i])}
                for i in np.flatnonzero(self.counts)
            ],
            "confused": [
                {"class": self.classes[i], "taken_for": self.classes[j], "images": int(self.confusion[i, j])}
                for i, j in np.argwhere(self.confusion)
                if i != j
            ],
            "unreadable": self.unreadable,
        }


def validate(
    source: Source,
    network: MobileMamba,
    *,
    batch_size: int = 16,
    workers: int | None = None,
    max_unreadable: int = 100,
    progress: Callable[[int, list[str]], Any] = lambda images, unreadable: None,
) -> Validation:
    """Classify every image of a source, prepared as the network's ``default_cfg`` says.

    Args:
        source: labelled images, such as :func:`mobilemamba.training.open_images` gives; see :func:`match_classes`.
        network: in eval mode, best optimized or fused.
        batch_size: images at once.
        workers: processes that read images; None: as many as processors, at most 8.
        max_unreadable: images that may fail to be read; they count neither as right nor as wrong.
        progress: called after every batch with its number of images, and with those that could not be read, and why.

    Raises:
        ValueError: the network is in training mode, or its classes are not the source's.
        RuntimeError: too many images cannot be read, or all; or the network's results are not finite.
    """
    if network.training:
        raise ValueError("the network must be in eval mode: call network.eval()")
    number = torch.from_numpy(match_classes(source, network))
    weight, classes = next(network.parameters()), network.num_classes
    dtype = torch.float32 if network.optimized else weight.dtype
    top1 = MulticlassAccuracy(classes, average="micro")
    top5 = MulticlassAccuracy(classes, average="micro", top_k=min(5, classes))
    labels: list[Tensor] = []
    predicted: list[Tensor] = []
    seconds = 0.0  # of the network
    unreadable: list[str] = []
    start = time.perf_counter()
    workers = default_workers() if workers is None else workers
    for batch in validation_loader(source, network.default_cfg, batch_size, workers, pin_memory=weight.is_cuda):
        if len(batch.labels):
            images = batch.images.to(weight.device, dtype, memory_format=torch.channels_last)
            before = time.perf_counter()
            with torch.inference_mode():
                logits = network(images).float().cpu()
            seconds += time.perf_counter() - before
            if not logits.isfinite().all():
                raise RuntimeError(f"the network's results are not finite in {dtype}: use another dtype or checkpoint")
            labels.append(number[batch.labels])
            predicted.append(logits.argmax(1))
            for metric in (top1, top5):
                metric.update(logits, labels[-1])
        unreadable += batch.unreadable
        progress(len(batch.labels) + len(batch.unreadable), batch.unreadable)
        check_unreadable(unreadable, max_unreadable)
    if not labels:
        raise RuntimeError(f"none of the {len(unreadable)} images can be read, the first one {unreadable[0]}")
    whole = time.perf_counter() - start
    answers = torch.cat(predicted), torch.cat(labels)
    confusion = MulticlassConfusionMatrix(classes)(*answers).numpy()
    return Validation(
        top1=100 * top1.compute().item(),
        top5=100 * top5.compute().item(),
        classes=network.default_cfg.get("label_names") or source.classes + numbers(len(source.classes), classes),
        counts=confusion.sum(1),
        accuracy=100 * MulticlassAccuracy(classes, average=None)(*answers).numpy(),
        confusion=confusion,
        images_per_s=len(answers[0]) / whole,
        network_images_per_s=len(answers[0]) / seconds,
        unreadable=unreadable,
    )


def match_classes(source: Source, network: MobileMamba) -> np.ndarray:
    """The network's number of each class of the source, -1 for one that has no images and that it does not know.

    Where both have names, the names count: the source may have fewer classes, in another order. Else the numbers do.

    Raises:
        ValueError: a class with images is not one of the network's, or the number of classes is another.
    """
    names, known, count = source.classes, network.default_cfg.get("label_names"), network.num_classes
    if count < 2:
        raise ValueError(f"the network must tell two classes or more apart, but has {count}")
    unnamed = names == numbers(0, len(names))  # shards and Parquet files may have no names
    if known is None or names == known or (unnamed and not set(names) <= set(known)):
        if len(names) != count and not (unnamed and len(names) < count):
            raise ValueError(
                f"the images have {len(names)} classes and the network {count}, without names to match them by: use "
                "images of all its classes, or a checkpoint that names them"
            )
        return np.arange(len(names))
    for name in (names[label] for label in np.unique(source.labels)):
        if known.count(name) != 1:
            raise ValueError(
                f"the network must know one class {name!r}, as the images do, but {known.count(name)} of its {count} "
                "have that name: rename the class, or leave it out"
            )
    return np.array([known.index(name) if name in known else -1 for name in names])
