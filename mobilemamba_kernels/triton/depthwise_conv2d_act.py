"""Depthwise convolution with bias, activation, a scaling of each channel and residual in one pass over memory.

A lane owns some rows of one column of the result, of one channel. For each column under the filter it reads the pixels
above each other once and adds them to all the rows whose taps meet them. Pixels that neighbouring lanes read too come
out of the L1 cache, so x, the residual and the result each move once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilemamba_kernels.ops._convolutions import empty_image, output_size
from mobilemamba_kernels.triton._activations import activate
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
from mobilemamba_kernels.triton._tiles import append, repeat, replace, rows_of_a_lane, tile, tile_size

_ELEMENTS = 256  # of a tile: one a thread
_FEW_TAPS = 9  # filters whose lanes read them where they lie


@triton.jit
def _load_taps(weight, row_stride, mask, K: tl.constexpr):
    """A column of K taps in float32."""
    taps = ()
    for i in tl.static_range(K):
        taps = append(taps, tl.load(weight + i * row_stride, mask, 0.0).to(tl.float32))
    return taps


@triton.jit
def _kernel(
    x, weight, bias, residual, scale, shift, y, channels, height, width, out_height, out_width, count, padding,
    x_batch, x_channel, x_row, x_column,
    w_channel, w_row, w_column,
    bias_channel, scale_channel, shift_channel,
    r_batch, r_channel, r_row, r_column,
    y_batch, y_channel, y_row, y_column,
    K: tl.constexpr, STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    m, c = tile(channels, POSITIONS, CHANNELS, INDEX)
    exists = c < channels
    mask = (m < count) & exists
    parts = tl.cdiv(out_height, ROWS)
    column, first_row, batch = m % out_width, m // out_width % parts * ROWS, m // out_width // parts
    top = first_row * STRIDE - padding
    x += batch * x_batch + c * x_channel + top * x_row
    weight += c * w_channel

    sums = repeat(tl.zeros([POSITIONS, CHANNELS], tl.float32), ROWS)
    for j in tl.range(0, K, loop_unroll_factor=UNROLL):
        met = column * STRIDE - padding + j
        meets = mask & (met >= 0) & (met < width)
        taps = _load_taps(weight + j * w_column, w_row, exists, K)
        for r in tl.static_range((ROWS - 1) * STRIDE + K):
            inside = meets & (top + r >= 0) & (top + r < height)
            pixel = tl.load(x + r * x_row + met * x_column, inside, 0.0).to(tl.float32)
            for q in tl.static_range(ROWS):
                if r - q * STRIDE >= 0 and r - q * STRIDE < K:
                    sums = replace(sums, q, sums[q] + taps[r - q * STRIDE] * pixel)

    y += batch * y_batch + c * y_channel + first_row * y_row + column * y_column
    if residual is not None:
        residual += batch * r_batch + c * r_channel + first_row * r_row + column * r_column
    if bias is not None:
        added = tl.load(bias + c * bias_channel, exists, 0.0).to(tl.float32)
    if scale is not None:
        factor = tl.load(scale + c * scale_channel, exists, 0.0).to(tl.float32)
    if shift is not None:
        offset = tl.load(shift + c * shift_channel, exists, 0.0).to(tl.float32)
    for q in tl.static_range(ROWS):
        inside = mask & (first_row + q < out_height)
        result = sums[q]
        if bias is not None:
            result += added
        result = activate(result, ACTIVATION)
        if scale is not None:
            result *= factor
        if shift is not None:
            result += offset
        if residual is not None:
            result += tl.load(residual + q * r_row, inside, 0.0).to(tl.float32)
        tl.store(y + q * y_row, result.to(y.dtype.element_ty), inside)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    batch, channels, height, width = x.shape
    k = weight.shape[2]
    out_height, out_width = output_size(x, k, stride, padding)
    y = empty_image(x, channels, out_height, out_width)
    if not y.numel():
        return y
    inside = channels_inside(x)
    taps = weight[:, 0]
    if inside and k * k > _FEW_TAPS and taps.stride(0) != 1:
        taps = taps.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    rows = rows_of_a_lane(out_height, batch * out_width * channels / _ELEMENTS)
    count = batch * blocks(out_height, rows) * out_width
    positions, across = tile_size(channels, inside, _ELEMENTS)
    launch(
        _kernel, blocks(count, positions) * blocks(channels, across),
        x, taps, bias, residual, scale, shift, y, channels, height, width, out_height, out_width, count, padding,
        *x.stride(), *taps.stride(), *strides_of(bias, 1), *strides_of(scale, 1), *strides_of(shift, 1),
        *strides_of(residual), *y.stride(),
        K=k, STRIDE=stride, ACTIVATION=activation, ROWS=rows, UNROLL=k if k * k <= _FEW_TAPS else 1,
        POSITIONS=positions, CHANNELS=across, INDEX=index_type(x, residual, y), num_warps=8,
    )  # fmt: skip
    return y


def configurations() -> Iterator[Configuration]:
    """The kernels of S6's depthwise convolutions."""
    for channels, size, k, stride, activation, adds, scales in (
        (192, 14, 3, 1, "none", True, False),
        (320, 14, 3, 1, "silu", False, False),
        (32, 14, 7, 1, "relu", False, True),
        (768, 14, 3, 2, "relu", False, False),
        (384, 7, 3, 1, "none", True, False),
        (76, 7, 5, 1, "relu", False, True),
        (448, 4, 3, 1, "none", True, False),
    ):
        for name, x in every_map(256, channels, size, size):
            weight = torch.empty(channels, 1, k, k, device="meta")
            bias = torch.empty(channels, device="meta")
            title = f"depthwise_conv2d_act-{name}-k{k}-s{stride}-{activation}"
            residual, scale = x if adds else None, bias if scales else None
            yield from record(title, forward, x, weight, bias, stride, k // 2, activation, residual, scale, scale)
