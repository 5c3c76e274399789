"""Four sequences brought back into images: VMamba's cross merge (arXiv 2401.10166, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from mobilemamba_kernels._library import define_operator
from mobilemamba_kernels.backends import choose
from mobilemamba_kernels.ops._checks import accumulate_dtype, check_dims, check_tensors
from mobilemamba_kernels.ops.cross_scan import check_scans


def cross_merge_fn(
    y: Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = 0,
    force_torch: bool = False,
) -> Tensor:
    """Bring four sequences back into row-major order and add them: the adjoint of :func:`cross_scan_fn`.

    Args:
        y: (batch, 4, C, H, W), or (batch, H, W, 4, C) unless ``out_channel_first``: each sequence, in its own order.
        in_channel_first, out_channel_first: the layouts of the images and of the sequences.
        one_by_one: do not add.
        scans: as in :func:`cross_scan_fn`.
        force_torch: accepted and ignored, for VMamba's callers; :func:`use_backend` chooses.

    Returns:
        (batch, C, H W), or (batch, H W, C) unless ``in_channel_first``; with ``one_by_one`` (batch, 4, C, H W) or
        (batch, H W, 4, C). Contiguous; sums of 16 bits are taken in float32. Differentiable once; any number of times
        on the reference.

    Raises:
        TypeError: y is no real floating-point tensor.
        ValueError: rank or scans do not fit.
    """
    op = "cross_merge_fn"
    check_tensors(op, {"y": y})
    check_scans(op, scans)
    check_dims(op, "y", y, "batch, 4, C, H, W" if out_channel_first else "batch, H, W, 4, C")
    sequences = y if out_channel_first else y.permute(0, 3, 4, 1, 2)
    if sequences.shape[1] != 4:
        raise ValueError(f"{op}: y must hold 4 sequences; got {sequences.shape[1]}")
    height, width = sequences.shape[3:]
    args = (sequences.flatten(3), height, width, scans, bool(one_by_one), not in_channel_first)
    return _run[choose("cross_merge", y)](*args)


def _reference(sequences: Tensor, height: int, width: int, scans: int, one_by_one: bool, channels_last: bool) -> Tensor:
    wide = sequences.to(accumulate_dtype(sequences.dtype))
    forth, back = wide[:, :2], wide[:, 2:] if scans == 1 else wide[:, 2:].flip(-1)
    images = []
    for pair in (forth, back) if one_by_one else (forth + back,):
        columns = pair[:, 1].unflatten(-1, (width, height)).mT.flatten(2) if scans == 0 else pair[:, 1]
        images += [pair[:, 0], columns]
    if one_by_one:
        merged = torch.stack(images, 1)
        merged = merged.permute(0, 3, 1, 2) if channels_last else merged
    else:
        merged = images[0] + images[1]
        merged = merged.mT if channels_last else merged
    return merged.to(sequences.dtype).contiguous()


def _fake(sequences: Tensor, height: int, width: int, scans: int, one_by_one: bool, channels_last: bool) -> Tensor:
    batch, _, channels, length = sequences.shape
    kept = (4,) if one_by_one else ()
    return sequences.new_empty((batch, length, *kept, channels) if channels_last else (batch, *kept, channels, length))


_run = define_operator(
    "cross_merge",
    "(Tensor sequences, SymInt height, SymInt width, int scans, bool one_by_one, bool channels_last) -> Tensor",
    _reference,
    _fake,
)
