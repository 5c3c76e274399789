"""The network for inference: batch norms folded into the convolutions, activations and residuals into their operators.

:func:`fuse` keeps the containers of :mod:`mobilemamba.layers` and replaces what is in them.
"""

import copy
from collections.abc import Iterable, Sequence
from functools import singledispatch
from typing import Any

from torch import Tensor, nn

from mobilemamba.layers import (
    FFN,
    Block,
    ConvBN,
    GlobalOp,
    Head,
    LocalOp,
    Mixer,
    PatchMerging,
    Residual,
    SqueezeExcite,
)
from mobilemamba.model import MobileMamba
from mobilemamba_kernels import (
    conv2d_act,
    depthwise_conv2d_act,
    feed_forward,
    fold_batch_norm,
    pointwise_conv2d_act,
    squeeze_excite,
    wavelet_depthwise_conv2d,
)


def fuse(model: MobileMamba) -> MobileMamba:
    """The same network for inference, as a copy: no batch norm, eval mode, parameters that take no gradient.

    It equals ``model`` in eval mode up to rounding and has the same methods. Two heads become one, the mean of them
    (paper, testing strategies: normalization layer fusion).

    Args:
        model: any :class:`MobileMamba`; it stays as it is.
    """
    model = copy.deepcopy(model)
    if model.fused:
        return model
    model.eval().requires_grad_(False)
    _fused(model)
    stem: Any = model.patch_embed
    for i in range(1, len(stem), 2):
        stem[i - 1].activation, stem[i] = "relu", nn.Identity()
    if isinstance(model.head, nn.Linear) and isinstance(model.head_dist, nn.Linear):
        for mean, other in zip(model.head.parameters(), model.head_dist.parameters(), strict=True):
            mean.copy_((mean + other) / 2)
    model.head_dist = None
    model.fused = True
    return model.requires_grad_(False)


class Conv(nn.Module):
    """``conv2d_act`` with its parameters, weight (O, C, k, k) and bias (O)."""

    def __init__(self, weight: Tensor, bias: Tensor, stride: int = 1, activation: str = "none") -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.stride, self.activation = stride, activation

    def forward(self, x: Tensor) -> Tensor:
        return conv2d_act(x, self.weight, self.bias, self.stride, activation=self.activation)


class Depthwise(nn.Module):
    """``depthwise_conv2d_act`` with its parameters, weight (C, 1, k, k) and bias (C); adds x if ``residual``."""

    def __init__(
        self, weight: Tensor, bias: Tensor, stride: int = 1, activation: str = "none", residual: bool = False
    ) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.stride, self.activation, self.residual = stride, activation, residual

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.residual else None
        return depthwise_conv2d_act(
            x, self.weight, self.bias, stride=self.stride, activation=self.activation, residual=residual
        )


class Pointwise(nn.Module):
    """``pointwise_conv2d_act`` with its parameters, weight (O, C) and bias (O)."""

    def __init__(self, weight: Tensor, bias: Tensor, activation: str = "none", input_activation: str = "none") -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.activation, self.input_activation = activation, input_activation

    def forward(self, x: Tensor | Sequence[Tensor], residual: Tensor | None = None) -> Tensor:
        return pointwise_conv2d_act(x, self.weight, self.bias, self.activation, residual, self.input_activation)


class FeedForward(nn.Module):
    """``feed_forward`` with its parameters, w1 (2C, C), b1 (2C), w2 (C, 2C), b2 (C); holds its residual."""

    def __init__(self, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
        super().__init__()
        self.w1, self.b1, self.w2, self.b2 = (nn.Parameter(t) for t in (w1, b1, w2, b2))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return feed_forward(x, self.w1, self.b1, self.w2, self.b2, residual=residual)


class FusedSqueezeExcite(nn.Module):
    """``squeeze_excite`` with its parameters, w1 (M, C), b1 (M), w2 (C, M), b2 (C)."""

    def __init__(self, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
        super().__init__()
        self.w1, self.b1, self.w2, self.b2 = (nn.Parameter(t) for t in (w1, b1, w2, b2))

    def forward(self, x: Tensor) -> Tensor:
        return squeeze_excite(x, self.w1, self.b1, self.w2, self.b2)


class FusedGlobalOp(nn.Module):
    """The global branch; ``base_scale`` is in the projection of ``atten``, the wavelet scale in ``weight``."""

    def __init__(self, atten: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.atten = atten
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return wavelet_depthwise_conv2d(x, self.weight, None, self.atten(x))


class FusedMixer(nn.Module):
    """MRFFI with its residual."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn: Any = attn

    def forward(self, x: Tensor) -> Tensor:
        return self.attn.proj(self.attn.branches(x), x)


class FusedBlock(nn.Module):
    """A block; the last of its layers adds its residual."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.dw0, self.ffn0, self.mixer, self.dw1, self.ffn1 = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn1(self.dw1(self.mixer(self.ffn0(self.dw0(x)))), x)


def _folded(conv: Any, bn: Any, scale: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Weight and bias of a Conv2d, then a BatchNorm2d, then a factor for each channel."""
    return fold_batch_norm(
        conv.weight, None, bn.running_mean, bn.running_var, bn.weight * scale, bn.bias * scale, bn.eps
    )


def _depthwise(layer: Any, activation: str = "none", residual: bool = False) -> Depthwise:
    return Depthwise(*_folded(layer.c, layer.bn), layer.c.stride[0], activation, residual)


def _pointwise(
    layer: Any, activation: str = "none", input_activation: str = "none", scale: Tensor | float = 1.0
) -> Pointwise:
    weight, bias = _folded(layer.c, layer.bn, scale)
    return Pointwise(weight.flatten(1), bias, activation, input_activation)


# Layers are Any below: their children become modules of other types.


@singledispatch
def _fused(module: nn.Module) -> nn.Module:
    """The inference counterpart of a layer; what has none is kept, with its children replaced."""
    for name, child in module.named_children():
        setattr(module, name, _fused(child))
    return module


@_fused.register(ConvBN)
def _(layer: Any) -> nn.Module:
    return Conv(*_folded(layer.c, layer.bn), layer.c.stride[0])


@_fused.register(Residual)
def _(layer: Any) -> nn.Module:
    m = layer.m
    if isinstance(m, FFN):
        (w1, b1), (w2, b2) = _folded(m.pw1.c, m.pw1.bn), _folded(m.pw2.c, m.pw2.bn)
        return FeedForward(w1.flatten(1), b1, w2.flatten(1), b2)
    if isinstance(m, Mixer):
        attn: Any = m.attn
        attn.proj = _pointwise(attn.proj[1], input_activation="relu")
        return FusedMixer(_fused(attn))
    return _depthwise(m, residual=True)


@_fused.register(PatchMerging)
def _(layer: Any) -> nn.Module:
    layer.conv1 = _pointwise(layer.conv1, "relu")
    layer.conv2 = _depthwise(layer.conv2, "relu")
    layer.conv3 = _pointwise(layer.conv3)
    layer.act = nn.Identity()
    layer.se = _fused(layer.se)
    return layer


@_fused.register(SqueezeExcite)
def _(layer: Any) -> nn.Module:
    return FusedSqueezeExcite(layer.fc1.weight.flatten(1), layer.fc1.bias, layer.fc2.weight.flatten(1), layer.fc2.bias)


@_fused.register(LocalOp)
def _(layer: Any) -> nn.Module:
    first = Depthwise(*_folded(layer.dwconv3x3, layer.bn1), activation="relu")
    return nn.Sequential(first, Depthwise(*_folded(layer.dwconv1x1, layer.bn2)))


@_fused.register(GlobalOp)
def _(layer: Any) -> nn.Module:
    atten = layer.global_atten
    atten.in_proj = _pointwise(atten.in_proj)
    atten.conv2d = Depthwise(atten.conv2d.weight, atten.conv2d.bias, activation="silu")
    atten.act = nn.Identity()
    atten.out_proj = _pointwise(atten.out_proj, scale=layer.base_scale.weight.flatten())
    if not layer.wavelet_convs:
        return atten
    scale = layer.wavelet_scale[0].weight.transpose(0, 1)  # (4g, 1, 1, 1)
    return FusedGlobalOp(atten, layer.wavelet_convs[0].weight * scale)


@_fused.register(Block)
def _(layer: Any) -> nn.Module:
    return FusedBlock(map(_fused, (layer.dw0, layer.ffn0, layer.mixer, layer.dw1, layer.ffn1)))


@_fused.register(Head)
def _(layer: Any) -> nn.Module:
    # Here the normalization comes first: l(factor · x + shift).
    bn, linear = layer.bn, layer.l
    factor = bn.weight.double() * (bn.running_var.double() + bn.eps).rsqrt()
    shift = bn.bias.double() - bn.running_mean.double() * factor
    linear.bias.copy_(linear.bias.double() + linear.weight.double() @ shift)
    linear.weight.copy_(linear.weight.double() * factor)
    return linear
