"""1×1 convolution: the product of ``_products.py``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mobilemamba_kernels.ops._convolutions import empty_image
from mobilemamba_kernels.ops.pack_weight import outputs_of, unpack_weight
from mobilemamba_kernels.triton._launch import Configuration, every_map, record
from mobilemamba_kernels.triton._products import multiply


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    input_activation: str,
    second: Tensor | None,
    third: Tensor | None,
) -> Tensor:
    maps = [t for t in (x, second, third) if t is not None]
    outputs = outputs_of(weight, bias)
    matrix = unpack_weight(weight, outputs, sum(t.shape[1] for t in maps))
    residuals = [] if residual is None else [residual]
    y = empty_image(x, outputs, *x.shape[2:])
    return multiply(maps, matrix, bias, activation, residuals, input_activation, y)


def configurations() -> Iterator[Configuration]:
    """The products of S6, with weights of the maps' dtype and of float32."""
    for parts, outputs, size, activation, input_activation, adds in (
        ((160,), 640, 14, "none", "none", False),
        ((320,), 160, 14, "none", "none", False),
        ((160, 32), 192, 14, "none", "relu", True),
        ((272, 76, 36), 384, 7, "none", "relu", True),
        ((192,), 768, 14, "relu", "none", False),
        ((1536,), 448, 4, "none", "none", False),
        ((448,), 1000, 1, "none", "none", False),
    ):
        for batch in (1, 256):
            for name, x in every_map(batch, max(sum(parts), outputs), size, size):
                second, third = (*(x[:, :part] for part in parts[1:]), None, None)[:2]
                for dtype in {x.dtype, torch.float32}:
                    weight = torch.empty(outputs, sum(parts), dtype=dtype, device="meta")
                    bias = torch.empty(outputs, device="meta")
                    first, residual = x[:, : parts[0]], x[:, :outputs] if adds else None
                    title = f"pointwise_conv2d_act-{name}-{'+'.join(map(str, parts))}to{outputs}"
                    yield from record(
                        f"{title}-{str(dtype).removeprefix('torch.')}",
                        forward, first, weight, bias, activation, residual, input_activation, second, third,
                    )  # fmt: skip
