"""A step of the causal depthwise convolution, with its last inputs kept from call to call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemamba_kernels._library import define_update
from mobilemamba_kernels.backends import run_update
from mobilemamba_kernels.ops._checks import (
    accumulate_dtype,
    check_changeable,
    check_dims,
    check_indices,
    check_rows,
    check_shape,
    check_tensors,
)
from mobilemamba_kernels.ops.causal_conv1d import check_activation, check_filter


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve new positions and keep them; causal-conv1d's function of this name, argument for argument.

    ``conv_state`` is changed in place: it moves on by T positions and ends with ``x``; with ``cache_seqlens`` it is a
    circular buffer instead.

    Args:
        x: the new positions, (batch, dim) or (batch, dim, T), float16, bfloat16, float32 or float64.
        conv_state: the positions before, (batch, dim, S), S at least W - 1, of any strides.
        weight: (dim, W), W from 2 to 4.
        bias: (dim).
        activation: None, "silu" or "swish" (the same).
        cache_seqlens: int32 or int64, (batch): how many positions came before. ``x`` goes to positions
            cache_seqlens % S and on, round the end of the buffer.
        conv_state_indices: int32 or int64, (batch), all different: the row of ``conv_state``, which may then have any
            number of rows, that each sequence uses. Where it is negative (padding) the result is 0.

    Returns:
        (batch, dim) or (batch, dim, T), as ``x``, in its dtype. Differentiable on the reference, which runs where a
        gradient is wanted.

    Raises:
        TypeError: an argument is no real floating-point tensor, or an index no integer.
        ValueError: shapes, devices, options or width do not fit, or (on a CPU) a row of ``conv_state`` does not exist.
    """
    check_activation("causal_conv1d_update", activation)
    args = (x, conv_state, weight, bias, activation is not None, cache_seqlens, conv_state_indices)
    return run_update("causal_conv1d_update", _run, _check, (x, conv_state, weight, bias), conv_state, args)


def _check(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> None:
    op = "causal_conv1d_update"
    check_tensors(op, {"x": x, "conv_state": conv_state, "weight": weight}, {"bias": bias})
    if x.ndim not in (2, 3):
        raise ValueError(f"{op}: x must have shape (batch, dim) or (batch, dim, T); got {tuple(x.shape)}")
    batch, dim = x.shape[:2]
    width = check_filter(op, weight, bias, dim)
    check_dims(op, "conv_state", conv_state, "batch, dim, S")
    rows, length = conv_state.shape[0], conv_state.shape[2]
    check_shape(
        op, "conv_state", conv_state, (batch if conv_state_indices is None else rows, dim, length), "batch, dim, S"
    )
    if length < width - 1:
        raise ValueError(f"{op}: conv_state must keep at least W - 1 = {width - 1} positions; got {length}")
    for name, index in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if index is not None:
            check_indices(op, name, index, x)
            check_shape(op, name, index, (batch,), "batch")
    check_changeable(op, "conv_state", conv_state)
    check_rows(op, "conv_state_indices", conv_state_indices, rows)


def _reference(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    dtype = accumulate_dtype(x.dtype)
    new = x if x.ndim == 3 else x.unsqueeze(-1)
    width, steps, length = weight.shape[1], new.shape[-1], conv_state.shape[-1]
    kept = conv_state if conv_state_indices is None else conv_state[conv_state_indices.clamp(min=0).long()]
    if cache_seqlens is None:
        before = kept[..., length - width + 1 :]
        updated = torch.cat([kept, new.to(kept.dtype)], dim=-1)[..., steps:]
    else:
        offsets = cache_seqlens.long().unsqueeze(-1)
        past = (offsets + torch.arange(1 - width, 0, device=x.device)) % length
        before = kept.gather(-1, past.unsqueeze(1).expand(-1, kept.shape[1], -1))
        last = new[..., max(steps - length, 0) :]  # of several that go to one place the last one stays
        places = (offsets + steps - last.shape[-1] + torch.arange(last.shape[-1], device=x.device)) % length
        updated = kept.scatter(-1, places.unsqueeze(1).expand(-1, kept.shape[1], -1), last.to(kept.dtype))
    known = torch.cat([before.to(dtype), new.to(dtype)], dim=-1)
    taps = weight.to(dtype)
    y = sum((taps[:, j : j + 1] * known[..., j : j + steps] for j in range(1, width)), taps[:, :1] * known[..., :steps])
    if bias is not None:
        y = y + bias.to(dtype).unsqueeze(-1)
    if silu:
        y = F.silu(y)
    if conv_state_indices is None:
        conv_state.copy_(updated)
    else:
        used = conv_state_indices >= 0
        conv_state[conv_state_indices[used].long()] = updated[used]
        y = torch.where(used.view(-1, 1, 1), y, 0)
    return (y if x.ndim == 3 else y.squeeze(-1)).to(x.dtype)


def _fake(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    return torch.empty_like(x)


_run = define_update(
    "causal_conv1d_update",
    "(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu, Tensor? cache_seqlens, "
    "Tensor? conv_state_indices) -> Tensor",
    _reference,
    _fake,
)
