"""Two 1×1 convolutions with an activation between them, around a residual."""

from __future__ import annotations

import torch
from torch import Tensor

from mobilemamba_kernels._library import define_operator
from mobilemamba_kernels.backends import choose
from mobilemamba_kernels.ops import pointwise_conv2d_act as pointwise
from mobilemamba_kernels.ops._activations import check_activation
from mobilemamba_kernels.ops._checks import accumulate_dtype, autocast, check_dims, check_shape, check_tensors


def feed_forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str = "relu"
) -> Tensor:
    """Return x + w2 · activation(w1 · x + b1) + b2 at every position.

    Args:
        x: (batch, C, H, W).
        w1: (M, C).
        b1: (M), or None.
        w2: (C, M).
        b2: (C), or None.
        activation: "none", "relu" or "silu".

    Returns:
        (batch, C, H, W) in ``x``'s dtype (under autocast, autocast's). Differentiable once, in every tensor; twice on
        the reference.

    Raises:
        TypeError: an argument is no real floating-point tensor.
        ValueError: shapes, devices or the activation do not fit.
    """
    op = "feed_forward"
    check_tensors(op, {"x": x, "w1": w1, "w2": w2}, {"b1": b1, "b2": b2})
    check_activation(op, "activation", activation)
    check_dims(op, "x", x, "batch, C, H, W")
    check_dims(op, "w1", w1, "M, C")
    channels, hidden = x.shape[1], w1.shape[0]
    check_shape(op, "w1", w1, (hidden, channels), "M, C")
    check_shape(op, "b1", b1, (hidden,), "M")
    check_shape(op, "w2", w2, (channels, hidden), "C, M")
    check_shape(op, "b2", b2, (channels,), "C")
    x = autocast(x)
    args = (x, w1, b1, w2, b2, activation)
    return _reference(*args) if choose(op, x, w1, b1, w2, b2) == "reference" else _operator(*args)


def _reference(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str) -> Tensor:
    wide = x.to(accumulate_dtype(x.dtype))
    hidden = pointwise._reference(wide, w1, b1, activation, None, "none")
    return pointwise._reference(hidden, w2, b2, "none", wide, "none").to(x.dtype)


def _fake(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str) -> Tensor:
    return torch.empty_like(x)


_operator = define_operator(
    "feed_forward",
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation) -> Tensor",
    _reference,
    _fake,
)
