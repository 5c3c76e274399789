"""The Haar transform of 2×2 blocks of pixels, and its inverse, each with one lane a block and channel.

A program holds a tile of blocks × channels. What is read with stride 2, of channels-first maps, comes out of the L1
cache the second time. Every element is read once from memory and written once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mobilemamba_kernels.triton._launch import blocks, channels_inside, index_type, launch
from mobilemamba_kernels.triton._tiles import tile, tile_size

_ELEMENTS = 1024  # of a tile, in each of the four bands


@triton.jit
def butterfly(a, b, c, d):
    """Twice the transform of the block a b / c d; twice the inverse of the bands a, b, c, d too."""
    s, t, u, v = a + b, c + d, a - b, c - d
    return s + t, s - t, u + v, u - v


@triton.jit
def load_block(x, row_stride, column_stride, row, column, height, width, mask):
    """The pixels of a block in float32; ``x`` points to the first pixel of its map."""
    x += 2 * row * row_stride + 2 * column * column_stride
    right, below = mask & (2 * column + 1 < width), mask & (2 * row + 1 < height)
    return (
        tl.load(x, mask, 0.0).to(tl.float32),
        tl.load(x + column_stride, right, 0.0).to(tl.float32),
        tl.load(x + row_stride, below, 0.0).to(tl.float32),
        tl.load(x + row_stride + column_stride, right & below, 0.0).to(tl.float32),
    )


@triton.jit
def load_bands(bands, band_stride, mask):
    """What belongs to each of the four bands, in float32."""
    return (
        tl.load(bands, mask, 0.0).to(tl.float32),
        tl.load(bands + band_stride, mask, 0.0).to(tl.float32),
        tl.load(bands + 2 * band_stride, mask, 0.0).to(tl.float32),
        tl.load(bands + 3 * band_stride, mask, 0.0).to(tl.float32),
    )


@triton.jit
def _store_pair(x, column_stride, left, right, left_mask, right_mask, INSIDE: tl.constexpr):
    """Write two columns: each by itself where neighbours in memory are channels, else interleaved."""
    if INSIDE:
        tl.store(x, left, left_mask)
        tl.store(x + column_stride, right, right_mask)
    else:
        columns = tl.arange(0, 2)[None, None, :]
        tl.store(x[:, :, None] + columns * column_stride, tl.join(left, right), tl.join(left_mask, right_mask))


@triton.jit
def store_block(x, row_stride, column_stride, row, column, height, width, mask, a, b, c, d, INSIDE: tl.constexpr):
    """Write the pixels a b / c d of a block; ``x`` points to the first pixel of its map, one for each channel."""
    x += 2 * row * row_stride + 2 * column * column_stride
    right, below = mask & (2 * column + 1 < width), mask & (2 * row + 1 < height)
    kind: tl.constexpr = x.dtype.element_ty
    _store_pair(x, column_stride, a.to(kind), b.to(kind), mask, right, INSIDE)
    _store_pair(x + row_stride, column_stride, c.to(kind), d.to(kind), below, right & below, INSIDE)


@triton.jit
def _transform_kernel(
    x, bands, channels, height, width, h, w, count,
    x_batch, x_channel, x_row, x_column,
    b_batch, b_channel, b_band, b_row, b_column,
    INVERSE: tl.constexpr, INSIDE: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    m, c = tile(channels, POSITIONS, CHANNELS, INDEX)
    mask = (m < count) & (c < channels)
    column, row, batch = m % w, m // w % h, m // w // h
    x += batch * x_batch + c * x_channel
    bands += batch * b_batch + c * b_channel + row * b_row + column * b_column
    if INVERSE:
        ll, lh, hl, hh = load_bands(bands, b_band, mask)
        p, q, r, s = butterfly(0.5 * ll, 0.5 * lh, 0.5 * hl, 0.5 * hh)
        store_block(x, x_row, x_column, row, column, height, width, mask, p, q, r, s, INSIDE)
    else:
        p, q, r, s = load_block(x, x_row, x_column, row, column, height, width, mask)
        ll, lh, hl, hh = butterfly(0.5 * p, 0.5 * q, 0.5 * r, 0.5 * s)
        kind: tl.constexpr = bands.dtype.element_ty
        tl.store(bands, ll.to(kind), mask)
        tl.store(bands + b_band, lh.to(kind), mask)
        tl.store(bands + 2 * b_band, hl.to(kind), mask)
        tl.store(bands + 3 * b_band, hh.to(kind), mask)


def _run(x: Tensor, bands: Tensor, inverse: bool) -> None:
    batch, channels, height, width = x.shape
    h, w = bands.shape[3:]
    count = batch * h * w
    if not count * channels:
        return
    inside = channels_inside(x)
    positions, across = tile_size(channels, inside or channels_inside(bands), _ELEMENTS)
    launch(
        _transform_kernel, blocks(count, positions) * blocks(channels, across),
        x, bands, channels, height, width, h, w, count, *x.stride(), *bands.stride(),
        INVERSE=inverse, INSIDE=inside, POSITIONS=positions, CHANNELS=across, INDEX=index_type(x, bands),
    )  # fmt: skip


def transform(x: Tensor, bands: Tensor) -> Tensor:
    """Write the bands (batch, C, 4, ⌈H/2⌉, ⌈W/2⌉) of ``x`` (batch, C, H, W); return them."""
    _run(x, bands, inverse=False)
    return bands


def inverse(bands: Tensor, x: Tensor) -> Tensor:
    """Write the map ``x`` that has these ``bands``; return it."""
    _run(x, bands, inverse=True)
    return x
