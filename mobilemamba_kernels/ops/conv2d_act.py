"""Dense convolution with bias and activation in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemamba_kernels._library import define_operator
from mobilemamba_kernels.backends import choose
from mobilemamba_kernels.ops._activations import activate, check_activation
from mobilemamba_kernels.ops._checks import (
    accumulate_dtype,
    autocast,
    check_dims,
    check_shape,
    check_tensors,
    check_window,
)


def conv2d_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int | None = None,
    activation: str = "none",
) -> Tensor:
    """Return activation(conv(x) + bias): the convolutions of a network's stem, with folded batch norm.

    Args:
        x: (batch, C, H, W).
        weight: (O, C, k, k). The CPU kernel reads it without a copy where O is a multiple of 16 and its memory is that
            of a dense (k, k, C, O).
        bias: (O).
        stride: at least 1, of both dimensions.
        padding: zeros on every side; k // 2 when None.
        activation: "none", "relu" or "silu".

    Returns:
        (batch, O, H', W') in ``x``'s dtype (under autocast, autocast's), H' = (H + 2·padding − k) // stride + 1.
        Differentiable once, in every tensor; twice on the reference.

    Raises:
        TypeError: an argument is no real floating-point tensor.
        ValueError: shapes, devices, stride, padding or activation do not fit.
    """
    op = "conv2d_act"
    check_tensors(op, {"x": x, "weight": weight}, {"bias": bias})
    check_activation(op, "activation", activation)
    check_dims(op, "x", x, "batch, C, H, W")
    check_dims(op, "weight", weight, "O, C, k, k")
    filters, k = weight.shape[0], weight.shape[2]
    check_shape(op, "weight", weight, (filters, x.shape[1], k, k), "O, C, k, k")
    check_shape(op, "bias", bias, (filters,), "O")
    padding = k // 2 if padding is None else padding
    check_window(op, x, k, stride, padding)
    x = autocast(x)
    args = (x, weight, bias, stride, padding, activation)
    return _reference(*args) if choose(op, x, weight, bias) == "reference" else _operator(*args)


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, activation: str) -> Tensor:
    dtype = accumulate_dtype(x.dtype)
    wide, border = x.to(dtype), padding
    if 0 in x.shape[2:]:  # conv2d refuses a map without positions, though its padding has some
        wide, border = F.pad(wide, (padding,) * 4), 0
    if x.shape[1] and weight.shape[0]:
        y = F.conv2d(wide, weight.to(dtype), None, stride, border)
    else:  # conv2d refuses a map without channels
        y = torch.zeros_like(_fake(x, weight, bias, stride, padding, activation), dtype=dtype) + x.sum() * weight.sum()
    if bias is not None:
        y = y + bias.to(dtype).view(-1, 1, 1)
    return activate(y, activation).to(x.dtype)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, activation: str) -> Tensor:
    height, width = ((n + 2 * padding - weight.shape[2]) // stride + 1 for n in x.shape[2:])
    y = x.new_empty(x.shape[0], weight.shape[0], height, width)
    # The layout of the input: channels-last in, channels-last out.
    return y.contiguous(memory_format=torch.channels_last) if x.stride(1) == 1 and x.shape[1] > 1 else y


_operator = define_operator(
    "conv2d_act",
    "(Tensor x, Tensor weight, Tensor? bias, int stride, int padding, str activation) -> Tensor",
    _reference,
    _fake,
)
