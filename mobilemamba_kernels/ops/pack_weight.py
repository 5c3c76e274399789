"""Weights in the order in which the CPU kernels read them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mobilemamba_kernels import _library
from mobilemamba_kernels.ops._checks import check_dims, check_shape, check_tensors

_LANES, _PANEL_VECTORS = 16, 3


def pack_weight(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a weight that :func:`pointwise_conv2d_act`, :func:`feed_forward` and :func:`conv2d_act` take in its place.

    They then do not order it anew at every call, which matters where there are few positions. A packed weight keeps its
    dtype and device; the bias beside it tells the number of outputs, and is required.

    Args:
        weight: (O, C), or (O, C, k, k).
        dtype: float32 or bfloat16. With a bfloat16 weight the input is rounded to bfloat16 too; sums stay float32.

    Returns:
        A tensor of three dimensions whose order is the kernels' business: panels of up to 48 outputs, outputs
        innermost, padded with zeros to a multiple of 16; in bfloat16, pairs of the depth within the outputs. Where
        products of bfloat16 are the vendor library's (AMX), ``weight`` (O, C) itself in that type, and the library
        rounds the sums to it; where a row of filters is no whole number of pairs (k · C odd), packed in float32.
        Filters without channels, whose k would be lost, stay as they are.

    Raises:
        TypeError: ``weight`` is no real floating-point tensor, or ``dtype`` is another.
        ValueError: ``weight`` has another rank, or filters that are not square.
    """
    check_tensors("pack_weight", {"weight": weight})
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"pack_weight: dtype must be float32 or bfloat16; got {dtype}")
    if weight.ndim not in (2, 4):
        raise ValueError(f"pack_weight: weight must have shape (O, C) or (O, C, k, k); got {tuple(weight.shape)}")
    if weight.ndim == 4 and weight.shape[2] != weight.shape[3]:
        raise ValueError(f"pack_weight: filters must be square, (O, C, k, k); got {tuple(weight.shape)}")
    if weight.ndim == 4 and weight.shape[1] == 0:
        return weight.to(dtype)
    if weight.ndim == 4 and weight.shape[1] * weight.shape[3] % 2:
        dtype = torch.float32
    elif weight.ndim == 2 and dtype == torch.bfloat16 and _vendor_multiplies():
        return weight.to(dtype)
    together = 2 if dtype == torch.bfloat16 else 1
    matrix = weight.to(dtype) if weight.ndim == 2 else weight.to(dtype).permute(0, 2, 3, 1).flatten(1)
    outputs, depth = matrix.shape
    vectors, steps = -(-outputs // _LANES), -(-depth // together)
    padded = matrix.new_zeros(vectors * _LANES, steps * together)
    padded[:outputs, :depth] = matrix
    panels = [
        padded[begin:end].unflatten(1, (steps, together)).transpose(0, 1).flatten() for begin, end in _panels(vectors)
    ]
    return torch.cat([*panels, padded.new_empty(0)]).view(vectors, steps, _LANES * together)


def _vendor_multiplies() -> bool:
    return _library.COMPILED_ERROR is None and _library.cpu_capability() == "amx"


def _panels(vectors: int) -> list[tuple[int, int]]:
    """The first output of each panel, and that behind its last."""
    count = -(-vectors // _PANEL_VECTORS)
    even = count + count % 2
    count = even if 5 * even <= 2 * vectors else count
    bounds = [vectors * i // count * _LANES for i in range(count + 1)] if count else [0]
    return list(itertools.pairwise(bounds))


def unpack_weight(weight: Tensor, outputs: int, channels: int, k: int | None = None) -> Tensor:
    """The weight (O, C), or (O, C, k, k), that was packed; what is not packed is returned as it is."""
    if weight.ndim != 3:
        return weight
    vectors, steps, inner = weight.shape
    together, flat = inner // _LANES, weight.flatten()
    panels = [
        flat[begin * steps * together : end * steps * together].view(steps, end - begin, together).transpose(0, 1)
        for begin, end in _panels(vectors)
    ]
    depth = channels * (k or 1) ** 2
    matrix = torch.cat([*panels, weight.new_empty(0, steps, together)]).flatten(1)[:outputs, :depth]
    return matrix if k is None else matrix.unflatten(1, (k, k, channels)).permute(0, 3, 1, 2)


def outputs_of(weight: Tensor, bias: Tensor | None) -> int:
    """The number of outputs of a weight, packed or not."""
    return weight.shape[0] if weight.ndim != 3 or bias is None else bias.shape[0]


def check_packed(op: str, name: str, weight: Tensor, bias_name: str, bias: Tensor | None, depth: int) -> int:
    """Check a packed weight whose outputs each take ``depth`` inputs, and its bias; return the number of outputs.

    Raises:
        TypeError: its dtype is not what it was packed in.
        ValueError: it has no bias, or does not fit it or the inputs.
    """
    if bias is None or bias.ndim != 1:
        raise ValueError(f"{op}: {name} is packed, so {bias_name} must be given, with shape (O)")
    outputs, (vectors, steps, inner) = bias.shape[0], weight.shape
    together = inner // _LANES
    if together not in (1, 2) or inner % _LANES or (vectors, steps) != (-(-outputs // _LANES), -(-depth // together)):
        raise ValueError(
            f"{op}: {name} must be what pack_weight made of {outputs} outputs ({bias_name}'s) and {depth} inputs; "
            f"got {tuple(weight.shape)}"
        )
    packed_as = torch.float32 if together == 1 else torch.bfloat16
    if weight.dtype not in (packed_as, torch.float64):
        raise TypeError(f"{op}: {name} was packed as {packed_as} and is now {weight.dtype}; pack it anew as that")
    return outputs


def check_matrix(
    op: str, name: str, weight: Tensor, bias_name: str, bias: Tensor | None, channels: int, dims: str
) -> int:
    """Check a weight (O, C), packed or not, and its bias (O); return O.

    Raises:
        TypeError, ValueError: see :func:`check_packed`; or another shape.
    """
    if weight.ndim == 3:
        return check_packed(op, name, weight, bias_name, bias, channels)
    check_dims(op, name, weight, dims)
    outputs = weight.shape[0]
    check_shape(op, name, weight, (outputs, channels), dims)
    check_shape(op, bias_name, bias, (outputs,), dims.split(",")[0])
    return outputs


def check_pair(op: str, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, channels: int) -> None:
    """Check two matrices from the channels to hidden ones and back, w1 (M, C), b1 (M), w2 (C, M), b2 (C).

    Raises:
        TypeError, ValueError: see :func:`check_matrix`; or one is packed and the other is not.
    """
    hidden = check_matrix(op, "w1", w1, "b1", b1, channels, "M, C")
    if w1.ndim != w2.ndim:
        raise ValueError(f"{op}: w1 and w2 must both be packed, or neither; got {tuple(w1.shape)}, {tuple(w2.shape)}")
    if check_matrix(op, "w2", w2, "b2", b2, hidden, "C, M") != channels:
        raise ValueError(f"{op}: w2 must have shape (C, M) = {(channels, hidden)}; got {tuple(w2.shape)}")


def as_multiplied(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` rounded as a weight of bfloat16 asks for."""
    return x.to(torch.bfloat16) if weight.dtype == torch.bfloat16 and x.dtype != torch.float64 else x
