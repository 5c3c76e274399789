"""Selective scan in one direction: the recurrence of Mamba (arXiv 2312.00752, algorithm 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemamba_kernels._library import define_operator
from mobilemamba_kernels.backends import choose
from mobilemamba_kernels.ops._checks import accumulate_dtype, check_dims, check_shape, check_tensors

MAX_STATE = 256
"""Largest state size N that the operators accept."""


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan ``u`` along its last dimension; mamba-ssm's function of this name, argument for argument.

    With Δ = softplus(delta + delta_bias) (without the softplus unless ``delta_softplus``)::

        h_l = exp(Δ_l A) h_{l-1} + Δ_l B_l u_l,   y_l = C_l · h_l + D u_l,   result = y · SiLU(z)

    Args:
        u: input, (batch, dim, L), float16, bfloat16, float32 or float64.
        delta: step sizes before bias and softplus, (batch, dim, L).
        A: (dim, N), real, N at most 256.
        B, C: (dim, N), (batch, N, L), or (batch, G, N, L) with dim a multiple of G.
        D: skip weights, (dim).
        z: gate before its SiLU, (batch, dim, L).
        delta_bias: (dim).
        delta_softplus: apply softplus (the identity above 20) to the step sizes.
        return_last_state: also return h_L.

    Returns:
        (batch, dim, L) in ``u``'s dtype and, with ``return_last_state``, the last state, (batch, dim, N), float32
        (float64 for a float64 ``u``). Differentiable once, in every tensor; twice on the reference.

    Raises:
        TypeError: an argument is no real floating-point tensor.
        ValueError: shapes or devices do not fit together.
    """
    _check("selective_scan_fn", u, delta, A, B, C, D, z, delta_bias)
    args = (u, delta, A, B, C, D, z, delta_bias, bool(delta_softplus))
    out, last = _run[choose("selective_scan", u, delta, A, B, C, D, z, delta_bias)](*args)
    return (out, last) if return_last_state else out


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain PyTorch version of :func:`selective_scan_fn`: one step a position, differentiable any number of times."""
    _check("selective_scan_ref", u, delta, A, B, C, D, z, delta_bias)
    out, last = _reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return (out, last) if return_last_state else out


def _check(
    op: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    check_tensors(op, {"u": u, "delta": delta, "A": A, "B": B, "C": C}, {"D": D, "z": z, "delta_bias": delta_bias})
    check_dims(op, "u", u, "batch, dim, L")
    check_dims(op, "A", A, "dim, N")
    batch, dim, length = u.shape
    state = A.shape[1]
    check_shape(op, "A", A, (dim, state), "dim, N")
    check_state(op, state)
    check_shape(op, "delta", delta, (batch, dim, length), "batch, dim, L")
    check_shape(op, "z", z, (batch, dim, length), "batch, dim, L")
    check_shape(op, "D", D, (dim,), "dim")
    check_shape(op, "delta_bias", delta_bias, (dim,), "dim")
    for name, tensor in (("B", B), ("C", C)):
        if tensor.ndim == 2:
            check_shape(op, name, tensor, (dim, state), "dim, N")
        elif tensor.ndim == 3:
            check_shape(op, name, tensor, (batch, state, length), "batch, N, L")
        elif tensor.ndim == 4:
            groups = tensor.shape[1]
            check_shape(op, name, tensor, (batch, groups, state, length), "batch, G, N, L")
            if (groups == 0 and dim != 0) or (groups and dim % groups):
                raise ValueError(f"{op}: dim must be a multiple of {name}'s groups G; got dim {dim} and G {groups}")
        else:
            raise ValueError(
                f"{op}: {name} must have shape (dim, N), (batch, N, L) or (batch, G, N, L); got {tuple(tensor.shape)}"
            )


def check_state(op: str, state: int) -> None:
    """Check the state size N.

    Raises:
        ValueError: N is over the limit or zero.
    """
    if not 1 <= state <= MAX_STATE:
        raise ValueError(f"{op}: the state size N must be between 1 and {MAX_STATE}; got {state}")


def scan_steps(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Run the recurrence step by step: u, delta (batch, dim, L), A (dim, N), B and C (batch, dim, N, L) or (dim, N, 1).

    Returns the sum over the states of C · h, (batch, dim, L), and the last state, (batch, dim, N).
    """
    length = u.shape[-1]
    decay = torch.exp(delta.unsqueeze(2) * A.unsqueeze(-1))  # (batch, dim, N, L)
    drive = (delta * u).unsqueeze(2) * B
    C = C.expand_as(drive)
    h = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    ys: list[Tensor] = []
    for step in range(length):
        i = length - 1 - step if reverse else step
        h = decay[..., i] * h + drive[..., i]
        ys.append((h * C[..., i]).sum(-1))
    if reverse:
        ys.reverse()
    return (torch.stack(ys, dim=-1) if ys else torch.zeros_like(u)), h


def _per_channel(M: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Bring B or C to (dim, N, 1) or (batch, dim, N, L)."""
    M = M.to(dtype)
    if M.ndim == 2:
        return M.unsqueeze(-1)
    if M.ndim == 3:
        return M.unsqueeze(1).expand(-1, dim, -1, -1)
    return M.repeat_interleave(dim // max(M.shape[1], 1), dim=1)


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
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(u.dtype)
    x, step = u.to(dtype), delta.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype).unsqueeze(-1)
    if delta_softplus:
        step = F.softplus(step)
    dim = u.shape[1]
    y, last = scan_steps(x, step, A.to(dtype), _per_channel(B, dim, dtype), _per_channel(C, dim, dtype))
    if D is not None:
        y = y + D.to(dtype).unsqueeze(-1) * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), last


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
) -> tuple[Tensor, Tensor]:
    last = u.new_empty(u.shape[0], u.shape[1], A.shape[1], dtype=accumulate_dtype(u.dtype))
    return torch.empty_like(u), last


_run = define_operator(
    "selective_scan",
    "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus) -> (Tensor, Tensor)",
    _reference,
    _fake,
)
