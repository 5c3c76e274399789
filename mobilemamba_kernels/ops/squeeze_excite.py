"""Squeeze-and-excitation: channels weighed by a function of all channels' means."""

from __future__ import annotations

import torch
from torch import Tensor

from mobilemamba_kernels._library import define_operator
from mobilemamba_kernels.backends import choose
from mobilemamba_kernels.ops import pointwise_conv2d_act as pointwise
from mobilemamba_kernels.ops._checks import accumulate_dtype, autocast, check_dims, check_tensors
from mobilemamba_kernels.ops.pack_weight import check_pair


def squeeze_excite(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """Return x · sigmoid(w2 · relu(w1 · mean(x) + b1) + b2), the mean over each channel's map (arXiv 1709.01507).

    Args:
        x: (batch, C, H, W).
        w1: (M, C), or that packed by :func:`pack_weight`. One of bfloat16 has its inputs rounded to bfloat16 as well.
        b1: (M), or None.
        w2: (C, M), or that packed, as ``w1`` is or is not.
        b2: (C), or None.

    Returns:
        (batch, C, H, W) in ``x``'s dtype (under autocast, autocast's). Differentiable once, in every tensor; twice on
        the reference.

    Raises:
        TypeError: an argument is no real floating-point tensor.
        ValueError: shapes or devices do not fit, or ``x`` has channels without positions, which have no mean.
    """
    op = "squeeze_excite"
    check_tensors(op, {"x": x, "w1": w1, "w2": w2}, {"b1": b1, "b2": b2})
    check_dims(op, "x", x, "batch, C, H, W")
    if 0 in x.shape[2:]:
        raise ValueError(f"{op}: the maps of x must have positions, of which to take the mean; got {tuple(x.shape)}")
    check_pair(op, w1, b1, w2, b2, x.shape[1])
    x = autocast(x)
    args = (x, w1, b1, w2, b2)
    return _run[choose(op, *args)](*args)


def _reference(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    wide = x.to(accumulate_dtype(x.dtype))
    hidden = pointwise._reference(wide.mean((2, 3), keepdim=True), w1, b1, "relu", None, "none")
    weights = pointwise._reference(hidden, w2, b2, "none", None, "none").sigmoid()
    return (wide * weights).to(x.dtype)


def _fake(x: Tensor, *others) -> Tensor:
    return torch.empty_like(x)


_run = define_operator(
    "squeeze_excite",
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2) -> Tensor",
    _reference,
    _fake,
)
