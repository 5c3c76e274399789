"""Checks that the operators share. Each failure is one sentence: constraint, value, remedy."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """Check that every given tensor is real floating point and lies on the device of the first.

    Raises:
        TypeError: not a tensor, or not float16, bfloat16, float32 or float64.
        ValueError: tensors on different devices.
    """
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor is None and tensor is not first:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{op}: {name} must be float16, bfloat16, float32 or float64; got {tensor.dtype}; "
                f"convert it, for example with {name}.float()"
            )
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be a dense tensor; got {tensor.layout}; call {name}.to_dense()")
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but {first_name} is on {first.device}; move both to one device"
            )


def check_dims(op: str, name: str, tensor: Tensor | None, dims: str) -> None:
    """Check the rank of ``tensor`` against ``dims``, a comma-separated list of the names of its dimensions.

    Raises:
        TypeError: None, where a tensor is required.
        ValueError: another rank.
    """
    if tensor is None:
        raise TypeError(f"{op}: {name} must be a tensor; got NoneType")
    if tensor.ndim != dims.count(",") + 1:
        raise ValueError(f"{op}: {name} must have shape ({dims}); got {tuple(tensor.shape)}")


def check_shape(op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...], dims: str) -> None:
    """Check the shape of ``tensor``, when given; ``dims`` names the dimensions.

    Raises:
        ValueError: another shape.
    """
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape ({dims}) = {shape}; got {tuple(tensor.shape)}")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an operator computes in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast to autocast's dtype where autocast is on for the device of the first, as PyTorch's convolutions do."""
    device = tensors[0].device.type  # type: ignore[union-attr]
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
