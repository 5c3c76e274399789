"""A step of the selective scan, and of its state, in one pass over memory.

A tile is some channels of one head and row of the batch × all their states: every element of the state is read and
written once, beside which the rest is little. A is the same for all of the batch and comes out of the L2 cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilemamba_kernels.triton._launch import Configuration, blocks, index_type, launch, record, strides_of
from mobilemamba_kernels.triton._scan import every_sequence, load, silu, softplus

_ELEMENTS = 512  # of a tile


@triton.jit
def _kernel(
    state, x, dt, A, B, C, D, z, dt_bias, rows, y, channels, heads, share, N,
    state_row, state_head, state_channel, state_n,
    x_batch, x_head, x_channel,
    dt_batch, dt_head, dt_channel,
    A_head, A_channel, A_n,
    B_batch, B_group, B_n,
    C_batch, C_group, C_n,
    D_head, D_channel,
    z_batch, z_head, z_channel,
    bias_head, bias_channel,
    rows_batch,
    y_batch, y_head, y_channel,
    SOFTPLUS: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """``share`` heads have the same B and C."""
    across = tl.cdiv(channels, CHANNELS)
    head = (tl.program_id(0) // across % heads).to(INDEX)
    batch = (tl.program_id(0) // across // heads).to(INDEX)
    c = (tl.program_id(0) % across).to(INDEX) * CHANNELS + tl.arange(0, CHANNELS).to(INDEX)
    n = tl.arange(0, STATES).to(INDEX)
    row = batch
    if rows is not None:
        row = tl.load(rows + batch * rows_batch).to(INDEX)
    exists, states_exist = c < tl.where(row < 0, 0, channels), n < N
    both = exists[:, None] & states_exist[None, :]

    state += row * state_row + head * state_head + c[:, None] * state_channel + n[None, :] * state_n
    before = load(state, both)
    value = load(x + batch * x_batch + head * x_head + c * x_channel, exists)
    step = load(dt + batch * dt_batch + head * dt_head + c * dt_channel, exists)
    if dt_bias is not None:
        step += load(dt_bias + head * bias_head + c * bias_channel, exists)
    if SOFTPLUS:
        step = softplus(step)
    rate = load(A + head * A_head + c[:, None] * A_channel + n[None, :] * A_n, both)
    into = load(B + batch * B_batch + head // share * B_group + n * B_n, states_exist)
    out_of = load(C + batch * C_batch + head // share * C_group + n * C_n, states_exist)
    after = tl.exp(step[:, None] * rate) * before + step[:, None] * into[None, :] * value[:, None]
    tl.debug_barrier()
    tl.store(state, after.to(state.dtype.element_ty), both)

    result = tl.sum(tl.where(both, after * out_of[None, :], 0.0), 1)
    if D is not None:
        result += load(D + head * D_head + c * D_channel, exists) * value
    if z is not None:
        result *= silu(load(z + batch * z_batch + head * z_head + c * z_channel, exists))
    result = tl.where(exists, result, 0.0)
    tl.store(y + batch * y_batch + head * y_head + c * y_channel, result.to(y.dtype.element_ty), c < channels)


def forward(
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
    y = out = torch.empty_like(x)
    if not x.numel():
        return y
    if x.ndim == 2:
        state, x, dt, out, A = *(t.unsqueeze(1) for t in (state, x, dt, y)), A.unsqueeze(0)
        D, dt_bias = (None if t is None else t.unsqueeze(0) for t in (D, dt_bias))
        z = None if z is None else z.unsqueeze(1)
    if B.ndim == 2:
        B, C = B.unsqueeze(1), C.unsqueeze(1)
    batch, heads, channels = x.shape
    states = triton.next_power_of_2(state.shape[3])
    across = min(triton.next_power_of_2(channels), _ELEMENTS // states)
    launch(
        _kernel, batch * heads * blocks(channels, across),
        state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, out, channels, heads, heads // B.shape[1],
        state.shape[3], *state.stride(), *x.stride(), *dt.stride(), *A.stride(), *B.stride(), *C.stride(),
        *strides_of(D, 2), *strides_of(z, 3), *strides_of(dt_bias, 2), *strides_of(state_batch_indices, 1),
        *out.stride(),
        SOFTPLUS=dt_softplus, CHANNELS=across, STATES=states, INDEX=index_type(state, x, dt, A, B, C, z, out),
    )  # fmt: skip
    return y


def configurations() -> Iterator[Configuration]:
    """A step of Mamba at 130 million parameters, and one of Mamba-2, with heads."""
    for name, empty in every_sequence():
        for heads, channels, N in ((1, 1536, 16), (24, 64, 128)):
            state = empty(8, heads, channels, N)
            x, B = state.new_empty(8, heads, channels), state.new_empty(8, 1, N)
            A, D = state.new_empty(heads, channels, N).float(), state.new_empty(heads, channels).float()
            title = f"selective_state_update-{heads}x{channels}-N{N}-{name}"
            for index in (None, x.new_empty(8, dtype=torch.int32), x.new_empty(8, dtype=torch.int64)):
                suffix = "" if index is None else f"-{index.dtype}"
                yield from record(f"{title}{suffix}", forward, state, x, x, A, B, B, D, x, D, True, index)
