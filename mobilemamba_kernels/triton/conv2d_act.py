"""Dense convolution as a product over taps and channels, with bias and activation.

A program computes a tile of positions × outputs in float32 registers. It reads the maps where they lie: for each tap
the channels of the pixels that it meets. Neighbouring programs share their positions, so x and the result move once;
pixels under several taps come out of L1 or L2.

Where channels are few (the first layer), taps and channels are one depth, and a lane is a position: it decodes its
place once and reads all that lies under its filter, beside its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilemamba_kernels.ops._convolutions import empty_image, output_size
from mobilemamba_kernels.ops.conv2d_act import filter_size
from mobilemamba_kernels.ops.pack_weight import outputs_of, unpack_weight
from mobilemamba_kernels.triton._launch import (
    Configuration,
    blocks,
    every_map,
    index_type,
    launch,
    record,
    shared_memory,
    strides_of,
)
from mobilemamba_kernels.triton._products import (
    at_positions,
    finished,
    fitting_block,
    multiplication,
    multiplied_as,
    product,
    product_tile,
    vector_of,
)
from mobilemamba_kernels.triton._tiles import BUSY, tile

_FEW_CHANNELS = 15  # of which a tap alone is no depth for tensor cores


@triton.jit
def _kernel(
    x, weight, bias, y, channels: tl.constexpr, outputs, height, width, out_height, out_width, count, stride, padding,
    x_batch, x_channel, x_row, x_column,
    w_output, w_depth, bias_output,
    y_batch, y_output, y_row, y_column,
    K: tl.constexpr, ACTIVATION: tl.constexpr,
    MULTIPLY: tl.constexpr, PRECISION: tl.constexpr, VECTOR: tl.constexpr,
    POSITIONS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    outputs = outputs // VECTOR * VECTOR
    m, o = tile(outputs, POSITIONS, OUTPUTS, INDEX)
    held, wanted = m < count, o < outputs
    column, row, batch = m % out_width, m // out_width % out_height, m // out_width // out_height
    left, top = column * stride - padding, row * stride - padding
    first = batch * x_batch + top * x_row + left * x_column
    weight += tl.multiple_of(o * w_output, (VECTOR, VECTOR))
    total = tl.zeros([POSITIONS, OUTPUTS], tl.float32)
    lanes = tl.arange(0, DEPTH)[None, :]
    for begin in range(0, K * K * channels, DEPTH):
        place = begin + lanes
        exists = place < K * K * channels
        tap, c = place // channels, place % channels
        i, j = tap // K, tap % K
        inside = held & exists & (top + i >= 0) & (top + i < height) & (left + j >= 0) & (left + j < width)
        zero = tl.zeros([1, 1], INDEX)
        offsets = tl.multiple_of(first + (i + zero) * x_row + (j + zero) * x_column, (VECTOR, VECTOR))
        pixels = tl.load(x + offsets + c * x_channel, inside, 0.0)
        filters = tl.load(weight + tl.trans(place) * w_depth, wanted & tl.trans(exists), 0.0)
        total = product(pixels.to(MULTIPLY), filters.to(MULTIPLY), total, PRECISION)
    total = finished(total, bias, bias_output, o, wanted, ACTIVATION)
    y = at_positions(y, batch, row, column, y_batch, y_row, y_column, VECTOR)
    tl.store(y + o * y_output, total.to(y.dtype.element_ty), held & wanted)


@triton.jit
def _few_channels_kernel(
    x, weight, bias, y, channels: tl.constexpr, outputs, height, width, out_height, out_width, count, stride, padding,
    x_batch, x_channel, x_row, x_column,
    w_output, w_depth, bias_output,
    y_batch, y_output, y_row, y_column,
    K: tl.constexpr, ACTIVATION: tl.constexpr,
    MULTIPLY: tl.constexpr, PRECISION: tl.constexpr, VECTOR: tl.constexpr,
    POSITIONS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    outputs = outputs // VECTOR * VECTOR
    m, o = tile(outputs, POSITIONS, OUTPUTS, INDEX)
    held, wanted = m < count, o < outputs
    column, row, batch = m % out_width, m // out_width % out_height, m // out_width // out_height
    left, top = tl.trans(column * stride - padding), tl.trans(row * stride - padding)
    x += tl.trans(batch) * x_batch + top * x_row + left * x_column
    weight += o * w_output
    total = tl.zeros([POSITIONS, OUTPUTS], tl.float32)
    for begin in range(0, K * K * channels, DEPTH):
        place = begin + tl.arange(0, DEPTH)[:, None]
        exists = place < K * K * channels
        c, i, j = place % channels, place // channels // K, place // channels % K
        inside = tl.trans(held) & (top + i >= 0) & (top + i < height) & (left + j >= 0) & (left + j < width)
        zero = tl.zeros([1, 1], INDEX)
        pixels = tl.load(x + (i + zero) * x_row + (j + zero) * x_column + (c + zero) * x_channel, inside & exists, 0.0)
        filters = tl.load(weight + place * w_depth, exists & wanted, 0.0)
        total = product(tl.trans(pixels.to(MULTIPLY)), filters.to(MULTIPLY), total, PRECISION)
    total = finished(total, bias, bias_output, o, wanted, ACTIVATION)
    y = at_positions(y, batch, row, column, y_batch, y_row, y_column, VECTOR)
    tl.store(y + o * y_output, total.to(y.dtype.element_ty), held & wanted)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, activation: str) -> Tensor:
    batch, channels, height, width = x.shape
    k, outputs = filter_size(x, weight), outputs_of(weight, bias)
    out_height, out_width = output_size(x, k, stride, padding)
    y = empty_image(x, outputs, out_height, out_width)
    if not y.numel():
        return y
    filters = unpack_weight(weight, outputs, channels, k)
    matrix = filters.permute(0, 2, 3, 1).reshape(outputs, k * k * channels)  # a copy, unless it is channels-last
    count = batch * out_height * out_width
    few = channels <= _FEW_CHANNELS
    multiplied = multiplied_as(x.dtype, weight)
    vector = vector_of((), y, outputs) if few else vector_of((x, y), matrix, channels, outputs)
    positions, across, depth, options = product_tile(count, outputs, k * k * channels, multiplied, vector)
    if few and multiplied != torch.float32:
        large = min(128, 4096 // across)  # more sums would not fit beside the addresses
        positions, options = large if blocks(count, large) >= BUSY else 32, {"num_warps": 4}
        depth = min(depth, 32)
        if positions == 128 and k * k * channels <= depth:
            options = {"num_warps": 2}
    elif positions == 128 and vector == 8:  # by a sweep on an H200: all outputs at once, or twice as many positions
        if 64 < outputs <= 128:
            across = fitting_block(outputs, 128)
            options = {"num_warps": 8 if across == 128 else 4}
        elif outputs <= 64 and blocks(count, 256) >= BUSY:
            positions = 256
            stage = (positions + across) * depth * multiplied.itemsize
            options = {"num_warps": 8, "num_stages": 3 if 3 * stage <= shared_memory(x.device) else 2}
    multiply_type, precision = multiplication(multiplied)
    launch(
        _few_channels_kernel if few else _kernel, blocks(count, positions) * blocks(outputs, across),
        x, matrix, bias, y, channels, outputs, height, width, out_height, out_width, count, stride, padding,
        *x.stride(), *matrix.stride(), *strides_of(bias, 1), *y.stride(),
        K=k, ACTIVATION=activation, MULTIPLY=multiply_type, PRECISION=precision,
        VECTOR=vector, POSITIONS=positions, OUTPUTS=across, DEPTH=depth, INDEX=index_type(x, y), **options,
    )  # fmt: skip
    return y


def configurations() -> Iterator[Configuration]:
    """The convolutions of S6's stem, and others of images, with weights of the maps' dtype and of float32."""
    stem = ((3, 24, 224, 3, 1), (24, 48, 112, 3, 1), (48, 96, 56, 3, 1), (96, 192, 28, 3, 1))
    for channels, outputs, size, k, padding in (*stem, (3, 64, 224, 7, 3), (3, 64, 224, 3, 0)):
        for batch in (1, 256):
            for name, x in every_map(batch, channels, size, size):
                for dtype in {x.dtype, torch.float32}:
                    weight = torch.empty(outputs, channels, k, k, dtype=dtype, device="meta")
                    bias = torch.empty(outputs, device="meta")
                    title = f"conv2d_act-{name}-to{outputs}-k{k}-p{padding}-{str(dtype).removeprefix('torch.')}"
                    yield from record(title, forward, x, weight, bias, 2, padding, "relu")
