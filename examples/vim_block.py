"""Vim: a sequence in both directions, each with weights of its own, without Vim's copy of mamba-ssm."""

import torch
import torch.nn.functional as F

import mobilemamba_kernels

mobilemamba_kernels.patch("vim")  # the one line; where Vim's mamba_ssm is installed its functions are replaced

from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn_no_out_proj  # noqa: E402

width, dim, N, rank = 192, 384, 16, 12


def weights() -> dict[str, torch.Tensor]:
    return {
        "conv1d_weight": torch.randn(dim, 1, 4) / 2,
        "conv1d_bias": torch.zeros(dim),
        "x_proj_weight": torch.randn(rank + 2 * N, dim) / dim**0.5,
        "delta_proj_weight": torch.randn(dim, rank) / rank**0.5,
        "A": -torch.arange(1.0, N + 1).repeat(dim, 1),
        "D": torch.ones(dim),
        "delta_bias": torch.full((dim,), -4.0),
    }


patches = torch.randn(1, 197, width)  # of an image at 224×224, and the class token
xz = F.linear(patches, torch.randn(2 * dim, width) / width**0.5).mT
forward = mamba_inner_fn_no_out_proj(xz, **weights(), delta_softplus=True)
backward = mamba_inner_fn_no_out_proj(xz.flip(-1), **weights(), delta_softplus=True).flip(-1)
out = F.linear((forward + backward).mT, torch.randn(width, dim) / dim**0.5)
print(f"Vim's block: {tuple(patches.shape)} to {tuple(out.shape)}")
