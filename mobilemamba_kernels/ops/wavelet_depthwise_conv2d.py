"""Depthwise convolution in the Haar wavelet domain: WTConv (arXiv 2407.05848), MobileMamba's wavelet branch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemamba_kernels._library import define_operator
from mobilemamba_kernels.backends import choose
from mobilemamba_kernels.ops import haar_dwt2d, haar_idwt2d
from mobilemamba_kernels.ops._checks import accumulate_dtype, autocast, check_dims, check_shape, check_tensors


def wavelet_depthwise_conv2d(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    scale: Tensor | Sequence[Tensor | None] | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """Transform, convolve every band by itself, scale, transform back, add ``base``.

    With a sequence of weights (and of scales) there is one level for each: the next level transforms the unfiltered
    low-pass band of the one before, and its result is added to the filtered one. One level is one pass over memory.

    Args:
        x: (batch, C, H, W). Odd sizes are zero-padded at the end before each transform and cropped after its inverse.
        weight: (4C, 1, k, k), k odd, zero "same" padding; channel 4c + band.
        scale: (4C,) or (1, 4C, 1, 1), multiplies the filtered bands.
        base: (batch, C, H, W), added to the result.

    Returns:
        (batch, C, H, W) in ``x``'s dtype (under autocast, autocast's). Differentiable once, in every tensor; twice on
        the reference.

    Raises:
        TypeError: an argument is no real floating-point tensor.
        ValueError: shapes or devices do not fit together, an even kernel, no level.
    """
    op = "wavelet_depthwise_conv2d"
    for name, given in {"weight": weight, "scale": () if scale is None else scale}.items():
        if not isinstance(given, Iterable):
            raise TypeError(f"{op}: {name} must be a tensor, or a sequence of one a level; got {type(given).__name__}")
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    scales = [scale] * len(weights) if scale is None or isinstance(scale, Tensor) else list(scale)
    if not weights or len(scales) != len(weights):
        raise ValueError(f"{op}: weight and scale must have one entry a level; got {len(weights)} and {len(scales)}")
    for w, s in zip(weights, scales, strict=True):
        check_tensors(op, {"x": x, "weight": w}, {"scale": s, "base": base})
        check_dims(op, "x", x, "batch, C, H, W")
        channels = x.shape[1]
        check_dims(op, "weight", w, "4C, 1, k, k")
        check_shape(op, "weight", w, (4 * channels, 1, w.shape[2], w.shape[2]), "4C, 1, k, k")
        if w.shape[2] % 2 == 0:
            raise ValueError(f"{op}: the kernel size k must be odd; got {w.shape[2]}")
        if s is not None and s.ndim == 4:
            check_shape(op, "scale", s, (1, 4 * channels, 1, 1), "1, 4C, 1, 1")
        elif s is not None:
            check_shape(op, "scale", s, (4 * channels,), "4C")
    check_shape(op, "base", base, tuple(x.shape), "batch, C, H, W")
    x, base = autocast(x), autocast(base)
    scales = [None if s is None else s.flatten() for s in scales]
    run = _run[choose(op, x, base, *weights, *scales)]
    if len(weights) == 1:
        return run(x, weights[0], scales[0], base)
    # The filtered bands of a level are linear in its raw bands, so deeper levels enter through the low-pass band alone.
    low = haar_dwt2d.haar_dwt2d(x)[:, :, 0]
    deeper = wavelet_depthwise_conv2d(low, weights[1:], scales[1:])
    bands = torch.stack((deeper, *(torch.zeros_like(deeper),) * 3), dim=2)
    lifted = haar_idwt2d.haar_idwt2d(bands, (x.shape[2], x.shape[3]))
    return run(x, weights[0], scales[0], lifted if base is None else lifted + base)


def _reference(x: Tensor, weight: Tensor, scale: Tensor | None, base: Tensor | None) -> Tensor:
    dtype = accumulate_dtype(x.dtype)
    height, width = x.shape[2:]
    bands = haar_dwt2d._reference(x.to(dtype))
    flat = bands.flatten(1, 2)  # (batch, 4C, h, w)
    weight = weight.to(dtype)
    if flat.numel():
        flat = F.conv2d(flat, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    else:  # conv2d refuses a map without positions
        flat = flat * weight.sum()
    if scale is not None:
        flat = flat * scale.to(dtype).view(-1, 1, 1)
    y = haar_idwt2d._reference(flat.view_as(bands), height, width)
    if base is not None:
        y = y + base.to(dtype)
    return y.to(x.dtype)


def _fake(x: Tensor, weight: Tensor, scale: Tensor | None, base: Tensor | None) -> Tensor:
    return torch.empty_like(x)


_run = define_operator(
    "wavelet_depthwise_conv2d",
    "(Tensor x, Tensor weight, Tensor? scale, Tensor? base) -> Tensor",
    _reference,
    _fake,
)
