"""Inputs of other projects' functions; interop.npz holds what their published code makes of them (see README.md).

A case is named project.function.variant. Its tensors are drawn in their order from one generator on the CPU, seeded by
the CRC-32 of the name; ``options`` are the arguments that are no tensors. Normal noise is drawn in float64, then
rounded: float32's differs in its last bits between processors.
"""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Draw = Callable[[torch.Generator], Tensor]

NOT_DIFFERENTIATED = ("seq_idx", "cache_seqlens", "wt_filter", "iwt_filter")


@dataclass(frozen=True)
class Case:
    """One call of a published function, or of a module: then ``tensors`` are its input and its state_dict."""

    project: str
    function: str
    tensors: dict[str, Draw]
    options: dict[str, Any]
    gradients: tuple[str, ...]
    """The tensors whose gradients are stored, as grad_NAME; empty where only the forward pass is."""
    seed: int
    gradient_seed: int


CASES: dict[str, Case] = {}


def inputs(name: str) -> dict[str, Tensor]:
    """Draw the tensors of a case."""
    generator = torch.Generator().manual_seed(CASES[name].seed)
    return {key: draw(generator) for key, draw in CASES[name].tensors.items()}


def output_gradients(name: str, *outputs: Tensor) -> list[Tensor]:
    """Draw the gradients that the stored ones start from, one for each of the outputs that is differentiated."""
    generator = torch.Generator().manual_seed(CASES[name].gradient_seed)
    return [normal(*output.shape)(generator) for output in outputs]


@functools.cache
def _stored() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).with_suffix(".npz")) as file:
        return dict(file)


def outputs(name: str) -> dict[str, Tensor]:
    """Return what the published code made of a case."""
    prefix = f"{name}/"
    return {
        key.removeprefix(prefix): torch.from_numpy(array) for key, array in _stored().items() if key.startswith(prefix)
    }


def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Draw:
    return lambda generator: (shift + scale * torch.randn(shape, generator=generator, dtype=torch.float64)).float()


def uniform(low: float, high: float, *shape: int) -> Draw:
    return lambda generator: low + (high - low) * torch.rand(shape, generator=generator)


def fixed(values: Any, dtype: torch.dtype = torch.float32) -> Draw:
    return lambda _: torch.tensor(values, dtype=dtype)


def _add(project: str, function: str, variant: str, tensors: dict[str, Draw], differentiated: bool = True, **options):
    name = f"{project}.{function}.{variant}"
    gradients = tuple(key for key in tensors if differentiated and key not in NOT_DIFFERENTIATED)
    seeds = zlib.crc32(name.encode()), zlib.crc32(f"{name}/gradient".encode())
    CASES[name] = Case(project, function, tensors, options, gradients, *seeds)


# ---- selective scans


def _scan(dim, state, length, B="bnl", C="bnl", groups=2, D=False, z=False, bias=False, softplus=False):
    shapes = {"dn": (dim, state), "bnl": (2, state, length), "bgnl": (2, groups, state, length)}
    tensors = {
        "u": normal(2, dim, length),
        "delta": normal(2, dim, length, scale=0.5) if softplus else uniform(0.0, 0.5, 2, dim, length),
        "A": uniform(-2.0, -0.2, dim, state),
        "B": normal(*shapes[B]),
        "C": normal(*shapes[C]),
    }
    if D:
        tensors["D"] = normal(dim)
    if z:
        tensors["z"] = normal(2, dim, length)
    if bias:
        tensors["delta_bias"] = uniform(-1.0, 1.0, dim) if softplus else uniform(0.0, 0.5, dim)
    return tensors


ALL = {"D": True, "z": True, "bias": True, "softplus": True}

for _variant, _arguments in {
    "minimal": {"dim": 8, "state": 3, "length": 23},
    "D": {"dim": 6, "state": 1, "length": 7, "D": True},
    "z": {"dim": 5, "state": 3, "length": 19, "z": True},
    "bias": {"dim": 4, "state": 16, "length": 11, "bias": True},
    "softplus": {"dim": 4, "state": 3, "length": 40, "softplus": True},
    "no_z": {"dim": 8, "state": 16, "length": 33, **ALL, "z": False},
    "all": {"dim": 8, "state": 16, "length": 40, **ALL},
    "all_one_state": {"dim": 8, "state": 1, "length": 40, **ALL},
    "constant_B_C": {"dim": 7, "state": 3, "length": 21, "B": "dn", "C": "dn", **ALL},
    "constant_B": {"dim": 4, "state": 3, "length": 18, "B": "dn", **ALL},
    "constant_C": {"dim": 4, "state": 16, "length": 18, "C": "dn", **ALL},
    "one_group": {"dim": 6, "state": 3, "length": 17, "B": "bgnl", "C": "bgnl", "groups": 1, **ALL},
    "groups": {"dim": 8, "state": 3, "length": 25, "B": "bgnl", "C": "bgnl", **ALL},
    "groups_one_state": {"dim": 8, "state": 1, "length": 25, "B": "bgnl", "C": "bgnl", "groups": 4, **ALL},
    "groups_B": {"dim": 6, "state": 3, "length": 14, "B": "bgnl", "groups": 3, **ALL},
    "groups_B_constant_C": {"dim": 6, "state": 3, "length": 14, "B": "bgnl", "C": "dn", "groups": 3, **ALL},
}.items():
    _add(
        "mamba_ssm",
        "selective_scan_fn",
        _variant,
        _scan(**_arguments),
        delta_softplus=_arguments.get("softplus", False),
        return_last_state=_variant != "minimal",
    )

for _variant, _arguments in {
    "all": {"dim": 16, "state": 16, "length": 35, "D": True, "bias": True, "softplus": True},
    "one_state": {"dim": 16, "state": 1, "length": 35, "D": True, "bias": True, "softplus": True},
    "no_D": {"dim": 12, "state": 3, "length": 20, "bias": True, "softplus": True},
    "no_bias": {"dim": 12, "state": 3, "length": 20, "D": True, "softplus": True},
    "no_softplus": {"dim": 8, "state": 3, "length": 20, "D": True, "bias": True},
    "one_group": {"dim": 6, "state": 3, "length": 30, "D": True, "bias": True, "softplus": True, "groups": 1},
    "two_groups": {"dim": 6, "state": 3, "length": 30, "D": True, "bias": True, "softplus": True, "groups": 2},
    "eight_groups": {"dim": 16, "state": 1, "length": 30, "D": True, "bias": True, "softplus": True, "groups": 8},
}.items():
    _add(
        "vmamba",
        "selective_scan_fn",
        _variant,
        _scan(B="bgnl", C="bgnl", **{"groups": 4, **_arguments}),
        delta_softplus=_arguments.get("softplus", False),
        oflex=True,
    )

# ---- one step of a state


def _step(state, heads=0, groups=0, D=False, bias=False, z=False, dim=5):
    channels = (heads, dim) if heads else (dim,)
    tensors = {
        "state": normal(2, *channels, state),
        "x": normal(2, *channels),
        "dt": uniform(0.0, 1.0, 2, *channels),
        "A": uniform(-2.0, -0.2, *channels, state),
        "B": normal(2, groups, state) if groups else normal(2, state),
        "C": normal(2, groups, state) if groups else normal(2, state),
    }
    if D:
        tensors["D"] = normal(*channels)
    if z:
        tensors["z"] = normal(2, *channels)
    if bias:
        tensors["dt_bias"] = uniform(-1.0, 1.0, *channels)
    return tensors


for _variant, (_softplus, _arguments) in {
    "minimal": (False, {"state": 3}),
    "D": (False, {"state": 1, "D": True}),
    "z": (False, {"state": 3, "z": True}),
    "bias": (False, {"state": 3, "bias": True}),
    "softplus": (True, {"state": 16}),
    "all": (True, {"state": 16, "dim": 8, "D": True, "bias": True, "z": True}),
    "all_one_state": (True, {"state": 1, "dim": 8, "D": True, "bias": True, "z": True}),
    "one_group_of_no_heads": (True, {"state": 3, "groups": 1, "D": True, "bias": True, "z": True}),
    "heads": (False, {"state": 3, "heads": 4}),
    "heads_all": (True, {"state": 16, "heads": 4, "groups": 1, "D": True, "bias": True, "z": True}),
    "heads_groups": (True, {"state": 3, "heads": 4, "groups": 2, "D": True, "bias": True}),
    "heads_own_groups": (True, {"state": 1, "heads": 3, "groups": 3, "z": True, "bias": True}),
}.items():
    _add(
        "mamba_ssm",
        "selective_state_update",
        _variant,
        _step(**_arguments),
        differentiated=False,
        dt_softplus=_softplus,
    )

# ---- causal convolutions


def _convolution(width, dim=6, length=23, bias=True, initial=False):
    tensors = {"x": normal(2, dim, length), "weight": normal(dim, width, scale=0.5)}
    if bias:
        tensors["bias"] = normal(dim)
    if initial:
        tensors["initial_states"] = normal(2, dim, width - 1)
    return tensors


for _width, _activation in product((2, 3, 4), (None, "silu")):
    _variant = f"width{_width}_{_activation}"
    _add("causal_conv1d", "causal_conv1d_fn", _variant, _convolution(_width), activation=_activation)
    _add(
        "causal_conv1d",
        "causal_conv1d_fn",
        f"{_variant}_states",
        _convolution(_width, dim=4, length=15, initial=True),
        activation=_activation,
        return_final_states=True,
    )
for _variant, (_options, _arguments) in {
    "no_bias": ({"activation": None}, {"width": 4, "bias": False}),
    "swish": ({"activation": "swish"}, {"width": 4, "bias": False, "length": 40}),
    "initial_states": ({"activation": "silu"}, {"width": 4, "length": 9, "initial": True}),
    "final_states": ({"activation": "silu", "return_final_states": True}, {"width": 4, "length": 9}),
    "short": ({"activation": "silu", "return_final_states": True}, {"width": 4, "length": 2}),
    "short_states": ({"activation": "silu", "return_final_states": True}, {"width": 4, "length": 2, "initial": True}),
}.items():
    _add("causal_conv1d", "causal_conv1d_fn", _variant, _convolution(**_arguments), **_options)
for _variant, _rows in {
    "seq_idx": ([0] * 5 + [1] + [2] * 13, [0] * 10 + [1] * 9),
    "seq_idx_padded": ([3] * 2 + [5] * 12 + [-1] * 5, [0] * 19),
}.items():
    for _width, _activation in ((2, None), (4, "silu")):
        _add(
            "causal_conv1d",
            "causal_conv1d_fn",
            f"{_variant}_width{_width}_{_activation}",
            {**_convolution(_width, dim=8, length=19), "seq_idx": fixed(_rows, torch.int32)},
            activation=_activation,
        )


def _update(width, states=None, steps=3, dim=6, bias=True, cache=None):
    tensors = {
        "x": normal(2, dim, steps) if steps else normal(2, dim),
        "conv_state": normal(2, dim, states or width - 1),
        "weight": normal(dim, width, scale=0.5),
    }
    if bias:
        tensors["bias"] = normal(dim)
    if cache:
        tensors["cache_seqlens"] = fixed(cache, torch.int32)
    return tensors


for _width, _activation in product((2, 3, 4), (None, "silu")):
    _add(
        "causal_conv1d",
        "causal_conv1d_update",
        f"width{_width}_{_activation}",
        _update(_width, steps=0),
        differentiated=False,
        activation=_activation,
    )
for _variant, _arguments in {
    "steps": {"width": 4},
    "steps_width2": {"width": 2},
    "no_bias": {"width": 3, "bias": False},
    "longer_state": {"width": 4, "states": 7},
    "longer_state_one_step": {"width": 3, "states": 7, "steps": 0},
    "more_steps_than_states": {"width": 4, "states": 3, "steps": 5},
    "circular": {"width": 4, "states": 7, "cache": [5, 16]},
    "circular_one_step": {"width": 4, "states": 3, "steps": 0, "cache": [0, 4]},
    "circular_width2": {"width": 2, "states": 4, "cache": [2, 3]},
}.items():
    _add(
        "causal_conv1d",
        "causal_conv1d_update",
        _variant,
        _update(**_arguments),
        differentiated=False,
        activation="silu",
    )

# ---- the inner functions of Mamba blocks


def _inner(
    state, length, given=(), shape="bnl", D=True, bias=True, conv_bias=True, projection_biases=(), out=0, out_bias=False
):
    dim, rank = 8, 2
    shapes = {"dn": (dim, state), "bnl": (2, state, length), "bgnl": (2, 2, state, length)}
    tensors = {"xz": normal(2, 2 * dim, length), "conv1d_weight": normal(dim, 1, 4, scale=0.5)}
    tensors["conv1d_bias"] = normal(dim) if conv_bias else None
    tensors["x_proj_weight"] = normal(rank + (2 - len(given)) * state, dim, scale=0.15)
    tensors["delta_proj_weight"] = normal(dim, rank, scale=0.7)
    if out:
        tensors["out_proj_weight"] = normal(out, dim, scale=0.4)
        tensors["out_proj_bias"] = normal(out) if out_bias else None
    tensors["A"] = uniform(-2.0, -0.2, dim, state)
    tensors |= {name: normal(*shapes[shape]) for name in given}
    if D:
        tensors["D"] = normal(dim)
    if bias:
        tensors["delta_bias"] = uniform(-1.0, 1.0, dim)
    return tensors | {name: normal(state) for name in projection_biases}


def _add_inner(project: str, function: str, variant: str, tensors: dict[str, Draw | None]):
    """None is an argument that cannot be left out."""
    absent = {key: None for key, draw in tensors.items() if draw is None}
    drawn = {key: draw for key, draw in tensors.items() if draw is not None}
    _add(project, function, variant, drawn, delta_softplus=True, **absent)


BIASES = {"out_bias": True, "projection_biases": ("B_proj_bias", "C_proj_bias")}

for _variant, _arguments in {
    "dynamic": {"state": 16, "length": 21},
    "biases": {"state": 3, "length": 17, **BIASES},
    "biases_one_state": {"state": 1, "length": 40, **BIASES},
    "no_optional": {"state": 3, "length": 13, "D": False, "bias": False, "conv_bias": False},
    "given": {"state": 3, "length": 15, "given": ("B", "C"), "out_bias": True},
    "given_groups": {"state": 3, "length": 15, "given": ("B", "C"), "shape": "bgnl"},
    "given_constant": {"state": 16, "length": 15, "given": ("B", "C"), "shape": "dn"},
    "given_B": {"state": 3, "length": 15, "given": ("B",)},
    "given_C": {"state": 3, "length": 15, "given": ("C",)},
}.items():
    _add_inner("mamba_ssm", "mamba_inner_fn", _variant, _inner(**_arguments, out=6))
for _variant, _arguments in {
    "dynamic": {"state": 16, "length": 21},
    "biases": {"state": 3, "length": 17, "projection_biases": ("B_proj_bias", "C_proj_bias")},
    "no_optional": {"state": 1, "length": 13, "D": False, "bias": False, "conv_bias": False},
    "given": {"state": 3, "length": 15, "given": ("B", "C")},
}.items():
    _add_inner("vim", "mamba_inner_fn_no_out_proj", _variant, _inner(**_arguments))
for _variant, _arguments in {
    "dynamic": {"state": 16, "length": 21},
    "biases": {"state": 3, "length": 17, **BIASES},
    "no_optional": {"state": 1, "length": 13, "D": False, "bias": False, "conv_bias": False},
    "given": {"state": 3, "length": 15, "given": ("B", "C")},
}.items():
    _tensors = {}
    for _key, _draw in _inner(**_arguments, out=6).items():
        _tensors[_key] = _draw
        if _key == "A":
            _tensors["A_b"] = _draw  # of the same shape; drawn anew
    _add_inner("vim", "bimamba_inner_fn", _variant, _tensors)

# ---- whole modules: the input, then the state_dict in its order


def _vim_block(model, inner, rank, state):
    def direction(suffix):
        return {
            f"conv1d{suffix}.weight": normal(inner, 1, 4, scale=0.5),
            f"conv1d{suffix}.bias": normal(inner),
            f"x_proj{suffix}.weight": normal(rank + 2 * state, inner, scale=0.15),
            f"dt_proj{suffix}.weight": normal(inner, rank, scale=0.7),
            f"dt_proj{suffix}.bias": uniform(-2.0, 0.0, inner),
        }

    return {
        "hidden_states": normal(2, 17, model),
        "A_log": uniform(-1.0, 1.0, inner, state),
        "D": normal(inner),
        "A_b_log": uniform(-1.0, 1.0, inner, state),
        "D_b": normal(inner),
        "in_proj.weight": normal(2 * inner, model, scale=0.4),
        **direction(""),
        **direction("_b"),
        "out_proj.weight": normal(model, inner, scale=0.3),
    }


for _variant, _state, _divide in (("v2", 16, False), ("v2_divided", 3, True)):
    _add(
        "vim",
        "Mamba",
        _variant,
        _vim_block(6, 12, 2, _state),
        d_model=6,
        d_state=_state,
        d_conv=4,
        expand=2,
        dt_rank=2,
        bimamba_type="v2",
        if_divide_out=_divide,
    )


def _ss2d_core(inner, rank, state):
    return {
        "x_proj_weight": normal(4, rank + 2 * state, inner, scale=0.4),
        "A_logs": uniform(-1.0, 1.0, 4 * inner, state),
        "Ds": normal(4 * inner),
        "dt_projs_weight": normal(4, inner, rank, scale=0.7),
        "dt_projs_bias": uniform(-2.0, 0.0, 4, inner),
        "out_norm.weight": normal(inner, scale=0.2, shift=1.0),
        "out_norm.bias": normal(inner, scale=0.2),
    }


for _variant, _state, _options in (
    ("cross2d_one_state", 1, {"scan_mode": "cross2d"}),
    ("cross2d", 16, {"scan_mode": "cross2d"}),
    ("cross2d_channel_first", 3, {"scan_mode": "cross2d", "channel_first": True}),
    ("unidi", 3, {"scan_mode": "unidi"}),
    ("bidi", 3, {"scan_mode": "bidi"}),
    ("cascade2d", 3, {"scan_mode": "cascade2d", "no_einsum": True, "channel_first": True}),  # raises otherwise
):
    _add(
        "vmamba",
        "forward_corev2",
        _variant,
        {"x": normal(2, 8, 5, 7), **_ss2d_core(8, 2, _state)},
        **{"d_model": 4, "d_state": _state, "ssm_ratio": 2.0, "dt_rank": 2, "channel_first": False, **_options},
    )
for _variant, _gated in (("v05", True), ("v05_noz", False)):
    _add(
        "vmamba",
        "SS2D",
        _variant,
        {
            "x": normal(2, 5, 7, 4),
            **_ss2d_core(8, 2, 1),
            "in_proj.weight": normal(16 if _gated else 8, 4, scale=0.5),
            "conv2d.weight": normal(8, 1, 3, 3, scale=0.3),
            "conv2d.bias": normal(8),
            "out_proj.weight": normal(4, 8, scale=0.4),
        },
        d_model=4,
        d_state=1,
        ssm_ratio=2.0,
        dt_rank=2,
        forward_type=_variant,
    )


def _haar(channels):
    """The filters as published, entries ±1/2 but for their rounding: products of two float32 numbers 1/√2."""
    low, high = torch.tensor([[0.5**0.5, 0.5**0.5], [0.5**0.5, -(0.5**0.5)]])
    bands = [rows[:, None] * columns for rows, columns in ((low, low), (high, low), (low, high), (high, high))]
    return torch.stack(bands)[:, None].repeat(channels, 1, 1, 1)


def _wtconv(channels, kernel, levels, bias, height, width, batch=2):
    tensors = {
        "x": normal(batch, channels, height, width),
        "wt_filter": lambda _: _haar(channels),
        "iwt_filter": lambda _: _haar(channels),
        "base_conv.weight": normal(channels, 1, kernel, kernel, scale=1 / kernel),
    }
    if bias:
        tensors["base_conv.bias"] = normal(channels)
    tensors["base_scale.weight"] = normal(1, channels, 1, 1, scale=0.2, shift=1.0)
    for level in range(levels):
        tensors[f"wavelet_convs.{level}.weight"] = normal(4 * channels, 1, kernel, kernel, scale=1 / kernel)
    for level in range(levels):
        tensors[f"wavelet_scale.{level}.weight"] = normal(1, 4 * channels, 1, 1, scale=0.3, shift=0.5)
    return tensors


for _channels, _kernel, _stride, _bias, _levels, _height, _width in (
    (4, 5, 1, True, 1, 9, 11),
    (4, 3, 2, False, 1, 10, 8),
    (4, 3, 1, False, 2, 13, 10),
    (4, 5, 2, True, 2, 12, 15),
    (3, 3, 1, True, 3, 17, 15),
    (3, 5, 2, False, 4, 21, 19),
    (3, 5, 1, True, 5, 33, 37),
    (3, 3, 2, True, 5, 33, 37),
):
    _add(
        "wtconv",
        "WTConv2d",
        f"levels{_levels}_kernel{_kernel}_stride{_stride}",
        _wtconv(_channels, _kernel, _levels, _bias, _height, _width, batch=1 if _levels == 5 else 2),
        in_channels=_channels,
        out_channels=_channels,
        kernel_size=_kernel,
        stride=_stride,
        bias=_bias,
        wt_levels=_levels,
    )

# ---- VMamba's scans of an image

for _scans, _one_by_one, _in_first, _out_first in product((0, 1, 2), (False, True), (True, False), (True, False)):
    _image = ((2, 4) if _one_by_one else (2,), (2, 5, 7)) if _in_first else ((2, 5, 7), (4, 2) if _one_by_one else (2,))
    _sequences = (2, 4, 2, 5, 7) if _out_first else (2, 5, 7, 4, 2)
    _options = {
        "in_channel_first": _in_first,
        "out_channel_first": _out_first,
        "one_by_one": _one_by_one,
        "scans": _scans,
    }
    _variant = "_".join(
        [
            f"scans{_scans}",
            "first" if _in_first else "last",
            "first" if _out_first else "last",
            *(["one_by_one"] if _one_by_one else []),
        ]
    )
    _add("vmamba", "cross_scan_fn", _variant, {"x": normal(*_image[0], *_image[1])}, **_options)
    _add("vmamba", "cross_merge_fn", _variant, {"y": normal(*_sequences)}, **_options)
