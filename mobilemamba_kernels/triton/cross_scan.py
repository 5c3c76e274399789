"""Images laid out as four sequences, by the kernel of _cross; the gradient merges them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mobilemamba_kernels.ops.cross_scan import _fake
from mobilemamba_kernels.triton import _cross
from mobilemamba_kernels.triton._launch import Configuration, every_map, record


def forward(images: Tensor, scans: int, channels_last: bool) -> Tensor:
    sequences = _fake(images, scans, channels_last)
    _cross.scan(_cross.one_by_one(images), _cross.channels_first(sequences, channels_last), scans)
    return sequences


def backward(grad: Tensor, images: Tensor, scans: int, channels_last: bool) -> Tensor:
    grad_images = torch.empty_like(images)
    _cross.merge(_cross.channels_first(grad, channels_last), _cross.one_by_one(grad_images), scans)
    return grad_images


def configurations() -> Iterator[Configuration]:
    for name, x in every_map(8, 96, 56, 56):
        for scans in range(3):
            for channels_last in (False, True):
                for images in (x, x.unsqueeze(1).expand(-1, 4, -1, -1, -1)):
                    options = (images, scans, channels_last)
                    case = f"{name}-{scans}-{images.ndim}-{'last' if channels_last else 'first'}"
                    yield from record(f"cross_scan-{case}", forward, *options)
                    yield from record(f"cross_scan-{case}-backward", backward, _fake(*options), *options)
