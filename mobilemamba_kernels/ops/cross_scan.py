"""Images laid out as four sequences: VMamba's cross scan (arXiv 2401.10166, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from mobilemamba_kernels._library import define_operator
from mobilemamba_kernels.backends import choose
from mobilemamba_kernels.ops._checks import accumulate_dtype, check_dims, check_tensors


def cross_scan_fn(
    x: Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = 0,
    force_torch: bool = False,
) -> Tensor:
    """Lay images out as four sequences.

    Args:
        x: (batch, C, H, W), or (batch, H, W, C) unless ``in_channel_first``; with ``one_by_one`` one image a sequence,
            (batch, 4, C, H, W) or (batch, H, W, 4, C).
        in_channel_first, out_channel_first: the layouts.
        scans: 0: row by row, column by column, and both backwards; 1: four times row by row; 2: twice row by row, and
            twice the same backwards.
        force_torch: accepted and ignored, for VMamba's callers; :func:`use_backend` chooses.

    Returns:
        (batch, 4, C, H W), or (batch, H W, 4, C) unless ``out_channel_first``; contiguous. Differentiable once; any
        number of times on the reference.

    Raises:
        TypeError: x is no real floating-point tensor.
        ValueError: rank or scans do not fit.
    """
    op = "cross_scan_fn"
    check_tensors(op, {"x": x})
    check_scans(op, scans)
    if one_by_one:
        check_dims(op, "x", x, "batch, 4, C, H, W" if in_channel_first else "batch, H, W, 4, C")
        images = x if in_channel_first else x.permute(0, 3, 4, 1, 2)
        if images.shape[1] != 4:
            raise ValueError(f"{op}: x must hold 4 images, one a sequence; got {images.shape[1]}")
    else:
        check_dims(op, "x", x, "batch, C, H, W" if in_channel_first else "batch, H, W, C")
        images = x if in_channel_first else x.permute(0, 3, 1, 2)
    return _run[choose("cross_scan", x)](images, scans, not out_channel_first)


def check_scans(op: str, scans: int) -> None:
    """Raise ValueError unless there is such a kind of scan."""
    if not isinstance(scans, int) or scans not in (0, 1, 2):
        raise ValueError(f"{op}: scans must be 0 (cross), 1 (in one direction) or 2 (in both); got {scans!r}")


def _reference(images: Tensor, scans: int, channels_last: bool) -> Tensor:
    wide = images.to(accumulate_dtype(images.dtype))  # in which the gradient is summed
    paths = []
    for k, image in enumerate(wide.unbind(1) if images.ndim == 5 else (wide,) * 4):
        path = (image.mT if scans == 0 and k % 2 else image).flatten(2)
        paths.append(path.flip(-1) if scans != 1 and k >= 2 else path)
    sequences = torch.stack(paths, 1).to(images.dtype)
    return sequences.permute(0, 3, 1, 2).contiguous() if channels_last else sequences


def _fake(images: Tensor, scans: int, channels_last: bool) -> Tensor:
    batch, (channels, height, width) = images.shape[0], images.shape[-3:]
    length = height * width
    return images.new_empty((batch, length, 4, channels) if channels_last else (batch, 4, channels, length))


_run = define_operator("cross_scan", "(Tensor images, int scans, bool channels_last) -> Tensor", _reference, _fake)
