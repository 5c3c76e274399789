"""One-level orthonormal Haar transform, by the kernels of _haar; its gradient is the inverse transform."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mobilemamba_kernels.triton import _haar
from mobilemamba_kernels.triton._launch import Configuration, every_map, record


def forward(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return _haar.transform(x, x.new_empty(batch, channels, 4, (height + 1) // 2, (width + 1) // 2))


def backward(grad: Tensor, x: Tensor) -> Tensor:
    return _haar.inverse(grad, torch.empty_like(x))


def configurations() -> Iterator[Configuration]:
    for name, x in every_map(16, 160, 14, 14):
        bands = torch.empty(16, 160, 4, 7, 7, dtype=x.dtype, device="meta")
        yield from record(f"haar_dwt2d-{name}", forward, x)
        yield from record(f"haar_dwt2d-{name}-backward", backward, bands, x)
