"""Depthwise convolution in the Haar domain: transform, taps, scale, inverse and addition in one pass over memory.

A lane owns some rows of one column of blocks, of one channel: all of them on the network's maps. For each column under
the filter it reads the blocks above each other, transforms each once, and adds them to all the rows whose taps meet
them; the sums of the four bands stay in registers until they are transformed back. Blocks that neighbouring lanes read
too come out of the L1 cache, so each of x, base and the result moves once.

Gradients: that of x is the same pass with the taps turned round, as transform and inverse are each other's adjoint.
That of the weights is the correlation of the transformed gradient with the transformed x: a lane sums one column of
taps over its group of positions, and a second kernel adds the groups in their order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilemamba_kernels.triton._haar import butterfly, load_bands, load_block, store_block
from mobilemamba_kernels.triton._launch import (
    ALL_REGISTERS,
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
_GRADIENT_PROGRAMS = 264  # two for each multiprocessor of a large GPU; each writes sums for all taps
_SUM_ELEMENTS = 1024  # of a tile where groups are added


@triton.jit
def _load_taps(weight, row_stride, band_stride, mask, ROWS: tl.constexpr):
    """A column of ROWS taps of the four bands."""
    taps = ()
    for i in tl.static_range(ROWS):
        taps = append(taps, load_bands(weight + i * row_stride, band_stride, mask))
    return taps


@triton.jit
def _load_rows(
    x, row_stride, column_stride, first_row, column, height, width, h, mask, ROWS: tl.constexpr
):  # fmt: skip
    """Twice the bands of ROWS blocks, one below the other."""
    rows = ()
    for q in tl.static_range(ROWS):
        row = first_row + q
        p0, p1, p2, p3 = load_block(x, row_stride, column_stride, row, column, height, width, mask & (row < h))
        rows = append(rows, butterfly(p0, p1, p2, p3))
    return rows


@triton.jit
def _convolution_kernel(
    x, weight, scale, base, y, channels, height, width, h, w, count,
    x_batch, x_channel, x_row, x_column,
    w_channel, w_band, w_row, w_column, w_first,
    s_channel, s_band,
    base_batch, base_channel, base_row, base_column,
    y_batch, y_channel, y_row, y_column,
    TAP_ROWS: tl.constexpr, TAP_COLUMNS: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr, INSIDE: tl.constexpr,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    m, c = tile(channels, POSITIONS, CHANNELS, INDEX)
    exists = c < channels
    mask = (m < count) & exists
    parts = tl.cdiv(h, ROWS)
    column, first_row, batch = m % w, m // w % parts * ROWS, m // w // parts
    x += batch * x_batch + c * x_channel
    weight += w_first + c * w_channel

    zero = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    sums = repeat((zero, zero, zero, zero), ROWS)
    for j in range(TAP_COLUMNS):
        met = column + j - TAP_COLUMNS // 2
        meets = mask & (met >= 0) & (met < w)
        taps = _load_taps(weight + j * w_column, w_row, w_band, exists, TAP_ROWS)
        for r in tl.static_range(ROWS + TAP_ROWS - 1):
            below = r - TAP_ROWS // 2
            if not WHOLE or (below >= 0 and below < ROWS):
                row = first_row + below
                inside = meets if WHOLE else meets & (row >= 0) & (row < h)
                p0, p1, p2, p3 = load_block(x, x_row, x_column, row, met, height, width, inside)
                ll, lh, hl, hh = butterfly(p0, p1, p2, p3)
                for q in tl.static_range(ROWS):
                    if r - q >= 0 and r - q < TAP_ROWS:
                        s0, s1, s2, s3 = sums[q]
                        t0, t1, t2, t3 = taps[r - q]
                        added = (s0 + t0 * ll, s1 + t1 * lh, s2 + t2 * hl, s3 + t3 * hh)
                        sums = replace(sums, q, added)

    g0, g1, g2, g3 = 0.25, 0.25, 0.25, 0.25  # half of each transform
    if scale is not None:
        scale += c * s_channel
        s0, s1, s2, s3 = load_bands(scale, s_band, exists)
        g0, g1, g2, g3 = g0 * s0, g1 * s1, g2 * s2, g3 * s3
    y += batch * y_batch + c * y_channel
    if base is not None:
        base += batch * base_batch + c * base_channel
    for q in tl.static_range(ROWS):
        row = first_row + q
        inside = mask if WHOLE else mask & (row < h)
        s0, s1, s2, s3 = sums[q]
        p0, p1, p2, p3 = butterfly(g0 * s0, g1 * s1, g2 * s2, g3 * s3)
        if base is not None:
            b0, b1, b2, b3 = load_block(base, base_row, base_column, row, column, height, width, inside)
            p0, p1, p2, p3 = p0 + b0, p1 + b1, p2 + b2, p3 + b3
        store_block(y, y_row, y_column, row, column, height, width, inside, p0, p1, p2, p3, INSIDE)


@triton.jit
def _correlation_kernel(
    grad, x, parts, channels, height, width, h, w, count, groups, steps,
    g_batch, g_channel, g_row, g_column,
    x_batch, x_channel, x_row, x_column,
    TAP_ROWS: tl.constexpr, TAP_COLUMNS: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
    COLUMNS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) % groups
    j = tl.arange(0, COLUMNS)[:, None, None]
    lane = tl.arange(0, POSITIONS).to(INDEX)[None, :, None]
    c = ((tl.program_id(0) // groups) * CHANNELS + tl.arange(0, CHANNELS)).to(INDEX)[None, None, :]
    exists = (j < TAP_COLUMNS) & (c < channels)
    height_parts = tl.cdiv(h, ROWS)

    zero = tl.zeros([COLUMNS, POSITIONS, CHANNELS], tl.float32)
    sums = repeat((zero, zero, zero, zero), TAP_ROWS)
    for step in range(steps):
        m = (group * steps + step).to(INDEX) * POSITIONS + lane
        column, first_row, batch = m % w, m // w % height_parts * ROWS, m // w // height_parts
        met = column + j - TAP_COLUMNS // 2
        # Masks both: an infinite gradient must not meet the zeros around x.
        meets = exists & (m < count) & (met >= 0) & (met < w)
        grad_map, x_map = grad + batch * g_batch + c * g_channel, x + batch * x_batch + c * x_channel
        grads = _load_rows(grad_map, g_row, g_column, first_row, column, height, width, h, meets, ROWS)
        for r in tl.static_range(ROWS + TAP_ROWS - 1):
            below = r - TAP_ROWS // 2
            if not WHOLE or (below >= 0 and below < ROWS):
                row = first_row + below
                inside = meets if WHOLE else meets & (row >= 0) & (row < h)
                p0, p1, p2, p3 = load_block(x_map, x_row, x_column, row, met, height, width, inside)
                ll, lh, hl, hh = butterfly(p0, p1, p2, p3)
                for q in tl.static_range(ROWS):
                    if r - q >= 0 and r - q < TAP_ROWS:
                        s0, s1, s2, s3 = sums[r - q]
                        g0, g1, g2, g3 = grads[q]
                        if not WHOLE:
                            g0, g1 = tl.where(inside, g0, 0.0), tl.where(inside, g1, 0.0)
                            g2, g3 = tl.where(inside, g2, 0.0), tl.where(inside, g3, 0.0)
                        added = (s0 + g0 * ll, s1 + g1 * lh, s2 + g2 * hl, s3 + g3 * hh)
                        sums = replace(sums, r - q, added)

    j, c = tl.arange(0, COLUMNS)[:, None], (tl.program_id(0) // groups) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    exists = (j < TAP_COLUMNS) & (c < channels)
    for i in tl.static_range(TAP_ROWS):
        part = parts + ((group.to(tl.int64) * TAP_ROWS + i) * TAP_COLUMNS + j) * 4 * channels + c
        for band in tl.static_range(4):
            tl.store(part + band * channels, 0.25 * tl.sum(sums[i][band], 1), exists)


@triton.jit
def _sum_kernel(
    parts, weight, scale, grad_weight, grad_scale, channels, groups,
    w_channel, w_band, w_row, w_column,
    s_channel, s_band,
    g_channel, g_band, g_row, g_column,
    TAP_COLUMNS: tl.constexpr, COUNT: tl.constexpr, TAPS: tl.constexpr, FILTERS: tl.constexpr,
):  # fmt: skip
    tap = tl.arange(0, TAPS)[:, None]
    f = tl.program_id(0) * FILTERS + tl.arange(0, FILTERS)
    c, band = f % channels, f // channels
    mask = (tap < COUNT) & (f < 4 * channels)[None, :]
    total = tl.zeros([TAPS, FILTERS], tl.float32)
    parts += tap * 4 * channels + f[None, :]
    for _ in range(groups):
        total += tl.load(parts, mask, 0.0)
        parts += COUNT * 4 * channels
    i, j = tap // TAP_COLUMNS, tap % TAP_COLUMNS
    gradient = total
    if scale is not None:
        weight += (c * w_channel + band * w_band)[None, :] + i * w_row + j * w_column
        product = tl.load(weight, mask, 0.0).to(tl.float32) * total
        filters = f < 4 * channels
        at_scale = c * s_channel + band * s_band
        tl.store(grad_scale + 4 * c + band, tl.sum(product, 0).to(grad_scale.dtype.element_ty), filters)
        gradient = tl.load(scale + at_scale, filters, 0.0).to(tl.float32)[None, :] * total
    grad_weight += (c * g_channel + band * g_band)[None, :] + i * g_row + j * g_column
    tl.store(grad_weight, gradient.to(grad_weight.dtype.element_ty), mask)


def _reachable(weight: Tensor, x: Tensor) -> Tensor:
    """The weights as (C, 4, rows, columns): only the taps that can meet a block of ``x``."""
    k = weight.shape[2]
    rows, columns = (min(k, max(1, 2 * ((n + 1) // 2) - 1)) for n in x.shape[2:])
    top, left = (k - rows) // 2, (k - columns) // 2
    return weight[:, 0, top : top + rows, left : left + columns].unflatten(0, (x.shape[1], 4))


def _readable(taps: Tensor) -> Tensor:
    """The taps with neighbouring filters beside each other, as the lanes of a warp read them."""
    order = (2, 3, 1, 0)
    return taps if taps.stride(1) == 1 else taps.permute(order).contiguous().permute(3, 2, 0, 1)


def _rows(x: Tensor) -> int:
    """Of a lane: all, or at most 6, as the checks at their edges take registers too."""
    batch, channels, height, width = x.shape
    h = (height + 1) // 2
    rows = rows_of_a_lane(h, batch * ((width + 1) // 2) * channels / _ELEMENTS)
    return rows if rows == h else min(rows, 6)


def _scale_strides(scale: Tensor | None) -> tuple[int, int]:
    return (0, 0) if scale is None else (4 * scale.stride(0), scale.stride(0))


def _convolve(x: Tensor, taps: Tensor, scale: Tensor | None, base: Tensor | None, y: Tensor, reverse: bool) -> Tensor:
    """Write the result into ``y``; return it."""
    if not x.numel():
        return y
    batch, channels, height, width = x.shape
    h, w = (height + 1) // 2, (width + 1) // 2
    tap_rows, tap_columns = taps.shape[2:]
    w_channel, w_band, w_row, w_column = taps.stride()
    first = (tap_rows - 1) * w_row + (tap_columns - 1) * w_column if reverse else 0
    direction = -1 if reverse else 1
    rows = _rows(x)
    count = batch * blocks(h, rows) * w
    positions, across = tile_size(channels, channels_inside(x), _ELEMENTS)
    launch(
        _convolution_kernel, blocks(count, positions) * blocks(channels, across),
        x, taps, scale, base, y, channels, height, width, h, w, count,
        *x.stride(), w_channel, w_band, direction * w_row, direction * w_column, first,
        *_scale_strides(scale), *strides_of(base), *y.stride(),
        TAP_ROWS=tap_rows, TAP_COLUMNS=tap_columns, ROWS=rows, WHOLE=rows == h, INSIDE=channels_inside(y),
        POSITIONS=positions, CHANNELS=across, INDEX=index_type(x, base, y), num_warps=8,
    )  # fmt: skip
    return y


def _correlate(grad: Tensor, x: Tensor, tap_rows: int, tap_columns: int) -> Tensor:
    """Sums (groups, rows · columns, 4, C) of the products of the transformed gradient and the x that each tap meets."""
    batch, channels, height, width = x.shape
    h, w = (height + 1) // 2, (width + 1) // 2
    rows = _rows(x)
    columns = triton.next_power_of_2(tap_columns)
    across = min(triton.next_power_of_2(channels), 32 if channels_inside(x) else 2)
    positions = max(1, _ELEMENTS // (columns * across))
    count = batch * blocks(h, rows) * w
    chunks, channel_blocks = blocks(count, positions), blocks(channels, across)
    steps = blocks(chunks, min(chunks, max(1, _GRADIENT_PROGRAMS // channel_blocks)))
    groups = blocks(chunks, steps)
    parts = x.new_empty(groups, tap_rows * tap_columns, 4, channels, dtype=torch.float32)
    launch(
        _correlation_kernel, groups * channel_blocks,
        grad, x, parts, channels, height, width, h, w, count, groups, steps, *grad.stride(), *x.stride(),
        TAP_ROWS=tap_rows, TAP_COLUMNS=tap_columns, ROWS=rows, WHOLE=rows == h,
        COLUMNS=columns, POSITIONS=positions, CHANNELS=across, INDEX=index_type(x, grad), num_warps=8,
        maxnreg=None if rows == h else ALL_REGISTERS,
    )  # fmt: skip
    return parts


def forward(x: Tensor, weight: Tensor, scale: Tensor | None, base: Tensor | None) -> Tensor:
    return _convolve(x, _readable(_reachable(weight, x)), scale, base, torch.empty_like(x), reverse=False)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, base: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    taps = _reachable(weight, x)
    grad_x = _convolve(grad, _readable(taps), scale, None, torch.empty_like(x), reverse=True)
    grad_base = x.new_empty(0) if base is None else torch.empty_like(base).copy_(grad)
    grad_weight = torch.empty_like(weight)
    grad_scale = x.new_empty(0) if scale is None else torch.empty_like(scale)
    if not x.numel() or taps.shape[2:] != weight.shape[2:]:
        grad_weight.zero_()
    if not x.numel():
        return grad_x, grad_weight, grad_scale.zero_(), grad_base
    channels, (tap_rows, tap_columns) = x.shape[1], taps.shape[2:]
    parts = _correlate(grad, x, tap_rows, tap_columns)
    padded = triton.next_power_of_2(tap_rows * tap_columns)
    filters = max(1, _SUM_ELEMENTS // padded)
    launch(
        _sum_kernel, blocks(4 * channels, filters),
        parts, taps, scale, _reachable(grad_weight, x), grad_scale, channels, parts.shape[0],
        *taps.stride(), *_scale_strides(scale), *_reachable(grad_weight, x).stride(),
        TAP_COLUMNS=tap_columns, COUNT=tap_rows * tap_columns, TAPS=padded, FILTERS=filters,
    )  # fmt: skip
    return grad_x, grad_weight, grad_scale, grad_base


def configurations() -> Iterator[Configuration]:
    """The kernels of the wavelet branches of S6, on their maps and on larger ones."""
    for channels, size, k in ((160, 14, 7), (272, 7, 5), (272, 4, 3), (160, 32, 7)):
        for name, x in every_map(256, channels, size, size):
            weight = torch.empty(4 * channels, 1, k, k, device="meta")
            scale = torch.empty(4 * channels, device="meta")
            title = f"wavelet_depthwise_conv2d-{name}-k{k}"
            yield from record(title, forward, x, weight, None, x)
            yield from record(f"{title}-scale", forward, x, weight, scale, x)
            yield from record(f"{title}-backward", backward, x, x, weight, scale, x)
