"""What the convolution operators share: sizes, the layout of a result, PyTorch's convolution for every map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemamba_kernels.ops._checks import accumulate_dtype


def output_size(x: Tensor, k: int, stride: int, padding: int) -> tuple[int, int]:
    """Height and width of what k×k filters make of the maps ``x`` (batch, C, H, W)."""
    height, width = ((n + 2 * padding - k) // stride + 1 for n in x.shape[2:])
    return height, width


def empty_image(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """A result (batch, channels, height, width) in the layout of ``x``: channels-last in, channels-last out."""
    differ = channels != 1 and height * width != 1  # else both layouts are the same bytes
    last = x.stride(1) == 1 and x.shape[1] > 1 and differ
    layout = torch.channels_last if last else torch.contiguous_format
    size = (x.shape[0], channels, height, width)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int = 1) -> Tensor:
    """``F.conv2d`` in float32 (float64 for float64), of maps without channels or positions too, which it refuses."""
    dtype = accumulate_dtype(x.dtype)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if 0 in x.shape[2:]:  # its padding may have positions
        x, padding = F.pad(x, (padding,) * 4), 0
    if x.shape[1] and weight.shape[0]:
        return F.conv2d(x, weight, bias, stride, padding, groups=groups)
    size = output_size(x, weight.shape[2], stride, padding)
    y = x.new_zeros(x.shape[0], weight.shape[0], *size) + x.sum() * weight.sum()
    return y if bias is None else y + bias.view(-1, 1, 1)
