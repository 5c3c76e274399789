"""Where the time of an optimized network goes: each operator, in each stage, against its own floor."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mobilemamba import bench
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
from mobilemamba.profile import macs

OPERATORS: dict[type[nn.Module], str] = {
    DirectConv: "conv2d_act",
    DirectPointwise: "pointwise_conv2d_act",
    Classifier: "pointwise_conv2d_act",
    DirectFeedForward: "feed_forward",
    DirectSqueezeExcite: "squeeze_excite",
    DirectDepthwise: "depthwise_conv2d_act",
    DirectScan: "ss2d_bidirectional",
    DirectWavelet: "wavelet_depthwise_conv2d",
}
_STAGES = {"patch_embed": "stem", "blocks1": "stage 1", "blocks2": "stage 2", "blocks3": "stage 3", "head": "head"}
_SIZES = tuple(1 << power for power in range(19, 28, 2))  # of the buffers copied, bytes


@dataclass(frozen=True)
class Bottleneck:
    """All calls of one operator in one stage, in one forward pass; seconds."""

    stage: str
    operator: str
    calls: int
    seconds: float
    operations_s: float  # its multiply-adds at the ceiling
    bytes_s: float  # its arguments, parameters and results once each, at the copy bandwidth of buffers of their size

    @property
    def floor(self) -> float:
        """What it takes at least: the longer of the two."""
        return max(self.operations_s, self.bytes_s)


@dataclass
class _Call:
    seconds: list[float]
    macs: int = 0
    activations: int = 0
    parameters: int = 0


def find_bottlenecks(
    model: MobileMamba, x: Tensor, ceilings: tuple[float, float], passes: int = 15
) -> tuple[list[Bottleneck], float]:
    """Time every operator of an optimized network.

    Args:
        model: what ``optimize_for_inference`` returned.
        x: images.
        ceilings: operations a second of the matrix products and of all else, which is float32.
        passes: forward passes, of which medians are taken.

    Returns:
        The operators' rows, in the network's order, and the time of a whole pass without the clocks, in seconds.
    """
    calls: dict[str, _Call] = {}
    leaves = {name: module for name, module in model.named_modules() if type(module) in OPERATORS}
    started = 0.0

    def start(module: nn.Module, inputs: Any) -> None:
        nonlocal started
        started = time.perf_counter()

    def stop(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seconds = time.perf_counter() - started
            call = calls.setdefault(name, _Call([]))
            call.seconds.append(seconds)
            call.macs = macs(module, output.shape) * output.shape[0]
            call.activations = sum(t.nbytes for t in pytree.tree_leaves((inputs, output)) if isinstance(t, Tensor))
            call.parameters = sum(p.nbytes for p in module.parameters())

        return note

    def run() -> Any:
        with torch.inference_mode():
            return model(x)

    (whole,) = bench.time_in_turn([run], 1.0)
    handles = [module.register_forward_pre_hook(start) for module in leaves.values()]
    handles += [module.register_forward_hook(stop(name)) for name, module in leaves.items()]
    try:
        for _ in range(passes):
            run()
    finally:
        for handle in handles:
            handle.remove()

    bandwidth = copy_bandwidths()

    def seconds_of(size: int, within: int) -> float:
        level = min(_SIZES, key=lambda s: abs(s - within / 2))
        return size / bandwidth[level]

    weights = sum(call.parameters for call in calls.values())
    rows: dict[tuple[str, str], list[float]] = {}
    for name, call in calls.items():
        operator = OPERATORS[type(leaves[name])]
        row = rows.setdefault((_STAGES[name.split(".")[0]], operator), [0, 0.0, 0.0, 0.0])
        products = operator in ("conv2d_act", "pointwise_conv2d_act", "feed_forward", "squeeze_excite")
        row[0] += 1
        row[1] += statistics.median(call.seconds[2:])
        row[2] += 2 * call.macs / ceilings[0 if products else 1]
        row[3] += seconds_of(call.activations, call.activations) + seconds_of(call.parameters, weights)
    found = [Bottleneck(stage, operator, int(row[0]), *row[1:]) for (stage, operator), row in rows.items()]
    return found, whole.median


def copy_bandwidths() -> dict[int, float]:
    """Bytes a second, read plus written, of copies of buffers of several sizes with PyTorch's threads."""
    found = {}
    for size in _SIZES:
        source = torch.ones(size // 4)
        target = torch.empty_like(source)
        (timing,) = bench.time_in_turn([partial(target.copy_, source)], 0.1)
        found[size] = 2 * size / timing.median
    return found
