"""MobileMamba's SS2D between its convolution and its output projection (arXiv 2411.15941, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemamba_kernels._library import define_operator
from mobilemamba_kernels.backends import choose
from mobilemamba_kernels.ops import bidirectional_selective_scan as scan
from mobilemamba_kernels.ops._checks import accumulate_dtype, autocast, check_dims, check_shape, check_tensors
from mobilemamba_kernels.ops.selective_scan import check_state


def ss2d_bidirectional(
    x: Tensor,
    z: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """Project, scan the row-major positions in both directions, add, normalize over channels, gate.

    For direction k every position of ``x`` is projected to (dt_low, B, C); then
    Δ = softplus(dt_proj_weight[k] · dt_low + dt_proj_bias[k]), A = −exp(A_log), and
    result = LayerNorm(y⁰ + y¹) · SiLU(z) with yᵏ as in :func:`bidirectional_selective_scan`.

    Args:
        x: (batch, d, H, W), already convolved and activated.
        z: gate before its SiLU, (batch, d, H, W), or None.
        x_proj_weight: (2, r + 2N, d).
        dt_proj_weight: (2, d, r).
        dt_proj_bias: (2, d).
        A_log: (2, d, N), N at most 256.
        D: skip weights, (2, d).
        norm_weight, norm_bias: (d).
        eps: of the LayerNorm.

    Returns:
        (batch, d, H, W) in ``x``'s dtype (under autocast, autocast's). Differentiable once, in every tensor; twice on
        the reference.

    Raises:
        TypeError: an argument is no real floating-point tensor.
        ValueError: shapes or devices do not fit together.
    """
    op = "ss2d_bidirectional"
    parameters = {
        "x_proj_weight": x_proj_weight,
        "dt_proj_weight": dt_proj_weight,
        "dt_proj_bias": dt_proj_bias,
        "A_log": A_log,
        "D": D,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
    }
    check_tensors(op, {"x": x} | parameters, {"z": z})
    check_dims(op, "x", x, "batch, d, H, W")
    check_dims(op, "dt_proj_weight", dt_proj_weight, "2, d, r")
    check_dims(op, "A_log", A_log, "2, d, N")
    d, rank, state = x.shape[1], dt_proj_weight.shape[2], A_log.shape[2]
    check_state(op, state)
    check_shape(op, "z", z, tuple(x.shape), "batch, d, H, W")
    check_shape(op, "x_proj_weight", x_proj_weight, (2, rank + 2 * state, d), "2, r + 2N, d")
    check_shape(op, "dt_proj_weight", dt_proj_weight, (2, d, rank), "2, d, r")
    check_shape(op, "dt_proj_bias", dt_proj_bias, (2, d), "2, d")
    check_shape(op, "A_log", A_log, (2, d, state), "2, d, N")
    check_shape(op, "D", D, (2, d), "2, d")
    check_shape(op, "norm_weight", norm_weight, (d,), "d")
    check_shape(op, "norm_bias", norm_bias, (d,), "d")
    x, z = autocast(x), autocast(z)
    args = (x, z, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, norm_weight, norm_bias, eps)
    return _run[choose(op, *args[:-1])](*args)


def _product(weight_axes: str, weight: Tensor, x_axes: str, x: Tensor, axes: str) -> Tensor:
    """einsum's product in x's layout: what is named first lies outside, so weights do where positions are inside."""
    if x.stride(-2) == 1:
        return torch.einsum(f"{x_axes},{weight_axes}->{axes}", x, weight)
    return torch.einsum(f"{weight_axes},{x_axes}->{axes}", weight, x)


def _project(
    x: Tensor, x_proj_weight: Tensor, dt_proj_weight: Tensor, A_log: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return u (batch, d, L), delta (batch, 2, d, L), A (2, d, N), B and C (batch, 2, N, L)."""
    dtype = accumulate_dtype(x.dtype)
    u = x.to(dtype).flatten(2)
    rank, state = dt_proj_weight.shape[2], A_log.shape[2]
    projected = _product("kcd", x_proj_weight.to(dtype), "bdl", u, "bkcl")
    dt_low, B, C = projected.split((rank, state, state), dim=2)
    delta = _product("kdr", dt_proj_weight.to(dtype), "bkrl", dt_low, "bkdl")
    return u, delta, -torch.exp(A_log.to(dtype)), B, C


def _normalize(y: Tensor, x: Tensor, z: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> Tensor:
    """Normalize y (batch, d, L), gate it, and return it in the shape and dtype of x."""
    y = F.layer_norm(y.transpose(1, 2), y.shape[1:2], norm_weight.to(y.dtype), norm_bias.to(y.dtype), eps)
    y = y.transpose(1, 2).unflatten(2, x.shape[2:])
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)


def _with_scan(
    run_scan: Callable[..., Tensor],
    x: Tensor,
    z: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    y = run_scan(*_project(x, x_proj_weight, dt_proj_weight, A_log), D, None, dt_proj_bias, True)
    return _normalize(y, x, z, norm_weight, norm_bias, eps)


_reference = partial(_with_scan, scan._reference)


def _composed(backend: str) -> Callable[..., Tensor]:
    return partial(_with_scan, scan._run[backend])


def _fake(x: Tensor, *others) -> Tensor:
    return torch.empty_like(x)


_run = define_operator(
    "ss2d_bidirectional",
    "(Tensor x, Tensor? z, Tensor x_proj_weight, Tensor dt_proj_weight, Tensor dt_proj_bias, Tensor A_log, Tensor D, "
    "Tensor norm_weight, Tensor norm_bias, float eps) -> Tensor",
    _reference,
    _fake,
    _composed,
)
