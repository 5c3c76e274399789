"""Four sequences merged into images, by the kernel of _cross; the gradient lays them out again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mobilemamba_kernels.ops.cross_merge import _fake
from mobilemamba_kernels.triton import _cross
from mobilemamba_kernels.triton._launch import Configuration


def forward(sequences: Tensor, height: int, width: int, scans: int, one_by_one: bool, channels_last: bool) -> Tensor:
    images = _fake(sequences, height, width, scans, one_by_one, channels_last)
    _cross.merge(sequences, _cross.as_maps(images, height, width, channels_last), scans)
    return images


def backward(
    grad: Tensor, sequences: Tensor, height: int, width: int, scans: int, one_by_one: bool, channels_last: bool
) -> Tensor:
    grad_sequences = torch.empty_like(sequences)
    _cross.scan(_cross.as_maps(grad, height, width, channels_last), grad_sequences, scans)
    return grad_sequences


def configurations() -> Iterator[Configuration]:
    """None of its own: they are those of cross_scan and its gradient."""
    return iter(())
