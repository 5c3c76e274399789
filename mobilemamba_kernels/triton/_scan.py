"""The selective scan in one or two directions: kernels over tiles of channels × positions, and what launches them.

A program holds some channels of one image over a chunk of positions, as a tile [RUN, channels, runs]: position
``run · RUN + step``. With channels or positions innermost in memory, Triton's layouts put all RUN steps of a run into
one thread, so that the recurrence is sequential there without any exchange; only the runs, a RUN-th of the elements,
are put together across threads. Both directions of a scan meet in the same program: u is read once, the sum written
once. A sequence that fits into one chunk, any of up to 1024 positions, takes one pass over memory. A longer one is
folded chunk by chunk first (``fold_kernel``), the states between the chunks follow one by one (``carry_kernel``), and
every chunk starts from its own.

The formulas of the backward are those in the head of csrc/cpu/selective_scan_kernel.cpp. Sums over channels, positions
and batch are taken within the program, and then by ``torch.sum`` over programs: there are no atomics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilemamba_kernels.triton._launch import ALL_REGISTERS, blocks, index_type, launch

# An argument a line would be half of this file.
# fmt: off

RUN = 4
"""Steps of one run: what a thread does by itself."""

# --- the recurrence on a tile ------------------------------------------------------------------------------------


@triton.jit
def _compose(a1, b1, a2, b2):
    """x → a x + b, one after the other."""
    return a2 * a1, a2 * b1 + b2


@triton.jit
def _lasting(product):
    """Of decays, which underflows before each of them does: not to zero, so that a state of infinity stays one."""
    return product + 2.0**-126  # one instruction with the product


@triton.jit
def _compose_delayed(a1, b1, p1, q1, a2, b2, p2, q2):
    """(p, q) as in _compose, and in (a, b) the same without the last element: what enters it."""
    return _lasting(a2 * p1), a2 * q1 + b2, _lasting(p2 * p1), p2 * q1 + q2


@triton.jit
def _compose_carried(a1, c1, d1, a2, c2, d2):
    """States h = c + d with c = a h_prev kept apart: h − d would lose it where a is small."""
    return a2 * a1, a2 * (c1 + d1) + c2, d2


@triton.jit
def _compose_adjoint(a1, p1, g1, a2, p2, g2):
    """g = d + a_prev g_prev, a being that of the element before."""
    return a2, p2 * a1 * p1, p2 * a1 * g1 + g2


@triton.jit
def _at(x, index, wanted, axis: tl.constexpr):
    return tl.sum(tl.where(index == wanted, x, 0.0), axis)


@triton.jit
def _steps_of(x):
    return tl.arange(0, x.shape[0])[:, None, None]


@triton.jit
def _fold_runs(a, d, REVERSE: tl.constexpr):
    """What enters every run is α x + β, x entering the tile, and p x + q leaves it: α, β, p, q, [channels, runs]."""
    p, q = tl.associative_scan((a, d), 0, _compose, reverse=REVERSE)
    last: tl.constexpr = 0 if REVERSE else a.shape[0] - 1
    p = _lasting(_at(p, _steps_of(a), last, 0))
    q = _at(q, _steps_of(a), last, 0)
    one = tl.full(p.shape, 1.0, tl.float32)
    return tl.associative_scan((one, one - 1.0, p, q), 1, _compose_delayed, reverse=REVERSE)


@triton.jit
def _enter_runs(a, d, entering, REVERSE: tl.constexpr):
    """The state before every run, in the first of its steps and zero elsewhere; and where the first steps are."""
    alpha, state, _, _ = _fold_runs(a, d, REVERSE)
    if entering is not None:
        state += alpha * entering
    first: tl.constexpr = a.shape[0] - 1 if REVERSE else 0
    return state[None, :, :], _steps_of(a) == first


@triton.jit
def _scan(a, d, entering, REVERSE: tl.constexpr):
    """c of h = c + d, h = a h_prev + d; ``entering`` [channels, 1] or None."""
    state, first = _enter_runs(a, d, entering, REVERSE)
    _, c, _ = tl.associative_scan((a, tl.where(first, a * state, 0.0), d), 0, _compose_carried, reverse=REVERSE)
    return c


@triton.jit
def _scan_adjoint(a, d, entering, REVERSE: tl.constexpr):
    """g = d + a_prev g_prev; ``entering`` is a_prev g_prev of the first position."""
    state, first = _enter_runs(a, a * d, entering, REVERSE)
    _, _, g = tl.associative_scan(
        (a, tl.full(a.shape, 1.0, tl.float32), d + tl.where(first, state, 0.0)), 0, _compose_adjoint, reverse=REVERSE
    )
    return g


# --- what a tile is made of --------------------------------------------------------------------------------------


@triton.jit
def softplus(x):
    """log(1 + eˣ) to two units in the last place, x itself above 20: max(x, 0) + 2 artanh(w / (w + 2)), w = e^−|x|."""
    w = tl.exp(-tl.abs(x))
    s = w / (w + 2.0)
    q = s * s
    p = ((0.28012002 * q + 0.28001803) * q + 0.40021527) * q + 0.66666418
    return tl.maximum(x, 0.0) + s * (2.0 + q * p)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def multiple(x, ALIGN: tl.constexpr):
    """x, which is a multiple of ALIGN, so that the compiler knows it."""
    return x // ALIGN * ALIGN


@triton.jit
def _place(
    program, length, group_channels, groups, chunks, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, RUN: tl.constexpr,
    RUNS: tl.constexpr, INDEX: tl.constexpr,
):
    """Batch, group, block, chunk; channels [C, 1], positions [RUN, 1, RUNS]; which exist; where runs start."""
    blocks = tl.cdiv(group_channels, BLOCK_C)
    chunk = program % chunks
    block = program // chunks % blocks
    group = program // chunks // blocks % groups
    batch = program // chunks // blocks // groups
    # Four at most side by side in a thread, of which eight of 16 bits would otherwise fill its registers.
    c = tl.max_contiguous(block * BLOCK_C + tl.arange(0, BLOCK_C)[:, None], [min(BLOCK_C, 4), 1])
    start = (chunk * RUNS + tl.arange(0, RUNS)[None, None, :]) * RUN
    t = start + tl.arange(0, RUN)[:, None, None]
    c_exists = c < group_channels
    l_exists = t < multiple(length, ALIGN)
    c = group.to(INDEX) * group_channels + c
    return batch.to(INDEX), group.to(INDEX), block, chunk, c, t.to(INDEX), c_exists, l_exists, start.to(INDEX)


@triton.jit
def _tile(pointer, batch, k, c, t, stride_b, stride_k, stride_c, stride_l, ALIGN: tl.constexpr):
    """Pointers [RUN, C, RUNS]."""
    pointer += batch * multiple(stride_b, ALIGN) + k * multiple(stride_k, ALIGN)
    return pointer + c * multiple(stride_c, ALIGN) + t * stride_l


@triton.jit
def load(pointer, exists):
    return tl.load(pointer, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _row(pointer, start, length, stride_l, RUN: tl.constexpr):
    """[RUN, 1, RUNS], one load a step: of fewer elements than threads, so that the compiler brings it into the layout
    of the tiles, and not the tiles into that of a row."""
    step = tl.arange(0, RUN)[:, None, None]
    row = tl.zeros([RUN, 1, start.shape[2]], tl.float32)
    for i in tl.static_range(RUN):
        row = tl.where(step == i, load(pointer + (start + i) * stride_l, start + i < length), row)
    return row


@triton.jit
def _raw_steps(
    pointers, weight, bias, c, c_exists, l_exists, start, length, rank, stride_r, stride_l, RUN: tl.constexpr,
    INDEX: tl.constexpr,
):
    """delta + bias; with ``weight`` (dim, rank), ``pointers`` are the base of rows that it multiplies."""
    if weight is None:
        raw = load(pointers, c_exists & l_exists)
    else:
        raw = tl.zeros([RUN, c.shape[0], start.shape[2]], tl.float32)
        for j in range(rank):
            row = _row(pointers + tl.cast(j, INDEX) * stride_r, start, length, stride_l, RUN)
            raw += load(weight + c * rank + j, c_exists) * row
    if bias is not None:
        raw += load(bias + c, c_exists)
    return raw


@triton.jit
def _steps(raw, exists, SOFTPLUS: tl.constexpr):
    """Δ; zero at places that do not exist."""
    if SOFTPLUS:
        raw = softplus(raw)
    return tl.where(exists, raw, 0.0)


@triton.jit
def _rates(A, c, c_exists, n, N, A_IS_LOG: tl.constexpr):
    a = load(A + c * N + n, c_exists)
    if A_IS_LOG:
        a = -tl.exp(a)
    return a


@triton.jit
def _coefficients(
    M, c, c_exists, start, length, n, N, stride_n, stride_l, FIXED: tl.constexpr, RUN: tl.constexpr,
    INDEX: tl.constexpr,
):
    """B or C of state n: [RUN, 1, RUNS], or [C, 1] where it does not vary."""
    if FIXED:
        return load(M + c * N + n, c_exists)
    else:
        return _row(M + tl.cast(n, INDEX) * stride_n, start, length, stride_l, RUN)


@triton.jit
def _over_positions(x):
    """[C, 1]"""
    return tl.sum(tl.sum(x, 0), 1, keep_dims=True)


@triton.jit
def _direction(
    y, x, dt, A, B, C, D, entering, last, last_chunk, c, t, c_exists, l_exists, start, length, N, B_n, B_l, C_n, C_l,
    B_FIXED: tl.constexpr, C_FIXED: tl.constexpr, A_IS_LOG: tl.constexpr, REVERSE: tl.constexpr, RUN: tl.constexpr,
    INDEX: tl.constexpr,
):
    """y + C h + D x of one direction; the last chunk leaves its last state in ``last``."""
    for n in range(N):
        a = _rates(A, c, c_exists, n, N, A_IS_LOG)
        decay = tl.where(l_exists, tl.exp(dt * a), 1.0)
        drive = dt * x * _coefficients(B, c, c_exists, start, length, n, N, B_n, B_l, B_FIXED, RUN, INDEX)
        before = None if entering is None else load(entering + c * N + n, c_exists)
        h = _scan(decay, drive, before, REVERSE) + drive
        y += h * _coefficients(C, c, c_exists, start, length, n, N, C_n, C_l, C_FIXED, RUN, INDEX)
        if last is not None:  # noqa: SIM102 (the compiler knows the one, and not the other)
            if last_chunk:
                tl.store(last + c * N + n, _over_positions(tl.where(t == length - 1, h, 0.0)), mask=c_exists)
    if D is not None:
        y += load(D + c, c_exists) * x
    return y


# --- kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(
    u, delta, A, B, C, D, z, bias, weight, entering, out, last, length, group_channels, groups, chunks, N, rank,
    B_share, C_share, u_b, u_k, u_c, u_l, delta_b, delta_k, delta_c, delta_l, z_b, z_c, z_l, out_b, out_c, out_l, B_b,
    B_s, B_n, B_l, C_b, C_s, C_n, C_l, DIRECTIONS: tl.constexpr, SHARED: tl.constexpr, SOFTPLUS: tl.constexpr,
    A_IS_LOG: tl.constexpr, B_FIXED: tl.constexpr, C_FIXED: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr,
    RUN: tl.constexpr, RUNS: tl.constexpr, INDEX: tl.constexpr,
):
    """u, delta and z of the tile are read once, and out written once. Indices of B and C: direction + group / share."""
    batch, group, _, chunk, c, t, c_exists, l_exists, start = _place(
        tl.program_id(0), length, group_channels, groups, chunks, ALIGN, BLOCK_C, RUN, RUNS, INDEX
    )
    dim = groups * group_channels
    exists = c_exists & l_exists
    y = tl.zeros([RUN, BLOCK_C, RUNS], tl.float32)
    if SHARED:
        x = load(_tile(u, batch, 0, c, t, u_b, u_k, u_c, u_l, ALIGN), exists)
    for k in tl.static_range(DIRECTIONS):
        if not SHARED:
            x = load(_tile(u, batch, k, c, t, u_b, u_k, u_c, u_l, ALIGN), exists)
        if weight is None:
            steps = _tile(delta, batch, k, c, t, delta_b, delta_k, delta_c, delta_l, ALIGN)
        else:
            steps = delta + batch * delta_b + k * delta_k
        row = k * dim + c
        raw = _raw_steps(
            steps, weight, bias, row, c_exists, l_exists, start, length, rank, delta_c, delta_l, RUN, INDEX
        )
        dt = _steps(raw, exists, SOFTPLUS)
        y = _direction(
            y, x, dt, A + k * dim * N, B + batch * B_b + (group // B_share + k) * B_s,
            C + batch * C_b + (group // C_share + k) * C_s, None if D is None else D + k * dim,
            None if entering is None else entering + ((batch * DIRECTIONS + k) * chunks + chunk) * dim * N,
            None if last is None else last + batch * dim * N, chunk == chunks - 1, c, t, c_exists, l_exists, start,
            length, N, B_n, B_l, C_n, C_l, B_FIXED, C_FIXED, A_IS_LOG, k == 1, RUN, INDEX,
        )
    if z is not None:
        y *= silu(load(_tile(z, batch, 0, c, t, z_b, 0, z_c, z_l, ALIGN), exists))
    tl.store(_tile(out, batch, 0, c, t, out_b, 0, out_c, out_l, ALIGN), y, mask=exists)


@triton.jit
def backward_kernel(
    grad, u, delta, A, B, C, D, z, bias, entering, adjoint, grad_u, grad_delta, grad_z, part_A, part_B, part_C,
    part_D, part_bias, length, group_channels, groups, chunks, N, B_share, C_share, grad_b, grad_c, grad_l, u_b, u_k,
    u_c, u_l, delta_b, delta_k, delta_c, delta_l, z_b, z_c, z_l, grad_u_b, grad_u_k, grad_u_c, grad_u_l, grad_delta_b,
    grad_delta_k, grad_delta_c, grad_delta_l, grad_z_b, grad_z_c, grad_z_l, B_b, B_s, B_n, B_l, C_b, C_s, C_n, C_l,
    DIRECTIONS: tl.constexpr, SHARED: tl.constexpr, SOFTPLUS: tl.constexpr, B_FIXED: tl.constexpr,
    C_FIXED: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Gradients of the tile, and its parts of those that are sums.

    Parts over positions are (batch, chunks, directions, dim[, N]); parts over channels
    (batch, directions or groups, blocks, N, length).
    """
    batch, group, block, chunk, c, t, c_exists, l_exists, start = _place(
        tl.program_id(0), length, group_channels, groups, chunks, ALIGN, BLOCK_C, RUN, RUNS, INDEX
    )
    dim = groups * group_channels
    exists = c_exists & l_exists
    dy = load(_tile(grad, batch, 0, c, t, grad_b, 0, grad_c, grad_l, ALIGN), exists)
    if SHARED:
        x = load(_tile(u, batch, 0, c, t, u_b, u_k, u_c, u_l, ALIGN), exists)
    if z is not None:  # its gradient needs the result of the forward
        y = tl.zeros([RUN, BLOCK_C, RUNS], tl.float32)
        for k in tl.static_range(DIRECTIONS):
            if not SHARED:
                x = load(_tile(u, batch, k, c, t, u_b, u_k, u_c, u_l, ALIGN), exists)
            steps = _tile(delta, batch, k, c, t, delta_b, delta_k, delta_c, delta_l, ALIGN)
            raw = _raw_steps(steps, None, bias, k * dim + c, c_exists, l_exists, start, length, 0, 0, 0, RUN, INDEX)
            y = _direction(
                y, x, _steps(raw, exists, SOFTPLUS), A + k * dim * N, B + batch * B_b + (group // B_share + k) * B_s,
                C + batch * C_b + (group // C_share + k) * C_s, None if D is None else D + k * dim,
                None if entering is None else entering + ((batch * DIRECTIONS + k) * chunks + chunk) * dim * N, None,
                False, c, t, c_exists, l_exists, start, length, N, B_n, B_l, C_n, C_l, B_FIXED, C_FIXED, False,
                k == 1, RUN, INDEX,
            )
        gate = load(_tile(z, batch, 0, c, t, z_b, 0, z_c, z_l, ALIGN), exists)
        open_ = _sigmoid(gate)
        pointers = _tile(grad_z, batch, 0, c, t, grad_z_b, 0, grad_z_c, grad_z_l, ALIGN)
        tl.store(pointers, dy * y * open_ * (1.0 + gate * (1.0 - open_)), mask=exists)
        dy *= gate * open_
    for k in tl.static_range(DIRECTIONS):
        if not SHARED:
            x = load(_tile(u, batch, k, c, t, u_b, u_k, u_c, u_l, ALIGN), exists)
        if k == 0 or not SHARED:
            dx = tl.zeros([RUN, BLOCK_C, RUNS], tl.float32)
        part = (batch * chunks + chunk) * DIRECTIONS + k  # of sums over positions
        sums = ((batch * groups + group) * DIRECTIONS + k) * tl.cdiv(group_channels, BLOCK_C) + block  # over channels
        if D is not None:
            dx += dy * load(D + k * dim + c, c_exists)
            tl.store(part_D + part * dim + c, _over_positions(dy * x), mask=c_exists)
        steps = _tile(delta, batch, k, c, t, delta_b, delta_k, delta_c, delta_l, ALIGN)
        raw = _raw_steps(steps, None, bias, k * dim + c, c_exists, l_exists, start, length, 0, 0, 0, RUN, INDEX)
        dt = _steps(raw, exists, SOFTPLUS)
        ddt = tl.zeros([RUN, BLOCK_C, RUNS], tl.float32)
        state = ((batch * DIRECTIONS + k) * chunks + chunk) * dim * N
        for n in range(N):
            a = _rates(A + k * dim * N, c, c_exists, n, N, False)
            b = _coefficients(
                B + batch * B_b + (group // B_share + k) * B_s, c, c_exists, start, length, n, N, B_n, B_l, B_FIXED,
                RUN, INDEX,
            )
            w = _coefficients(
                C + batch * C_b + (group // C_share + k) * C_s, c, c_exists, start, length, n, N, C_n, C_l, C_FIXED,
                RUN, INDEX,
            )
            decay = tl.where(l_exists, tl.exp(dt * a), 1.0)
            drive = dt * x * b
            before = None if entering is None else load(entering + state + c * N + n, c_exists)
            # An infinite state goes on behind the last position, where it would meet zeros.
            carried = tl.where(l_exists, _scan(decay, drive, before, k == 1), 0.0)
            after = None if adjoint is None else load(adjoint + state + c * N + n, c_exists)
            g = _scan_adjoint(decay, w * dy, after, k == 0)
            product = g * carried
            dx += g * b * dt
            ddt += product * a + g * b * x
            tl.store(part_A + (part * dim + c) * N + n, _over_positions(product * dt), mask=c_exists)
            product = g * dt * x
            if B_FIXED:
                tl.store(part_B + (part * dim + c) * N + n, _over_positions(product), mask=c_exists)
            else:
                tl.store(part_B + (sums * N + n) * length + t, tl.sum(product, 1, keep_dims=True), mask=l_exists)
            product = dy * (carried + drive)
            if C_FIXED:
                tl.store(part_C + (part * dim + c) * N + n, _over_positions(product), mask=c_exists)
            else:
                tl.store(part_C + (sums * N + n) * length + t, tl.sum(product, 1, keep_dims=True), mask=l_exists)
        if SOFTPLUS:
            ddt *= _sigmoid(raw)
        if bias is not None:
            tl.store(part_bias + part * dim + c, _over_positions(tl.where(exists, ddt, 0.0)), mask=c_exists)
        pointers = _tile(grad_delta, batch, k, c, t, grad_delta_b, grad_delta_k, grad_delta_c, grad_delta_l, ALIGN)
        tl.store(pointers, ddt, mask=exists)
        if k == DIRECTIONS - 1 or not SHARED:
            pointers = _tile(grad_u, batch, k, c, t, grad_u_b, grad_u_k, grad_u_c, grad_u_l, ALIGN)
            tl.store(pointers, dx, mask=exists)


@triton.jit
def fold_kernel(
    u, delta, A, M, z, bias, weight, product, end, length, group_channels, groups, chunks, N, rank, share, u_b, u_k,
    u_c, u_l, delta_b, delta_k, delta_c, delta_l, z_b, z_c, z_l, M_b, M_s, M_n, M_l, DIRECTIONS: tl.constexpr,
    SOFTPLUS: tl.constexpr, A_IS_LOG: tl.constexpr, ADJOINT: tl.constexpr, FIXED: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, INDEX: tl.constexpr,
):
    """A chunk as x → product x + end, (batch, directions, chunks, dim, N): of the states, M being B and u the input;
    or of their adjoints, M being C and u the gradient of the result, which z gates."""
    batch, group, _, chunk, c, t, c_exists, l_exists, start = _place(
        tl.program_id(0), length, group_channels, groups, chunks, ALIGN, BLOCK_C, RUN, RUNS, INDEX
    )
    dim = groups * group_channels
    exists = c_exists & l_exists
    for k in tl.static_range(DIRECTIONS):
        x = load(_tile(u, batch, k, c, t, u_b, u_k, u_c, u_l, ALIGN), exists)
        if z is not None:
            x *= silu(load(_tile(z, batch, 0, c, t, z_b, 0, z_c, z_l, ALIGN), exists))
        if weight is None:
            steps = _tile(delta, batch, k, c, t, delta_b, delta_k, delta_c, delta_l, ALIGN)
        else:
            steps = delta + batch * delta_b + k * delta_k
        row = k * dim + c
        raw = _raw_steps(
            steps, weight, bias, row, c_exists, l_exists, start, length, rank, delta_c, delta_l, RUN, INDEX
        )
        dt = _steps(raw, exists, SOFTPLUS)
        state = ((batch * DIRECTIONS + k) * chunks + chunk) * dim * N
        for n in range(N):
            decay = tl.where(l_exists, tl.exp(dt * _rates(A + k * dim * N, c, c_exists, n, N, A_IS_LOG)), 1.0)
            m = _coefficients(
                M + batch * M_b + (group // share + k) * M_s, c, c_exists, start, length, n, N, M_n, M_l, FIXED, RUN,
                INDEX,
            )
            leaving = _fold_runs(decay, (decay if ADJOINT else dt) * x * m, (k == 1) != ADJOINT)
            runs = tl.arange(0, RUNS)[None, :]
            final: tl.constexpr = 0 if (k == 1) != ADJOINT else RUNS - 1
            tl.store(product + state + c * N + n, _at(leaving[2], runs, final, 1)[:, None], mask=c_exists)
            tl.store(end + state + c * N + n, _at(leaving[3], runs, final, 1)[:, None], mask=c_exists)


@triton.jit
def carry_kernel(
    product, end, initial, elements, chunks, DIRECTIONS: tl.constexpr, ADJOINT: tl.constexpr, BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Replace ``end`` of every chunk by the state that enters it; ``initial`` (batch, elements) or None."""
    blocks = tl.cdiv(elements, BLOCK)
    row = (tl.program_id(0) // blocks).to(INDEX)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    exists = i < elements
    falls = (row % DIRECTIONS == 1) != ADJOINT
    state = tl.zeros([BLOCK], tl.float32)
    if initial is not None:
        state = load(initial + row // DIRECTIONS * elements + i, exists)
    for step in range(chunks):
        chunk = tl.where(falls, chunks - 1 - step, step)
        place = (row * chunks + chunk) * elements + i
        p = load(product + place, exists)
        q = load(end + place, exists)
        tl.store(end + place, state, mask=exists)
        state = p * state + q


# --- their launchers ---------------------------------------------------------------------------------------------


class Scan(NamedTuple):
    """The arguments of a scan in K directions; those that a kernel walks through in any strides, the rest dense."""

    u: Tensor  # (batch, K, dim, L), of stride 0 between directions that share it
    delta: Tensor  # (batch, K, dim, L); with ``weight`` (batch, K, rank, L)
    A: Tensor  # (K, dim, N)
    B: Tensor  # (batch, K, N, L), (batch, G, N, L), or (dim, N)
    C: Tensor
    D: Tensor | None  # (K, dim)
    z: Tensor | None  # (batch, dim, L)
    bias: Tensor | None  # (K, dim)
    softplus: bool
    shared: bool  # u, by all directions
    weight: Tensor | None = None  # (K, dim, rank): delta is its product with the given rows, and A is −exp(A)

    @property
    def directions(self) -> int:
        return self.delta.shape[1]

    @property
    def groups(self) -> int:
        """Of channels that have the same B and C."""
        if self.directions > 1:
            return 1
        return math.lcm(*(M.shape[1] for M in (self.B, self.C) if M.ndim == 4))


def _share(scan: Scan, M: Tensor) -> int:
    """Groups that have the same M, one of B and C."""
    return scan.groups // M.shape[1] if M.ndim == 4 and scan.directions == 1 else 1


def _rows(t: Tensor | None) -> tuple[int, ...]:
    """Strides of B or C; zeros where it does not vary."""
    return t.stride() if t is not None and t.ndim == 4 else (0, 0, 0, 0)


def strides(t: Tensor | None) -> tuple[int, ...]:
    """Strides of (batch, dim, L)."""
    return (0, 0, 0) if t is None else t.stride()


def alignment(*tiles: Tensor | None) -> int:
    """What divides length and strides where positions are innermost in all of ``tiles``: 4, 2 or 1."""
    given = [t for t in tiles if t is not None]
    if any(t.stride(-1) != 1 for t in given):
        return 1
    outer = [s for t in given for n, s in zip(t.shape[:-1], t.stride(), strict=False) if n > 1]
    return math.gcd(RUN, given[0].shape[-1], *outer)


def _config(scan: Scan, longest: int, elements: int = 8) -> tuple[int, int, int]:
    """Channels and runs of a tile, and warps: ``elements`` a thread where 256 threads suffice.

    At least 32 bytes of channels where they lie side by side, a sector of memory, or less where the positions are so
    many that a thread would have more than 16; and more threads than runs (_row).
    """
    dim, length = scan.u.shape[2:]
    sector = 32 // scan.u.element_size() if scan.u.stride(2) == 1 else 8
    positions = max(triton.next_power_of_2(length), 16) if length <= longest else 2048 // sector
    most = 8192 if scan.weight is None else 4096  # steps computed here take registers
    channels = min(max(sector, 256 * elements // positions), most // positions, 64)
    channels = min(channels, triton.next_power_of_2(dim // scan.groups))
    size = channels * positions
    return channels, positions // RUN, min(max(size // (32 * elements), 1), 8 if size <= 4096 else 16)


def _grid(scan: Scan, channels: int, runs: int) -> tuple[int, int, tuple[int, int, int, int]]:
    """Programs, blocks of channels in a group, and length, channels of a group, groups, chunks."""
    batch, _, dim, length = scan.u.shape
    per_group = dim // scan.groups
    chunks, per = blocks(length, runs * RUN), blocks(per_group, channels)
    return batch * scan.groups * per * chunks, per, (length, per_group, scan.groups, chunks)


def _states_between_chunks(
    scan: Scan, config: tuple[int, int, int], adjoint: bool, grad: Tensor | None = None, initial: Tensor | None = None
) -> Tensor | None:
    """What enters every chunk, (batch, K, chunks, dim, N); ``initial`` itself where there is one chunk.

    Of the states, or, for the gradient of the result, of their adjoints.
    """
    channels, runs, warps = config
    programs, _, sizes = _grid(scan, channels, runs)
    chunks = sizes[-1]
    if chunks == 1:
        return initial
    K, dim, N = scan.A.shape
    shape = (scan.u.shape[0], K, chunks, dim, N)
    product, end = (scan.u.new_empty(shape, dtype=torch.float32) for _ in range(2))
    x, M, z = (scan.u, scan.B, None) if grad is None else (grad.unsqueeze(1).expand_as(scan.u), scan.C, scan.z)
    rank = 0 if scan.weight is None else scan.weight.shape[2]
    launch(
        fold_kernel, programs, x, scan.delta, scan.A, M, z, scan.bias, scan.weight, product, end, *sizes, N, rank,
        _share(scan, M), *x.stride(), *scan.delta.stride(), *strides(z), *_rows(M), DIRECTIONS=K,
        SOFTPLUS=scan.softplus, A_IS_LOG=scan.weight is not None, ADJOINT=adjoint, FIXED=M.ndim == 2,
        ALIGN=alignment(x, z, *(() if scan.weight is not None else (scan.delta,))), BLOCK_C=channels, RUN=RUN,
        RUNS=runs, INDEX=index_type(x, scan.delta, M, z, product), num_warps=warps,
        maxnreg=None if scan.weight is None else ALL_REGISTERS,
    )
    block = 128
    launch(
        carry_kernel, shape[0] * K * blocks(dim * N, block), product, end, initial, dim * N, chunks, DIRECTIONS=K,
        ADJOINT=adjoint, BLOCK=block, INDEX=index_type(product), num_warps=block // 32,
    )
    return end


def run_forward(scan: Scan, out: Tensor, last: Tensor | None = None) -> None:
    """Write the scan's result to out (batch, dim, L), and its last state to ``last`` (batch, dim, N), contiguous."""
    config = channels, runs, warps = _config(scan, longest=1024)
    programs, _, sizes = _grid(scan, channels, runs)
    chunks = sizes[-1]
    entering = _states_between_chunks(scan, config, adjoint=False)
    u, delta, A, B, C, D, z, bias, softplus, shared, weight = scan
    launch(
        forward_kernel, programs, u, delta, A, B, C, D, z, bias, weight, entering, out, last, *sizes, A.shape[2],
        0 if weight is None else weight.shape[2], _share(scan, B), _share(scan, C), *u.stride(), *delta.stride(),
        *strides(z), *out.stride(), *_rows(B), *_rows(C), DIRECTIONS=scan.directions, SHARED=shared,
        SOFTPLUS=softplus, A_IS_LOG=weight is not None, B_FIXED=B.ndim == 2, C_FIXED=C.ndim == 2,
        ALIGN=alignment(u, z, out, *(() if weight is not None else (delta,))), BLOCK_C=channels, RUN=RUN, RUNS=runs,
        INDEX=index_type(u, delta, B, C, z, out, entering, last), num_warps=warps,
        maxnreg=ALL_REGISTERS if warps == 8 and chunks > 1 and A.shape[2] > 1 else None,
    )


class Gradients(NamedTuple):
    """The gradients of a scan that are sums over programs, in float32."""

    A: Tensor  # (K, dim, N)
    B: Tensor  # (batch, K or G, N, L), or (dim, N)
    C: Tensor
    D: Tensor | None  # (K, dim)
    bias: Tensor | None


def run_backward(
    scan: Scan, grad: Tensor, grad_last: Tensor | None, grad_u: Tensor, grad_delta: Tensor, grad_z: Tensor | None
) -> Gradients:
    """Write the gradients of u (its stride 0 between directions that share u), delta and z; return the others.

    Args:
        grad: of the result, (batch, dim, L).
        grad_last: of the last state, (batch, dim, N), contiguous.
    """
    # With z the result is computed too, in the same program.
    elements = 4 if scan.z is not None and scan.directions == 2 else 8
    config = channels, runs, warps = _config(scan, longest=256, elements=elements)
    programs, per_group, sizes = _grid(scan, channels, runs)
    entering = _states_between_chunks(scan, config, adjoint=False)
    adjoint = _states_between_chunks(scan, config, adjoint=True, grad=grad, initial=grad_last)
    u, delta, A, B, C, D, z, bias, softplus, shared, _ = scan
    batch, K, (_, dim, N), (length, _, groups, chunks) = u.shape[0], scan.directions, A.shape, sizes

    def parts(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    def coefficient_parts(M: Tensor) -> Tensor:
        return parts(batch * chunks, dim, N) if M.ndim == 2 else parts(batch, K * groups, per_group, N, length)

    part_A, part_B, part_C = parts(batch * chunks, K, dim, N), coefficient_parts(B), coefficient_parts(C)
    part_D, part_bias = (None if t is None else parts(batch * chunks, K, dim) for t in (D, bias))
    launch(
        backward_kernel, programs, grad, u, delta, A, B, C, D, z, bias, entering, adjoint, grad_u, grad_delta, grad_z,
        part_A, part_B, part_C, part_D, part_bias, *sizes, N, _share(scan, B), _share(scan, C), *grad.stride(),
        *u.stride(), *delta.stride(), *strides(z), *grad_u.stride(), *grad_delta.stride(), *strides(grad_z),
        *_rows(B), *_rows(C), DIRECTIONS=K, SHARED=shared, SOFTPLUS=softplus, B_FIXED=B.ndim == 2,
        C_FIXED=C.ndim == 2, ALIGN=alignment(grad, u, delta, z, grad_u, grad_delta, grad_z), BLOCK_C=channels, RUN=RUN,
        RUNS=runs,
        INDEX=index_type(grad, u, delta, B, C, z, grad_u, grad_delta, grad_z, entering, part_A, part_B, part_C),
        num_warps=warps, maxnreg=ALL_REGISTERS if warps == 8 else None,
    )

    def sum_coefficients(part: Tensor, M: Tensor) -> Tensor:
        if M.ndim == 2:
            return part.sum(0)
        return part.view(batch, M.shape[1], -1, N, length).sum(2)

    return Gradients(
        part_A.sum(0),
        sum_coefficients(part_B, B),
        sum_coefficients(part_C, C),
        None if part_D is None else part_D.sum(0),
        None if part_bias is None else part_bias.sum(0),
    )


def dense(t: Tensor | None) -> Tensor | None:
    """A parameter as the kernels walk through it."""
    return None if t is None else t.contiguous()


def gradient_of(argument: Tensor | None, computed: Tensor | None, like: Tensor) -> Tensor:
    """``computed`` in shape, dtype and strides of its argument; an empty tensor for an absent one."""
    if argument is None:
        return like.new_empty(0)
    assert computed is not None
    return torch.empty_like(argument).copy_(computed.view(argument.shape))


def each_direction(t: Tensor) -> Tensor:
    """A sequence (batch, dim, L) as one of each direction, (batch, 1, dim, L); (batch, 2, dim, L) as it is."""
    return t if t.ndim == 4 else t.unsqueeze(1)


def gradients(scan_of: Callable[..., Scan], grad_out: Tensor, grad_last: Tensor | None, *inputs: Any) -> list[Tensor]:
    """What a scan operator's ``backward`` returns; ``scan_of`` makes a scan of the operator's arguments."""
    u, delta, A, B, C, D, z, delta_bias, _ = inputs
    if not u.numel():
        return [u.new_empty(0) if t is None else torch.zeros_like(t) for t in inputs[:-1]]
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    grad_z = None if z is None else torch.empty_like(z)
    scan = scan_of(*inputs)
    of_u = each_direction(grad_u).expand_as(scan.u)
    sums = run_backward(scan, grad_out, grad_last, of_u, each_direction(grad_delta), grad_z)
    return [
        grad_u,
        grad_delta,
        gradient_of(A, sums.A, u),
        gradient_of(B, sums.B, u),
        gradient_of(C, sums.C, u),
        gradient_of(D, sums.D, u),
        u.new_empty(0) if grad_z is None else grad_z,
        gradient_of(delta_bias, sums.bias, u),
    ]


def every_sequence() -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """What makes a tensor (…, dim, L) without memory, of each dtype and layout, for ``record``."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):

        def rows(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def columns(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty((*shape[:-2], shape[-1], shape[-2]), dtype=dtype, device="meta").mT

        name = str(dtype).removeprefix("torch.")
        yield from ((f"{name}-channels_first", rows), (f"{name}-channels_last", columns))
