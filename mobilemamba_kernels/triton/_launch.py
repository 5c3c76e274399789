"""How kernels are launched, and how those that can be launched are listed to be compiled ahead of time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Configuration = tuple[str, Any, dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]], dict[str, int]]
"""Name, kernel, types of its arguments, constants, multiples of 16, options: what a compiler needs of one launch."""

_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_INDICES = {torch.int32: "*i32", torch.int64: "*i64"}
_INDEX_LIMIT = 2**31 - 2**16  # of 32-bit indices: a tile may reach beyond the end by less than 2^16

ALL_REGISTERS = 255
"""Of a thread. Left alone the compiler spills some where one program more would nearly fit on a multiprocessor."""

compiled_for = 90
"""The architecture of the launches that :func:`record` lists."""

_recorded: list[tuple[Any, dict[str, Any], dict[str, int]]] | None = None


def launch(
    kernel: Any,
    programs: int,
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 3,
    maxnreg: int | None = None,
    **constants: Any,
) -> None:
    """Run ``kernel`` on the device of its first tensor; not at all for no programs.

    Args:
        num_warps: of a program.
        num_stages: tiles of factors that are on their way or in use, in a loop of products.
        maxnreg: most registers of a thread; None leaves them to the compiler.
    """
    if not programs:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages} | ({} if maxnreg is None else {"maxnreg": maxnreg})
    if _recorded is not None:
        _recorded.append((kernel, dict(zip(kernel.arg_names, arguments, strict=False)) | constants, options))
        return
    first = next(a for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **options, **constants)


def record(name: str, function: Callable[..., Any], *arguments: Any) -> Iterator[Configuration]:
    """What ``function`` would launch for these arguments, tensors of the device "meta"."""
    global _recorded
    _recorded = []
    try:
        function(*arguments)
        launches = _recorded
    finally:
        _recorded = None
    for i, (kernel, given, options) in enumerate(launches):
        signature, constants, multiples = {}, {}, {}
        for j, parameter in enumerate(kernel.params):
            value = given[parameter.name]
            if isinstance(value, Tensor):
                signature[parameter.name] = (_TYPES | _INDICES)[value.dtype]
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            elif parameter.is_constexpr or value is None or value == 1:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            else:
                signature[parameter.name] = "i32" if value < 2**31 else "i64"
            # As Triton's own launcher finds: PyTorch's memory begins at such addresses.
            if isinstance(value, Tensor) or (signature[parameter.name] in ("i32", "i64") and value % 16 == 0):
                multiples[(j,)] = [["tt.divisibility", 16]]
        yield f"{name}-{i}-{kernel.fn.__name__}", kernel, signature, constants, multiples, options


def index_type(*tensors: Tensor | None) -> tl.dtype:
    """The integers that count the elements of ``tensors`` and reach every one of them."""
    for t in tensors:
        if t is not None and t.numel():
            reach = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
            if max(reach, t.numel()) >= _INDEX_LIMIT:
                return tl.int64
    return tl.int32


def strides_of(t: Tensor | None, rank: int = 4) -> tuple[int, ...]:
    """Strides in elements; zeros for an absent tensor."""
    return (0,) * rank if t is None else t.stride()


def channels_inside(x: Tensor) -> bool:
    """Whether neighbours in memory are channels, dimension 1, rather than columns, the last one."""
    return x.stride(1) < x.stride(-1) or x.shape[-1] == 1


def architecture(device: torch.device) -> int:
    """10 times the compute capability; where there is no GPU, what is compiled for."""
    if device.type != "cuda":
        return compiled_for
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have."""
    if device.type != "cuda":
        return 166912 if compiled_for == 80 else 232448
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def blocks(size: int, block: int) -> int:
    """How many blocks hold ``size``."""
    return triton.cdiv(size, block)


def every_map(*shape: int) -> Iterator[tuple[str, Tensor]]:
    """A map (batch, C, H, W) of each dtype and layout, without memory, for :func:`record`."""
    for dtype in _TYPES:
        for layout in ("channels_first", "channels_last"):
            memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
            x = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
            yield f"{'x'.join(map(str, shape))}-{str(dtype).removeprefix('torch.')}-{layout}", x
