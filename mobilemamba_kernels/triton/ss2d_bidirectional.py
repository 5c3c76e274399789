"""MobileMamba's SS2D between its convolution and its output projection.

The projection to dt_low, B and C is a matrix product of PyTorch's, with float32 results. The scan (_scan) then forms Δ
in registers from dt_low, and sums both directions; a last kernel normalizes over the channels and gates. What passes
through memory is x twice (three times where the product needs it in float32), z, the sum in float32 out and back in,
and the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilemamba_kernels.triton._launch import Configuration, blocks, every_map, index_type, launch, record
from mobilemamba_kernels.triton._scan import Scan, load, run_forward, silu, strides


@triton.jit
def normalize_kernel(
    y,
    z,
    weight,
    bias,
    out,
    channels,
    length,
    eps,
    y_b,
    y_c,
    y_l,
    z_b,
    z_c,
    z_l,
    out_b,
    out_c,
    out_l,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    INDEX: tl.constexpr,
):
    """LayerNorm over all channels of some positions, times SiLU(z)."""
    per_image = tl.cdiv(length, BLOCK_L)
    batch = (tl.program_id(0) // per_image).to(INDEX)
    t = (tl.program_id(0) % per_image * BLOCK_L + tl.arange(0, BLOCK_L)[None, :]).to(INDEX)
    c = tl.arange(0, BLOCK_C)[:, None].to(INDEX)
    c_exists = c < channels
    exists = c_exists & (t < length)
    value = load(y + batch * y_b + c * y_c + t * y_l, exists)
    mean = tl.sum(value, 0, keep_dims=True) / channels
    centred = tl.where(c_exists, value - mean, 0.0)
    variance = tl.sum(centred * centred, 0, keep_dims=True) / channels
    value = centred * tl.rsqrt(variance + eps) * load(weight + c, c_exists) + load(bias + c, c_exists)
    if z is not None:
        value *= silu(load(z + batch * z_b + c * z_c + t * z_l, exists))
    tl.store(out + batch * out_b + c * out_c + t * out_l, value, mask=exists)


def _normalize_config(channels: int) -> tuple[int, int, int]:
    """Channels and positions of a tile, and warps: 16 elements a thread as long as there are threads."""
    block_c = triton.next_power_of_2(channels)
    block_l = min(max(8192 // block_c, 1), 32)
    return block_c, block_l, min(max(block_c * block_l // 512, 1), 16)


def _normalize(y: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> None:
    """y, z and out (batch, channels, L)."""
    batch, channels, length = y.shape
    block_c, block_l, warps = _normalize_config(channels)
    launch(
        normalize_kernel,
        batch * blocks(length, block_l),
        y,
        z,
        weight.contiguous(),
        bias.contiguous(),
        out,
        channels,
        length,
        eps,
        *y.stride(),
        *strides(z),
        *out.stride(),
        BLOCK_C=block_c,
        BLOCK_L=block_l,
        INDEX=index_type(y, z, out),
        num_warps=warps,
    )


def _project(weight: Tensor, u: Tensor) -> Tensor:
    """weight (features, d) · u (batch, d, L) in float32; in 16 bits where both have the same, as only GPUs can."""
    tokens = u.transpose(1, 2)
    if weight.dtype == u.dtype != torch.float32 and tokens.is_contiguous() and u.device.type != "cpu":
        rows = torch.mm(tokens.flatten(0, 1), weight.t(), out_dtype=torch.float32)
        return rows.unflatten(0, tokens.shape[:2]).transpose(1, 2)
    return torch.matmul(weight.float(), u.float())


def forward(
    x: Tensor,
    z: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """The kernels of ``mobilemamba::ss2d_bidirectional_fwd``."""
    out = torch.empty_like(x)
    if not x.numel():
        return out
    u = x.flatten(2)  # a copy where rows and columns are not one dimension of positions
    rank, state = dt_proj_weight.shape[2], A_log.shape[2]
    projected = _project(x_proj_weight.flatten(0, 1), u).unflatten(1, (2, -1))
    dt_low, B, C = projected.split((rank, state, state), dim=2)
    scan = Scan(
        u.unsqueeze(1).expand(-1, 2, -1, -1),
        dt_low,
        A_log.contiguous(),
        B,
        C,
        D.contiguous(),
        None,
        dt_proj_bias.contiguous(),
        softplus=True,
        shared=True,
        weight=dt_proj_weight.contiguous(),
    )
    y = torch.empty_like(u, dtype=torch.float32)
    run_forward(scan, y)
    result = out.flatten(2)  # of x's layout, hence a view or a copy as u is
    _normalize(y, None if z is None else z.flatten(2), norm_weight, norm_bias, eps, result)
    return out if result.data_ptr() == out.data_ptr() else out.copy_(result.view(out.shape))


def configurations() -> Iterator[Configuration]:
    """What the launchers choose for the maps of the network, dtypes and layouts."""
    for channels, side, rank in ((320, 14, 10), (544, 7, 17), (320, 28, 10), (320, 64, 10)):
        for name, x in every_map(16, channels, side, side):
            shapes = (2, rank + 2, channels), (2, channels, rank), (2, channels), (2, channels, 1), (2, channels)
            parameters = (x.new_empty(shape, dtype=torch.float32) for shape in (*shapes, (channels,), (channels,)))
            given: list[Any] = [x, x, *parameters, 1e-5]
            yield from record(f"ss2d_bidirectional-{name}", partial(forward, *given))
