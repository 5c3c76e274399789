"""Depthwise convolution with bias, activation, a scaling of each channel and residual in one pass."""

from __future__ import annotations

from torch import Tensor

from mobilemamba_kernels._library import define_operator
from mobilemamba_kernels.backends import choose
from mobilemamba_kernels.ops._activations import activate, check_activation
from mobilemamba_kernels.ops._checks import autocast, check_dims, check_shape, check_tensors, check_window
from mobilemamba_kernels.ops._convolutions import convolve, empty_image, output_size


def depthwise_conv2d_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Return activation(conv(x) + bias) · scale + shift + residual, one filter a channel.

    Args:
        x: (batch, C, H, W).
        weight: (C, 1, k, k).
        bias: (C).
        stride: at least 1, of both dimensions.
        padding: zeros on every side; k // 2 when None.
        activation: "none", "relu" or "silu".
        residual: of the result's shape.
        scale, shift: (C).

    Returns:
        (batch, C, H', W') in ``x``'s dtype (under autocast, autocast's), H' = (H + 2·padding − k) // stride + 1.
        Differentiable once, in every tensor; twice on the reference.

    Raises:
        TypeError: an argument is no real floating-point tensor.
        ValueError: shapes, devices, stride, padding or activation do not fit.
    """
    op = "depthwise_conv2d_act"
    check_tensors(op, {"x": x, "weight": weight}, {"bias": bias, "residual": residual, "scale": scale, "shift": shift})
    check_activation(op, "activation", activation)
    check_dims(op, "x", x, "batch, C, H, W")
    check_dims(op, "weight", weight, "C, 1, k, k")
    batch, channels = x.shape[:2]
    k = weight.shape[2]
    check_shape(op, "weight", weight, (channels, 1, k, k), "C, 1, k, k")
    for name, vector in {"bias": bias, "scale": scale, "shift": shift}.items():
        check_shape(op, name, vector, (channels,), "C")
    padding = k // 2 if padding is None else padding
    check_window(op, x, k, stride, padding)
    out_shape = (batch, channels, *output_size(x, k, stride, padding))
    check_shape(op, "residual", residual, out_shape, "batch, C, H', W'")
    x, residual = autocast(x), autocast(residual)
    args = (x, weight, bias, stride, padding, activation, residual, scale, shift)
    return _run[choose(op, x, weight, bias, residual, scale, shift)](*args)


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    y = activate(convolve(x, weight, bias, stride, padding, groups=x.shape[1]), activation)
    if scale is not None:
        y = y * scale[:, None, None].to(y.dtype)
    if shift is not None:
        y = y + shift[:, None, None].to(y.dtype)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return y.to(x.dtype)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    return empty_image(x, x.shape[1], *output_size(x, weight.shape[2], stride, padding))


_run = define_operator(
    "depthwise_conv2d_act",
    "(Tensor x, Tensor weight, Tensor? bias, int stride, int padding, str activation, Tensor? residual, "
    "Tensor? scale, Tensor? shift) -> Tensor",
    _reference,
    _fake,
)
