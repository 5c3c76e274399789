"""Tiles of positions × channels, the one shape in which every kernel without products works; and tuples of them.

Triton 3.6, the one of PyTorch 2.11, takes two calls for the same function where their arguments flatten to the same, as
(a, b, c), d and (), (a, b, c, d) do: what is put into tuples in one kernel is all tensors, or all tuples.
"""

from __future__ import annotations

import triton
import triton.language as tl

BUSY = 264
"""Programs that keep a large GPU busy: two for each of its multiprocessors."""


@triton.jit
def tile(channels, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr):
    """Positions (POSITIONS, 1) and channels (1, CHANNELS) of this program; neighbours share their positions."""
    across = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    m = (program // across).to(INDEX) * POSITIONS + tl.arange(0, POSITIONS).to(INDEX)
    c = (program % across).to(INDEX) * CHANNELS + tl.arange(0, CHANNELS).to(INDEX)
    return m[:, None], c[None, :]


@triton.jit
def repeat(value, COUNT: tl.constexpr):
    """A tuple of COUNT times ``value``."""
    values = ()
    for _ in tl.static_range(COUNT):
        values = append(values, value)
    return values


@triton.jit
def append(values, value):
    """The tuple ``values`` with ``value`` behind them."""
    return values + (value,)  # noqa: RUF005  # Triton knows no starred expressions


@triton.jit
def replace(values, place, value):
    """The tuple ``values`` with ``value`` at ``place``."""
    return values[:place] + (value,) + values[place + 1 :]  # noqa: RUF005


def tile_size(channels: int, inside: bool, elements: int) -> tuple[int, int]:
    """Positions and channels of a tile: whichever are neighbours in memory get the lanes of a warp."""
    across = min(triton.next_power_of_2(channels), 32 if inside else 8)
    return elements // across, across


def rows_of_a_lane(height: int, programs_of_a_row: float) -> int:
    """How many rows, one below the other, a lane computes: up to 8, fewer where there would be few programs."""
    rows = 8
    while rows > 1 and triton.cdiv(height, rows) * programs_of_a_row < BUSY:
        rows //= 2
    return triton.cdiv(height, triton.cdiv(height, rows)) if height else 1
