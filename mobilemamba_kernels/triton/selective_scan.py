"""Selective scan in one direction, by the kernels of _scan."""

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
    B, C = (M.contiguous() if M.ndim == 2 else M.unsqueeze(1) if M.ndim == 3 else M for M in (B, C))
    A = A.contiguous().unsqueeze(0)
    return Scan(
        u.unsqueeze(1), delta.unsqueeze(1), A, B, C, dense(D), z, dense(delta_bias), delta_softplus, shared=True
    )


def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The kernels of ``mobilemamba::selective_scan_fwd``."""
    u, A = inputs[0], inputs[2]
    out = torch.empty_like(u)
    last = u.new_empty(u.shape[0], u.shape[1], A.shape[1], dtype=torch.float32)
    if not u.numel():
        return out, last.zero_()
    run_forward(_scan(*inputs), out, last)
    return out, last


def backward(grad_out: Tensor, grad_last: Tensor, *inputs: Any) -> list[Tensor]:
    """The kernels of ``mobilemamba::selective_scan_bwd``."""
    return gradients(_scan, grad_out, grad_last.contiguous(), *inputs)


def _both(*args: Any) -> None:
    backward(*forward(*args), *args)


_CASES = ((196, 320, 1, True), (784, 192, 1, True), (196, 320, 16, False), (4096, 320, 1, True), (4096, 1536, 16, True))


def configurations() -> Iterator[Configuration]:
    """What the launchers choose for the lengths, dtypes, layouts and variants that differ in their code."""
    for name, empty in every_sequence():
        for length, dim, N, optional in _CASES:
            u = empty(16, dim, length)
            B, A, D = empty(16, 1, N, length), u.new_empty(dim, N, dtype=torch.float32), u.new_empty(dim).float()
            given = (u, u, A, B, B, *((D, u, D) if optional else (None, None, None)), True)
            yield from record(f"selective_scan-{length}-N{N}-{name}", partial(_both, *given))
