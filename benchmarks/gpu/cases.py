"""The shapes that are measured on a GPU, and the least that each asks of it."""

from __future__ import annotations

import dataclasses
import re
from math import prod
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gpu import DRY_RUN
from mobilemamba_kernels.testing import BUILDERS, Argument, Case, cases

BATCH = 256  # at which the network's maps are larger than the caches


def with_batch(case: Case, batch: int) -> Case:
    """The case with another number of images."""

    def change(argument: Argument) -> Argument:
        shape = (batch, *argument.shape[1:]) if argument.positions else argument.shape
        return dataclasses.replace(argument, shape=shape)

    arguments = pytree.tree_map_only(Argument, change, dict(case.arguments))
    return dataclasses.replace(case, name=re.sub(r"^\d+", str(batch), case.name), arguments=arguments)


def measured() -> list[Case]:
    """The network's shapes at batch 256 and long sequences; in a dry run one small case of each operator."""
    if DRY_RUN:
        return [next(c for c in cases(op, benchmark=False)[1:] if "levels" not in c.name) for op in BUILDERS]
    found = {(c.op, c.name): c for c in (with_batch(case, BATCH) for case in cases(benchmark=True))}
    return [
        *found.values(),
        BUILDERS["selective_scan_fn"](4, 512, 8192, 1, bc="1", has="Dbs"),
        BUILDERS["selective_scan_fn"](2, 1024, 4096, 16, bc="1", has="Dzbs"),
        BUILDERS["bidirectional_selective_scan"](4, 512, 8192, 1, has="Dbs"),
    ]


_MULTIPLIED = {
    "ss2d_bidirectional": ("x_proj_weight",),
    "conv2d_act": ("weight",),
    "pointwise_conv2d_act": ("weight",),
    "feed_forward": ("w1", "w2"),
    "squeeze_excite": ("w1", "w2"),
}
"""Weights of products, which an optimized network has in the type of its maps."""


_LONG = 1024
"""Positions, more of which no map of the network has."""


def make_arguments(case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Channels-last maps, and weights as an optimized network has them; long sequences as mamba-ssm has them."""
    long = case.op in ("selective_scan_fn", "bidirectional_selective_scan") and case.arguments["u"].shape[-1] > _LONG
    made = case.make(dtype, "channels_first" if long else "channels_last", device)
    for name in _MULTIPLIED.get(case.op, ()):
        made[name] = made[name].to(dtype)
        if case.op == "conv2d_act":
            made[name] = made[name].contiguous(memory_format=torch.channels_last)
    return made


def operations(case: Case, direction: str) -> dict[str, float]:
    """What the mathematics needs at least: "operations" (a multiply-add is two), "exponentials", and "products".

    Exponentials stand for all that the special-function units do (logarithm and reciprocal too). What a smarter order
    could save is not counted; taps and transforms outside of the map are not either. A backward pass differentiates
    each product in both factors, and has the decays of a scan to compute again.
    """
    shapes = pytree.tree_map_only(Argument, lambda a: a.shape, dict(case.arguments))
    found = dict.fromkeys(("operations", "exponentials", "products"), 0.0)
    for kind, amount in _FORWARD[case.op](shapes, case.options).items():
        found[kind] = amount
    if direction == "backward":
        found["operations"] *= 2
        found["products"] *= 2
    return found


def _scan(shapes: dict[str, Any], options: Any) -> dict[str, float]:
    steps, (*_, state) = prod(shapes["delta"]), shapes["A"]
    special = steps * (state + 2 * options["delta_softplus"]) + 2 * prod(shapes.get("z", (0,)))
    return {"operations": 6 * steps * state, "exponentials": special}


def _ss2d(shapes: dict[str, Any], options: Any) -> dict[str, float]:
    batch, _, height, width = shapes["x"]
    positions, (_, d, state) = batch * height * width, shapes["A_log"]
    rank = shapes["dt_proj_weight"][-1]
    return {
        "operations": positions * d * (12 * state + 8),
        "exponentials": 2 * positions * d * (state + 2) + 2 * prod(shapes.get("z", (0,))),
        "products": 2 * positions * 2 * d * (2 * rank + 2 * state),
    }


def _taps(size: int, k: int, stride: int = 1, padding: int | None = None) -> int:
    """Taps of a filter within one dimension of the map, over all its outputs."""
    pad = k // 2 if padding is None else padding
    starts = (o * stride - pad for o in range((size + 2 * pad - k) // stride + 1))
    return sum(min(start + k, size) - max(start, 0) for start in starts)


def _causal(shapes: dict[str, Any], options: Any) -> dict[str, float]:
    elements, gated = prod(shapes["x"]), options["activation"] is not None
    return {"operations": 2 * elements * shapes["weight"][-1], "exponentials": 2 * elements * gated}


def _haar(shapes: dict[str, Any], options: Any) -> dict[str, float]:
    return {"operations": 2 * prod(shapes.get("x") or shapes["bands"])}


def _wavelet(shapes: dict[str, Any], options: Any) -> dict[str, float]:
    (batch, channels, height, width), k = shapes["x"], shapes["weight"][-1]
    taps = _taps(-(-height // 2), k) * _taps(-(-width // 2), k)
    return {"operations": 2 * batch * 4 * channels * taps + 4 * prod(shapes["x"])}


def _convolution(shapes: dict[str, Any], options: Any) -> float:
    (batch, _, height, width), (out, inner, k, _) = shapes["x"], shapes["weight"]
    stride, padding = options["stride"], options["padding"]
    return 2 * batch * out * inner * _taps(height, k, stride, padding) * _taps(width, k, stride, padding)


def _pair(positions: int, shapes: dict[str, Any]) -> dict[str, float]:
    return {"products": 2.0 * positions * (prod(shapes["w1"]) + prod(shapes["w2"]))}


def _positions(shapes: dict[str, Any]) -> int:
    first = shapes["x"][0] if isinstance(shapes["x"], list) else shapes["x"]
    return first[0] * first[2] * first[3]


_FORWARD: dict[str, Any] = {
    "selective_scan_fn": _scan,
    "bidirectional_selective_scan": _scan,
    "ss2d_bidirectional": _ss2d,
    "causal_conv1d_fn": _causal,
    "cross_scan_fn": lambda shapes, options: {},
    "cross_merge_fn": lambda shapes, options: {"operations": 0 if options["one_by_one"] else 3 * prod(shapes["y"]) / 4},
    "haar_dwt2d": _haar,
    "haar_idwt2d": _haar,
    "wavelet_depthwise_conv2d": _wavelet,
    "depthwise_conv2d_act": lambda shapes, options: {"operations": _convolution(shapes, options)},
    "conv2d_act": lambda shapes, options: {"products": _convolution(shapes, options)},
    "pointwise_conv2d_act": lambda shapes, options: {"products": 2 * _positions(shapes) * prod(shapes["weight"])},
    "feed_forward": lambda shapes, options: _pair(_positions(shapes), shapes),
    "squeeze_excite": lambda shapes, options: _pair(shapes["x"][0], shapes),
}
