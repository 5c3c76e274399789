"""VMamba's functions (https://github.com/MzeroMiko/VMamba), which MobileMamba and LocalMamba use too."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemamba_kernels.ops._checks import check_dims, check_tensors
from mobilemamba_kernels.ops.cross_merge import cross_merge_fn
from mobilemamba_kernels.ops.cross_scan import cross_scan_fn
from mobilemamba_kernels.ops.selective_scan import selective_scan_fn as _selective_scan_fn

__all__ = [
    "cross_merge_fn",
    "cross_scan_fn",
    "selective_scan_cuda",
    "selective_scan_cuda_core",
    "selective_scan_cuda_oflex",
    "selective_scan_fn",
]

BACKENDS = (None, "oflex", "core", "mamba", "torch")


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    oflex: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Scan K sequences of each image, which lie in the channels.

    Args:
        u: (batch, K dim, L).
        delta: (batch, K dim, L), or fewer channels that each serve several of ``u``.
        A: (K dim, N), real.
        B, C: (batch, K, N, L).
        D: (K dim).
        delta_bias: as many as ``delta`` has channels.
        delta_softplus: apply softplus to the step sizes.
        oflex: return float32 whatever the dtype of ``u``.
        backend: accepted, as VMamba's own implementations all compute this; with "core" and "mamba", ``oflex`` has no
            effect, as it has none there.

    Returns:
        (batch, K dim, L). Differentiable once; twice on the reference.

    Raises:
        TypeError: an argument is no real floating-point tensor.
        ValueError: shapes or devices do not fit together, or no such backend.
    """
    op = "selective_scan_fn"
    check_tensors(op, {"u": u, "delta": delta, "A": A, "B": B, "C": C}, {"D": D, "delta_bias": delta_bias})
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be None, oflex, core, mamba or torch; got {backend!r}")
    delta, delta_bias = _spread(u, delta, delta_bias)
    if oflex and backend not in ("core", "mamba") and u.dtype in (torch.float16, torch.bfloat16):
        u = u.float()
    return _selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, delta_softplus)  # type: ignore[return-value]


def _spread(u: Tensor, delta: Tensor, delta_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Give every channel of ``u`` its step sizes and bias."""
    for name, tensor in (("u", u), ("delta", delta)):
        check_dims("selective_scan_fn", name, tensor, "batch, K dim, L")
    channels, steps = u.shape[1], delta.shape[1]
    if channels == steps:
        return delta, delta_bias
    if not steps or channels % steps:
        raise ValueError(f"selective_scan_fn: u's channels must be a multiple of delta's; got {channels} and {steps}")
    repeats = channels // steps
    return delta.repeat_interleave(repeats, 1), None if delta_bias is None else delta_bias.repeat_interleave(repeats)


def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    out_float: bool = False,
) -> list[Tensor]:
    """The result, and x, (batch, dim, 1, 2 N), of which [:, :, -1, 1::2] is the last state, and the rest 0."""
    delta, delta_bias = _spread(u, delta, delta_bias)
    out, last = _selective_scan_fn(
        u.float() if out_float else u, delta, A, B, C, D, None, delta_bias, delta_softplus, True
    )
    x = last.new_zeros(*last.shape[:2], 1, 2 * last.shape[2])
    x[:, :, -1, 1::2] = last
    return [out, x]


def _gate(out: Tensor, z: Tensor) -> Tensor:
    return (out.float() * F.silu(z.float())).to(out.dtype)


def _backward(
    dout: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    z: Tensor | None = None,
) -> tuple[list[Tensor | None], Tensor]:
    """The gradients of u, delta, A, B, C, D, delta_bias and z, and the gated result."""
    inputs: list[Any] = [t if t is None else t.detach().requires_grad_() for t in (u, delta, A, B, C, D, delta_bias, z)]
    with torch.enable_grad():
        out = selective_scan_fn(*[*inputs[:7], delta_softplus, dout.dtype != u.dtype])
        gated = out if z is None else _gate(out, inputs[7])
        given = [t for t in inputs if t is not None]
        found = iter(torch.autograd.grad(gated, given, dout))
    return [None if t is None else next(found) for t in inputs], gated.detach()


def _oflex_fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows, out_float):  # type: ignore[no-untyped-def]
    """Return out, in float32 if ``out_float``, and x."""
    return _forward(u, delta, A, B, C, D, delta_bias, delta_softplus, out_float)


def _core_fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows):  # type: ignore[no-untyped-def]
    """Return out and x."""
    return _forward(u, delta, A, B, C, D, delta_bias, delta_softplus)


def _core_bwd(u, delta, A, B, C, D, delta_bias, dout, x, delta_softplus, nrows):  # type: ignore[no-untyped-def]
    """Return du, ddelta, dA, dB, dC, dD and ddelta_bias."""
    return _backward(dout, u, delta, A, B, C, D, delta_bias, delta_softplus)[0][:7]


def _mamba_fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):  # type: ignore[no-untyped-def]
    """Return out, x and, with z, out · SiLU(z)."""
    out, x = _forward(u, delta, A, B, C, D, delta_bias, delta_softplus)
    return [out, x] if z is None else [out, x, _gate(out, z)]


def _mamba_bwd(  # type: ignore[no-untyped-def]
    u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z
):
    """Return du, ddelta, dA, dB, dC, dD, ddelta_bias and, with z, dz (written to ``dz`` if given) and out · SiLU(z)."""
    gradients, gated = _backward(dout, u, delta, A, B, C, D, delta_bias, delta_softplus, z)
    if z is None:
        return gradients[:7]
    if dz is not None:
        gradients[7] = dz.copy_(gradients[7])
    return [*gradients, gated] if recompute_out_z else gradients


def _module(name: str, fwd: Callable[..., Any], bwd: Callable[..., Any]) -> ModuleType:
    module = ModuleType(name, f"The extension {name}, which networks import, on mobilemamba_kernels' operators.")
    module.fwd, module.bwd = fwd, bwd  # type: ignore[attr-defined]
    return module


selective_scan_cuda = _module("selective_scan_cuda", _mamba_fwd, _mamba_bwd)
selective_scan_cuda_core = _module("selective_scan_cuda_core", _core_fwd, _core_bwd)
selective_scan_cuda_oflex = _module("selective_scan_cuda_oflex", _oflex_fwd, _core_bwd)
