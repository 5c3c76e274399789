"""VMamba's functions (https://github.com/MzeroMiko/VMamba), which MobileMamba and LocalMamba use too."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemamba_kernels.ops._checks import check_dims, check_tensors
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


def _check_scans(op: str, scans: int) -> None:
    if scans not in (0, 1, 2):
        raise ValueError(f"{op}: scans must be 0 (cross), 1 (in one direction) or 2 (in both); got {scans!r}")


def cross_scan_fn(
    x: Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = 0,
    force_torch: bool = False,
) -> Tensor:
    """Lay images out as four sequences.

    Args:
        x: (batch, C, H, W), or (batch, H, W, C) unless ``in_channel_first``; with ``one_by_one`` one image a sequence,
            (batch, 4, C, H, W) or (batch, H, W, 4, C).
        in_channel_first, out_channel_first: the layouts.
        scans: 0: row by row, column by column, and both backwards; 1: four times row by row; 2: twice row by row, and
            both backwards.
        force_torch: accepted and ignored.

    Returns:
        (batch, 4, C, H W), or (batch, H W, 4, C) unless ``out_channel_first``; contiguous, differentiable.

    Raises:
        TypeError: x is no real floating-point tensor.
        ValueError: rank or scans do not fit.
    """
    op = "cross_scan_fn"
    check_tensors(op, {"x": x})
    _check_scans(op, scans)
    if one_by_one:
        check_dims(op, "x", x, "batch, 4, C, H, W" if in_channel_first else "batch, H, W, 4, C")
        maps = (x if in_channel_first else x.permute(0, 3, 4, 1, 2)).unbind(1)
        if len(maps) != 4:
            raise ValueError(f"{op}: x must hold 4 images, one a sequence; got {len(maps)}")
    else:
        check_dims(op, "x", x, "batch, C, H, W" if in_channel_first else "batch, H, W, C")
        maps = (x if in_channel_first else x.permute(0, 3, 1, 2),) * 4
    batch, channels, height, width = maps[0].shape
    shape = (batch, 4, channels, height * width) if out_channel_first else (batch, height * width, 4, channels)
    y = x.new_empty(shape)
    sequences = y if out_channel_first else y.permute(0, 2, 3, 1)
    for k, image in enumerate(maps):
        path = image.mT if scans == 0 and k % 2 else image
        place = sequences[:, k].unflatten(-1, path.shape[2:])
        place.copy_(path.flip(-2, -1) if scans != 1 and k >= 2 else path)
    return y


def cross_merge_fn(
    y: Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = 0,
    force_torch: bool = False,
) -> Tensor:
    """Bring four sequences back into row-major order and add them: what undoes :func:`cross_scan_fn`.

    Args:
        y: (batch, 4, C, H, W), or (batch, H, W, 4, C) unless ``out_channel_first``: each sequence, in its own order.
        in_channel_first, out_channel_first: the layouts of the images and of the sequences.
        one_by_one: do not add.
        scans: as in :func:`cross_scan_fn`.
        force_torch: accepted and ignored.

    Returns:
        (batch, C, H W), or (batch, H W, C) unless ``in_channel_first``; with ``one_by_one`` (batch, 4, C, H W) or
        (batch, H W, 4, C). Contiguous, differentiable.

    Raises:
        TypeError: y is no real floating-point tensor.
        ValueError: rank or scans do not fit.
    """
    op = "cross_merge_fn"
    check_tensors(op, {"y": y})
    _check_scans(op, scans)
    check_dims(op, "y", y, "batch, 4, C, H, W" if out_channel_first else "batch, H, W, 4, C")
    sequences = y if out_channel_first else y.permute(0, 3, 4, 1, 2)
    if sequences.shape[1] != 4:
        raise ValueError(f"{op}: y must hold 4 sequences; got {sequences.shape[1]}")
    height, width = sequences.shape[3:]
    sequences = sequences.flatten(3)

    def images(paths: Tensor, k: int) -> Tensor:
        return paths.unflatten(-1, (width, height)).mT if scans == 0 and k % 2 else paths.unflatten(-1, (height, width))

    backwards = sequences[:, 2:] if scans == 1 else sequences[:, 2:].flip(-1)
    if one_by_one:
        paths = [images(p, k).flatten(2) for k, p in enumerate((*sequences[:, :2].unbind(1), *backwards.unbind(1)))]
        return torch.stack(paths, 1) if in_channel_first else torch.stack([path.mT for path in paths], 2)
    both = sequences[:, :2] + backwards
    merged = (images(both[:, 0], 0) + images(both[:, 1], 1)).flatten(2)
    return merged.contiguous() if in_channel_first else merged.mT.contiguous()


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
