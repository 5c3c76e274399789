"""Inverse of the one-level orthonormal Haar wavelet transform."""

from __future__ import annotations

import torch
from torch import Tensor

from mobilemamba_kernels._library import define_operator
from mobilemamba_kernels.backends import choose
from mobilemamba_kernels.ops._checks import check_dims, check_integer, check_tensors


def haar_idwt2d(bands: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Invert :func:`haar_dwt2d`.

    Args:
        bands: (batch, C, 4, h, w) in the order of :func:`haar_dwt2d`.
        size: (H, W) to crop to, with ⌈H/2⌉ = h and ⌈W/2⌉ = w; (2h, 2w) when None.

    Returns:
        (batch, C, H, W) in the dtype of ``bands``. Differentiable once; twice on the reference.

    Raises:
        TypeError: ``bands`` is no real floating-point tensor.
        ValueError: the shape or ``size`` does not fit.
    """
    op = "haar_idwt2d"
    check_tensors(op, {"bands": bands})
    check_dims(op, "bands", bands, "batch, C, 4, h, w")
    if bands.shape[2] != 4:
        raise ValueError(f"{op}: bands must have 4 bands in dimension 2; got {tuple(bands.shape)}")
    h, w = bands.shape[3:]
    if size is not None and len(size) != 2:
        raise ValueError(f"{op}: size must be (H, W); got {size!r}")
    height, width = (2 * h, 2 * w) if size is None else size
    check_integer(op, "H of size", height, 0)
    check_integer(op, "W of size", width, 0)
    if (height + 1) // 2 != h or (width + 1) // 2 != w:
        raise ValueError(
            f"{op}: size must be (H, W) with ⌈H/2⌉ = {h} and ⌈W/2⌉ = {w}, as the bands are; got ({height}, {width})"
        )
    args = (bands, height, width)
    return _run[choose(op, bands)](*args)


def _reference(bands: Tensor, height: int, width: int) -> Tensor:
    ll, lh, hl, hh = bands.unbind(2)
    even = torch.stack((ll + lh + hl + hh, ll + lh - hl - hh), dim=-1)  # rows 0, 2, …: x00, x01
    odd = torch.stack((ll - lh + hl - hh, ll - lh - hl + hh), dim=-1)  # rows 1, 3, …: x10, x11
    x = torch.stack((even, odd), dim=3).flatten(4).flatten(2, 3) / 2
    return x[:, :, :height, :width]


def _fake(bands: Tensor, height: int, width: int) -> Tensor:
    return bands.new_empty(bands.shape[0], bands.shape[1], height, width)


_run = define_operator("haar_idwt2d", "(Tensor bands, SymInt height, SymInt width) -> Tensor", _reference, _fake)
