"""The network as fast as a CPU runs it: the fused one with its weights in the kernels' order.

:func:`optimize_for_inference` replaces the layers of :func:`mobilemamba.fuse` by those below. Each calls one operator
below the public functions, whose checks take as long as an operator on one image: the layers' shapes are the network's.
"""

import copy
from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from mobilemamba.inference import (
    Conv,
    Depthwise,
    FeedForward,
    FusedGlobalOp,
    FusedSqueezeExcite,
    Pointwise,
    fuse,
    rewrite,
    runs_as,
)
from mobilemamba.layers import SS2D
from mobilemamba.model import MobileMamba
from mobilemamba_kernels import pack_weight

_conv2d_act = torch.ops.mobilemamba.conv2d_act_fwd.default
_depthwise_conv2d_act = torch.ops.mobilemamba.depthwise_conv2d_act_fwd.default
_pointwise_conv2d_act = torch.ops.mobilemamba.pointwise_conv2d_act_fwd.default
_feed_forward = torch.ops.mobilemamba.feed_forward_fwd.default
_squeeze_excite = torch.ops.mobilemamba.squeeze_excite_fwd.default
_ss2d_bidirectional = torch.ops.mobilemamba.ss2d_bidirectional_fwd.default
_wavelet_depthwise_conv2d = torch.ops.mobilemamba.wavelet_depthwise_conv2d_fwd.default


@torch.inference_mode(False)  # inference tensors could not be called where gradients are recorded
def optimize_for_inference(model: MobileMamba, dtype: torch.dtype = torch.float32) -> MobileMamba:
    """The same network as fast as a CPU runs it, as a copy, in eval mode.

    It equals ``model`` in eval mode up to rounding and has the same methods; ``torch.compile`` and ``torch.export``
    capture it. Images may be of any floating-point type and in any layout, as results are float32 and channels-last;
    about a million pixels are computed at a time, a larger batch in parts. It stays on the CPU, in its type, and with
    its head.

    Args:
        model: any :class:`MobileMamba`, fused or not; it stays as it is.
        dtype: of what is multiplied in matrix products: float32; or bfloat16, which is faster where the processor
            multiplies it and halves the weights' memory. All else is float32 in both, the sums of the products too
            (but for AMX, where the vendor's library multiplies and rounds them to bfloat16).

    Raises:
        TypeError: ``dtype`` is another, ``model`` no MobileMamba, or one that :func:`mobilemamba.fuse` refuses.
        ValueError: ``model`` is optimized already, or not on the CPU.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if not isinstance(model, MobileMamba):
        raise TypeError(f"the network must be a MobileMamba, but is a {type(model).__name__}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"dtype must be torch.float32 or torch.bfloat16, but is {dtype!r}")
    if model.optimized:
        raise ValueError("the network is optimized already: optimize the one that it was made from")
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ValueError(
            f"the network must be on the CPU to be optimized for it, but is on {device}: move a copy there"
        )
    model = fuse(copy.deepcopy(model).double()).float()
    rewrite(_optimized, model, dtype)
    for name in ("head", "head_dist"):
        head = getattr(model, name)
        if runs_as(head, nn.Linear):
            setattr(model, name, Classifier(head, dtype))
    model.optimized = True
    return model.requires_grad_(False)


class _Packed(nn.Module):
    """An operator with packed weights. ``macs``: its multiply-adds a position."""

    def __init__(self, dtype: torch.dtype, weights: dict[str, Tensor], biases: dict[str, Tensor]) -> None:
        super().__init__()
        self.macs = sum(weight.numel() for weight in weights.values())
        for name, weight in weights.items():
            setattr(self, name, nn.Parameter(pack_weight(weight, dtype)))
        for name, bias in biases.items():
            setattr(self, name, nn.Parameter(bias))


class PackedConv(_Packed):
    """:class:`Conv` with a packed weight."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: Conv, dtype: torch.dtype) -> None:
        super().__init__(dtype, {"weight": conv.weight}, {"bias": conv.bias})
        self.stride, self.padding, self.activation = conv.stride, conv.weight.shape[-1] // 2, conv.activation

    def forward(self, x: Tensor) -> Tensor:
        return _conv2d_act(x, self.weight, self.bias, self.stride, self.padding, self.activation)


class PackedPointwise(_Packed):
    """:class:`Pointwise` with a packed weight."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: Pointwise | nn.Linear, dtype: torch.dtype) -> None:
        bias = layer.weight.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias
        super().__init__(dtype, {"weight": layer.weight}, {"bias": bias})
        self.activation = getattr(layer, "activation", "none")
        self.input_activation = getattr(layer, "input_activation", "none")

    def forward(self, x: Tensor | Sequence[Tensor], residual: Tensor | None = None) -> Tensor:
        first, second, third = (x, None, None) if isinstance(x, Tensor) else (*x, None, None)[:3]
        return _pointwise_conv2d_act(
            first, self.weight, self.bias, self.activation, residual, self.input_activation, second, third
        )


class Classifier(PackedPointwise):
    """The linear layer as a pointwise convolution of pooled features: (B, C) → (B, num_classes)."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x[:, :, None, None])[:, :, 0, 0]


class _PackedPair(_Packed):
    """Two matrices, from the channels to hidden ones and back."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def __init__(self, layer: FeedForward | FusedSqueezeExcite, dtype: torch.dtype) -> None:
        super().__init__(dtype, {"w1": layer.w1, "w2": layer.w2}, {"b1": layer.b1, "b2": layer.b2})


class PackedFeedForward(_PackedPair):
    """:class:`FeedForward` with packed weights."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return _feed_forward(x, self.w1, self.b1, self.w2, self.b2, "relu", residual)


class PackedSqueezeExcite(_PackedPair):
    """:class:`FusedSqueezeExcite` with packed weights."""

    def forward(self, x: Tensor) -> Tensor:
        return _squeeze_excite(x, self.w1, self.b1, self.w2, self.b2)


class DirectDepthwise(nn.Module):
    """:class:`Depthwise`."""

    def __init__(self, layer: Depthwise) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.stride, self.padding, self.activation = layer.stride, layer.weight.shape[-1] // 2, layer.activation
        self.residual = layer.residual

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.residual else None
        return _depthwise_conv2d_act(x, self.weight, self.bias, self.stride, self.padding, self.activation, residual)


class DirectScan(nn.Module):
    """The scan of :class:`SS2D` in two directions."""

    def __init__(self, layer: SS2D) -> None:
        super().__init__()
        self.x_proj_weight = nn.Parameter(layer.x_proj_weight.detach())
        self.dt_proj_weight = nn.Parameter(layer.dt_projs_weight.detach())
        self.dt_proj_bias = nn.Parameter(layer.dt_projs_bias.detach())
        self.A_log = nn.Parameter(layer.A_logs.detach().unflatten(0, (2, -1)))
        self.D = nn.Parameter(layer.Ds.detach().unflatten(0, (2, -1)))
        self.norm_weight = nn.Parameter(layer.out_norm.weight.detach())
        self.norm_bias = nn.Parameter(layer.out_norm.bias.detach())
        self.eps = layer.out_norm.eps
        self.macs = layer.x_proj_weight.numel() + layer.dt_projs_weight.numel()

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return _ss2d_bidirectional(
            x,
            z,
            self.x_proj_weight,
            self.dt_proj_weight,
            self.dt_proj_bias,
            self.A_log,
            self.D,
            self.norm_weight,
            self.norm_bias,
            self.eps,
        )


class DirectSS2D(nn.Module):
    """:class:`SS2D` in two directions, with the base scale in its output projection."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_proj = PackedPointwise(layer.in_proj, dtype)
        self.conv2d = DirectDepthwise(layer.conv2d)
        self.scan = DirectScan(layer)
        self.out_proj = PackedPointwise(layer.out_proj, dtype)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, 1)
        return self.out_proj(self.scan(self.conv2d(x), z))


class DirectWavelet(nn.Module):
    """The wavelet branch, added to ``base``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        return _wavelet_depthwise_conv2d(x, self.weight, None, base)


class DirectGlobalOp(nn.Module):
    """:class:`FusedGlobalOp`."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.atten = rewrite(_optimized, layer.atten, dtype)
        self.wavelet = DirectWavelet(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.wavelet(x, self.atten(x))


@singledispatch
def _optimized(module: Any, dtype: torch.dtype) -> nn.Module:
    """The optimized counterpart of a fused layer; what has none is kept, with its children replaced."""
    for name, child in module.named_children():
        setattr(module, name, rewrite(_optimized, child, dtype))
    return module


@_optimized.register(SS2D)
def _(module: Any, dtype: torch.dtype) -> nn.Module:
    if not isinstance(module.conv2d, Depthwise):  # one that was kept as it is
        return module
    if module.directions == 2:
        return DirectSS2D(module, dtype)
    module.in_proj, module.out_proj = (PackedPointwise(m, dtype) for m in (module.in_proj, module.out_proj))
    module.conv2d = DirectDepthwise(module.conv2d)
    return module


_optimized.register(Conv)(PackedConv)
_optimized.register(Pointwise)(PackedPointwise)
_optimized.register(FeedForward)(PackedFeedForward)
_optimized.register(FusedSqueezeExcite)(PackedSqueezeExcite)
_optimized.register(FusedGlobalOp)(DirectGlobalOp)
_optimized.register(Depthwise)(lambda layer, dtype: DirectDepthwise(layer))
