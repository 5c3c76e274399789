"""Parameters and multiply-adds of a network."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mobilemamba.inference import Conv, Depthwise, FeedForward, FusedGlobalOp, FusedSqueezeExcite, Pointwise
from mobilemamba.layers import SS2D, GlobalOp
from mobilemamba.model import MobileMamba
from mobilemamba.optimized import (
    Classifier,
    DirectConv,
    DirectDepthwise,
    DirectFeedForward,
    DirectPointwise,
    DirectScan,
    DirectSqueezeExcite,
    DirectWavelet,
)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; as in the paper, the fixed wavelet filters count."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: MobileMamba, image_size: int | tuple[int, int]) -> int:
    """Multiply-adds of the network, fused or not, for one image of that size (height and width, or both in one).

    Counts convolutions, linear layers, SS2D's projections, and the wavelet transforms as the convolutions that they
    are. The scan, normalizations and activations are left out.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    total = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal total
        total += macs(module, output.shape)

    model = copy.deepcopy(model).eval()
    model.graphs = None
    for module in model.modules():
        if type(module) in _MACS:
            module.register_forward_hook(count)
        if isinstance(module, SS2D):  # the scan counts nothing and takes its time, step by step, even without data
            module.scan_pair = module.scan_any = _keep_shape  # type: ignore[method-assign]
    weight = next(model.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():  # shapes alone: nothing is computed
        model(torch.empty(1, model.in_chans, height, width, dtype=weight.dtype, device=weight.device))
    return total


def macs(module: nn.Module, shape: torch.Size) -> int:
    """Multiply-adds of a layer that gives one image a result of that shape; 0 of a layer without any."""
    return _MACS[type(module)](module, shape) if type(module) in _MACS else 0


def _keep_shape(x: Tensor, z: Tensor) -> Tensor:
    return x


def _at_each_position(*names: str) -> Callable[[nn.Module, torch.Size], int]:
    """Every weight of that name, where there is one, multiplies once at each position of the output."""

    def count(module: nn.Module, shape: torch.Size) -> int:
        weights = [getattr(module, name) for name in names]
        return sum(weight.numel() for weight in weights if weight is not None) * shape[2:].numel()

    return count


def _wavelet(weight: Tensor, shape: torch.Size) -> int:
    # Both transforms and the convolution work at half the resolution; a transform has four taps for each band.
    return (weight.numel() + 2 * 4 * weight.shape[0]) * -(-shape[2] // 2) * -(-shape[3] // 2)


def _packed(module: Any, shape: torch.Size) -> int:
    return module.macs * shape[2:].numel()


_MACS: dict[type[nn.Module], Callable[[Any, torch.Size], int]] = {
    nn.Conv2d: _at_each_position("weight"),
    nn.Linear: lambda module, shape: module.weight.numel(),
    Conv: _at_each_position("weight"),
    Depthwise: _at_each_position("weight", "scale"),
    Pointwise: _at_each_position("weight"),
    FeedForward: _at_each_position("w1", "w2"),
    FusedSqueezeExcite: lambda module, shape: module.w1.numel() + module.w2.numel(),
    SS2D: _at_each_position("x_proj_weight", "dt_projs_weight"),
    GlobalOp: lambda module, shape: sum(_wavelet(conv.weight, shape) for conv in module.wavelet_convs),
    FusedGlobalOp: lambda module, shape: _wavelet(module.weight, shape),
    Classifier: lambda module, shape: module.macs,
    DirectConv: _packed,
    DirectPointwise: _packed,
    DirectFeedForward: _packed,
    DirectSqueezeExcite: lambda module, shape: module.macs,
    DirectDepthwise: _packed,
    DirectScan: _packed,
    DirectWavelet: lambda module, shape: _wavelet(module.weight, shape),
}
