"""A step of the selective scan, with its state kept from call to call: Mamba's recurrence when it generates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemamba_kernels._library import define_update
from mobilemamba_kernels.backends import run_update
from mobilemamba_kernels.ops._checks import (
    accumulate_dtype,
    check_changeable,
    check_indices,
    check_rows,
    check_shape,
    check_tensors,
)
from mobilemamba_kernels.ops.selective_scan import check_state


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Advance the state by one position; mamba-ssm's function of this name, argument for argument.

    With Δ = softplus(dt + dt_bias) (without the softplus unless ``dt_softplus``), ``state`` changes in place::

        state = exp(Δ A) state + Δ B x,   result = (C · state + D x) · SiLU(z)

    Every tensor may have a dimension of heads, (heads, dim) in place of (dim); groups of heads share B and C.

    Args:
        state: (batch, [heads,] dim, N), float16, bfloat16, float32 or float64, of any strides, N at most 256.
        x, dt, z: (batch, [heads,] dim).
        A: ([heads,] dim, N).
        B, C: (batch, N) or (batch, groups, N), heads a multiple of groups.
        D, dt_bias: ([heads,] dim).
        dt_softplus: apply softplus (the identity above 20) to the step sizes.
        state_batch_indices: int32 or int64, (batch), all different: the row of ``state``, which may then have any
            number of rows, that each sequence uses. Where it is negative (padding) the result is 0.

    Returns:
        (batch, [heads,] dim) in ``x``'s dtype. Differentiable on the reference, which runs where a gradient is wanted.

    Raises:
        TypeError: an argument is no real floating-point tensor, or an index no integer.
        ValueError: shapes or devices do not fit together, or (on a CPU) a row of ``state`` does not exist.
    """
    if getattr(state, "ndim", 0) == 3:  # one group, of no heads
        B, C = (t.squeeze(1) if getattr(t, "ndim", 0) == 3 else t for t in (B, C))
    args = (state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
    return run_update("selective_state_update", _run, _check, (x, state, dt, A, B, C, D, z, dt_bias), state, args)


def _check(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
) -> None:
    op = "selective_state_update"
    check_tensors(
        op,
        {"x": x, "state": state, "dt": dt, "A": A, "B": B, "C": C},
        {"D": D, "z": z, "dt_bias": dt_bias},
    )
    if state.ndim not in (3, 4):
        raise ValueError(
            f"{op}: state must have shape (batch, dim, N) or (batch, heads, dim, N); got {tuple(state.shape)}"
        )
    heads = state.ndim == 4
    *channels, N = state.shape[1:]
    check_state(op, N)
    names = "heads, dim" if heads else "dim"
    batch = x.shape[0] if x.ndim else 0
    if state_batch_indices is None:
        check_shape(op, "state", state, (batch, *channels, N), f"batch, {names}, N")
    for name, tensor in (("x", x), ("dt", dt), ("z", z)):
        check_shape(op, name, tensor, (batch, *channels), f"batch, {names}")
    check_shape(op, "A", A, (*channels, N), f"{names}, N")
    for name, tensor in (("D", D), ("dt_bias", dt_bias)):
        check_shape(op, name, tensor, tuple(channels), names)
    grouped = (B.shape[1],) if heads and B.ndim == 3 else ()
    groups = grouped[0] if grouped else 1
    for name, tensor in (("B", B), ("C", C)):
        check_shape(op, name, tensor, (batch, *grouped, N), "batch, groups, N" if grouped else "batch, N")
    if heads and (groups == 0 or channels[0] % groups):
        raise ValueError(f"{op}: heads must be a multiple of B's groups; got {channels[0]} heads, {groups} groups")
    if state_batch_indices is not None:
        check_indices(op, "state_batch_indices", state_batch_indices, x)
        check_shape(op, "state_batch_indices", state_batch_indices, (batch,), "batch")
    check_changeable(op, "state", state)
    check_rows(op, "state_batch_indices", state_batch_indices, state.shape[0])


def _reference(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
) -> Tensor:
    dtype = accumulate_dtype(x.dtype)
    if B.ndim == 3:  # a group for every head: (batch, heads, 1, N)
        B, C = (t.repeat_interleave(x.shape[1] // t.shape[1], dim=1).unsqueeze(2) for t in (B, C))
    else:
        B, C = (t.view(t.shape[0], *[1] * (x.ndim - 1), t.shape[1]) for t in (B, C))
    step = dt.to(dtype)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    if dt_softplus:
        step = F.softplus(step)
    step, value = step.unsqueeze(-1), x.to(dtype)
    rows = slice(None) if state_batch_indices is None else state_batch_indices.clamp(min=0).long()
    before = state[rows].clone()  # autograd keeps it, and state changes
    after = torch.exp(step * A.to(dtype)) * before.to(dtype) + step * B.to(dtype) * value.unsqueeze(-1)
    y = (after * C.to(dtype)).sum(-1)
    if D is not None:
        y = y + D.to(dtype) * value
    if z is not None:
        y = y * F.silu(z.to(dtype))
    if state_batch_indices is None:
        state.copy_(after)
    else:
        used = state_batch_indices >= 0
        state[state_batch_indices[used].long()] = after[used].to(state.dtype)
        y = torch.where(used.view(-1, *[1] * (y.ndim - 1)), y, 0)
    return y.to(x.dtype)


def _fake(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
) -> Tensor:
    return torch.empty_like(x)


_run = define_update(
    "selective_state_update",
    "(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, Tensor? state_batch_indices) -> Tensor",
    _reference,
    _fake,
)
