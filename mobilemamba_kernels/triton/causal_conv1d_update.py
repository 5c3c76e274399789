"""A step of the causal depthwise convolution, and of its state, in one pass over memory.

A program owns some channels of one row of the batch and all positions of their state. It computes the results first, by
tiles of channels × positions, then reads the state that the step leaves as one tile, and writes that when all its
threads have read. x and the result move once; the state is read and written once, in a circular buffer only the
positions that the filter meets are read and those of x are written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilemamba_kernels.triton._activations import activate
from mobilemamba_kernels.triton._launch import Configuration, blocks, index_type, launch, record, strides_of
from mobilemamba_kernels.triton._scan import every_sequence, load

_ELEMENTS = 512  # of a tile
_MOST_STEPS = 16


@triton.jit
def _known(x, state, i, offset, length, exists, x_position, state_position):
    """Position i from the first of x on; the state's are the last ones before it."""
    new = load(x + i * x_position, exists & (i >= 0))
    old = load(state + (offset + i + length) % length * state_position, exists & (i < 0))
    return tl.where(i < 0, old, new)


@triton.jit
def _kernel(
    x, state, weight, bias, offsets, rows, y, channels, steps, length,
    x_batch, x_channel, x_position,
    state_row, state_channel, state_position,
    w_channel, w_tap,
    bias_channel, offsets_batch, rows_batch,
    y_batch, y_channel, y_position,
    WIDTH: tl.constexpr, SILU: tl.constexpr,
    CHANNELS: tl.constexpr, STEPS: tl.constexpr, LENGTH: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(channels, CHANNELS)
    batch = (tl.program_id(0) // across).to(INDEX)
    c = (tl.program_id(0) % across).to(INDEX) * CHANNELS + tl.arange(0, CHANNELS).to(INDEX)[:, None]
    row, offset = batch, tl.cast(0, INDEX)
    if rows is not None:
        row = tl.load(rows + batch * rows_batch).to(INDEX)
    if offsets is not None:
        offset = ((tl.load(offsets + batch * offsets_batch) % length + length) % length).to(INDEX)
    exists = c < tl.where(row < 0, 0, channels)
    x += batch * x_batch + c * x_channel
    y += batch * y_batch + c * y_channel
    state += row * state_row + c * state_channel

    for first in range(0, steps, STEPS):
        t = first + tl.arange(0, STEPS).to(INDEX)[None, :]
        total = tl.zeros([CHANNELS, STEPS], tl.float32)
        if bias is not None:
            total += load(bias + c * bias_channel, exists)
        for j in tl.static_range(WIDTH):
            tap = load(weight + c * w_channel + j * w_tap, exists)
            inside = exists & (t < steps)
            total += tap * _known(x, state, t + (j - WIDTH + 1), offset, length, inside, x_position, state_position)
        result = tl.where(exists, activate(total, "silu" if SILU else "none"), 0.0)
        tl.store(y + t * y_position, result.to(y.dtype.element_ty), (c < channels) & (t < steps))

    place = tl.arange(0, LENGTH).to(INDEX)[None, :]
    newest = length - 1 if offsets is None else (offset + steps - 1) % length
    i = steps - 1 - (newest - place + length) % length
    changed = exists & (place < length)
    if offsets is not None:
        changed = changed & (i >= 0)
    updated = _known(x, state, i, offset, length, changed, x_position, state_position)
    tl.debug_barrier()
    tl.store(state + place * state_position, updated.to(state.dtype.element_ty), changed)


def forward(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    y = torch.empty_like(x)
    if not x.numel():
        return y
    new, out = (x, y) if x.ndim == 3 else (x.unsqueeze(-1), y.unsqueeze(-1))
    batch, channels, steps = new.shape
    length = triton.next_power_of_2(conv_state.shape[2])
    together = min(triton.next_power_of_2(steps), _MOST_STEPS)
    across = min(triton.next_power_of_2(channels), max(_ELEMENTS // max(length, together), 1))
    launch(
        _kernel, batch * blocks(channels, across),
        new, conv_state, weight, bias, cache_seqlens, conv_state_indices, out, channels, steps, conv_state.shape[2],
        *new.stride(), *conv_state.stride(), *weight.stride(), *strides_of(bias, 1), *strides_of(cache_seqlens, 1),
        *strides_of(conv_state_indices, 1), *out.stride(),
        WIDTH=weight.shape[1], SILU=silu, CHANNELS=across, STEPS=together, LENGTH=length,
        INDEX=index_type(x, conv_state, y),
    )  # fmt: skip
    return y


def configurations() -> Iterator[Configuration]:
    """A step of Mamba at 130 million parameters, and several at once."""
    for name, empty in every_sequence():
        for steps in (1, 4):
            x, state = empty(8, 1536, steps), empty(8, 1536, 4)
            weight, bias = x.new_empty(1536, 4, dtype=torch.float32), x.new_empty(1536, dtype=torch.float32)
            title = f"causal_conv1d_update-{steps}-{name}"
            for index in (None, x.new_empty(8, dtype=torch.int32), x.new_empty(8, dtype=torch.int64)):
                suffix = "" if index is None else f"-{index.dtype}"
                yield from record(f"{title}{suffix}", forward, x, state, weight, bias, True, index, index)
