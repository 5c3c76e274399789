"""Causal depthwise convolution over a sequence, as before Mamba's scan (arXiv 2312.00752, figure 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemamba_kernels._library import define_operator
from mobilemamba_kernels.backends import choose
from mobilemamba_kernels.ops._checks import accumulate_dtype, check_dims, check_indices, check_shape, check_tensors

WIDTHS = (2, 3, 4)
"""The filter widths that the operators take."""


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel along its last dimension; causal-conv1d's function of this name, argument for argument.

    With W the width, y_l = activation(bias + Σ_j weight_j x_{l-W+1+j}), where x before its first position is
    ``initial_states``, or 0.

    Args:
        x: (batch, dim, L), float16, bfloat16, float32 or float64, of any strides.
        weight: (dim, W), W from 2 to 4.
        bias: (dim).
        seq_idx: int32 or int64, (batch, L): the number of the sequence that a position belongs to. Positions of other
            sequences count as 0, and where the number is negative (padding) the result is 0. Not together with
            ``initial_states`` or ``return_final_states``.
        initial_states: what precedes ``x``, (batch, dim, W - 1).
        return_final_states: also return the last W - 1 positions (of ``initial_states`` and ``x``).
        final_states_out: where to write these, (batch, dim, W - 1).
        activation: None, "silu" or "swish" (the same).

    Returns:
        (batch, dim, L) in ``x``'s dtype, and with ``return_final_states`` a pair: that and (batch, dim, W - 1).
        Differentiable once, in every floating-point tensor; twice on the reference.

    Raises:
        TypeError: an argument is no real floating-point tensor, or an index no integer.
        ValueError: shapes, devices, options or width do not fit.
    """
    op = "causal_conv1d_fn"
    check_tensors(
        op,
        {"x": x, "weight": weight},
        {"bias": bias, "initial_states": initial_states, "final_states_out": final_states_out},
    )
    check_dims(op, "x", x, "batch, dim, L")
    batch, dim, length = x.shape
    width = check_filter(op, weight, bias, dim)
    check_activation(op, activation)
    for name, states in (("initial_states", initial_states), ("final_states_out", final_states_out)):
        check_shape(op, name, states, (batch, dim, width - 1), "batch, dim, W - 1")
    if seq_idx is not None:
        check_indices(op, "seq_idx", seq_idx, x)
        check_shape(op, "seq_idx", seq_idx, (batch, length), "batch, L")
        if initial_states is not None or return_final_states:
            raise ValueError(
                f"{op}: seq_idx excludes initial_states and return_final_states, as sequences begin within x; "
                "leave one of them out"
            )
    args = (x, weight, bias, seq_idx, initial_states, activation is not None)
    y = _run[choose("causal_conv1d", x, weight, bias, initial_states)](*args)
    if not return_final_states:
        return y
    # A copy, so that the state outlives x and may be updated in place.
    known = x if initial_states is None else torch.cat([initial_states.to(x.dtype), x[..., 1 - width :]], dim=-1)
    final = F.pad(known[..., max(known.shape[-1] - width + 1, 0) :], (max(width - 1 - known.shape[-1], 0), 0))
    final = final.clone() if final_states_out is None else final_states_out.copy_(final)
    return y, final


def check_filter(op: str, weight: Tensor, bias: Tensor | None, dim: int) -> int:
    """Check a filter of ``dim`` channels and its bias; return its width W.

    Raises:
        ValueError: they do not fit.
    """
    check_dims(op, "weight", weight, "dim, W")
    width = weight.shape[1]
    check_shape(op, "weight", weight, (dim, width), "dim, W")
    if width not in WIDTHS:
        raise ValueError(f"{op}: weight's width W must be 2, 3 or 4; got {width}; use torch.nn.functional.conv1d")
    check_shape(op, "bias", bias, (dim,), "dim")
    return width


def check_activation(op: str, activation: str | None) -> None:
    """Check the activation's name.

    Raises:
        ValueError: unknown.
    """
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'{op}: activation must be None, "silu" or "swish"; got {activation!r}')


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
) -> Tensor:
    dtype = accumulate_dtype(x.dtype)
    width, length = weight.shape[1], x.shape[-1]
    before = x.new_zeros(*x.shape[:2], width - 1) if initial_states is None else initial_states
    if seq_idx is not None:  # what the padding holds has no effect, on gradients either
        x = torch.where(seq_idx.unsqueeze(1) >= 0, x, 0)
    known = torch.cat([before.to(dtype), x.to(dtype)], dim=-1)
    taps = weight.to(dtype)
    y = known.new_zeros(x.shape) if bias is None else bias.to(dtype).unsqueeze(-1).expand(x.shape)
    numbers = None if seq_idx is None else F.pad(seq_idx, (width - 1, 0), value=-1).unsqueeze(1)
    for j in range(width):
        tap = taps[:, j : j + 1] * known[..., j : j + length]
        if numbers is not None:
            tap = torch.where(numbers[..., j : j + length] == numbers[..., width - 1 :], tap, 0)
        y = y + tap
    if silu:
        y = F.silu(y)
    if seq_idx is not None:
        y = torch.where(seq_idx.unsqueeze(1) >= 0, y, 0)
    return y.to(x.dtype)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
) -> Tensor:
    return torch.empty_like(x)


_run = define_operator(
    "causal_conv1d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states, bool silu) -> Tensor",
    _reference,
    _fake,
)
