"""Selective scan in both directions at once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mobilemamba_kernels.triton._launch import Configuration, record
from mobilemamba_kernels.triton._scan import Scan, dense, every_sequence, gradient_of, run_backward, run_forward


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Scan:
    shared = u.ndim == 3
    both = u.unsqueeze(1).expand(-1, 2, -1, -1) if shared else u
    return Scan(both, delta, A.contiguous(), B, C, dense(D), z, dense(delta_bias), delta_softplus, shared)


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """The kernels of ``mobilemamba::bidirectional_selective_scan_fwd``."""
    out = torch.empty_like(u if u.ndim == 3 else u[:, 0])
    if u.numel():
        run_forward(_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus), out)
    return out


def backward(
    grad_out: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """The kernels of ``mobilemamba::bidirectional_selective_scan_bwd``."""
    if not u.numel():
        return [u.new_empty(0) if t is None else torch.zeros_like(t) for t in (u, delta, A, B, C, D, z, delta_bias)]
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    grad_z = None if z is None else torch.empty_like(z)
    scan = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    both = grad_u.unsqueeze(1).expand_as(scan.u) if scan.shared else grad_u
    sums = run_backward(scan, grad_out, None, both, grad_delta, grad_z)
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


def _both(*args: Any) -> None:
    backward(forward(*args), *args)


def configurations() -> Iterator[Configuration]:
    """What the launchers choose for the lengths, dtypes, layouts and variants that differ in their code."""
    for name, empty in every_sequence():
        for length, dim, N in ((196, 320, 1), (49, 544, 1), (196, 320, 16), (4096, 320, 1)):
            u, delta, B = empty(16, dim, length), empty(16, 2, dim, length), empty(16, 2, N, length)
            A, D = (u.new_empty(shape, dtype=torch.float32) for shape in ((2, dim, N), (2, dim)))
            given = (u, delta, A, B, B, D, u if length in (49, 4096) else None, D, True)
            yield from record(f"bidirectional_selective_scan-{length}-N{N}-{name}", partial(_both, *given))
