"""x + w2 · activation(w1 · x + b1) + b2 + residual: both products in one pass, the hidden maps never in memory.

A program keeps a tile of positions, with all its channels in chunks of 64, beside the float32 sums of its result; the
weights stream by in blocks of hidden channels out of the L2 cache. x, the residual and the result each move once.

Two products run instead where they are faster, by what 192, 384 and 448 channels tell: few positions fit beside the
sums of all of them, and for those all weights come out of the L2 cache (on an H200 at 192 channels 61 µs, two products
82; at 384 channels 127 and 59). At 448 channels, S6's last stage, they would be faster too (86 and 41), but of S6's 100
launches four are left, and it has five of them. They run also where channels are not neighbours, where positions are
few, and where float32 is multiplied, which is bound by arithmetic.
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
    architecture,
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
    multiplication,
    multiplied_as,
    multiply,
    product,
    vector_of,
)
from mobilemamba_kernels.triton._tiles import append, repeat, replace

_CHUNK = 64  # channels
_CHUNKS = (1, 2, 3, 7)  # that one kernel takes
_FEWEST_PROGRAMS = 64


@triton.jit
def _load_chunks(
    x, x_channel, channels, held, MULTIPLY: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, INDEX: tl.constexpr
):  # fmt: skip
    """The channels of a tile of positions, CHUNK by CHUNK."""
    chunks = ()
    for i in tl.static_range(CHUNKS):
        c = (i * CHUNK + tl.arange(0, CHUNK)).to(INDEX)[None, :]
        chunks = append(chunks, tl.load(x + c * x_channel, held & (c < channels), 0.0).to(MULTIPLY))
    return chunks


@triton.jit
def _kernel(
    x, w1, b1, w2, b2, residual, y, channels, hidden_channels, height, width, count,
    x_batch, x_channel, x_row, x_column,
    w1_output, w1_channel, b1_stride, w2_output, w2_channel, b2_stride,
    r_batch, r_channel, r_row, r_column,
    y_batch, y_channel, y_row, y_column,
    ACTIVATION: tl.constexpr, MULTIPLY: tl.constexpr, VECTOR: tl.constexpr,
    POSITIONS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, HIDDEN: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    channels, hidden_channels = channels // VECTOR * VECTOR, hidden_channels // VECTOR * VECTOR
    m = (tl.program_id(0).to(INDEX) * POSITIONS + tl.arange(0, POSITIONS).to(INDEX))[:, None]
    held = m < count
    column, row, batch = m % width, m // width % height, m // width // height
    x = at_positions(x, batch, row, column, x_batch, x_row, x_column, VECTOR)
    lanes = tl.arange(0, CHUNK).to(INDEX)
    chunks = _load_chunks(x, x_channel, channels, held, MULTIPLY, CHUNKS, CHUNK, INDEX)
    sums = repeat(tl.zeros([POSITIONS, CHUNK], tl.float32), CHUNKS)

    for begin in tl.range(0, hidden_channels, HIDDEN, num_stages=2):
        h = begin + tl.arange(0, HIDDEN)
        hidden = tl.zeros([POSITIONS, HIDDEN], tl.float32)
        at = w1 + tl.multiple_of(h * w1_output, VECTOR)[None, :]
        for i in tl.static_range(CHUNKS):
            c = (i * CHUNK + lanes)[:, None]
            weights = tl.load(at + c * w1_channel, (c < channels) & (h < hidden_channels)[None, :], 0.0)
            hidden = product(chunks[i], weights.to(MULTIPLY), hidden, "ieee")
        if b1 is not None:
            hidden += tl.load(b1 + h * b1_stride, h < hidden_channels, 0.0).to(tl.float32)[None, :]
        # Beyond the last hidden channel an infinite x would have become NaN.
        hidden = tl.where((h < hidden_channels)[None, :], activate(hidden, ACTIVATION), 0.0).to(MULTIPLY)
        at = w2 + (h * w2_channel)[:, None]
        for i in tl.static_range(CHUNKS):
            c = (i * CHUNK + lanes)[None, :]
            outputs = at + tl.multiple_of(c * w2_output, (VECTOR, VECTOR))
            weights = tl.load(outputs, (h < hidden_channels)[:, None] & (c < channels), 0.0)
            total = product(hidden, weights.to(MULTIPLY), sums[i], "ieee")
            sums = replace(sums, i, total)

    y = at_positions(y, batch, row, column, y_batch, y_row, y_column, VECTOR)
    if residual is not None:
        residual = at_positions(residual, batch, row, column, r_batch, r_row, r_column, VECTOR)
    for i in tl.static_range(CHUNKS):
        c = (i * CHUNK + lanes)[None, :]
        mask = held & (c < channels)
        total = sums[i] + tl.load(x + c * x_channel, mask, 0.0).to(tl.float32)
        if b2 is not None:
            total += tl.load(b2 + c * b2_stride, c < channels, 0.0).to(tl.float32)
        if residual is not None:
            total += tl.load(residual + c * r_channel, mask, 0.0).to(tl.float32)
        tl.store(y + c * y_channel, total.to(y.dtype.element_ty), mask)


def _tile(chunks: int, device: torch.device) -> tuple[int, int]:
    """Positions of a program and hidden channels of a step.

    Hopper and Blackwell (9.0, 10.x) multiply out of shared memory; elsewhere x lies in registers too, beside the sums.
    """
    many = chunks > 3
    if 90 <= architecture(device) < 120:
        return (32, 32) if many else (128, 64)
    return (16 if many else 64), 32


def _fits(x: Tensor, count: int, multiplied: torch.dtype, vector: int) -> bool:
    """Whether one kernel is wanted and can hold what it needs, and there is work for many programs.

    What is not read in whole vectors takes a register for each address.
    """
    chunks = blocks(x.shape[1], _CHUNK)
    if multiplied == torch.float32 or vector < 8 or chunks not in _CHUNKS:
        return False
    positions, step = _tile(chunks, x.device)
    needed = (positions + 4 * step) * chunks * _CHUNK * multiplied.itemsize + 1024
    return blocks(count, positions) >= _FEWEST_PROGRAMS and needed <= shared_memory(x.device)


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    batch, channels, height, width = x.shape
    y = torch.empty_like(x)
    if not y.numel():
        return y
    hidden, count = outputs_of(w1, b1), batch * height * width
    multiplied = multiplied_as(x.dtype, w1)
    w1, w2 = unpack_weight(w1, hidden, channels), unpack_weight(w2, channels, hidden)
    maps = [x, y] if residual is None else [x, y, residual]
    vector = min(vector_of(maps, w1, channels, hidden), vector_of(maps, w2, channels, hidden))
    if w2.dtype != w1.dtype or not _fits(x, count, multiplied, vector):
        between = x.new_empty(batch, height, width, hidden, dtype=multiplied).permute(0, 3, 1, 2)
        multiply([x], w1, b1, activation, [], "none", between)
        return multiply([between], w2, b2, "none", [x] if residual is None else [x, residual], "none", y)
    chunks = blocks(channels, _CHUNK)
    positions, step = _tile(chunks, x.device)
    launch(
        _kernel, blocks(count, positions),
        x, w1, b1, w2, b2, residual, y, channels, hidden, height, width, count,
        *x.stride(), *w1.stride(), *strides_of(b1, 1), *w2.stride(), *strides_of(b2, 1),
        *strides_of(residual), *y.stride(),
        ACTIVATION=activation, MULTIPLY=multiplication(multiplied)[0],
        VECTOR=vector, POSITIONS=positions, CHUNKS=chunks, CHUNK=_CHUNK, HIDDEN=step,
        INDEX=index_type(*maps), num_warps=8, maxnreg=ALL_REGISTERS,
    )  # fmt: skip
    return y


def configurations() -> Iterator[Configuration]:
    """The feed-forward layers of S6, with weights of the maps' dtype and of float32, with and without a residual."""
    for channels, size in ((192, 14), (384, 7), (448, 4)):
        for batch in (1, 256):
            for name, x in every_map(batch, channels, size, size):
                for dtype in {x.dtype, torch.float32}:
                    w1, w2 = (torch.empty(s, dtype=dtype, device="meta") for s in ((2 * channels, channels),) * 2)
                    w2 = w2.T.contiguous()
                    b1, b2 = torch.empty(2 * channels, device="meta"), torch.empty(channels, device="meta")
                    weights = str(dtype).removeprefix("torch.")
                    for suffix, residual in (("", None), ("-r", x)):
                        title = f"feed_forward-{name}-{weights}{suffix}"
                        yield from record(title, forward, x, w1, b1, w2, b2, "relu", residual)
