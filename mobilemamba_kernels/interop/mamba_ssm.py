"""mamba-ssm's functions (https://github.com/state-spaces/mamba), version 1 of Mamba."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemamba_kernels.ops._checks import check_dims, check_shape, check_tensors
from mobilemamba_kernels.ops.causal_conv1d import causal_conv1d_fn
from mobilemamba_kernels.ops.selective_scan import selective_scan_fn, selective_scan_ref
from mobilemamba_kernels.ops.selective_state_update import selective_state_update

__all__ = ["mamba_inner_fn", "selective_scan_fn", "selective_scan_ref", "selective_state_update"]


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Run a Mamba block between its projections in and out (arXiv 2312.00752, figure 3), and the projection out.

    Args:
        xz: x and the gate z, (batch, 2 dim, L).
        conv1d_weight: of the causal convolution with SiLU, (dim, 1, W).
        conv1d_bias: (dim).
        x_proj_weight: (rank + 2 N, dim), less N for each of ``B`` and ``C`` that is given.
        delta_proj_weight: (dim, rank).
        out_proj_weight: (out, dim).
        out_proj_bias: (out).
        A: (dim, N), real.
        B, C: as :func:`selective_scan_fn` takes them; None: projected from x.
        D, delta_bias: (dim).
        B_proj_bias, C_proj_bias: added to what is projected, (N).
        delta_softplus: apply softplus to the step sizes.
        checkpoint_lvl: accepted and ignored: the scan keeps no states, the convolution's result is kept.
        b_rms_weight, c_rms_weight, dt_rms_weight: weights of an RMS norm of B, C (N) and the step sizes (dim).
        b_c_dt_rms_eps: its epsilon.

    Returns:
        (batch, L, out). Differentiable once; twice on the reference.

    Raises:
        TypeError: an argument is no real floating-point tensor.
        ValueError: shapes or devices do not fit together.
    """
    y = run_inner(
        "mamba_inner_fn", xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias,
        B_proj_bias, C_proj_bias, delta_softplus, b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps,
    )  # fmt: skip
    return project_out("mamba_inner_fn", y, out_proj_weight, out_proj_bias)


def project_out(op: str, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(batch, dim, L) to (batch, L, out)."""
    check_tensors(op, {"y": y, "out_proj_weight": weight}, {"out_proj_bias": bias})
    check_shape(op, "out_proj_weight", weight, (weight.shape[0], y.shape[1]), "out, dim")
    check_shape(op, "out_proj_bias", bias, (weight.shape[0],), "out")
    return F.linear(y.mT, weight, bias)


def run_inner(
    op: str,
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
    delta_softplus: bool,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """:func:`mamba_inner_fn` before its projection out: (batch, dim, L). ``op`` is named in errors."""
    x, z, delta, B, C = project(
        op, xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias,
        b_rms_weight, c_rms_weight, dt_rms_weight, eps,
    )  # fmt: skip
    return selective_scan_fn(x, delta, A, B, C, D, z, delta_bias, delta_softplus)  # type: ignore[return-value]


def project(
    op: str,
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the scan of a Mamba block takes: u, z, delta, B and C."""
    required = {"xz": xz, "conv1d_weight": conv1d_weight, "x_proj_weight": x_proj_weight}
    added = {"B_proj_bias": B_proj_bias, "C_proj_bias": C_proj_bias}
    norms = {"b_rms_weight": b_rms_weight, "c_rms_weight": c_rms_weight, "dt_rms_weight": dt_rms_weight}
    others = {"conv1d_bias": conv1d_bias, "B": B, "C": C} | added | norms
    check_tensors(op, required | {"delta_proj_weight": delta_proj_weight, "A": A}, others)
    check_dims(op, "xz", xz, "batch, 2 dim, L")
    check_dims(op, "conv1d_weight", conv1d_weight, "dim, 1, W")
    check_dims(op, "A", A, "dim, N")
    dim, rank, N = conv1d_weight.shape[0], delta_proj_weight.shape[-1], A.shape[-1]
    columns = rank + N * ((B is None) + (C is None))
    check_shape(op, "xz", xz, (xz.shape[0], 2 * dim, xz.shape[-1]), "batch, 2 dim, L")
    check_shape(op, "conv1d_weight", conv1d_weight, (dim, 1, conv1d_weight.shape[-1]), "dim, 1, W")
    check_shape(op, "x_proj_weight", x_proj_weight, (columns, dim), "rank + N for each of B and C not given, dim")
    check_shape(op, "delta_proj_weight", delta_proj_weight, (dim, rank), "dim, rank")
    check_shape(op, "conv1d_bias", conv1d_bias, (dim,), "dim")
    for name, tensor in (added | norms).items():
        of_steps = name == "dt_rms_weight"
        check_shape(op, name, tensor, (dim if of_steps else N,), "dim" if of_steps else "N")
    if not torch.is_autocast_enabled(xz.device.type):
        for name, weight in (("x_proj_weight", x_proj_weight), ("delta_proj_weight", delta_proj_weight)):
            if weight.dtype != xz.dtype:
                raise TypeError(f"{op}: {name} must have the dtype of xz, {xz.dtype}; got {weight.dtype}; convert it")
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d_fn(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")  # type: ignore[assignment]
    projected = F.linear(x.mT, x_proj_weight)
    delta = F.linear(projected[..., :rank], delta_proj_weight)
    if dt_rms_weight is not None:
        delta = F.rms_norm(delta, delta.shape[-1:], dt_rms_weight.to(delta.dtype), eps)
    found = []
    for given, bias, norm, begin in (
        (B, B_proj_bias, b_rms_weight, rank),
        (C, C_proj_bias, c_rms_weight, columns - N),
    ):
        if given is None:
            part = projected[..., begin : begin + N]
            if bias is not None:
                part = part + bias.to(part.dtype)
            given = part.mT
        if norm is not None:
            given = F.rms_norm(given.mT, (N,), norm.to(given.dtype), eps).mT
        found.append(given)
    return x, z, delta.mT, found[0], found[1]
