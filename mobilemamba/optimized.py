"""The network as fast as its device runs it: the fused one with its weights in the kernels' order.

:func:`optimize_for_inference` replaces the layers of :func:`mobilemamba.fuse` by those below. Each calls one operator
below the public functions, whose checks take as long as an operator on one image: the layers' shapes are the network's.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from mobilemamba.cuda_graphs import CudaGraphs
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
from mobilemamba_kernels.backends import choose, implementations

_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}


@torch.inference_mode(False)  # inference tensors could not be called where gradients are recorded
def optimize_for_inference(
    model: MobileMamba, dtype: torch.dtype = torch.float32, *, cuda_graph: bool = False
) -> MobileMamba:
    """The same network as fast as its device, a CPU or a CUDA GPU, runs it, as a copy, in eval mode.

    It equals ``model`` in eval mode up to rounding and has the same methods; ``torch.compile`` and ``torch.export``
    capture it. Images may be of any floating-point type and in any layout; maps are channels-last, and logits and
    pooled features float32. On a CPU about a million pixels are computed at a time, a larger batch in parts. It stays
    on its device, in its type, on the backends that are chosen now, and with its head.

    Args:
        model: any :class:`MobileMamba`, fused or not; it stays as it is.
        dtype: on a CPU, of what is multiplied in matrix products: float32; or bfloat16, which is faster where the
            processor multiplies it and halves the weights' memory. All else is float32 in both, the sums of the
            products too (but for AMX, where the vendor's library multiplies and rounds them to bfloat16). On a GPU, of
            the maps and the matrices: float32, float16 or bfloat16. Sums, scans and small parameters are float32.
        cuda_graph: replay a CUDA graph instead of launching kernel after kernel, which is faster where a batch is
            small: see :class:`mobilemamba.cuda_graphs.CudaGraphs`. It holds for calls of the network; its other methods
            launch kernels.

    Raises:
        TypeError: ``dtype`` is another, ``model`` no MobileMamba, or one that :func:`mobilemamba.fuse` refuses.
        ValueError: ``model`` is optimized already, on another kind of device, or on a CPU with ``cuda_graph``.
        RuntimeError: a backend is forced that cannot run there.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if not isinstance(model, MobileMamba):
        raise TypeError(f"the network must be a MobileMamba, but is a {type(model).__name__}")
    if model.optimized:
        raise ValueError("the network is optimized already: optimize the one that it was made from")
    device = next(model.parameters()).device
    if device.type not in _DTYPES:
        raise ValueError(f"the network must be on a CPU or a CUDA GPU to be optimized, but is on {device}")
    if dtype not in _DTYPES[device.type]:
        raise TypeError(f"dtype must be {' or '.join(map(str, _DTYPES[device.type]))}, but is {dtype!r}")
    if cuda_graph and device.type != "cuda":
        raise ValueError(f"a CUDA graph takes a network on a CUDA GPU, but it is on {device}")
    model = _rebuilt(fuse(copy.deepcopy(model).double()).float(), _Target(device, dtype))
    model.graphs = CudaGraphs() if cuda_graph else None
    return model


@dataclass(frozen=True)
class _Target:
    """What layers are made for, and how its kernels read weights."""

    device: torch.device
    dtype: torch.dtype

    @property
    def packs(self) -> bool:
        """Whether it is the CPU's kernels; Triton's interpreter has the GPU's on a CPU."""
        images = torch.empty(0, device=self.device, dtype=torch.float32)
        return self.device.type == "cpu" and choose(DirectConv.operator, images) != "triton"

    @property
    def map_dtype(self) -> torch.dtype:
        """Of the maps between layers."""
        return torch.float32 if self.packs else self.dtype

    def backend(self, operator: str) -> str:
        """What runs an operator."""
        return choose(operator, torch.empty(0, device=self.device, dtype=self.map_dtype))

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight (O, C) or (O, C, k, k) of a product; filters with their channels innermost."""
        if self.packs:
            return pack_weight(weight, self.dtype)
        return weight.to(self.dtype).contiguous(
            memory_format=torch.channels_last if weight.ndim == 4 else torch.contiguous_format
        )

    def filters(self, operator: str, weight: Tensor) -> Tensor:
        """A weight (C, 1, k, k), one filter a channel; for Triton with the channels innermost."""
        innermost_last = weight.permute(2, 3, 1, 0)
        return innermost_last.contiguous().permute(3, 2, 0, 1) if self.backend(operator) == "triton" else weight


def _rebuilt(model: MobileMamba, target: _Target) -> MobileMamba:
    """A fused network in float32, itself, with its layers made for a target."""
    for name, child in model.named_children():
        if not name.startswith("head"):  # which takes what is pooled, in float32
            setattr(model, name, rewrite(_optimized, child, target))
        elif runs_as(child, nn.Linear):
            setattr(model, name, Classifier(child, target))
    model.optimized, model.map_dtype = True, target.map_dtype
    model.backend = " and ".join(sorted({m.backend for m in model.modules() if isinstance(m, Direct)}))
    return model.requires_grad_(False)


class Direct(nn.Module):
    """An operator below its public function, on the backend of its target, with parameters as that reads them.

    ``macs``: its multiply-adds a position.
    """

    operator: str

    def __init__(self, target: _Target, macs: int, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.backend, self.macs = target.backend(self.operator), macs
        for name, parameter in parameters.items():
            setattr(self, name, nn.Parameter(parameter.detach()))

    def run(self, *args: Any) -> Tensor:
        """The operator of these arguments."""
        return _IMPLEMENTATIONS[self.operator][self.backend](*args)


class DirectConv(Direct):
    """:class:`Conv`."""

    operator = "conv2d_act"
    weight: Tensor
    bias: Tensor

    def __init__(self, conv: Conv, target: _Target) -> None:
        super().__init__(target, conv.weight.numel(), {"weight": target.matrix(conv.weight), "bias": conv.bias})
        self.stride, self.padding, self.activation = conv.stride, conv.weight.shape[-1] // 2, conv.activation

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.weight, self.bias, self.stride, self.padding, self.activation)


class DirectPointwise(Direct):
    """:class:`Pointwise`."""

    operator = "pointwise_conv2d_act"
    weight: Tensor
    bias: Tensor

    def __init__(self, layer: Pointwise | nn.Linear, target: _Target) -> None:
        bias = layer.weight.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias
        super().__init__(target, layer.weight.numel(), {"weight": target.matrix(layer.weight), "bias": bias})
        self.activation = getattr(layer, "activation", "none")
        self.input_activation = getattr(layer, "input_activation", "none")

    def forward(self, x: Tensor | Sequence[Tensor], residual: Tensor | None = None) -> Tensor:
        first, second, third = (x, None, None) if isinstance(x, Tensor) else (*x, None, None)[:3]
        return self.run(first, self.weight, self.bias, self.activation, residual, self.input_activation, second, third)


class Classifier(DirectPointwise):
    """The linear layer as a pointwise convolution of pooled features: (B, C) → (B, num_classes), float32."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x[:, :, None, None])[:, :, 0, 0]


class _DirectPair(Direct):
    """Two matrices, from the channels to hidden ones and back."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def __init__(self, layer: FeedForward | FusedSqueezeExcite, target: _Target) -> None:
        w1, w2 = target.matrix(layer.w1), target.matrix(layer.w2)
        macs = layer.w1.numel() + layer.w2.numel()
        super().__init__(target, macs, {"w1": w1, "b1": layer.b1, "w2": w2, "b2": layer.b2})


class DirectFeedForward(_DirectPair):
    """:class:`FeedForward`."""

    operator = "feed_forward"

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.run(x, self.w1, self.b1, self.w2, self.b2, "relu", residual)


class DirectSqueezeExcite(_DirectPair):
    """:class:`FusedSqueezeExcite`."""

    operator = "squeeze_excite"

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.w1, self.b1, self.w2, self.b2)


class DirectDepthwise(Direct):
    """:class:`Depthwise`."""

    operator = "depthwise_conv2d_act"
    weight: Tensor
    bias: Tensor

    def __init__(self, layer: Depthwise, target: _Target) -> None:
        weight = target.filters(self.operator, layer.weight)
        macs = weight.numel() + (0 if layer.scale is None else layer.scale.numel())
        super().__init__(target, macs, {"weight": weight, "bias": layer.bias})
        self.scale, self.shift = layer.scale, layer.shift
        self.stride, self.padding, self.activation = layer.stride, layer.weight.shape[-1] // 2, layer.activation
        self.residual = layer.residual

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.residual else None
        return self.run(
            x, self.weight, self.bias, self.stride, self.padding, self.activation, residual, self.scale, self.shift
        )


class DirectScan(Direct):
    """The scan of :class:`SS2D` in two directions."""

    operator = "ss2d_bidirectional"

    def __init__(self, layer: SS2D, target: _Target) -> None:
        parameters = {
            "x_proj_weight": layer.x_proj_weight.to(target.map_dtype),
            "dt_proj_weight": layer.dt_projs_weight,
            "dt_proj_bias": layer.dt_projs_bias,
            "A_log": layer.A_logs.unflatten(0, (2, -1)),
            "D": layer.Ds.unflatten(0, (2, -1)),
            "norm_weight": layer.out_norm.weight,
            "norm_bias": layer.out_norm.bias,
        }
        super().__init__(target, layer.x_proj_weight.numel() + layer.dt_projs_weight.numel(), parameters)
        self.eps = layer.out_norm.eps

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.run(
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

    def __init__(self, layer: Any, target: _Target) -> None:
        super().__init__()
        self.in_proj = DirectPointwise(layer.in_proj, target)
        self.conv2d = DirectDepthwise(layer.conv2d, target)
        self.scan = DirectScan(layer, target)
        self.out_proj = DirectPointwise(layer.out_proj, target)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, 1)
        return self.out_proj(self.scan(self.conv2d(x), z))


class DirectWavelet(Direct):
    """The wavelet branch, added to ``base``."""

    operator = "wavelet_depthwise_conv2d"
    weight: Tensor

    def __init__(self, weight: Tensor, target: _Target) -> None:
        super().__init__(target, weight.numel(), {"weight": target.filters(self.operator, weight)})

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        return self.run(x, self.weight, None, base)


class DirectGlobalOp(nn.Module):
    """:class:`FusedGlobalOp`."""

    def __init__(self, layer: Any, target: _Target) -> None:
        super().__init__()
        self.atten = rewrite(_optimized, layer.atten, target)
        self.wavelet = DirectWavelet(layer.weight, target)

    def forward(self, x: Tensor) -> Tensor:
        return self.wavelet(x, self.atten(x))


_IMPLEMENTATIONS = {
    layer.operator: implementations(layer.operator)
    for layer in (
        DirectConv,
        DirectPointwise,
        DirectFeedForward,
        DirectSqueezeExcite,
        DirectDepthwise,
        DirectScan,
        DirectWavelet,
    )
}


@singledispatch
def _optimized(module: Any, target: _Target) -> nn.Module:
    """The optimized counterpart of a fused layer; what has none is kept, in the maps' type, its children replaced."""
    for name, child in module.named_children():
        setattr(module, name, rewrite(_optimized, child, target))
    return module._apply(lambda t: t.to(target.map_dtype) if t.is_floating_point() else t, recurse=False)


@_optimized.register(SS2D)
def _(module: Any, target: _Target) -> nn.Module:
    if not isinstance(module.conv2d, Depthwise):  # one that was kept as it is
        return module.to(target.map_dtype)
    if module.directions == 2:
        return DirectSS2D(module, target)
    in_proj, out_proj = (DirectPointwise(m, target) for m in (module.in_proj, module.out_proj))
    conv2d = DirectDepthwise(module.conv2d, target)
    module.to(target.map_dtype)
    module.in_proj, module.conv2d, module.out_proj = in_proj, conv2d, out_proj
    return module


_optimized.register(Conv)(DirectConv)
_optimized.register(Pointwise)(DirectPointwise)
_optimized.register(FeedForward)(DirectFeedForward)
_optimized.register(FusedSqueezeExcite)(DirectSqueezeExcite)
_optimized.register(FusedGlobalOp)(DirectGlobalOp)
_optimized.register(Depthwise)(DirectDepthwise)
