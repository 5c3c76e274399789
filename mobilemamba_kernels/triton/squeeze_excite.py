"""Squeeze-and-excitation in three launches: means, hidden channels, and weights with what they scale.

The last kernel computes the weights of 16 images × some channels, the rows that tensor cores take, and scales a run of
those images' positions with them. x moves twice, the second time out of the L2 cache where it fits, the result once;
means and hidden channels are small.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilemamba_kernels.ops.pack_weight import outputs_of, unpack_weight
from mobilemamba_kernels.triton._launch import (
    Configuration,
    blocks,
    channels_inside,
    every_map,
    index_type,
    launch,
    record,
    strides_of,
)
from mobilemamba_kernels.triton._products import multiplication, multiplied_as, multiply, product
from mobilemamba_kernels.triton._tiles import BUSY

_MEAN_ELEMENTS = 1024  # of a tile of one image
_IMAGES = 16
_CHANNELS = 64  # of a tile of weights
_DEPTH = 32
_STEP = 4  # positions that are scaled at a time


@triton.jit
def _mean_kernel(
    x, mean, channels, width, positions,
    x_batch, x_channel, x_row, x_column,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(channels, CHANNELS)
    batch = (tl.program_id(0) // across).to(INDEX)
    c = (tl.program_id(0) % across * CHANNELS + tl.arange(0, CHANNELS)).to(INDEX)
    exists = (c < channels)[None, :]
    x += batch * x_batch + (c * x_channel)[None, :]
    total = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    for begin in range(0, positions, POSITIONS):
        at = (begin + tl.arange(0, POSITIONS).to(INDEX))[:, None]
        pixels = tl.load(x + at // width * x_row + at % width * x_column, exists & (at < positions), 0.0)
        total += pixels.to(tl.float32)
    tl.store(mean + batch * channels + c, tl.sum(total, 0) / positions, c < channels)


@triton.jit
def _scale_kernel(
    x, hidden, weight, bias, y, images, channels, hidden_channels, width, positions, parts, steps,
    x_batch, x_channel, x_row, x_column,
    w_output, w_hidden, bias_stride,
    y_batch, y_channel, y_row, y_column,
    MULTIPLY: tl.constexpr, PRECISION: tl.constexpr,
    IMAGES: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, STEP: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    c = (program % across * CHANNELS + tl.arange(0, CHANNELS)).to(INDEX)
    part = program // across % parts
    image = (program // across // parts).to(INDEX) * IMAGES + tl.arange(0, IMAGES).to(INDEX)
    exists, wanted = image < images, c < channels
    total = tl.zeros([IMAGES, CHANNELS], tl.float32)
    for begin in range(0, hidden_channels, DEPTH):
        h = begin + tl.arange(0, DEPTH)
        at = hidden + image[:, None] * hidden_channels + h[None, :]
        left = tl.load(at, exists[:, None] & (h < hidden_channels)[None, :], 0.0)
        at = weight + h[:, None] * w_hidden + c[None, :] * w_output
        right = tl.load(at, (h < hidden_channels)[:, None] & wanted[None, :], 0.0)
        total = product(left.to(MULTIPLY), right.to(MULTIPLY), total, PRECISION)
    if bias is not None:
        total += tl.load(bias + c * bias_stride, wanted, 0.0).to(tl.float32)[None, :]
    gate = (1 / (1 + tl.exp(-total)))[:, None, :]

    x += (image * x_batch)[:, None, None] + (c * x_channel)[None, None, :]
    y += (image * y_batch)[:, None, None] + (c * y_channel)[None, None, :]
    mask = exists[:, None, None] & wanted[None, None, :]
    for step in range(steps):
        at = ((part * steps + step) * STEP + tl.arange(0, STEP)).to(INDEX)[None, :, None]
        inside = mask & (at < positions)
        row, column = at // width, at % width
        pixels = tl.load(x + row * x_row + column * x_column, inside, 0.0).to(tl.float32)
        tl.store(y + row * y_row + column * y_column, (pixels * gate).to(y.dtype.element_ty), inside)


def _means(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    mean = x.new_empty(batch, channels, 1, 1, dtype=torch.float32)
    across = min(triton.next_power_of_2(channels), 32 if channels_inside(x) else 4)
    positions = min(triton.next_power_of_2(height * width), _MEAN_ELEMENTS // across)
    launch(
        _mean_kernel, batch * blocks(channels, across),
        x, mean, channels, width, height * width, *x.stride(),
        POSITIONS=positions, CHANNELS=across, INDEX=index_type(x),
    )  # fmt: skip
    return mean


def forward(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    batch, channels, height, width = x.shape
    y = torch.empty_like(x)
    if not y.numel():
        return y
    hidden_channels, positions = outputs_of(w1, b1), height * width
    w1, w2 = unpack_weight(w1, hidden_channels, channels), unpack_weight(w2, channels, hidden_channels)
    hidden = x.new_empty(batch, hidden_channels, 1, 1, dtype=torch.float32)
    multiply([_means(x)], w1, b1, "relu", [], "none", hidden)
    multiply_type, precision = multiplication(multiplied_as(hidden.dtype, w2))
    tiles = blocks(batch, _IMAGES) * blocks(channels, _CHANNELS)
    steps = blocks(blocks(positions, _STEP), max(1, BUSY // tiles))
    parts = blocks(positions, _STEP * steps)
    launch(
        _scale_kernel, tiles * parts,
        x, hidden, w2, b2, y, batch, channels, hidden_channels, width, positions, parts, steps,
        *x.stride(), *w2.stride(), *strides_of(b2, 1), *y.stride(),
        MULTIPLY=multiply_type, PRECISION=precision,
        IMAGES=_IMAGES, CHANNELS=_CHANNELS, DEPTH=_DEPTH, STEP=_STEP, INDEX=index_type(x, y), num_warps=8,
    )  # fmt: skip
    return y


def configurations() -> Iterator[Configuration]:
    """The squeeze-and-excitations of S6, with weights of the maps' dtype and of float32."""
    for channels, hidden, size in ((768, 192, 7), (1536, 384, 4)):
        for batch in (1, 256):
            for name, x in every_map(batch, channels, size, size):
                for dtype in {x.dtype, torch.float32}:
                    w1 = torch.empty(hidden, channels, dtype=dtype, device="meta")
                    w2 = torch.empty(channels, hidden, dtype=dtype, device="meta")
                    b1, b2 = torch.empty(hidden, device="meta"), torch.empty(channels, device="meta")
                    title = f"squeeze_excite-{name}-to{hidden}-{str(dtype).removeprefix('torch.')}"
                    yield from record(title, forward, x, w1, b1, w2, b2)
