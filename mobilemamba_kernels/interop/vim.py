"""The functions that Vim adds to its copy of mamba-ssm (https://github.com/hustvl/Vim)."""

from __future__ import annotations

import torch
from torch import Tensor

from mobilemamba_kernels.interop.mamba_ssm import project, project_out, run_inner, selective_scan_fn
from mobilemamba_kernels.ops._checks import check_shape, check_tensors
from mobilemamba_kernels.ops.bidirectional_selective_scan import bidirectional_selective_scan
from mobilemamba_kernels.ops.causal_conv1d import causal_conv1d_fn as _causal_conv1d_fn

__all__ = ["bimamba_inner_fn", "causal_conv1d_fn", "mamba_inner_fn_no_out_proj"]


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """As :func:`mobilemamba_kernels.causal_conv1d_fn`, with the arguments of the version that comes with Vim."""
    return _causal_conv1d_fn(x, weight, bias, activation=activation)  # type: ignore[return-value]


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """Run a Mamba block between its projections: ``mamba_inner_fn`` of mamba-ssm without the last one.

    Vim calls it twice, the second time on a flipped ``xz`` with weights of its own.

    Returns:
        (batch, dim, L). Differentiable once; twice on the reference.

    Raises:
        TypeError: an argument is no real floating-point tensor.
        ValueError: shapes or devices do not fit together.
    """
    return run_inner(
        "mamba_inner_fn_no_out_proj", xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D,
        delta_bias, B_proj_bias, C_proj_bias, delta_softplus,
    )  # fmt: skip


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """Run a Mamba block with a scan in both directions, which share all parameters but A, and its projection out.

    Args:
        A, A_b: of the first and the second direction, (dim, N), real. Others are as in mamba-ssm's ``mamba_inner_fn``.

    Returns:
        (batch, L, out). Differentiable once; twice on the reference.

    Raises:
        TypeError: an argument is no real floating-point tensor.
        ValueError: shapes or devices do not fit together.
    """
    check_tensors("bimamba_inner_fn", {"A": A, "A_b": A_b}, {"D": D, "delta_bias": delta_bias})
    check_shape("bimamba_inner_fn", "A_b", A_b, tuple(A.shape), "dim, N")
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        check_shape("bimamba_inner_fn", name, tensor, (A.shape[0],), "dim")
    x, z, delta, B, C = project(
        "bimamba_inner_fn", xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias,
        C_proj_bias,
    )  # fmt: skip
    if B.ndim == C.ndim == 3:
        both = [t.unsqueeze(1).expand(-1, 2, -1, -1) for t in (delta, B, C)]
        D, delta_bias = (t if t is None else t.expand(2, -1) for t in (D, delta_bias))
        y = bidirectional_selective_scan(
            x, both[0], torch.stack([A, A_b]), both[1], both[2], D, z, delta_bias,
            delta_softplus,
        )  # fmt: skip
    else:
        # Constant and grouped B and C. Vim flips the former along N, and its networks may have learnt that.
        x_b, delta_b, B_b, C_b, z_b = (t.flip(-1) for t in (x, delta, B, C, z))
        first = selective_scan_fn(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
        second = selective_scan_fn(x_b, delta_b, A_b, B_b, C_b, D, z_b, delta_bias, delta_softplus)
        y = first + second.flip(-1)  # type: ignore[operator, union-attr]
    return project_out("bimamba_inner_fn", y, out_proj_weight, out_proj_bias)
