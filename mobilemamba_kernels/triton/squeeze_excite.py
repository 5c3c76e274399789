"""Squeeze-and-excitation in two launches: hidden channels, and weights with what they scale.

The 16 rows that tensor cores take are up to eight images times parts of their positions, whose products are added: the
mean of a block of channels is multiplied where it was made. Where positions lie side by side all rows are one image's.
The second kernel computes the weights of 16 images × some channels and scales a run of those images' positions with
them. x moves once, and out of the L2 cache, where it fits, once for each tile of hidden channels and once for the
result; the result moves once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilemamba_kernels.ops.pack_weight import outputs_of, unpack_weight
from mobilemamba_kernels.triton._activations import activate
from mobilemamba_kernels.triton._launch import (
    ALL_REGISTERS,
    Configuration,
    blocks,
    every_map,
    index_type,
    launch,
    record,
    strides_of,
)
from mobilemamba_kernels.triton._products import multiplication, multiplied_as, product
from mobilemamba_kernels.triton._tiles import BUSY

_ROWS = 16  # of a product
_MOST_IMAGES = 8  # whose means are taken at a time
_MOST_STEPS = 16  # positions of a row that are on their way
_FEWEST_PROGRAMS = 96
_CHANNELS = 64  # of a tile of weights
_DEPTH = 32
_STEP = 4  # positions that are scaled at a time


@triton.jit
def _hidden_kernel(
    x, weight, bias, hidden, images, channels, hidden_channels, width, positions,
    x_batch, x_channel, x_row, x_column,
    w_hidden, w_channel, bias_stride,
    MULTIPLY: tl.constexpr, PRECISION: tl.constexpr,
    IMAGES: tl.constexpr, PARTS: tl.constexpr, HIDDEN: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(hidden_channels, HIDDEN)
    program = tl.program_id(0)
    h = (program % across * HIDDEN + tl.arange(0, HIDDEN)).to(INDEX)
    rows = tl.arange(0, IMAGES * PARTS)
    image = (program // across).to(INDEX) * IMAGES + (rows // PARTS).to(INDEX)
    part = (rows % PARTS).to(INDEX)[:, None]
    x += (image * x_batch)[:, None]
    exists, wanted = (image < images)[:, None], h < hidden_channels
    total = tl.zeros([IMAGES * PARTS, HIDDEN], tl.float32)
    for begin in range(0, channels, DEPTH):
        c = (begin + tl.arange(0, DEPTH)).to(INDEX)
        held = exists & (c < channels)[None, :]
        weights = weight + c[:, None] * w_channel + (h * w_hidden)[None, :]
        right = tl.load(weights, (c < channels)[:, None] & wanted[None, :], 0.0)
        sums = tl.zeros([IMAGES * PARTS, DEPTH], tl.float32)
        for run in range(0, positions, PARTS * STEPS):
            for step in tl.static_range(STEPS):
                at = run + step * PARTS + part
                pixels = x + at // width * x_row + at % width * x_column + (c * x_channel)[None, :]
                sums += tl.load(pixels, held & (at < positions), 0.0).to(tl.float32)
        total = product((sums / positions).to(MULTIPLY), right.to(MULTIPLY), total, PRECISION)
    total = tl.sum(tl.reshape(total, [IMAGES, PARTS, HIDDEN]), 1)
    if bias is not None:
        total += tl.load(bias + h * bias_stride, wanted, 0.0).to(tl.float32)[None, :]
    image = (program // across).to(INDEX) * IMAGES + tl.arange(0, IMAGES).to(INDEX)
    at = hidden + image[:, None] * hidden_channels + h[None, :]
    tl.store(at, activate(total, "relu"), (image < images)[:, None] & wanted[None, :])


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


def _one_column(*maps: Tensor) -> tuple[Tensor, ...]:
    """Maps with a row for each position, whose place takes no division, where their rows follow each other."""
    if all(t.stride(2) == t.shape[3] * t.stride(3) for t in maps):
        return tuple(t.view(*t.shape[:2], -1, 1) for t in maps)
    return maps


def _hidden(x: Tensor, w1: Tensor, b1: Tensor | None) -> Tensor:
    """relu(w1 · mean(x) + b1), (batch, M) in float32."""
    batch, channels, height, width = x.shape
    hidden = x.new_empty(batch, w1.shape[0], dtype=torch.float32)
    multiplied = multiplied_as(hidden.dtype, w1)
    across = 64 if multiplied == torch.float32 else 128
    depth = min(across, max(16, triton.next_power_of_2(channels)))
    images = min(triton.next_power_of_2(batch), _MOST_IMAGES) if x.stride(1) <= x.stride(2) else 1

    def programs() -> int:
        return blocks(batch, images) * blocks(hidden.shape[1], across)

    while images > 1 and programs() < _FEWEST_PROGRAMS:
        images //= 2
    while across > 16 and programs() < _FEWEST_PROGRAMS:
        across //= 2
    parts = _ROWS // images
    steps = blocks(height * width, parts)
    multiply_type, precision = multiplication(multiplied)
    launch(
        _hidden_kernel, programs(),
        x, w1, b1, hidden, batch, channels, hidden.shape[1], width, height * width,
        *x.stride(), *w1.stride(), *strides_of(b1, 1),
        MULTIPLY=multiply_type, PRECISION=precision, IMAGES=images, PARTS=parts, HIDDEN=across,
        DEPTH=depth, STEPS=blocks(steps, blocks(steps, _MOST_STEPS)),
        INDEX=index_type(x), num_warps=8, maxnreg=ALL_REGISTERS,
    )  # fmt: skip
    return hidden


def forward(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    batch, channels, height, width = x.shape
    y = torch.empty_like(x)
    if not y.numel():
        return y
    x, result = _one_column(x, y)
    hidden_channels, positions = outputs_of(w1, b1), height * width
    w1, w2 = unpack_weight(w1, hidden_channels, channels), unpack_weight(w2, channels, hidden_channels)
    hidden = _hidden(x, w1, b1)
    multiply_type, precision = multiplication(multiplied_as(hidden.dtype, w2))
    tiles = blocks(batch, _ROWS) * blocks(channels, _CHANNELS)
    steps = blocks(blocks(positions, _STEP), max(1, BUSY // tiles))
    parts = blocks(positions, _STEP * steps)
    launch(
        _scale_kernel, tiles * parts,
        x, hidden, w2, b2, result, batch, channels, hidden_channels, x.shape[3], positions, parts, steps,
        *x.stride(), *w2.stride(), *strides_of(b2, 1), *result.stride(),
        MULTIPLY=multiply_type, PRECISION=precision,
        IMAGES=_ROWS, CHANNELS=_CHANNELS, DEPTH=_DEPTH, STEP=_STEP, INDEX=index_type(x, y), num_warps=8,
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
