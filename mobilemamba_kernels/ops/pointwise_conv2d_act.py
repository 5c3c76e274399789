"""1×1 convolution with input activation, bias, activation and residual."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mobilemamba_kernels._library import define_operator
from mobilemamba_kernels.backends import choose
from mobilemamba_kernels.ops._activations import activate, check_activation
from mobilemamba_kernels.ops._checks import accumulate_dtype, autocast, check_dims, check_shape, check_tensors
from mobilemamba_kernels.ops._convolutions import empty_image
from mobilemamba_kernels.ops.pack_weight import as_multiplied, check_matrix, outputs_of, unpack_weight


def pointwise_conv2d_act(
    x: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    input_activation: str = "none",
) -> Tensor:
    """Return activation(weight · input_activation(x) + bias) + residual at every position.

    Args:
        x: (batch, C, H, W), or up to three such maps of one dtype, whose channels follow each other, C in all.
        weight: (O, C), or that packed by :func:`pack_weight`. One of bfloat16 has ``x`` rounded to bfloat16 as well.
            Where a processor multiplies bfloat16, an ``x`` of bfloat16 has a weight that is not packed rounded to it.
        bias: (O).
        activation, input_activation: "none", "relu" or "silu".
        residual: (batch, O, H, W).

    Returns:
        (batch, O, H, W) in ``x``'s dtype (under autocast, autocast's), in the layout of the first map. Differentiable
        once, in every tensor; twice on the reference.

    Raises:
        TypeError: an argument is no real floating-point tensor, or maps differ in dtype.
        ValueError: shapes, devices or activations do not fit, or there are more than three maps.
    """
    op = "pointwise_conv2d_act"
    maps = {"x": x} if isinstance(x, Tensor) or not isinstance(x, Sequence) else {f"x[{i}]": t for i, t in enumerate(x)}
    if not 1 <= len(maps) <= 3:
        raise ValueError(f"{op}: x must be one to three maps; got {len(maps)}")
    check_tensors(op, {**maps, "weight": weight}, {"bias": bias, "residual": residual})
    check_activation(op, "activation", activation)
    check_activation(op, "input_activation", input_activation)
    first, *others = maps.values()
    check_dims(op, next(iter(maps)), first, "batch, C, H, W")
    batch, channels, height, width = first.shape
    for name, t in list(maps.items())[1:]:
        check_dims(op, name, t, "batch, C, H, W")
        check_shape(op, name, t, (batch, t.shape[1], height, width), "batch, C, H, W")
        if t.dtype != first.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of x[0], {first.dtype}; got {t.dtype}")
        channels += t.shape[1]
    outputs = check_matrix(op, "weight", weight, "bias", bias, channels, "O, C")
    check_shape(op, "residual", residual, (batch, outputs, height, width), "batch, O, H, W")
    first, residual = autocast(first), autocast(residual)
    second, third = (*map(autocast, others), None, None)[:2]
    args = (first, weight, bias, activation, residual, input_activation, second, third)
    return _run[choose(op, first, weight, bias, residual, second, third)](*args)


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    input_activation: str,
    second: Tensor | None = None,
    third: Tensor | None = None,
) -> Tensor:
    dtype = accumulate_dtype(x.dtype)
    maps = [t for t in (x, second, third) if t is not None]
    wide = torch.cat(maps, 1) if len(maps) > 1 else x
    matrix = unpack_weight(weight, outputs_of(weight, bias), wide.shape[1])
    wide = as_multiplied(activate(wide.to(dtype), input_activation), weight).to(dtype)
    y = torch.einsum("oc,bchw->bohw", matrix.to(dtype), wide)
    if bias is not None:
        y = y + bias.to(dtype).view(-1, 1, 1)
    y = activate(y, activation)
    if residual is not None:
        y = y + residual.to(dtype)
    return y.to(x.dtype)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, *others) -> Tensor:
    return empty_image(x, outputs_of(weight, bias), *x.shape[2:])


_run = define_operator(
    "pointwise_conv2d_act",
    "(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? residual, str input_activation, Tensor? second, "
    "Tensor? third) -> Tensor",
    _reference,
    _fake,
)
