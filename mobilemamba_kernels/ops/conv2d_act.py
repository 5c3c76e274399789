"""Dense convolution with bias and activation in one pass."""

from __future__ import annotations

from torch import Tensor

from mobilemamba_kernels._library import define_operator
from mobilemamba_kernels.backends import choose
from mobilemamba_kernels.ops._activations import activate, check_activation
from mobilemamba_kernels.ops._checks import autocast, check_dims, check_shape, check_tensors, check_window
from mobilemamba_kernels.ops._convolutions import convolve, empty_image, output_size
from mobilemamba_kernels.ops.pack_weight import as_multiplied, check_packed, outputs_of, unpack_weight


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
        weight: (O, C, k, k), or that packed by :func:`pack_weight`. One of bfloat16 has ``x`` rounded to bfloat16 too.
            Where a processor multiplies bfloat16, an ``x`` of bfloat16 has a weight that is not packed rounded to it.
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
    k = filter_size(x, weight)
    if weight.ndim == 3:
        check_packed(op, "weight", weight, "bias", bias, k * k * x.shape[1])
    else:
        check_dims(op, "weight", weight, "O, C, k, k")
        check_shape(op, "weight", weight, (weight.shape[0], x.shape[1], k, k), "O, C, k, k")
        check_shape(op, "bias", bias, (weight.shape[0],), "O")
    padding = k // 2 if padding is None else padding
    check_window(op, x, k, stride, padding)
    x = autocast(x)
    args = (x, weight, bias, stride, padding, activation)
    return _run[choose(op, x, weight, bias)](*args)


def filter_size(x: Tensor, weight: Tensor) -> int:
    """k of a weight, packed or not."""
    if weight.ndim != 3:
        return weight.shape[-1]
    return max(1, round((weight.shape[1] * (weight.shape[2] // 16) / max(1, x.shape[1])) ** 0.5))


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, activation: str) -> Tensor:
    filters = unpack_weight(weight, outputs_of(weight, bias), x.shape[1], filter_size(x, weight))
    y = convolve(as_multiplied(x, weight), filters, bias, stride, padding)
    return activate(y, activation).to(x.dtype)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, activation: str) -> Tensor:
    return empty_image(x, outputs_of(weight, bias), *output_size(x, filter_size(x, weight), stride, padding))


_run = define_operator(
    "conv2d_act",
    "(Tensor x, Tensor weight, Tensor? bias, int stride, int padding, str activation) -> Tensor",
    _reference,
    _fake,
)
