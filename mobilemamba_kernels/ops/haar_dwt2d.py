"""One-level orthonormal Haar wavelet transform, stride 2 (arXiv 2411.15941, equation 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemamba_kernels._library import define_operator
from mobilemamba_kernels.backends import choose
from mobilemamba_kernels.ops._checks import check_dims, check_tensors


def haar_dwt2d(x: Tensor) -> Tensor:
    """Transform each 2×2 block of ``x`` into its four Haar bands.

    For the block x00 x01 / x10 x11 the bands are, in this order, (x00+x01+x10+x11)/2, (x00+x01−x10−x11)/2,
    (x00−x01+x10−x11)/2 and (x00−x01−x10+x11)/2. (The paper's equation lists the middle two the other way round;
    published weights need this order.) Odd heights and widths are zero-padded at the end.

    Args:
        x: (batch, C, H, W), float16, bfloat16, float32 or float64.

    Returns:
        (batch, C, 4, ⌈H/2⌉, ⌈W/2⌉) in ``x``'s dtype. Differentiable once; twice on the reference.

    Raises:
        TypeError: ``x`` is no real floating-point tensor.
        ValueError: ``x`` has another rank.
    """
    check_tensors("haar_dwt2d", {"x": x})
    check_dims("haar_dwt2d", "x", x, "batch, C, H, W")
    return _run[choose("haar_dwt2d", x)](x)


def _reference(x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    x = F.pad(x, (0, width % 2, 0, height % 2))
    x00, x01 = x[:, :, 0::2, 0::2], x[:, :, 0::2, 1::2]
    x10, x11 = x[:, :, 1::2, 0::2], x[:, :, 1::2, 1::2]
    bands = (x00 + x01 + x10 + x11, x00 + x01 - x10 - x11, x00 - x01 + x10 - x11, x00 - x01 - x10 + x11)
    return torch.stack(bands, dim=2) / 2


def _fake(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.new_empty(batch, channels, 4, (height + 1) // 2, (width + 1) // 2)


_run = define_operator("haar_dwt2d", "(Tensor x) -> Tensor", _reference, _fake)
