"""Products of maps and weights: y = activation(weight · input_activation(x) + bias) + residuals at every position.

A program computes a tile of positions × outputs in float32 registers, over all channels of up to three maps; bias,
activation and residuals meet it there. Neighbouring programs share their positions, so x comes out of the L2 cache
but for the first time: x, the residuals and y each move once, the weight once for each tile of positions, from L2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilemamba_kernels import backends
from mobilemamba_kernels.triton._activations import activate
from mobilemamba_kernels.triton._launch import ALL_REGISTERS, blocks, index_type, launch, strides_of
from mobilemamba_kernels.triton._tiles import BUSY, tile

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_INTERPRETED = tl.constexpr(backends.INTERPRETED)


@triton.jit
def product(left, right, total, PRECISION: tl.constexpr):
    """``total`` + left · right, summed in float32."""
    if _INTERPRETED:  # Triton's interpreter would multiply the bits of bfloat16
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def _multiply_map(
    total, x, x_channel, channels, weight, w_channel, held, wanted,
    INPUT_ACTIVATION: tl.constexpr, MULTIPLY: tl.constexpr, PRECISION: tl.constexpr, VECTOR: tl.constexpr,
    DEPTH: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Add the product of a map and its part of the weight; ``held`` positions and ``wanted`` outputs exist."""
    channels = channels // VECTOR * VECTOR
    depth = tl.arange(0, DEPTH).to(INDEX)
    for begin in range(0, channels, DEPTH):
        c = begin + depth
        left = tl.load(x + c[None, :] * x_channel, held & (c < channels)[None, :], 0.0)
        right = tl.load(weight + c[:, None] * w_channel, wanted & (c < channels)[:, None], 0.0)
        if INPUT_ACTIVATION != "none":
            left = activate(left.to(tl.float32), INPUT_ACTIVATION)
        total = product(left.to(MULTIPLY), right.to(MULTIPLY), total, PRECISION)
    return total


@triton.jit
def at_positions(pointer, batch, row, column, stride_batch, stride_row, stride_column, VECTOR: tl.constexpr):
    """Where the channels of positions begin: at multiples of VECTOR elements."""
    # Told of the offsets: the compiler joins additions to a pointer and forgets what it was told of their sum.
    offsets = batch * stride_batch + row * stride_row + column * stride_column
    return pointer + tl.multiple_of(offsets, (VECTOR, VECTOR))


@triton.jit
def finished(total, bias, bias_output, o, wanted, ACTIVATION: tl.constexpr):
    """activation(``total`` + bias) of outputs ``o``."""
    if bias is not None:
        total += tl.load(bias + o * bias_output, wanted, 0.0).to(tl.float32)
    return activate(total, ACTIVATION)


@triton.jit
def _kernel(
    x, second, third, weight, bias, residual, other, y,
    channels, second_channels, third_channels, outputs, height, width, count,
    x_batch, x_channel, x_row, x_column,
    second_batch, second_channel, second_row, second_column,
    third_batch, third_channel, third_row, third_column,
    w_output, w_channel, bias_output,
    r_batch, r_output, r_row, r_column,
    o_batch, o_output, o_row, o_column,
    y_batch, y_output, y_row, y_column,
    INPUT_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr, MULTIPLY: tl.constexpr, PRECISION: tl.constexpr,
    VECTOR: tl.constexpr, POSITIONS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    outputs = outputs // VECTOR * VECTOR
    m, o = tile(outputs, POSITIONS, OUTPUTS, INDEX)
    held, wanted = m < count, o < outputs
    column, row, batch = m % width, m // width % height, m // width // height
    weight += tl.multiple_of(o * w_output, (VECTOR, VECTOR))
    total = tl.zeros([POSITIONS, OUTPUTS], tl.float32)
    at = at_positions(x, batch, row, column, x_batch, x_row, x_column, VECTOR)
    total = _multiply_map(
        total, at, x_channel, channels, weight, w_channel, held, wanted,
        INPUT_ACTIVATION, MULTIPLY, PRECISION, VECTOR, DEPTH, INDEX,
    )  # fmt: skip
    if second is not None:
        at = at_positions(second, batch, row, column, second_batch, second_row, second_column, VECTOR)
        weight += channels // VECTOR * VECTOR * w_channel
        total = _multiply_map(
            total, at, second_channel, second_channels, weight, w_channel, held, wanted,
            INPUT_ACTIVATION, MULTIPLY, PRECISION, VECTOR, DEPTH, INDEX,
        )  # fmt: skip
    if third is not None:
        at = at_positions(third, batch, row, column, third_batch, third_row, third_column, VECTOR)
        weight += second_channels // VECTOR * VECTOR * w_channel
        total = _multiply_map(
            total, at, third_channel, third_channels, weight, w_channel, held, wanted,
            INPUT_ACTIVATION, MULTIPLY, PRECISION, VECTOR, DEPTH, INDEX,
        )  # fmt: skip
    total = finished(total, bias, bias_output, o, wanted, ACTIVATION)
    mask = held & wanted
    if residual is not None:
        at = at_positions(residual, batch, row, column, r_batch, r_row, r_column, VECTOR)
        total += tl.load(at + o * r_output, mask, 0.0).to(tl.float32)
    if other is not None:
        at = at_positions(other, batch, row, column, o_batch, o_row, o_column, VECTOR)
        total += tl.load(at + o * o_output, mask, 0.0).to(tl.float32)
    at = at_positions(y, batch, row, column, y_batch, y_row, y_column, VECTOR)
    tl.store(at + o * y_output, total.to(y.dtype.element_ty), mask)


def multiplied_as(dtype: torch.dtype, weight: Tensor) -> torch.dtype:
    """The type in which maps of ``dtype`` are multiplied: that of the weight where tensor cores hold both exactly.

    A weight of bfloat16 has its input rounded to it, as in the reference.
    """
    return weight.dtype if weight.dtype in (torch.bfloat16, dtype) else torch.float32


def multiplication(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """MULTIPLY and PRECISION of a kernel."""
    fast = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return _TYPES[dtype], "tf32" if fast else "ieee"


def fitting_block(size: int, largest: int) -> int:
    """A power of two from 16 to ``largest`` in whose multiples at most a quarter is empty."""
    block = largest
    while block > 16 and 3 * blocks(size, block) * block > 4 * blocks(size, 16) * 16:
        block //= 2
    return block


def product_tile(
    count: int, outputs: int, depth: int, dtype: torch.dtype, vector: int, most: int = 128
) -> tuple[int, int, int, dict[str, int]]:
    """Positions, outputs and depth of a tile, and options of its launch; at most ``most`` positions in 16 bits.

    Measured on an H200 (benchmarks/results): small tiles of four warps are faster than large ones, because products
    this short begin and end more than they multiply, and several programs a multiprocessor overlap.
    """
    if dtype == torch.float32 or vector < 8:  # what is read element by element takes registers for each address
        options = {"num_warps": 8, "maxnreg": ALL_REGISTERS}
        return 64, fitting_block(outputs, 64), fitting_block(depth, 16 if dtype == torch.float32 else 32), options
    across, positions = fitting_block(outputs, 64), most
    while positions > 16 and blocks(count, positions) * blocks(outputs, across) < BUSY:
        positions //= 2
    return positions, across, fitting_block(depth, 64), {"num_warps": 4}


def vector_of(maps: Sequence[Tensor], weight: Tensor, *sizes: int) -> int:
    """The largest number up to 8 of elements in whose multiples all rows of channels begin, and ``sizes``."""
    places = list(sizes)
    for t in (*maps, weight):
        if t.stride(1) != 1:
            return 1
        places += [t.stride(i) for i in range(t.ndim) if i != 1 and t.shape[i] > 1]
    return math.gcd(8, *places)


def multiply(
    maps: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residuals: Sequence[Tensor],
    input_activation: str,
    y: Tensor,
) -> Tensor:
    """Write into ``y`` (batch, O, H, W) the product of one to three maps, their channels one after the other.

    ``weight`` is (O, C), not packed; up to two residuals. Returns ``y``.
    """
    if not y.numel():
        return y
    batch, outputs, height, width = y.shape
    count = batch * height * width
    parts = [t.shape[1] for t in maps]
    multiplied = multiplied_as(maps[0].dtype, weight)
    vector = vector_of((*maps, *residuals, y), weight, *parts, outputs)
    most = 64 if len(maps) > 1 or residuals else 128
    positions, across, depth, options = product_tile(count, outputs, max(parts), multiplied, vector, most)
    multiply_type, precision = multiplication(multiplied)
    x, second, third = (*maps, None, None)[:3]
    residual, other = (*residuals, None, None)[:2]
    launch(
        _kernel, blocks(count, positions) * blocks(outputs, across),
        x, second, third, weight, bias, residual, other, y,
        *(*parts, 0, 0)[:3], outputs, height, width, count,
        *strides_of(x), *strides_of(second), *strides_of(third), *weight.stride(), *strides_of(bias, 1),
        *strides_of(residual), *strides_of(other), *y.stride(),
        INPUT_ACTIVATION=input_activation, ACTIVATION=activation, MULTIPLY=multiply_type, PRECISION=precision,
        VECTOR=vector, POSITIONS=positions, OUTPUTS=across, DEPTH=depth, INDEX=index_type(*maps, *residuals, y),
        **options,
    )  # fmt: skip
    return y
