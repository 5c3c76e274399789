"""Selective scan in both directions at once: what MobileMamba and Vim (arXiv 2401.09417) run on every block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemamba_kernels._library import define_operator
from mobilemamba_kernels.backends import choose
from mobilemamba_kernels.ops._checks import accumulate_dtype, check_dims, check_shape, check_tensors
from mobilemamba_kernels.ops.selective_scan import check_state, scan_steps


def bidirectional_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Scan ``u`` upwards and downwards along its last dimension and add the two, in the order of ``u``.

    Direction 0 is :func:`selective_scan_fn` on index 0 of every argument. Direction 1 is the same on index 1, run from
    the last position to the first; nothing is flipped or copied. N = 1 is the fast case.

    Args:
        u: input, (batch, dim, L), or (batch, 2, dim, L) when the directions differ (Vim).
        delta: step sizes before bias and softplus, (batch, 2, dim, L).
        A: (2, dim, N), real, N at most 256.
        B, C: (batch, 2, N, L).
        D: skip weights, (2, dim).
        z: gate of the sum before its SiLU, (batch, dim, L).
        delta_bias: (2, dim).
        delta_softplus: apply softplus (the identity above 20) to the step sizes.

    Returns:
        (batch, dim, L) in ``u``'s dtype. Differentiable once, in every tensor; twice on the reference.

    Raises:
        TypeError: an argument is no real floating-point tensor.
        ValueError: shapes or devices do not fit together.
    """
    op = "bidirectional_selective_scan"
    check_tensors(op, {"u": u, "delta": delta, "A": A, "B": B, "C": C}, {"D": D, "z": z, "delta_bias": delta_bias})
    if u.ndim not in (3, 4):
        raise ValueError(f"{op}: u must have shape (batch, dim, L) or (batch, 2, dim, L); got {tuple(u.shape)}")
    batch, dim, length = u.shape[0], u.shape[-2], u.shape[-1]
    if u.ndim == 4:
        check_shape(op, "u", u, (batch, 2, dim, length), "batch, 2, dim, L")
    check_dims(op, "A", A, "2, dim, N")
    state = A.shape[2]
    check_shape(op, "A", A, (2, dim, state), "2, dim, N")
    check_state(op, state)
    check_shape(op, "delta", delta, (batch, 2, dim, length), "batch, 2, dim, L")
    check_shape(op, "B", B, (batch, 2, state, length), "batch, 2, N, L")
    check_shape(op, "C", C, (batch, 2, state, length), "batch, 2, N, L")
    check_shape(op, "D", D, (2, dim), "2, dim")
    check_shape(op, "z", z, (batch, dim, length), "batch, dim, L")
    check_shape(op, "delta_bias", delta_bias, (2, dim), "2, dim")
    args = (u, delta, A, B, C, D, z, delta_bias, bool(delta_softplus))
    return _run[choose(op, u, delta, A, B, C, D, z, delta_bias)](*args)


def _reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    dtype = accumulate_dtype(u.dtype)
    step = delta.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype).unsqueeze(-1)
    if delta_softplus:
        step = F.softplus(step)
    total: Tensor | None = None
    for k in range(2):
        x = (u if u.ndim == 3 else u[:, k]).to(dtype)
        B_k, C_k = (M[:, k].to(dtype).unsqueeze(1).expand(-1, x.shape[1], -1, -1) for M in (B, C))
        y, _ = scan_steps(x, step[:, k], A[k].to(dtype), B_k, C_k, reverse=k == 1)
        if D is not None:
            y = y + D[k].to(dtype).unsqueeze(-1) * x
        total = y if total is None else total + y
    assert total is not None
    if z is not None:
        total = total * F.silu(z.to(dtype))
    return total.to(u.dtype)


def _fake(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    return torch.empty_like(u if u.ndim == 3 else u[:, 0])


_run = define_operator(
    "bidirectional_selective_scan",
    "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus) -> Tensor",
    _reference,
    _fake,
)
