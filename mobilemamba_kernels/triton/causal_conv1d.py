"""Causal depthwise convolution over a sequence, with bias and SiLU, in one pass over memory.

A tile is runs of four positions × channels, a lane has one run of one channel. Its run and the one before, which
neighbouring lanes read too and which comes out of the L1 cache, are all that the result needs: x is read and the result
written once. With positions innermost in memory a lane moves a run at once, else neighbouring lanes are neighbouring
channels.

The backward computes the pre-activation again, of a run and of the positions behind it whose taps meet the run: x and
the gradient are read and the gradient of x is written once. The gradients of weight and bias are summed over the runs
of a program in registers, and then over programs by ``torch.sum``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilemamba_kernels.triton._activations import activate
from mobilemamba_kernels.triton._launch import (
    Configuration,
    blocks,
    channels_inside,
    index_type,
    launch,
    record,
    strides_of,
)
from mobilemamba_kernels.triton._scan import RUN, alignment, every_sequence, gradient_of, load, multiple
from mobilemamba_kernels.triton._tiles import BUSY, append, repeat, replace, tile_size

_ELEMENTS = 256  # of a tile: a run a thread
_GRADIENT_PROGRAMS = 4 * BUSY


@triton.jit
def _channels(block, INSIDE: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr):
    """The channels of a tile, behind its runs where they are neighbours in memory."""
    c = block.to(INDEX) * CHANNELS + tl.arange(0, CHANNELS).to(INDEX)
    return c[None, :] if INSIDE else c[:, None]


@triton.jit
def _runs(block, runs, count, INSIDE: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, INDEX: tl.constexpr):
    """Batch and first position of the runs of a tile, and which exist."""
    m = block.to(INDEX) * RUNS + tl.arange(0, RUNS).to(INDEX)
    m = m[:, None] if INSIDE else m[None, :]
    return m // runs, m % runs * RUN, m < count


@triton.jit
def _load_run(pointers, t, stride, length, exists, INSIDE: tl.constexpr, RUN: tl.constexpr):
    """What lies at the RUN positions from t on, zeros outside of the sequence."""
    if INSIDE:
        values = ()
        for r in tl.static_range(RUN):
            values = append(values, load(pointers + (t + r) * stride, exists & (t + r >= 0) & (t + r < length)))
        return values
    else:
        at = t[:, :, None] + tl.arange(0, RUN)
        values = load(pointers[:, :, None] + at * stride, exists[:, :, None] & (at >= 0) & (at < length))
        even, odd = tl.split(values.reshape(exists.shape[0], exists.shape[1], 2, 2))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth


@triton.jit
def _store_run(pointers, values, t, stride, length, exists, INSIDE: tl.constexpr, RUN: tl.constexpr):
    if INSIDE:
        for r in tl.static_range(RUN):
            tl.store(pointers + (t + r) * stride, values[r].to(pointers.dtype.element_ty), exists & (t + r < length))
    else:
        at = t[:, :, None] + tl.arange(0, RUN)
        joined = tl.join(tl.join(values[0], values[2]), tl.join(values[1], values[3]))
        joined = joined.reshape(exists.shape[0], exists.shape[1], RUN).to(pointers.dtype.element_ty)
        tl.store(pointers[:, :, None] + at * stride, joined, exists[:, :, None] & (at < length))


@triton.jit
def _load_known(
    x, initial_states, t, stride, i_position, length, exists, INSIDE: tl.constexpr, RUN: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The WIDTH - 1 positions before a run, and the run."""
    before = _load_run(x, t - RUN, stride, length, exists, INSIDE, RUN)
    known = before[RUN - WIDTH + 1 :] + _load_run(x, t, stride, length, exists, INSIDE, RUN)
    if initial_states is not None:
        for j in tl.static_range(WIDTH - 1):
            known = replace(known, j, known[j] + load(initial_states + j * i_position, exists & (t == 0)))
    return known


@triton.jit
def _load_numbers(seq_idx, t, stride, length, exists, COUNT: tl.constexpr):
    """The numbers of the sequences of COUNT positions, -1 where there are none."""
    numbers = ()
    for i in tl.static_range(COUNT):
        inside = exists & (t + i >= 0) & (t + i < length)
        numbers = append(numbers, tl.load(seq_idx + (t + i) * stride, inside, -1))
    return numbers


@triton.jit
def _load_filter(weight, bias, c, channels, w_channel, w_tap, bias_channel, WIDTH: tl.constexpr):
    taps = ()
    for j in tl.static_range(WIDTH):
        taps = append(taps, load(weight + c * w_channel + j * w_tap, c < channels))
    return taps, tl.zeros(c.shape, tl.float32) if bias is None else load(bias + c * bias_channel, c < channels)


@triton.jit
def _within(product, numbers, i, j):
    """``product`` where two positions belong to the same sequence, else 0."""
    if numbers is None:
        return product
    else:
        return tl.where(numbers[i] == numbers[j], product, 0.0)


@triton.jit
def _convolve(known, numbers, taps, shift, i, WIDTH: tl.constexpr):
    """Bias and taps at the i-th position of a run."""
    total = shift
    for j in tl.static_range(WIDTH):
        total += _within(taps[j] * known[i + j], numbers, i + j, i + WIDTH - 1)
    return total


@triton.jit
def _forward_kernel(
    x, weight, bias, seq_idx, initial_states, y, channels, length, runs, count,
    x_batch, x_channel, x_position,
    w_channel, w_tap,
    bias_channel,
    s_batch, s_position,
    i_batch, i_channel, i_position,
    y_batch, y_channel, y_position,
    WIDTH: tl.constexpr, SILU: tl.constexpr, INSIDE: tl.constexpr, ALIGN: tl.constexpr,
    RUN: tl.constexpr, RUNS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(channels, CHANNELS)
    c = _channels(tl.program_id(0) % across, INSIDE, CHANNELS, INDEX)
    batch, t, runs_exist = _runs(tl.program_id(0) // across, runs, count, INSIDE, RUN, RUNS, INDEX)
    exists = runs_exist & (c < channels)
    length = multiple(length, ALIGN)
    x += batch * multiple(x_batch, ALIGN) + c * multiple(x_channel, ALIGN)
    y += batch * multiple(y_batch, ALIGN) + c * multiple(y_channel, ALIGN)
    if seq_idx is not None:
        seq_idx += batch * s_batch
    if initial_states is not None:
        initial_states += batch * i_batch + c * i_channel
    taps, shift = _load_filter(weight, bias, c, channels, w_channel, w_tap, bias_channel, WIDTH)
    known = _load_known(x, initial_states, t, x_position, i_position, length, exists, INSIDE, RUN, WIDTH)
    numbers = None
    if seq_idx is not None:
        numbers = _load_numbers(seq_idx, t - (WIDTH - 1), s_position, length, runs_exist, RUN + WIDTH - 1)
    results = ()
    for i in tl.static_range(RUN):
        result = activate(_convolve(known, numbers, taps, shift, i, WIDTH), "silu" if SILU else "none")
        if numbers is not None:
            result = tl.where(numbers[i + WIDTH - 1] >= 0, result, 0.0)
        results = append(results, result)
    _store_run(y, results, t, y_position, length, exists, INSIDE, RUN)


@triton.jit
def _adjoint(slopes, numbers, taps, i, WIDTH: tl.constexpr):
    """The gradient of the i-th known position, from those before the activation."""
    total = tl.zeros(slopes[0].shape, tl.float32)
    for j in tl.static_range(WIDTH):
        if i >= j:
            total += _within(taps[j] * slopes[i - j], numbers, i, i - j + WIDTH - 1)
    return total


@triton.jit
def _backward_kernel(
    grad, x, weight, bias, seq_idx, initial_states, grad_x, grad_initial, parts, channels, length, runs, count, steps,
    grad_batch, grad_channel, grad_position,
    x_batch, x_channel, x_position,
    w_channel, w_tap,
    bias_channel,
    s_batch, s_position,
    i_batch, i_channel, i_position,
    grad_x_batch, grad_x_channel, grad_x_position,
    grad_i_batch, grad_i_channel, grad_i_position,
    WIDTH: tl.constexpr, SILU: tl.constexpr, INSIDE: tl.constexpr, ALIGN: tl.constexpr,
    RUN: tl.constexpr, RUNS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """``parts`` is (groups of runs, WIDTH + 1, channels): the sums for the taps, and that for the bias."""
    across = tl.cdiv(channels, CHANNELS)
    group = tl.program_id(0) // across
    c = _channels(tl.program_id(0) % across, INSIDE, CHANNELS, INDEX)
    taps, shift = _load_filter(weight, bias, c, channels, w_channel, w_tap, bias_channel, WIDTH)
    length = multiple(length, ALIGN)
    sums = repeat(tl.zeros([RUNS, CHANNELS] if INSIDE else [CHANNELS, RUNS], tl.float32), WIDTH + 1)
    for step in range(steps):
        batch, t, runs_exist = _runs(group * steps + step, runs, count, INSIDE, RUN, RUNS, INDEX)
        exists = runs_exist & (c < channels)
        at_x = x + batch * multiple(x_batch, ALIGN) + c * multiple(x_channel, ALIGN)
        at_grad = grad + batch * multiple(grad_batch, ALIGN) + c * multiple(grad_channel, ALIGN)
        at_grad_x = grad_x + batch * multiple(grad_x_batch, ALIGN) + c * multiple(grad_x_channel, ALIGN)
        at_initial = None if initial_states is None else initial_states + batch * i_batch + c * i_channel
        known = _load_known(at_x, at_initial, t, x_position, i_position, length, exists, INSIDE, RUN, WIDTH)
        known = known + _load_run(at_x, t + RUN, x_position, length, exists, INSIDE, RUN)
        numbers = None
        if seq_idx is not None:
            at_numbers = seq_idx + batch * s_batch
            numbers = _load_numbers(at_numbers, t - (WIDTH - 1), s_position, length, runs_exist, RUN + 2 * (WIDTH - 1))
            # A NaN of the padding times its gradient, which is 0, is no part of the sums.
            for i in tl.static_range(RUN + WIDTH - 1):
                known = replace(known, i, tl.where(numbers[i] < 0, 0.0, known[i]))
        grads = _load_run(at_grad, t, grad_position, length, exists, INSIDE, RUN)
        grads = grads + _load_run(at_grad, t + RUN, grad_position, length, exists, INSIDE, RUN)

        slopes = ()
        for i in tl.static_range(RUN + WIDTH - 1):
            slope = grads[i]
            if SILU:
                result = _convolve(known, numbers, taps, shift, i, WIDTH)
                opened = tl.sigmoid(result)
                slope = tl.where(t + i < length, slope * opened * (1.0 + result * (1.0 - opened)), 0.0)
            if numbers is not None:
                slope = tl.where(numbers[i + WIDTH - 1] >= 0, slope, 0.0)
            slopes = append(slopes, slope)

        results = ()
        for i in tl.static_range(RUN):
            for j in tl.static_range(WIDTH):
                product = _within(slopes[i] * known[i + j], numbers, i + j, i + WIDTH - 1)
                sums = replace(sums, j, sums[j] + product)
            sums = replace(sums, WIDTH, sums[WIDTH] + slopes[i])
            results = append(results, _adjoint(slopes, numbers, taps, i + WIDTH - 1, WIDTH))
        _store_run(at_grad_x, results, t, grad_x_position, length, exists, INSIDE, RUN)
        if grad_initial is not None:
            at_grad_initial = grad_initial + batch * grad_i_batch + c * grad_i_channel
            for i in tl.static_range(WIDTH - 1):
                result = _adjoint(slopes, numbers, taps, i, WIDTH).to(grad_initial.dtype.element_ty)
                tl.store(at_grad_initial + i * grad_i_position, result, exists & (t == 0))

    for j in tl.static_range(WIDTH + 1):
        part = parts + (group.to(INDEX) * (WIDTH + 1) + j) * channels + c
        tl.store(part, tl.sum(sums[j], 0 if INSIDE else 1, keep_dims=True), c < channels)


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    """Channels and length, runs of a sequence and of all."""
    batch, channels, length = x.shape
    runs = blocks(length, RUN)
    return channels, length, runs, batch * runs


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, initial_states: Tensor | None, silu: bool
) -> Tensor:
    y = torch.empty_like(x)
    if not x.numel():
        return y
    channels, _, _, count = sizes = _sizes(x)
    inside = channels_inside(x)
    runs, across = tile_size(channels, inside, _ELEMENTS)
    launch(
        _forward_kernel, blocks(count, runs) * blocks(channels, across),
        x, weight, bias, seq_idx, initial_states, y, *sizes,
        *x.stride(), *weight.stride(), *strides_of(bias, 1), *strides_of(seq_idx, 2), *strides_of(initial_states, 3),
        *y.stride(),
        WIDTH=weight.shape[1], SILU=silu, INSIDE=inside, ALIGN=alignment(x, y), RUN=RUN, RUNS=runs, CHANNELS=across,
        INDEX=index_type(x, y, seq_idx, initial_states), num_warps=8,
    )  # fmt: skip
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    silu: bool,
) -> list[Tensor]:
    if not x.numel():
        arguments = (x, weight, bias, None, initial_states)
        return [x.new_empty(0) if t is None else torch.zeros_like(t) for t in arguments]
    grad_x = torch.empty_like(x)
    grad_initial = None if initial_states is None else torch.empty_like(initial_states)
    channels, _, _, count = sizes = _sizes(x)
    inside = channels_inside(x)
    runs, across = tile_size(channels, inside, _ELEMENTS)
    chunks, channel_blocks = blocks(count, runs), blocks(channels, across)
    steps = blocks(chunks, max(1, _GRADIENT_PROGRAMS // channel_blocks))
    groups = blocks(chunks, steps)
    parts = x.new_empty(groups, weight.shape[1] + 1, channels, dtype=torch.float32)
    launch(
        _backward_kernel, groups * channel_blocks,
        grad, x, weight, bias, seq_idx, initial_states, grad_x, grad_initial, parts, *sizes, steps,
        *grad.stride(), *x.stride(), *weight.stride(), *strides_of(bias, 1), *strides_of(seq_idx, 2),
        *strides_of(initial_states, 3), *grad_x.stride(), *strides_of(grad_initial, 3),
        WIDTH=weight.shape[1], SILU=silu, INSIDE=inside, ALIGN=alignment(grad, x, grad_x), RUN=RUN, RUNS=runs,
        CHANNELS=across, INDEX=index_type(grad, x, grad_x, seq_idx, initial_states, grad_initial, parts), num_warps=8,
    )  # fmt: skip
    sums = parts.sum(0)
    return [
        grad_x,
        gradient_of(weight, sums[:-1].T, x),
        gradient_of(bias, sums[-1], x),
        x.new_empty(0),
        x.new_empty(0) if grad_initial is None else grad_initial,
    ]


def _both(*args: Any) -> None:
    backward(forward(*args), *args)


def configurations() -> Iterator[Configuration]:
    """The kernels of Mamba's convolution at 130 million parameters, and of the other widths."""
    for name, empty in every_sequence():
        for length, width, silu, states in ((2048, 4, True, False), (196, 4, True, True), (2048, 2, False, False)):
            x = empty(8, 1536, length)
            weight, bias = x.new_empty(1536, width, dtype=torch.float32), x.new_empty(1536, dtype=torch.float32)
            initial_states = empty(8, 1536, width - 1) if states else None
            title = f"causal_conv1d-{length}-w{width}-{name}"
            yield from record(title, partial(_both, x, weight, bias, None, initial_states, silu))
        for dtype in (torch.int32, torch.int64):
            x, seq_idx = empty(8, 1536, 2048), weight.new_empty(8, 2048, dtype=dtype)
            yield from record(
                f"causal_conv1d-2048-{dtype}-{name}", partial(_both, x, weight, bias, seq_idx, None, True)
            )
