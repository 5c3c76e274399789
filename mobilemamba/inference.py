"""The network for inference: batch norms folded into the convolutions, activations and residuals into their operators.

:func:`fuse` keeps the containers of :mod:`mobilemamba.layers` and replaces what is in them.
"""

import copy
from collections.abc import Iterable, Sequence
from functools import singledispatch
from typing import Any, TypeGuard

from torch import Tensor, nn

from mobilemamba.layers import (
    FFN,
    MRFFI,
    SS2D,
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
    (paper, testing strategies: normalization layer fusion). Layers that were replaced by others are kept.

    Args:
        model: any :class:`MobileMamba`; it stays as it is.

    Raises:
        TypeError: a convolution or batch norm was replaced by what cannot be folded.
    """
    model = copy.deepcopy(model)
    if model.fused:
        return model
    model.eval().requires_grad_(False)
    stem: Any = model.patch_embed
    relus = [i for i in range(1, len(stem)) if runs_as(stem[i], nn.ReLU) and runs_as(stem[i - 1], ConvBN)]
    rewrite(_fused, model)
    for i in relus:
        stem[i - 1].activation, stem[i] = "relu", nn.Identity()
    head, other = model.head, model.head_dist
    if runs_as(head, nn.Linear) and runs_as(other, nn.Linear) and head.bias is not None and other.bias is not None:
        model.head = _linear((head.weight + other.weight) / 2, (head.bias + other.bias) / 2)
        model.head_dist = None
    model.fused = True
    return model.requires_grad_(False)


def runs_as(module: Any, kind: type[nn.Module]) -> TypeGuard[Any]:
    """Whether a module computes what ``kind`` does: a subclass may have a forward of its own, as may an instance."""
    return isinstance(module, kind) and type(module).forward is kind.forward and "forward" not in vars(module)


def rewrite(rules: Any, module: nn.Module, *args: Any) -> nn.Module:
    """The counterpart that ``rules``, a ``singledispatch`` function, have for what a module computes."""
    kind = next(k for k in type(module).__mro__ if k in rules.registry)
    return rules.registry[kind if kind is object or runs_as(module, kind) else object](module, *args)


class Conv(nn.Module):
    """``conv2d_act`` with its parameters, weight (O, C, k, k) and bias (O)."""

    def __init__(self, weight: Tensor, bias: Tensor, stride: int = 1, activation: str = "none") -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.stride, self.activation = stride, activation

    def forward(self, x: Tensor) -> Tensor:
        return conv2d_act(x, self.weight, self.bias, self.stride, activation=self.activation)


class Depthwise(nn.Module):
    """``depthwise_conv2d_act`` with its parameters, weight (C, 1, k, k) and vectors (C); adds x if ``residual``."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        stride: int = 1,
        activation: str = "none",
        residual: bool = False,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.scale, self.shift = (None if vector is None else nn.Parameter(vector) for vector in (scale, shift))
        self.stride, self.activation, self.residual = stride, activation, residual

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.residual else None
        return depthwise_conv2d_act(
            x, self.weight, self.bias, self.stride,
            activation=self.activation, residual=residual, scale=self.scale, shift=self.shift,
        )  # fmt: skip


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


def _folded(conv: Any, bn: Any, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a Conv2d, then a batch norm, then a factor for each channel."""
    normalizes = isinstance(bn, nn.SyncBatchNorm) or runs_as(bn, nn.BatchNorm2d)
    if not (_is_plain(conv) and normalizes and bn.running_mean is not None):
        raise TypeError(
            f"{conv} and {bn} cannot be fused: it takes a Conv2d, padded by half its size, and a BatchNorm2d with "
            "running statistics; use the network as it is"
        )
    weight, bias = fold_batch_norm(conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
    return (weight, bias) if scale is None else (weight * scale.view(-1, 1, 1, 1), bias * scale)


def _is_plain(conv: Any) -> bool:
    """Whether a convolution is one that the operators compute: of square filters that keep the size."""
    if not runs_as(conv, nn.Conv2d):
        return False
    k, stride = conv.kernel_size[0], conv.stride[0]
    plain = conv.kernel_size == (k, k) and conv.stride == (stride, stride) and conv.dilation == (1, 1)
    return plain and conv.padding in ("same", (k // 2, k // 2)) and conv.padding_mode == "zeros"


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
    return linear


def _depthwise(layer: Any, activation: str = "none", residual: bool = False) -> Depthwise:
    return Depthwise(*_folded(layer.c, layer.bn), layer.c.stride[0], activation, residual)


def _pointwise(
    layer: Any, activation: str = "none", input_activation: str = "none", scale: Tensor | None = None
) -> Pointwise:
    weight, bias = _folded(layer.c, layer.bn, scale)
    return Pointwise(weight.flatten(1), bias, activation, input_activation)


# Layers are Any below: their children become modules of other types.


@singledispatch
def _fused(module: nn.Module) -> nn.Module:
    """The inference counterpart of a layer; what has none is kept, with its children replaced."""
    for name, child in module.named_children():
        setattr(module, name, rewrite(_fused, child))
    return module


def _kept(module: nn.Module) -> nn.Module:
    return _fused.registry[object](module)


@_fused.register(ConvBN)
def _(layer: Any) -> nn.Module:
    conv = layer.c
    if isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels == conv.out_channels > 1:
        return _depthwise(layer)
    return Conv(*_folded(conv, layer.bn), conv.stride[0])


@_fused.register(Residual)
def _(layer: Any) -> nn.Module:
    m = layer.m
    if runs_as(m, FFN) and runs_as(m.act, nn.ReLU):
        (w1, b1), (w2, b2) = _folded(m.pw1.c, m.pw1.bn), _folded(m.pw2.c, m.pw2.bn)
        return FeedForward(w1.flatten(1), b1, w2.flatten(1), b2)
    if runs_as(m, Mixer) and runs_as(m.attn, MRFFI) and runs_as(m.attn.proj[0], nn.ReLU):
        attn: Any = m.attn
        attn.proj = _pointwise(attn.proj[1], input_activation="relu")
        return FusedMixer(_fused(attn))
    return _depthwise(m, residual=True) if runs_as(m, ConvBN) else _kept(layer)


@_fused.register(PatchMerging)
def _(layer: Any) -> nn.Module:
    if not runs_as(layer.act, nn.ReLU):
        return _kept(layer)
    layer.conv1 = _pointwise(layer.conv1, "relu")
    layer.conv2 = _depthwise(layer.conv2, "relu")
    layer.conv3 = _pointwise(layer.conv3)
    layer.act = nn.Identity()
    layer.se = rewrite(_fused, layer.se)
    return layer


@_fused.register(SqueezeExcite)
def _(layer: Any) -> nn.Module:
    if not (runs_as(layer.fc1, nn.Conv2d) and runs_as(layer.fc2, nn.Conv2d)):
        return layer
    return FusedSqueezeExcite(layer.fc1.weight.flatten(1), layer.fc1.bias, layer.fc2.weight.flatten(1), layer.fc2.bias)


@_fused.register(LocalOp)
def _(layer: Any) -> nn.Module:
    weight, bias = _folded(layer.dwconv3x3, layer.bn1)
    scale, shift = _folded(layer.dwconv1x1, layer.bn2)
    if scale.shape[1:].numel() == 1:
        return Depthwise(weight, bias, activation="relu", scale=scale.flatten(), shift=shift)
    return nn.Sequential(Depthwise(weight, bias, activation="relu"), Depthwise(scale, shift))


@_fused.register(GlobalOp)
def _(layer: Any) -> nn.Module:
    atten = layer.global_atten
    plain = all(map(_is_plain, (atten.conv2d, *layer.wavelet_convs)))
    if not (runs_as(atten, SS2D) and runs_as(atten.act, nn.SiLU) and plain):
        return _kept(layer)
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
    _kept(layer)
    if not isinstance(layer.ffn1, FeedForward):
        return layer
    return FusedBlock((layer.dw0, layer.ffn0, layer.mixer, layer.dw1, layer.ffn1))


@_fused.register(Head)
def _(layer: Any) -> nn.Module:
    bn, linear = layer.bn, layer.l
    if not (runs_as(bn, nn.BatchNorm1d) and runs_as(linear, nn.Linear) and bn.affine and bn.running_mean is not None):
        return layer
    # Here the normalization comes first: l(factor · x + shift).
    factor = bn.weight.double() * (bn.running_var.double() + bn.eps).rsqrt()
    shift = bn.bias.double() - bn.running_mean.double() * factor
    weight, dtype = linear.weight.double(), linear.weight.dtype
    bias = weight @ shift + (0 if linear.bias is None else linear.bias.double())
    return _linear((weight * factor).to(dtype), bias.to(dtype))
