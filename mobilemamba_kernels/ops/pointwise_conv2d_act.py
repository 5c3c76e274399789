"""1×1 convolution with input activation, bias, activation and residual."""

from __future__ import annotations

import torch
from torch import Tensor

from mobilemamba_kernels._library import define_operator
from mobilemamba_kernels.backends import choose
from mobilemamba_kernels.ops._activations import activate, check_activation
from mobilemamba_kernels.ops._checks import accumulate_dtype, autocast, check_dims, check_shape, check_tensors
from mobilemamba_kernels.ops._convolutions import empty_image
from mobilemamba_kernels.ops.pack_weight import as_multiplied, check_matrix, outputs_of, unpack_weight


def pointwise_conv2d_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    input_activation: str = "none",
) -> Tensor:
    """Return activation(weight · input_activation(x) + bias) + residual at every position.

    Args:
        x: (batch, C, H, W).
        weight: (O, C), or that packed by :func:`pack_weight`. One of bfloat16 has ``x`` rounded to bfloat16 as well.
        bias: (O).
        activation, input_activation: "none", "relu" or "silu".
        residual: (batch, O, H, W).

    Returns:
        (batch, O, H, W) in ``x``'s dtype (under autocast, autocast's). Differentiable once, in every tensor; twice on
        the reference.

    Raises:
        TypeError: an argument is no real floating-point tensor.
        ValueError: shapes, devices or activations do not fit.
    """
    op = "pointwise_conv2d_act"
    check_tensors(op, {"x": x, "weight": weight}, {"bias": bias, "residual": residual})
    check_activation(op, "activation", activation)
    check_activation(op, "input_activation", input_activation)
    check_dims(op, "x", x, "batch, C, H, W")
    batch, channels, height, width = x.shape
    outputs = check_matrix(op, "weight", weight, "bias", bias, channels, "O, C")
    check_shape(op, "residual", residual, (batch, outputs, height, width), "batch, O, H, W")
    x, residual = autocast(x), autocast(residual)
    args = (x, weight, bias, activation, residual, input_activation)
    return _reference(*args) if choose(op, x, weight, bias, residual) == "reference" else _operator(*args)


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    input_activation: str,
) -> Tensor:
    dtype = accumulate_dtype(x.dtype)
    matrix = unpack_weight(weight, outputs_of(weight, bias), x.shape[1])
    wide = as_multiplied(activate(x.to(dtype), input_activation), weight).to(dtype)
    y = torch.einsum("oc,bchw->bohw", matrix.to(dtype), wide)
    if bias is not None:
        y = y + bias.to(dtype).view(-1, 1, 1)
    y = activate(y, activation)
    if residual is not None:
        y = y + residual.to(dtype)
    return y.to(x.dtype)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    input_activation: str,
) -> Tensor:
    return empty_image(x, outputs_of(weight, bias), *x.shape[2:])


_operator = define_operator(
    "pointwise_conv2d_act",
    "(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? residual, str input_activation) -> Tensor",
    _reference,
    _fake,
)
