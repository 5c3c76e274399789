"""Folding of a batch normalization into the convolution or linear layer before it."""

from __future__ import annotations

import torch
from torch import Tensor

from mobilemamba_kernels.ops._checks import check_shape, check_tensors


def fold_batch_norm(
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the layer that equals ``weight``, ``bias`` followed by batch norm in eval mode.

    Args:
        weight: (O, …), of a convolution or linear layer.
        bias: (O), or None.
        running_mean, running_var: (O).
        bn_weight, bn_bias: (O), or None for a normalization without affine part.
        eps: of the batch norm.

    Returns:
        weight and bias in ``weight``'s dtype, computed in float64.

    Raises:
        TypeError: an argument is no real floating-point tensor.
        ValueError: shapes or devices do not fit together.
    """
    op = "fold_batch_norm"
    statistics = {"running_mean": running_mean, "running_var": running_var}
    optional = {"bias": bias, "bn_weight": bn_weight, "bn_bias": bn_bias}
    check_tensors(op, {"weight": weight} | statistics, optional)
    if weight.ndim < 1:
        raise ValueError(f"{op}: weight must have shape (O, …); got {tuple(weight.shape)}")
    for name, vector in (statistics | optional).items():
        check_shape(op, name, vector, (weight.shape[0],), "O")
    scale = torch.rsqrt(running_var.double() + eps)
    if bn_weight is not None:
        scale = scale * bn_weight.double()
    shift = -running_mean.double() if bias is None else bias.double() - running_mean.double()
    shift = shift * scale
    if bn_bias is not None:
        shift = shift + bn_bias.double()
    folded = weight.double() * scale.view(-1, *(1,) * (weight.ndim - 1))
    return folded.to(weight.dtype), shift.to(weight.dtype)
