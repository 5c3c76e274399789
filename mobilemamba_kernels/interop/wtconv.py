"""WTConv's module (https://github.com/BGU-CS-VIL/WTConv, arXiv 2407.05848)."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mobilemamba_kernels.ops.depthwise_conv2d_act import depthwise_conv2d_act
from mobilemamba_kernels.ops.wavelet_depthwise_conv2d import wavelet_depthwise_conv2d

__all__ = ["WTConv2d"]


class WTConv2d(nn.Module):
    """A depthwise convolution plus a cascade of depthwise convolutions of its input's Haar wavelet bands.

    Parameters have the names and shapes of the original, so its state dicts load.

    Args:
        in_channels, out_channels: the same number.
        kernel_size: odd.
        stride: of the result.
        bias: of the convolution of the input itself.
        wt_levels: how often the low band is transformed again.
        wt_type: "db1" or "haar" (the same).

    Raises:
        TypeError: a size is no int.
        ValueError: the sizes do not fit, or another wavelet.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 5,
        stride: int = 1,
        bias: bool = True,
        wt_levels: int = 1,
        wt_type: str = "db1",
    ) -> None:
        super().__init__()
        if in_channels != out_channels:
            raise ValueError(f"WTConv2d: in_channels and out_channels must agree; got {in_channels} and {out_channels}")
        sizes = {"in_channels": in_channels, "kernel_size": kernel_size, "stride": stride, "wt_levels": wt_levels}
        for name, size in sizes.items():
            if not isinstance(size, int):
                raise TypeError(f"WTConv2d: {name} must be an int; got {size!r}")
        if in_channels < 1:
            raise ValueError(f"WTConv2d: in_channels must be at least 1; got {in_channels}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"WTConv2d: kernel_size must be odd; got {kernel_size}")
        if wt_levels < 1 or stride < 1:
            raise ValueError(f"WTConv2d: wt_levels and stride must be at least 1; got {wt_levels} and {stride}")
        if wt_type not in ("db1", "haar"):
            raise ValueError(f"WTConv2d: wt_type must be db1 or haar, which are the same; got {wt_type!r}")
        self.in_channels, self.wt_levels, self.stride, self.dilation = in_channels, wt_levels, stride, 1
        haar = _haar_filters(in_channels)
        self.wt_filter, self.iwt_filter = (nn.Parameter(haar.clone(), requires_grad=False) for _ in range(2))
        self.base_conv = _depthwise(in_channels, kernel_size, bias)
        self.base_scale = _Scale(in_channels, 1.0)
        self.wavelet_convs = nn.ModuleList(_depthwise(4 * in_channels, kernel_size, False) for _ in range(wt_levels))
        self.wavelet_scale = nn.ModuleList(_Scale(4 * in_channels, 0.1) for _ in range(wt_levels))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, C, H, W) to (batch, C, ⌈H / stride⌉, ⌈W / stride⌉). Serves the original class too.

        In x's dtype; under autocast, whose type the convolutions take, in that of the scales.
        """
        scale, bias = self.base_scale.weight.view(-1), self.base_conv.bias
        weight = self.base_conv.weight * scale.view(-1, 1, 1, 1)
        base = depthwise_conv2d_act(x, weight, None if bias is None else bias * scale)
        weights, scales = ([part.weight for part in parts] for parts in (self.wavelet_convs, self.wavelet_scale))
        y = wavelet_depthwise_conv2d(x, weights, scales, base)  # type: ignore[arg-type]
        if torch.is_autocast_enabled(x.device.type):
            y = y.to(torch.promote_types(y.dtype, scale.dtype))
        return y if self.stride == 1 else y[:, :, :: self.stride, :: self.stride]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("wt_filter", "iwt_filter"):
            loaded, own = state_dict.get(prefix + name), getattr(self, name)
            if loaded is not None and (loaded.shape != own.shape or (loaded.to(own) - own).abs().max() > 1e-4):
                raise ValueError(f"WTConv2d: {prefix}{name} is not the Haar wavelet's, the only one that there is here")
        super()._load_from_state_dict(state_dict, prefix, *args)


def serves(layer: nn.Module, x: Tensor) -> bool:
    """Whether :meth:`WTConv2d.forward` computes what a layer of the original class does.

    Not where a filter is another or is trained, where a convolution was replaced, changed or hooked, or where the class
    only has the same name.
    """
    parts = vars(layer).get("_modules", {})
    if not {"base_conv", "base_scale", "wavelet_convs", "wavelet_scale"} <= parts.keys():
        return False
    convs = [layer.base_conv, *layer.wavelet_convs]  # type: ignore[misc]
    return all(map(_is_plain, convs)) and _has_haar_filters(layer)


def _is_plain(conv: nn.Module) -> bool:
    if type(conv) is not nn.Conv2d or "forward" in vars(conv):
        return False
    hooks = (conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks, conv._backward_pre_hooks)
    (height, width), padding = conv.kernel_size, conv.padding
    return (
        not any(hooks)
        and height == width
        and height % 2 == 1
        and (padding == "same" or padding == (height // 2, width // 2))
        and (conv.padding_mode, conv.stride, conv.dilation) == ("zeros", (1, 1), (1, 1))
        and conv.groups == conv.in_channels == conv.out_channels
    )


_checked: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # filters that were the Haar wavelet's


def _has_haar_filters(layer: nn.Module) -> bool:
    filters: list[Any] = [getattr(layer, name, None) for name in ("wt_filter", "iwt_filter")]
    if any(f is None or f.requires_grad or f.ndim != 4 or f.shape[-2:] != (2, 2) for f in filters):
        return False
    if torch.compiler.is_compiling():
        return True
    state = [(f.data_ptr(), f._version, f.dtype) for f in filters]
    if _checked.get(layer) != state:
        haar = _haar_filters(filters[0].shape[0] // 4)
        if any(f.shape != haar.shape or (f.cpu() - haar).abs().max() > 1e-4 for f in filters):
            return False
        _checked[layer] = state
    return True


def _haar_filters(channels: int) -> Tensor:
    """(4 channels, 1, 2, 2)."""
    signs = torch.tensor([[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]])
    return (signs / 2).unsqueeze(1).repeat(channels, 1, 1, 1)


def _depthwise(channels: int, kernel_size: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel_size, padding="same", groups=channels, bias=bias)


class _Scale(nn.Module):
    """Holds a scale a channel under the original's name."""

    def __init__(self, channels: int, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, channels, 1, 1), value))
