"""Images laid out as four sequences, and back: a program has a block of channels, rows and columns of an image.

The block is read and written with the dimension last that is dense in what is read or written, so that a warp's lanes
have neighbours; in between it is permuted. Every element is read once and written once for each place it goes to.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mobilemamba_kernels.triton._launch import ALL_REGISTERS, blocks, channels_inside, index_type, launch


@triton.jit
def _places(first_c, first_y, first_x, C: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, ORDER: tl.constexpr):
    """Channels, rows and columns of a block whose dimensions are, by ORDER, c y x, c x y or y x c."""
    c, y, x = first_c + tl.arange(0, C), first_y + tl.arange(0, Y), first_x + tl.arange(0, X)
    if ORDER == 0:
        return c[:, None, None], y[None, :, None], x[None, None, :]
    elif ORDER == 1:
        return c[:, None, None], y[None, None, :], x[None, :, None]
    else:
        return c[None, None, :], y[:, None, None], x[None, :, None]


@triton.jit
def _reordered(values, FROM: tl.constexpr, TO: tl.constexpr):
    if FROM == 1:
        values = tl.permute(values, (0, 2, 1))
    elif FROM == 2:
        values = tl.permute(values, (2, 0, 1))
    if TO == 1:
        values = tl.permute(values, (0, 2, 1))
    elif TO == 2:
        values = tl.permute(values, (1, 2, 0))
    return values


@triton.jit
def _elements(
    sequences, k: tl.constexpr, c, y, x, channels, height, width, s_sequence, s_channel, s_position, SCANS: tl.constexpr
):  # fmt: skip
    """Where sequence k has pixels, and which of them are in the image."""
    position = x * height + y if SCANS == 0 and k % 2 == 1 else y * width + x
    if SCANS != 1 and k >= 2:
        position = height * width - 1 - position
    inside = (c < channels) & (y < height) & (x < width)
    return sequences + k * s_sequence + c * s_channel + position * s_position, inside


@triton.jit
def _exchange(
    values, sequences, k: tl.constexpr, first_c, first_y, first_x,
    channels, height, width, s_sequence, s_channel, s_position,
    LOAD: tl.constexpr, SCANS: tl.constexpr, HERE: tl.constexpr, INSIDE: tl.constexpr,
    C: tl.constexpr, Y: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Write a block, in the order HERE, to sequence k; or read it, in this order."""
    THERE: tl.constexpr = 2 if INSIDE else (1 if SCANS == 0 and k % 2 == 1 else 0)
    c, y, x = _places(first_c, first_y, first_x, C, Y, X, THERE)
    places, inside = _elements(
        sequences, k, c, y, x, channels, height, width, s_sequence, s_channel, s_position, SCANS
    )  # fmt: skip
    if LOAD:
        values = _reordered(tl.load(places, inside, 0.0), THERE, HERE)
    else:
        tl.store(places, _reordered(values, HERE, THERE), inside)
    return values


@triton.jit
def _cross_kernel(
    images, sequences, channels, height, width,
    i_batch, i_image, i_channel, i_row, i_column,
    s_batch, s_sequence, s_channel, s_position,
    MERGE: tl.constexpr, ONE_BY_ONE: tl.constexpr, SCANS: tl.constexpr,
    IMAGE_INSIDE: tl.constexpr, SEQUENCE_INSIDE: tl.constexpr,
    C: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    program, one = tl.program_id(0).to(INDEX), tl.full((), 1, INDEX)
    height, width, i_image, s_sequence = one * height, one * width, one * i_image, one * s_sequence
    across, down, deep = tl.cdiv(width, X), tl.cdiv(height, Y), tl.cdiv(channels, C)
    first_x, first_y = program % across * X, program // across % down * Y
    first_c, batch = program // across // down % deep * C, program // across // down // deep
    sequences += batch * s_batch
    HERE: tl.constexpr = 2 if IMAGE_INSIDE else 0
    c, y, x = _places(first_c, first_y, first_x, C, Y, X, HERE)
    inside = (c < channels) & (y < height) & (x < width)
    places = images + batch * i_batch + c * i_channel + y * i_row + x * i_column
    values = tl.load(places, inside, 0.0) if not MERGE else tl.zeros(inside.shape, images.dtype.element_ty)
    merged = values
    for k in tl.static_range(4):
        if ONE_BY_ONE and not MERGE and k > 0:
            values = tl.load(places + k * i_image, inside, 0.0)
        values = _exchange(
            values, sequences, k, first_c, first_y, first_x,
            channels, height, width, s_sequence, s_channel, s_position,
            MERGE, SCANS, HERE, SEQUENCE_INSIDE, C, Y, X,
        )  # fmt: skip
        if MERGE and ONE_BY_ONE:
            tl.store(places + k * i_image, values, inside)
        merged = values.to(tl.float32) if k == 0 else merged + values.to(tl.float32)  # -0 stays
    if MERGE and not ONE_BY_ONE:
        tl.store(places, merged.to(images.dtype.element_ty), inside)


def _run(images: Tensor, sequences: Tensor, scans: int, merge: bool) -> None:
    """Between images (batch, 4 or 1, C, H, W) and sequences (batch, 4, C, L)."""
    batch, own, channels, height, width = images.shape
    if not images.numel():
        return
    inside = channels_inside(images.select(1, 0)), channels_inside(sequences.select(1, 0))
    if inside[0] != inside[1]:
        sizes = (16, 8, 8)
    elif inside[0]:
        sizes = (min(256, triton.next_power_of_2(channels)), 1, 4)
    else:
        sizes = (1, min(32, triton.next_power_of_2(height)), min(32, triton.next_power_of_2(width)))
    launch(
        _cross_kernel, batch * blocks(channels, sizes[0]) * blocks(height, sizes[1]) * blocks(width, sizes[2]),
        images, sequences, channels, height, width, *images.stride(), *sequences.stride(),
        MERGE=merge, ONE_BY_ONE=own == 4, SCANS=scans, IMAGE_INSIDE=inside[0], SEQUENCE_INSIDE=inside[1],
        C=sizes[0], Y=sizes[1], X=sizes[2], INDEX=index_type(images, sequences),
        maxnreg=ALL_REGISTERS if merge else None,
    )  # fmt: skip


def one_by_one(images: Tensor) -> Tensor:
    """Images with a dimension of the sequence that they belong to, of size 1 if to all."""
    return images if images.ndim == 5 else images.unsqueeze(1)


def channels_first(sequences: Tensor, channels_last: bool) -> Tensor:
    """The view (batch, 4, C, L) of sequences that may be (batch, L, 4, C)."""
    return sequences.permute(0, 2, 3, 1) if channels_last else sequences


def as_maps(images: Tensor, height: int, width: int, channels_last: bool) -> Tensor:
    """The view (batch, 4 or 1, C, H, W) of images in rows: their positions are one dimension."""
    rows = images.movedim(1, -1) if channels_last else images
    return one_by_one(rows.unflatten(-1, (height, width)))


def scan(images: Tensor, sequences: Tensor, scans: int) -> None:
    """Write the sequences (batch, 4, C, L) of images (batch, 4 or 1, C, H, W)."""
    _run(images, sequences, scans, merge=False)


def merge(sequences: Tensor, images: Tensor, scans: int) -> None:
    """Write the images of sequences: their sums where there is one image for all."""
    _run(images, sequences, scans, merge=True)
