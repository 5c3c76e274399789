"""Checks that the operators share. Each failure is one sentence: constraint, value, remedy."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(op: str, required: dict[str, Tensor], optional: dict[str, Tensor | None] | None = None) -> None:
    """Check that every given tensor is real floating point and lies on the device of the first.

    Raises:
        TypeError: not a tensor, or not float16, bfloat16, float32 or float64.
        ValueError: tensors on different devices.
    """
    given = {name: tensor for name, tensor in (optional or {}).items() if tensor is not None}
    first_name, first = next(iter(required.items()))
    for name, tensor in (required | given).items():
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


def check_indices(op: str, name: str, index: Tensor, like: Tensor) -> None:
    """Check that ``index`` is a tensor of int32 or int64 on the device of ``like``.

    Raises:
        TypeError: no tensor, or of another dtype.
        ValueError: on another device.
    """
    if not isinstance(index, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor; got {type(index).__name__}")
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64; got {index.dtype}; convert it with {name}.int()")
    if index.device != like.device:
        raise ValueError(f"{op}: {name} is on {index.device} but x is on {like.device}; move both to one device")


def check_changeable(op: str, name: str, tensor: Tensor) -> None:
    """Check that ``tensor``, which is changed in place, is not expanded.

    Raises:
        ValueError: several of its elements are one in memory.
    """
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ValueError(
            f"{op}: {name} is expanded (strides {tuple(tensor.stride())}), so it cannot be changed in place; "
            f"call {name}.clone() first"
        )


def check_rows(op: str, name: str, index: Tensor | None, rows: int) -> None:
    """Check that ``index`` names rows that exist; a GPU's is not looked at, which would wait for it.

    Raises:
        ValueError: a value is not below ``rows``.
    """
    if index is None or not index.numel() or index.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if (most := int(index.max())) >= rows:
        raise ValueError(f"{op}: {name} must be below {rows}, the number of rows; got {most}")


def check_integer(op: str, name: str, value: int, least: int) -> None:
    """Check that ``value`` is an integer, at least ``least``.

    Raises:
        TypeError: no integer.
        ValueError: too small, or too large for any tensor.
    """
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an integer; got {value!r}")
    if not least <= value < 2**31:
        raise ValueError(f"{op}: {name} must be at least {least} and below 2³¹; got {value}")


def check_window(op: str, x: Tensor, k: int, stride: int, padding: int) -> None:
    """Check that k×k filters at that stride fit into the maps ``x``, padded.

    Raises:
        TypeError: stride or padding is no integer.
        ValueError: they do not fit.
    """
    check_integer(op, "k", k, 1)
    check_integer(op, "stride", stride, 1)
    check_integer(op, "padding", padding, 0)
    height, width = x.shape[2:]
    if height + 2 * padding < k or width + 2 * padding < k:
        raise ValueError(f"{op}: the padded input must be at least {k}×{k}; got {height}×{width}, padding {padding}")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an operator computes in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_OptionalTensor = TypeVar("_OptionalTensor", Tensor, Tensor | None)


def autocast(tensor: _OptionalTensor) -> _OptionalTensor:
    """Cast to autocast's dtype where autocast is on for the tensor's device, as PyTorch's convolutions do."""
    if tensor is None or tensor.dtype == torch.float64:
        return tensor
    device = tensor.device.type
    # torch.compile cannot trace is_autocast_available before torch 2.13, and has no device without autocast.
    if not (torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)):
        return tensor
    if not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))
