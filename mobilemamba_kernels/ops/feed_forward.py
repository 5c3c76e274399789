"""Two 1×1 convolutions with an activation between them, around a residual."""

from __future__ import annotations

import torch
from torch import Tensor

from mobilemamba_kernels._library import define_operator
from mobilemamba_kernels.backends import choose
from mobilemamba_kernels.ops import pointwise_conv2d_act as pointwise
from mobilemamba_kernels.ops._activations import check_activation
from mobilemamba_kernels.ops._checks import accumulate_dtype, autocast, check_dims, check_shape, check_tensors
from mobilemamba_kernels.ops.pack_weight import check_pair


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "relu",
    residual: Tensor | None = None,
) -> Tensor:
    """Return x + w2 · activation(w1 · x + b1) + b2 + residual at every position.

    Args:
        x: (batch, C, H, W).
        w1: (M, C), or that packed by :func:`pack_weight`. One of bfloat16 has its inputs rounded to bfloat16 as well.
            Where a processor multiplies bfloat16, an ``x`` of bfloat16 has weights that are not packed rounded to it.
        b1: (M), or None.
        w2: (C, M), or that packed, as ``w1`` is or is not.
        b2: (C), or None.
        activation: "none", "relu" or "silu".
        residual: (batch, C, H, W); an outer residual beside the layer's own.

    Returns:
        (batch, C, H, W) in ``x``'s dtype (under autocast, autocast's). Differentiable once, in every tensor; twice on
        the reference.

    Raises:
        TypeError: an argument is no real floating-point tensor.
        ValueError: shapes, devices or the activation do not fit.
    """
    op = "feed_forward"
    check_tensors(op, {"x": x, "w1": w1, "w2": w2}, {"b1": b1, "b2": b2, "residual": residual})
    check_activation(op, "activation", activation)
    check_dims(op, "x", x, "batch, C, H, W")
    check_pair(op, w1, b1, w2, b2, x.shape[1])
    check_shape(op, "residual", residual, tuple(x.shape), "batch, C, H, W")
    x, residual = autocast(x), autocast(residual)
    args = (x, w1, b1, w2, b2, activation, residual)
    return _run[choose(op, x, w1, b1, w2, b2, residual)](*args)


def _reference(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    wide = x.to(accumulate_dtype(x.dtype))
    hidden = pointwise._reference(wide, w1, b1, activation, None, "none")
    y = pointwise._reference(hidden, w2, b2, "none", wide, "none")
    return (y if residual is None else y + residual.to(y.dtype)).to(x.dtype)


def _fake(x: Tensor, *others) -> Tensor:
    return torch.empty_like(x)


_run = define_operator(
    "feed_forward",
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, Tensor? residual) -> Tensor",
    _reference,
    _fake,
)
