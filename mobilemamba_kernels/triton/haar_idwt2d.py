"""Inverse of the one-level Haar transform, by the kernels of _haar; its gradient is the transform."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mobilemamba_kernels.triton import _haar
from mobilemamba_kernels.triton._launch import Configuration, every_map, record


def forward(bands: Tensor, height: int, width: int) -> Tensor:
    return _haar.inverse(bands, bands.new_empty(bands.shape[0], bands.shape[1], height, width))


def backward(grad: Tensor, bands: Tensor, height: int, width: int) -> Tensor:
    return _haar.transform(grad, torch.empty_like(bands))


def configurations() -> Iterator[Configuration]:
    for name, x in every_map(16, 160 * 4, 7, 7):
        bands = x.unflatten(1, (160, 4))
        grad = torch.empty(16, 160, 14, 14, dtype=x.dtype, device="meta")
        yield from record(f"haar_idwt2d-{name}", forward, bands, 14, 14)
        yield from record(f"haar_idwt2d-{name}-backward", backward, grad, bands, 14, 14)
