"""The layers of MobileMamba (arXiv 2411.15941), under the names of its published checkpoints.

A map is (batch, channels, height, width) in channels-first or channels-last memory; every layer keeps which.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilemamba_kernels import selective_scan_fn, ss2d_bidirectional, wavelet_depthwise_conv2d


class ConvBN(nn.Module):
    """Convolution without bias, then batch normalization: (B, in, H, W) → (B, out, ⌈H/stride⌉, ⌈W/stride⌉)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        scale: float = 1,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.c = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.constant_(self.bn.weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))


class Residual(nn.Module):
    """x + m(x)."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


class DropPath(nn.Module):
    """Stochastic depth: in training, zeroes whole samples with probability ``rate`` and scales up the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep).div_(keep)


class Scale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, channels: int, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, channels, 1, 1), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.to(x.dtype)  # under autocast a float32 factor would make the map float32


class FFN(nn.Module):
    """Pointwise convolutions to twice the channels and back, with a ReLU between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pw1 = ConvBN(channels, 2 * channels)
        self.act = nn.ReLU()
        self.pw2 = ConvBN(2 * channels, channels, scale=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(self.act(self.pw1(x)))


class SqueezeExcite(nn.Module):
    """Weighs each channel by a function of all channels' means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(8, (channels // 4 + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class PatchMerging(nn.Module):
    """Halves the resolution through an inverted bottleneck: (B, in, H, W) → (B, out, ⌈H/2⌉, ⌈W/2⌉)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        hidden = 4 * in_channels
        self.conv1 = ConvBN(in_channels, hidden)
        self.conv2 = ConvBN(hidden, hidden, 3, stride=2, groups=hidden)
        self.act = nn.ReLU()
        self.se = SqueezeExcite(hidden)
        self.conv3 = ConvBN(hidden, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.se(self.act(self.conv2(self.act(self.conv1(x))))))


class LocalOp(nn.Module):
    """The local branch: one depthwise convolution and a scaling of each channel."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        # Published checkpoints call it 3x3 whatever its size.
        self.dwconv3x3 = nn.Conv2d(channels, channels, kernel_size, padding="same", groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.dwconv1x1 = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.dwconv1x1(F.relu(self.bn1(self.dwconv3x3(x)))))


class LocalGroups(nn.Module):
    """The local branch with kernels 3, 5, … on equal groups of the channels (the last takes the rest)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.split = [channels // groups] * (groups - 1) + [channels - channels // groups * (groups - 1)]
        self.parts = nn.ModuleList(LocalOp(size, 2 * j + 3) for j, size in enumerate(self.split))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(group) for part, group in zip(self.parts, x.split(self.split, 1), strict=True)], 1)


class SS2D(nn.Module):
    """Selective scan over the positions of a map, K directions added up, between two projections (paper section 3.2).

    The second half of ``in_proj`` gates the result through a SiLU.
    """

    def __init__(self, channels: int, ssm_ratio: float, d_state: int, directions: int) -> None:
        super().__init__()
        d, k, rank = int(ssm_ratio * channels), directions, math.ceil(channels / 16)
        self.directions, self.dt_rank, self.d_state = directions, rank, d_state
        self.x_proj_weight = nn.Parameter(torch.empty(k, rank + 2 * d_state, d).uniform_(-1, 1) / math.sqrt(d))
        self.Ds = nn.Parameter(torch.ones(k * d))
        self.A_logs = nn.Parameter(torch.zeros(k * d, d_state))
        self.dt_projs_weight = nn.Parameter(torch.empty(k, d, rank).uniform_(0, 0.1))
        self.dt_projs_bias = nn.Parameter(torch.empty(k, d).uniform_(0, 0.1))
        self.out_norm = nn.LayerNorm(d)
        self.in_proj = ConvBN(channels, 2 * d)
        self.conv2d = nn.Conv2d(d, d, 3, padding=1, groups=d)
        self.act = nn.SiLU()
        self.out_proj = ConvBN(d, channels)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, 1)
        x = self.act(self.conv2d(x))
        return self.out_proj(self.scan_pair(x, z) if self.directions == 2 else self.scan_any(x, z))

    def scan_pair(self, x: Tensor, z: Tensor) -> Tensor:
        """The published network's scan, row-major and back: x, z (B, d, H, W) → (B, d, H, W)."""
        return ss2d_bidirectional(
            x,
            z,
            self.x_proj_weight,
            self.dt_projs_weight,
            self.dt_projs_bias,
            self.A_logs.unflatten(0, (2, -1)),
            self.Ds.unflatten(0, (2, -1)),
            self.out_norm.weight,
            self.out_norm.bias,
            self.out_norm.eps,
        )

    def scan_any(self, x: Tensor, z: Tensor) -> Tensor:
        """The ablations' scans, of 1 or 4 directions: x, z (B, d, H, W) → (B, d, H, W)."""
        sequences = x.flatten(2)[:, None]  # (B, K, d, L) in the end
        if self.directions == 4:
            sequences = torch.cat([sequences, x.mT.flatten(2)[:, None]], 1)
            sequences = torch.cat([sequences, sequences.flip(-1)], 1)
        projected = torch.einsum("bkdl,kcd->bkcl", sequences, self.x_proj_weight)
        dt_low, b, c = projected.split([self.dt_rank, self.d_state, self.d_state], 2)
        delta = torch.einsum("bkrl,kdr->bkdl", dt_low, self.dt_projs_weight)
        y: Tensor = selective_scan_fn(  # type: ignore[assignment]
            sequences.flatten(1, 2),
            delta.flatten(1, 2),
            -self.A_logs.exp(),
            b,
            c,
            D=self.Ds,
            delta_bias=self.dt_projs_bias.flatten(),
            delta_softplus=True,
        )
        y = y.unflatten(1, (self.directions, -1))
        if self.directions == 4:
            y = y[:, :2] + y[:, 2:].flip(-1)
            rows, columns = y.unbind(1)
            y = rows + columns.unflatten(-1, x.mT.shape[2:]).mT.flatten(2)
        else:
            y = y[:, 0]
        y = self.out_norm(y.mT).mT.reshape_as(x)
        return y.to(x.dtype) * F.silu(z)


def haar_filters(channels: int) -> Tensor:
    """The four 2×2 Haar filters, low-pass first, for each channel: (4 · channels, 1, 2, 2)."""
    bands = torch.tensor([[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]) / 2
    return bands[:, None].repeat(channels, 1, 1, 1)


class GlobalOp(nn.Module):
    """The global branch: selective scan plus a depthwise convolution in the wavelet domain (paper section 3.2)."""

    def __init__(
        self, channels: int, kernel_size: int, ssm_ratio: float, d_state: int, directions: int, wavelet: bool
    ) -> None:
        super().__init__()
        if wavelet:
            # Constants that the operator has built in; here because published checkpoints and counts hold them.
            self.wt_filter = nn.Parameter(haar_filters(channels), requires_grad=False)
            self.iwt_filter = nn.Parameter(haar_filters(channels), requires_grad=False)
        self.global_atten = SS2D(channels, ssm_ratio, d_state, directions)
        self.base_scale = Scale(channels, 1.0)
        # Lists of one level, or of none.
        levels, bands = int(wavelet), 4 * channels
        self.wavelet_convs = nn.ModuleList(
            nn.Conv2d(bands, bands, kernel_size, padding="same", groups=bands, bias=False) for _ in range(levels)
        )
        self.wavelet_scale = nn.ModuleList(Scale(bands, 0.1) for _ in range(levels))

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_scale(self.global_atten(x))
        if not self.wavelet_convs:
            return base
        conv: Any = self.wavelet_convs[0]
        scale: Any = self.wavelet_scale[0]
        return wavelet_depthwise_conv2d(x, conv.weight, scale.weight, base)


class MRFFI(nn.Module):
    """Multi-receptive field feature interaction: global, local and identity branches on a split of the channels.

    Section 3.2 of the paper.
    """

    def __init__(self, split: tuple[int, int, int], global_op: nn.Module | None, local_op: nn.Module | None) -> None:
        super().__init__()
        self.split = split
        self.local_op = local_op
        self.global_op = global_op
        self.proj = nn.Sequential(nn.ReLU(), ConvBN(sum(split), sum(split), scale=0))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat(self.branches(x), 1))

    def branches(self, x: Tensor) -> list[Tensor]:
        """The branches' results, those of them that have channels: (B, C, H, W) → three maps of C channels in all."""
        wide, narrow, rest = x.split(self.split, 1)
        if self.global_op is not None:
            wide = self.global_op(wide)
        if self.local_op is not None:
            narrow = self.local_op(narrow)
        return [part for part in (wide, narrow, rest) if part.shape[1]]


class Mixer(nn.Module):
    """Holds MRFFI under the checkpoints' name."""

    def __init__(self, attn: MRFFI) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


def depthwise_pair(channels: int, scale: float) -> tuple[Residual, Residual]:
    """A depthwise 3×3 convolution and a feed-forward layer, each with its residual."""
    return Residual(ConvBN(channels, channels, 3, groups=channels, scale=scale)), Residual(FFN(channels))


class Block(nn.Module):
    """x + drop_path(ffn1(dw1(mixer(ffn0(dw0(x)))))), every one of the five with a residual of its own."""

    def __init__(self, attn: MRFFI, channels: int, drop_path_rate: float) -> None:
        super().__init__()
        self.dw0, self.ffn0 = depthwise_pair(channels, scale=0)
        self.mixer = Residual(Mixer(attn))
        self.dw1, self.ffn1 = depthwise_pair(channels, scale=0)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.ffn1(self.dw1(self.mixer(self.ffn0(self.dw0(x))))))


class Head(nn.Module):
    """Batch normalization and the classifier: (B, C) → (B, num_classes)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(channels)
        self.l = nn.Linear(channels, num_classes)
        nn.init.trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.bn(x))
