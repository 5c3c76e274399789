"""Selective scan in both directions at once, by the kernels of _scan."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mobilemamba_kernels.triton._launch import Configuration, record
from mobilemamba_kernels.triton._scan import Scan, dense, every_sequence, gradients, run_forward


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


def forward(*inputs: Any) -> Tensor:
    """The kernels of ``mobilemamba::bidirectional_selective_scan_fwd``."""
    u = inputs[0]
    out = torch.empty_like(u if u.ndim == 3 else u[:, 0])
    if u.numel():
        run_forward(_scan(*inputs), out)
    return out


def backward(grad_out: Tensor, *inputs: Any) -> list[Tensor]:
    """The kernels of ``mobilemamba::bidirectional_selective_scan_bwd``."""
    return gradients(_scan, grad_out, None, *inputs)


def _both(*args: Any) -> None:
    backward(forward(*args), *args)


def configurations() -> Iterator[Configuration]:
    """What the launchers choose for the lengths, dtypes, layouts and variants that differ in their code."""
    for name, empty in every_sequence():
        for length, dim, N in ((196, 320, 1), (49, 544, 1), (784, 192, 1), (196, 320, 16), (4096, 320, 1)):
            u, delta, B = empty(16, dim, length), empty(16, 2, dim, length), empty(16, 2, N, length)
            A, D = (u.new_empty(shape, dtype=torch.float32) for shape in ((2, dim, N), (2, dim)))
            given = (u, delta, A, B, B, D, u if length in (49, 4096) else None, D, True)
            yield from record(f"bidirectional_selective_scan-{length}-N{N}-{name}", partial(_both, *given))
