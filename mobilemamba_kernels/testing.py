"""The one table of cases that feeds tests, fuzzing and benchmarks, and the one rule of how close is close."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

import mobilemamba_kernels
from mobilemamba_kernels.backends import use_backend

LAYOUTS = ("channels_first", "channels_last", "channels_slice", "strided")
"""Contiguous; positions outside, channels inside, as the network hands them; a slice of the channels of such a tensor,
as its mixer does; a slice of every dimension with steps, none dense, columns outside rows. Gaps hold NaN, which shows a
stray read."""


@dataclass(frozen=True)
class Argument:
    """One tensor of a case: an activation when it has positions, else a parameter, which stays float32."""

    shape: tuple[int, ...]
    mean: float = 0.0
    spread: float = 1.0  # standard deviation of an activation, half the width of a parameter's uniform interval
    positions: int = 0  # trailing dimensions that are positions, not channels
    packed: torch.dtype | None = None  # of a parameter that pack_weight has packed

    def make(self, dtype: torch.dtype, layout: str, device: str, generator: torch.Generator) -> Tensor:
        if not self.positions:
            values = 2 * torch.rand(self.shape, generator=generator, dtype=torch.float64) - 1
            kept = torch.float64 if dtype == torch.float64 else torch.float32
            made = (self.mean + self.spread * values).to(device, kept)
            if self.packed is None:
                return made
            packed = mobilemamba_kernels.pack_weight(made, self.packed)
            return packed.double() if dtype == torch.float64 else packed
        values = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return _lay_out((self.mean + self.spread * values).to(device, dtype), self.positions, layout)


def _lay_out(values: Tensor, positions: int, layout: str) -> Tensor:
    if layout == "channels_first":
        return values
    if layout == "strided":
        if positions == 2:  # columns outside rows too: height and width are then not one dimension of positions
            return _lay_out(values.mT, 1, layout).mT
        *outer, last = values.shape
        room = values.new_full((*(n + 2 for n in outer), 2 * last + 2), math.nan)
        return room[(*(slice(1, n + 1) for n in outer), slice(1, 2 * last + 1, 2))].copy_(values)
    order = (0, *range(values.ndim - positions, values.ndim), *range(1, values.ndim - positions))
    back = sorted(range(values.ndim), key=order.__getitem__)
    dense = values.permute(order)
    if layout == "channels_slice":
        room = dense.new_full((*dense.shape[:-1], dense.shape[-1] + 5), math.nan)
        return room[..., 3:-2].copy_(dense).permute(back)
    return dense.contiguous().permute(back)


@dataclass(frozen=True)
class Numbers:
    """The numbers of the sequences that positions belong to, (batch, L), int32: growing, padding (-1) at the end."""

    shape: tuple[int, ...]
    positions: int = 1

    def make(self, dtype: torch.dtype, layout: str, device: str, generator: torch.Generator) -> Tensor:
        begins = torch.rand(self.shape, generator=generator) < 0.3
        numbers = begins.int().cumsum(-1, dtype=torch.int32)
        numbers[:, max(self.shape[1] - 2, 1) :] = -1
        return numbers.to(device)


@dataclass(frozen=True, eq=False)
class Case:
    """A call of one operator.

    ``op`` is the public function, ``name`` says what is particular, ``arguments`` maps keywords to an
    :class:`Argument` (or a list of them, one a level) and ``options`` to other values. Cases with ``benchmark`` are the
    shapes of the network that speed is measured at.
    """

    op: str
    name: str
    arguments: Mapping[str, Argument | Numbers | Sequence[Argument]]
    options: Mapping[str, Any] = field(default_factory=dict)
    benchmark: bool = False

    def __str__(self) -> str:
        return f"{self.op}[{self.name}]"

    @property
    def operator(self) -> str:
        """The name below ``torch.ops.mobilemamba``, without ``_fwd`` or ``_bwd``."""
        return self.op.removesuffix("_fn")

    def make(
        self,
        dtype: torch.dtype = torch.float32,
        layout: str = "channels_first",
        device: str = "cpu",
        seed: int = 0,
    ) -> dict[str, Any]:
        """Build the keyword arguments; activations have ``dtype`` and one of :data:`LAYOUTS`."""
        generator = torch.Generator().manual_seed(seed)
        made = pytree.tree_map_only(
            (Argument, Numbers), lambda a: a.make(dtype, layout, device, generator), dict(self.arguments)
        )
        return made | dict(self.options)

    def run(self, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Call the public function; its results as a tuple."""
        results = getattr(mobilemamba_kernels, self.op)(**arguments)
        return results if isinstance(results, tuple) else (results,)

    def peer(self, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """What a user of plain PyTorch runs instead: the peer that speed is compared with. The reference by default."""
        if self.op in PEERS:
            return (PEERS[self.op](**arguments),)
        with use_backend("reference"):
            return self.run(arguments)


def tensors(arguments: Any) -> dict[str, Tensor]:
    """The floating-point tensors among ``arguments``, named as their keywords ("weight.1" in a sequence)."""
    leaves, _ = pytree.tree_flatten_with_path(arguments)
    return {
        ".".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path): leaf
        for path, leaf in leaves
        if _is_floating(leaf)
    }


def map_tensors(function: Callable[[Tensor], Tensor], arguments: Any) -> Any:
    """Apply ``function`` to every floating-point tensor among ``arguments``."""
    return pytree.tree_map_only(_is_floating, function, arguments)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def traffic(*trees: Any) -> int:
    """Bytes of every tensor in ``trees``: what a pass that reads and writes each once moves."""
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(trees) if isinstance(t, Tensor))


def wavelet_with_convolutions(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, base: Tensor | None = None
) -> Tensor:
    """``wavelet_depthwise_conv2d`` of one level as the published network writes it, in convolutions."""
    channels, (height, width) = x.shape[1], x.shape[2:]
    filters = _haar_filters(channels, x.dtype, x.device)
    y = F.conv2d(F.pad(x, (0, width % 2, 0, height % 2)), filters, stride=2, groups=channels)
    y = F.conv2d(y, weight.to(x.dtype), padding=weight.shape[-1] // 2, groups=4 * channels)
    if scale is not None:
        y = y * scale.to(x.dtype).view(-1, 1, 1)
    y = F.conv_transpose2d(y, filters, stride=2, groups=channels)[:, :, :height, :width]
    return y if base is None else y + base


def wtconv_with_convolutions(layer: Any, x: Tensor) -> Tensor:
    """A layer of WTConv as the cascade of convolutions that it is published as."""
    low, kept = x, []
    for conv, scale in zip(layer.wavelet_convs, layer.wavelet_scale, strict=True):
        height, width = low.shape[2:]
        padded = F.pad(low, (0, width % 2, 0, height % 2))
        bands = F.conv2d(padded, layer.wt_filter, stride=2, groups=x.shape[1])
        low = bands[:, ::4]
        kept.append((conv(bands) * scale.weight, (height, width)))
    lifted = torch.zeros_like(low)
    for bands, (height, width) in reversed(kept):
        bands = bands.clone()
        bands[:, ::4] += lifted
        lifted = F.conv_transpose2d(bands, layer.iwt_filter, stride=2, groups=x.shape[1])[..., :height, :width]
    return layer.base_conv(x) * layer.base_scale.weight + lifted


def causal_with_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """``causal_conv1d_fn`` without states and sequence numbers, as models write it without a kernel."""
    width, length = weight.shape[1], x.shape[-1]
    weight, bias = weight.unsqueeze(1).to(x.dtype), None if bias is None else bias.to(x.dtype)
    y = F.conv1d(x, weight, bias, padding=width - 1, groups=x.shape[1])[..., :length]
    return y if options["activation"] is None else F.silu(y)


@functools.cache
def _haar_filters(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    signs = [[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]
    with torch.inference_mode(False):  # normal tensors for every caller, also when the first one is in that mode
        return (torch.tensor(signs, dtype=dtype, device=device) / 2).unsqueeze(1).repeat(channels, 1, 1, 1)


PEERS: dict[str, Callable[..., Tensor]] = {
    "wavelet_depthwise_conv2d": wavelet_with_convolutions,
    "causal_conv1d_fn": causal_with_conv1d,
}
"""The peers that are not the reference."""


# --- the table ---------------------------------------------------------------------------------------------------


def _steps(shape: tuple[int, ...], softplus: bool) -> Argument:
    """Step sizes of about 0.3, for which the decay exp(Δ A) of a step is about 0.8: memory of some positions."""
    return Argument(shape, mean=-1.0, positions=1) if softplus else Argument(shape, 0.3, 0.05, positions=1)


_A_MEAN, _A_SPREAD = -0.75, 0.25


def _selective_scan(
    batch: int, dim: int, length: int, state: int, *, bc: str = "BNL", has: str = "", benchmark: bool = False
) -> Case:
    """``bc``: "DN", "BNL" or the number of groups; ``has``: D, z, b(ias), s(oftplus), l(ast state)."""
    shape = (batch, dim, length)
    if bc == "DN":
        B = Argument((dim, state))
    else:
        B = Argument((batch, state, length) if bc == "BNL" else (batch, int(bc), state, length), positions=1)
    arguments = {
        "u": Argument(shape, positions=1),
        "delta": _steps(shape, "s" in has),
        "A": Argument((dim, state), _A_MEAN, _A_SPREAD),
        "B": B,
        "C": B,
    }
    arguments |= {"D": Argument((dim,))} if "D" in has else {}
    arguments |= {"z": Argument(shape, positions=1)} if "z" in has else {}
    arguments |= {"delta_bias": Argument((dim,), spread=0.5 if "s" in has else 0.05)} if "b" in has else {}
    name = f"{batch}x{dim}x{length}-N{state}-{bc}" + ("-" + has if has else "")
    options = {"delta_softplus": "s" in has, "return_last_state": "l" in has}
    return Case("selective_scan_fn", name, arguments, options, benchmark)


def _bidirectional(
    batch: int, dim: int, length: int, state: int, *, two_inputs: bool = False, has: str = "", benchmark: bool = False
) -> Case:
    """``has`` as in :func:`_selective_scan`."""
    u = (batch, 2, dim, length) if two_inputs else (batch, dim, length)
    B = Argument((batch, 2, state, length), positions=1)
    arguments = {
        "u": Argument(u, positions=1),
        "delta": _steps((batch, 2, dim, length), "s" in has),
        "A": Argument((2, dim, state), _A_MEAN, _A_SPREAD),
        "B": B,
        "C": B,
    }
    arguments |= {"D": Argument((2, dim))} if "D" in has else {}
    arguments |= {"z": Argument((batch, dim, length), positions=1)} if "z" in has else {}
    arguments |= {"delta_bias": Argument((2, dim), spread=0.5 if "s" in has else 0.05)} if "b" in has else {}
    name = f"{batch}x{dim}x{length}-N{state}" + ("-two" if two_inputs else "") + ("-" + has if has else "")
    return Case("bidirectional_selective_scan", name, arguments, {"delta_softplus": "s" in has}, benchmark)


def _ss2d(
    batch: int, d: int, height: int, width: int, rank: int, state: int = 1, gate: bool = True, benchmark: bool = False
) -> Case:
    image = Argument((batch, d, height, width), positions=2)
    arguments = {
        "x": image,
        "z": image,
        "x_proj_weight": Argument((2, rank + 2 * state, d), spread=(3 / max(d, 1)) ** 0.5),
        "dt_proj_weight": Argument((2, d, rank), spread=0.5 * (3 / rank) ** 0.5),
        "dt_proj_bias": Argument((2, d), -1.0, 0.5),
        "A_log": Argument((2, d, state), -0.3, 0.3),
        "D": Argument((2, d)),
        "norm_weight": Argument((d,), 1.0, 0.5),
        "norm_bias": Argument((d,)),
    }
    name = f"{batch}x{d}x{height}x{width}-N{state}-r{rank}" + ("" if gate else "-nogate")
    options = {} if gate else {"z": None}
    return Case(
        "ss2d_bidirectional", name, {k: v for k, v in arguments.items() if k not in options}, options, benchmark
    )


def _causal_conv1d(batch: int, dim: int, length: int, width: int, *, has: str = "", benchmark: bool = False) -> Case:
    """``has``: b(ias), q (seq_idx), i(nitial states), f(inal states), s(ilu)."""
    arguments: dict[str, Any] = {
        "x": Argument((batch, dim, length), positions=1),
        "weight": Argument((dim, width), spread=(3 / width) ** 0.5),
    }
    arguments |= {"bias": Argument((dim,))} if "b" in has else {}
    arguments |= {"seq_idx": Numbers((batch, length))} if "q" in has else {}
    arguments |= {"initial_states": Argument((batch, dim, width - 1), positions=1)} if "i" in has else {}
    name = f"{batch}x{dim}x{length}-w{width}" + ("-" + has if has else "")
    options = {"activation": "silu" if "s" in has else None, "return_final_states": "f" in has}
    return Case("causal_conv1d_fn", name, arguments, options, benchmark)


def _cross(
    op: str,
    batch: int,
    channels: int,
    height: int,
    width: int,
    scans: int = 0,
    *,
    has: str = "",
    benchmark: bool = False,
) -> Case:
    """``has``: i(mages with their channels last), o(utput, the sequences, so), 1 (one image a sequence)."""
    x, last = ("y", "o" in has) if op == "cross_merge_fn" else ("x", "i" in has)
    own = (4,) if "1" in has or op == "cross_merge_fn" else ()
    shape = (batch, height, width, *own, channels) if last else (batch, *own, channels, height, width)
    name = f"{batch}x{channels}x{height}x{width}-{scans}" + ("-" + has if has else "")
    options = {
        "in_channel_first": "i" not in has,
        "out_channel_first": "o" not in has,
        "one_by_one": "1" in has,
        "scans": scans,
    }
    return Case(op, name, {x: Argument(shape, positions=2)}, options, benchmark)


def _dwt(batch: int, channels: int, height: int, width: int, benchmark: bool = False) -> Case:
    x = Argument((batch, channels, height, width), positions=2)
    return Case("haar_dwt2d", f"{batch}x{channels}x{height}x{width}", {"x": x}, {}, benchmark)


def _idwt(batch: int, channels: int, height: int, width: int, benchmark: bool = False) -> Case:
    bands = Argument((batch, channels, 4, (height + 1) // 2, (width + 1) // 2), positions=2)
    options = {"size": (height, width)}
    return Case("haar_idwt2d", f"{batch}x{channels}x{height}x{width}", {"bands": bands}, options, benchmark)


def _wavelet(
    batch: int,
    channels: int,
    height: int,
    width: int,
    k: int,
    *,
    levels: int = 1,
    has: str = "sb",
    benchmark: bool = False,
) -> Case:
    """``has``: s(cale), b(ase)."""
    image = Argument((batch, channels, height, width), positions=2)
    weights = [Argument((4 * channels, 1, k, k), spread=3**0.5 / k)] * levels
    scales = [Argument((1, 4 * channels, 1, 1) if levels == 1 else (4 * channels,), 1.0, 0.5)] * levels
    arguments: dict[str, Any] = {"x": image, "weight": weights if levels > 1 else weights[0]}
    arguments |= {"scale": scales if levels > 1 else scales[0]} if "s" in has else {}
    arguments |= {"base": image} if "b" in has else {}
    name = f"{batch}x{channels}x{height}x{width}-k{k}" + (f"-levels{levels}" if levels > 1 else "")
    return Case("wavelet_depthwise_conv2d", name + ("-" + has if has else ""), arguments, {}, benchmark)


def _depthwise(
    batch: int,
    channels: int,
    height: int,
    width: int,
    k: int = 3,
    *,
    stride: int = 1,
    padding: int | None = None,
    activation: str = "none",
    has: str = "br",
    benchmark: bool = False,
) -> Case:
    """``has``: b(ias), r(esidual), s(cale), t (shift)."""
    pad = k // 2 if padding is None else padding
    out = (batch, channels, *((n + 2 * pad - k) // stride + 1 for n in (height, width)))
    arguments = {
        "x": Argument((batch, channels, height, width), positions=2),
        "weight": Argument((channels, 1, k, k), spread=3**0.5 / k),
    }
    arguments |= {"bias": Argument((channels,))} if "b" in has else {}
    arguments |= {"residual": Argument(out, positions=2)} if "r" in has else {}
    arguments |= {"scale": Argument((channels,))} if "s" in has else {}
    arguments |= {"shift": Argument((channels,))} if "t" in has else {}
    name = f"{batch}x{channels}x{height}x{width}-k{k}-s{stride}-p{pad}-{activation}" + ("-" + has if has else "")
    options = {"stride": stride, "padding": padding, "activation": activation}
    return Case("depthwise_conv2d_act", name, arguments, options, benchmark)


def _conv(
    batch: int,
    channels: int,
    out: int,
    height: int,
    width: int,
    k: int = 3,
    *,
    stride: int = 1,
    padding: int | None = None,
    activation: str = "none",
    bias: bool = True,
    packed: torch.dtype | None = None,
    benchmark: bool = False,
) -> Case:
    arguments = {
        "x": Argument((batch, channels, height, width), positions=2),
        "weight": Argument((out, channels, k, k), spread=(3 / max(channels, 1)) ** 0.5 / k, packed=packed),
    }
    arguments |= {"bias": Argument((out,))} if bias else {}
    pad = k // 2 if padding is None else padding
    name = f"{batch}x{channels}to{out}x{height}x{width}-k{k}-s{stride}-p{pad}-{activation}" + (
        "" if bias else "-nobias"
    )
    name += _packed_as(packed)
    options = {"stride": stride, "padding": padding, "activation": activation}
    return Case("conv2d_act", name, arguments, options, benchmark)


def _packed_as(packed: torch.dtype | None) -> str:
    return "" if packed is None else f"-packed-{str(packed).removeprefix('torch.')}"


def _pointwise(
    batch: int,
    channels: int,
    out: int,
    height: int,
    width: int,
    *,
    activation: str = "none",
    input_activation: str = "none",
    has: str = "b",
    maps: int = 1,
    packed: torch.dtype | None = None,
    benchmark: bool = False,
) -> Case:
    """``has``: b(ias), r(esidual); ``maps``: that hold the channels, the last one fewer."""
    parts = [channels // maps] * (maps - 1) + [channels - channels // maps * (maps - 1)]
    images = [Argument((batch, part, height, width), positions=2) for part in reversed(parts)]
    arguments: dict[str, Any] = {
        "x": images if maps > 1 else images[0],
        "weight": Argument((out, channels), spread=(3 / max(channels, 1)) ** 0.5, packed=packed),
    }
    arguments |= {"bias": Argument((out,))} if "b" in has else {}
    arguments |= {"residual": Argument((batch, out, height, width), positions=2)} if "r" in has else {}
    name = f"{batch}x{channels}to{out}x{height}x{width}-{input_activation}-{activation}" + ("-" + has if has else "")
    name += (f"-maps{maps}" if maps > 1 else "") + _packed_as(packed)
    options = {"activation": activation, "input_activation": input_activation}
    return Case("pointwise_conv2d_act", name, arguments, options, benchmark)


def _feed_forward(
    batch: int,
    channels: int,
    hidden: int,
    height: int,
    width: int,
    *,
    activation: str = "relu",
    has: str = "b",
    packed: torch.dtype | None = None,
    benchmark: bool = False,
) -> Case:
    """``has``: b(iases), r(esidual)."""
    image = Argument((batch, channels, height, width), positions=2)
    arguments = {
        "x": image,
        "w1": Argument((hidden, channels), spread=(3 / max(channels, 1)) ** 0.5, packed=packed),
        "w2": Argument((channels, hidden), spread=(3 / max(hidden, 1)) ** 0.5, packed=packed),
    }
    biases = {"b1": Argument((hidden,)), "b2": Argument((channels,))}
    arguments |= {"residual": image} if "r" in has else {}
    name = f"{batch}x{channels}to{hidden}x{height}x{width}-{activation}-{has}" + _packed_as(packed)
    options = {"activation": activation} | ({} if "b" in has else dict.fromkeys(biases))
    return Case("feed_forward", name, arguments | (biases if "b" in has else {}), options, benchmark)


def _squeeze_excite(
    batch: int,
    channels: int,
    hidden: int,
    height: int,
    width: int,
    *,
    bias: bool = True,
    packed: torch.dtype | None = None,
    benchmark: bool = False,
) -> Case:
    arguments = {
        "x": Argument((batch, channels, height, width), positions=2),
        "w1": Argument((hidden, channels), spread=(3 / max(channels, 1)) ** 0.5, packed=packed),
        "w2": Argument((channels, hidden), spread=(3 / max(hidden, 1)) ** 0.5, packed=packed),
    }
    biases = {"b1": Argument((hidden,)), "b2": Argument((channels,))}
    name = f"{batch}x{channels}to{hidden}x{height}x{width}" + ("" if bias else "-nobias") + _packed_as(packed)
    options = {} if bias else dict.fromkeys(biases)
    return Case("squeeze_excite", name, arguments | (biases if bias else {}), options, benchmark)


BUILDERS: dict[str, Callable[..., Case]] = {
    "selective_scan_fn": _selective_scan,
    "bidirectional_selective_scan": _bidirectional,
    "ss2d_bidirectional": _ss2d,
    "causal_conv1d_fn": _causal_conv1d,
    "cross_scan_fn": functools.partial(_cross, "cross_scan_fn"),
    "cross_merge_fn": functools.partial(_cross, "cross_merge_fn"),
    "haar_dwt2d": _dwt,
    "haar_idwt2d": _idwt,
    "wavelet_depthwise_conv2d": _wavelet,
    "depthwise_conv2d_act": _depthwise,
    "conv2d_act": _conv,
    "pointwise_conv2d_act": _pointwise,
    "feed_forward": _feed_forward,
    "squeeze_excite": _squeeze_excite,
}
"""What builds a case of each operator from its sizes: the table below, and fuzzing."""

CASES: tuple[Case, ...] = (
    _selective_scan(1, 1, 1, 1),
    _selective_scan(2, 5, 7, 1, has="Dzbsl"),
    _selective_scan(2, 37, 196, 1, bc="1", has="Dbs"),
    _selective_scan(1, 16, 300, 1, has="zs"),
    _selective_scan(1, 6, 1100, 1, bc="2", has="Dbsl"),
    _selective_scan(2, 20, 49, 16, bc="2", has="Dzbsl"),
    _selective_scan(1, 6, 7, 3, bc="3", has="D"),
    _selective_scan(2, 6, 7, 3, bc="DN", has="Dzb"),
    _selective_scan(1, 3, 7, 256, has="Dzbsl"),
    _selective_scan(2, 136, 21, 1, bc="2", has="Dzbsl"),
    _selective_scan(1, 16, 49, 1, has="s"),
    _selective_scan(1, 150, 72, 16, has="zbsl"),
    _selective_scan(0, 5, 7, 1, has="Dzbsl"),
    _selective_scan(2, 5, 0, 3, has="Dzbsl"),
    _selective_scan(2, 0, 7, 3, has="Dzbsl"),
    _selective_scan(16, 320, 196, 1, has="Dbs", benchmark=True),
    _selective_scan(4, 320, 196, 16, has="Dzbs", benchmark=True),
    _bidirectional(1, 1, 1, 1),
    _bidirectional(2, 5, 7, 1, has="Dzbs"),
    _bidirectional(2, 5, 7, 1, two_inputs=True, has="Dzbs"),
    _bidirectional(2, 37, 196, 1, has="Dbs"),
    _bidirectional(1, 16, 300, 1, has="zs"),
    _bidirectional(2, 2, 1100, 1, two_inputs=True, has="Dbs"),
    _bidirectional(2, 20, 49, 16, has="Dzbs"),
    _bidirectional(2, 6, 7, 3, two_inputs=True, has="Db"),
    _bidirectional(1, 3, 7, 256, has="Dzbs"),
    _bidirectional(2, 70, 18, 1, has="Dzbs"),
    _bidirectional(2, 70, 18, 1, two_inputs=True, has="s"),
    _bidirectional(2, 4, 1, 1, two_inputs=True, has="Dz"),
    _bidirectional(0, 5, 7, 1, has="Dzbs"),
    _bidirectional(2, 5, 0, 3, two_inputs=True, has="Dzbs"),
    _bidirectional(2, 0, 7, 1, has="Dzbs"),
    _bidirectional(16, 320, 196, 1, has="Dbs", benchmark=True),
    _bidirectional(1, 320, 196, 1, has="Dbs", benchmark=True),
    _bidirectional(16, 544, 49, 1, has="Dbs", benchmark=True),
    _ss2d(1, 7, 1, 1, rank=1),  # of fewer channels a LayerNorm leaves little but rounding
    _ss2d(2, 5, 3, 4, rank=2),
    _ss2d(2, 5, 3, 4, rank=2, gate=False),
    _ss2d(1, 37, 14, 14, rank=3),
    _ss2d(2, 20, 5, 7, rank=2, state=16),
    _ss2d(1, 6, 3, 3, rank=1, state=3),
    _ss2d(1, 17, 2, 3, rank=1, state=256),
    _ss2d(2, 70, 3, 5, rank=14),
    _ss2d(1, 6, 3, 3, rank=23),
    _ss2d(0, 5, 3, 4, rank=2),
    _ss2d(2, 5, 0, 4, rank=2),
    _ss2d(16, 320, 14, 14, rank=10, benchmark=True),
    _ss2d(1, 320, 14, 14, rank=10, benchmark=True),
    _ss2d(16, 544, 7, 7, rank=17, benchmark=True),
    _causal_conv1d(1, 1, 1, 2),
    _causal_conv1d(2, 5, 7, 4, has="bs"),
    _causal_conv1d(2, 5, 7, 3, has="bifs"),
    _causal_conv1d(2, 37, 270, 4, has="bqs"),
    _causal_conv1d(1, 6, 2, 4, has="if"),
    _causal_conv1d(1, 5, 1500, 4, has="bs"),
    _causal_conv1d(1, 3, 9, 2, has="q"),
    _causal_conv1d(2, 12, 43, 4, has="bifs"),  # vectors on GPUs, as the next four
    _causal_conv1d(1, 8, 2, 4, has="is"),
    _causal_conv1d(2, 5, 72, 3, has="bis"),
    _causal_conv1d(1, 8, 24, 2),
    _causal_conv1d(1, 128, 1504, 4, has="b"),
    _causal_conv1d(0, 5, 7, 4, has="bifs"),
    _causal_conv1d(2, 5, 0, 4, has="bs"),
    _causal_conv1d(2, 0, 7, 4, has="bqs"),
    _causal_conv1d(1, 1536, 512, 4, has="bs", benchmark=True),
    *(
        case
        for op in ("cross_scan_fn", "cross_merge_fn")
        for case in (
            _cross(op, 2, 5, 7, 4),
            _cross(op, 2, 37, 14, 33, has="i"),
            _cross(op, 1, 1, 1, 1),
            _cross(op, 2, 37, 14, 13, has="o"),
            _cross(op, 1, 300, 5, 6, has="io"),
            _cross(op, 1, 3, 70, 40),
            _cross(op, 1, 257, 4, 4),
            _cross(op, 1, 1800, 1, 1, 2),
            _cross(op, 1, 3, 35, 40, 1),
            _cross(op, 2, 20, 7, 4, 1, has="io1"),
            _cross(op, 1, 3, 35, 40, 2),
            _cross(op, 2, 5, 7, 19, 2, has="i"),
            _cross(op, 2, 5, 7, 4, has="1"),
            _cross(op, 2, 20, 17, 4, 2, has="o1"),
            _cross(op, 2, 8, 8, 72),  # vectors of channels and of positions, some shorter, and several tiles on GPUs
            _cross(op, 1, 48, 16, 72, has="i"),
            _cross(op, 1, 72, 6, 76, has="o"),
            _cross(op, 2, 24, 6, 10, has="i"),
            _cross(op, 2, 24, 8, 6, has="io"),
            _cross(op, 1, 8, 8, 16, 2, has="i1"),
            _cross(op, 1, 8, 8, 16, 1, has="o"),
            _cross(op, 0, 3, 4, 4),
            _cross(op, 2, 3, 0, 5, has="io"),
            _cross(op, 2, 0, 4, 4, has="1"),
            _cross(op, 8, 96, 56, 56, benchmark=True),
        )
    ),
    _dwt(1, 1, 1, 1),
    _dwt(2, 5, 7, 4),
    _dwt(2, 37, 14, 13),
    _dwt(2, 24, 7, 9),
    _dwt(3, 6, 14, 14),
    _dwt(1, 24, 63, 40),
    _dwt(0, 3, 4, 4),
    _dwt(2, 3, 0, 5),
    _dwt(2, 0, 4, 4),
    _dwt(16, 160, 14, 14, benchmark=True),
    _dwt(16, 272, 7, 7, benchmark=True),
    _idwt(1, 1, 1, 1),
    _idwt(2, 5, 7, 4),
    _idwt(2, 37, 14, 13),
    _idwt(2, 24, 7, 9),
    _idwt(3, 6, 14, 14),
    _idwt(1, 24, 63, 40),
    _idwt(0, 3, 4, 4),
    _idwt(2, 3, 0, 5),
    _idwt(2, 0, 4, 4),
    _idwt(16, 160, 14, 14, benchmark=True),
    _idwt(16, 272, 7, 7, benchmark=True),
    _wavelet(1, 1, 1, 1, k=1, has=""),
    _wavelet(2, 5, 7, 4, k=3, has="s"),
    _wavelet(2, 5, 5, 5, k=7, has="b"),
    _wavelet(1, 37, 14, 13, k=7),
    _wavelet(2, 16, 8, 8, k=5),
    _wavelet(1, 3, 2, 9, k=9),
    _wavelet(2, 5, 11, 7, k=5, levels=2),
    _wavelet(1, 3, 9, 16, k=3, levels=3),
    _wavelet(1, 3, 9, 6, k=3, levels=3, has=""),
    _wavelet(3, 38, 13, 14, k=7),  # pairs of channels on GPUs, as the next
    _wavelet(9, 6, 4, 3, k=3),
    _wavelet(0, 3, 4, 4, k=3),
    _wavelet(2, 3, 0, 5, k=3),
    _wavelet(2, 0, 4, 4, k=3),
    _wavelet(16, 160, 14, 14, k=7, benchmark=True),
    _wavelet(16, 272, 7, 7, k=5, benchmark=True),
    _wavelet(16, 272, 4, 4, k=3, benchmark=True),
    _wavelet(1, 160, 14, 14, k=7, benchmark=True),
    _depthwise(1, 1, 1, 1, k=1, has=""),
    _depthwise(2, 5, 7, 4, activation="relu"),
    _depthwise(2, 5, 7, 4, k=2, activation="silu", padding=1, has="r"),
    _depthwise(1, 37, 14, 13, k=7, activation="silu", has="brst"),
    _depthwise(2, 16, 9, 8, k=5, stride=2, activation="relu", has="b"),
    _depthwise(2, 5, 7, 6, k=3, stride=2, padding=0),
    _depthwise(1, 3, 5, 5, k=3, stride=3, padding=3, has="t"),
    _depthwise(1, 3, 3, 3, k=7),
    _depthwise(3, 6, 21, 19, k=3, activation="silu"),  # pairs of channels on GPUs, as the next two
    _depthwise(1, 72, 11, 18, k=7, stride=2, has="r"),
    _depthwise(5, 24, 7, 6, k=5, activation="relu", has="brst"),
    _depthwise(2, 40, 6, 7, k=3, activation="none", has="s"),
    _depthwise(21, 72, 4, 5, activation="relu", has="br"),  # blocks of several images on GPUs, as the next one
    _depthwise(7, 64, 16, 16, activation="silu", has="b"),
    _depthwise(0, 3, 4, 4),
    _depthwise(2, 0, 4, 4),
    _depthwise(16, 192, 14, 14, benchmark=True),
    _depthwise(16, 320, 14, 14, activation="silu", has="b", benchmark=True),
    _depthwise(16, 32, 14, 14, k=7, activation="relu", has="bst", benchmark=True),
    _depthwise(16, 768, 14, 14, stride=2, activation="relu", has="b", benchmark=True),
    _depthwise(16, 384, 7, 7, benchmark=True),
    _depthwise(16, 448, 4, 4, benchmark=True),
    _depthwise(1, 192, 14, 14, benchmark=True),
    _conv(1, 1, 1, 1, 1, k=1, bias=False),
    _conv(2, 3, 24, 13, 20, stride=2, activation="relu"),
    _conv(2, 20, 37, 5, 9, k=2, padding=1, activation="silu"),
    _conv(1, 5, 48, 7, 11, k=5, stride=3, padding=0),
    _conv(1, 2, 3, 2, 3, k=7, bias=False),
    _conv(2, 4, 8, 3, 3, padding=0),  # one position
    _conv(2, 4, 1, 6, 6, stride=2),  # one filter
    _conv(0, 3, 8, 4, 4),
    _conv(2, 0, 4, 3, 3),
    _conv(2, 3, 0, 4, 4),
    _conv(2, 6, 20, 5, 6, stride=2, activation="relu", packed=torch.float32),
    _conv(2, 6, 52, 5, 6, stride=2, packed=torch.bfloat16),
    _conv(1, 3, 20, 5, 6, packed=torch.bfloat16),  # a row of the filter holds no whole pairs
    _conv(16, 3, 24, 224, 224, stride=2, activation="relu", benchmark=True),
    # Without their ReLU: among two million sums some are within rounding of its kink, and then no gradient is right.
    _conv(16, 24, 48, 112, 112, stride=2, benchmark=True),
    _conv(16, 48, 96, 56, 56, stride=2, benchmark=True),
    _conv(16, 96, 192, 28, 28, stride=2, benchmark=True),
    _conv(1, 96, 192, 28, 28, stride=2, benchmark=True),
    _pointwise(1, 1, 1, 1, 1, has=""),
    _pointwise(2, 5, 7, 3, 4, activation="relu", has="br"),
    _pointwise(2, 37, 20, 5, 5, activation="silu", input_activation="relu", has="r"),
    _pointwise(1, 16, 37, 7, 7, input_activation="silu", has="br"),
    _pointwise(0, 3, 4, 4, 4),
    _pointwise(2, 3, 4, 0, 5),
    _pointwise(2, 0, 4, 3, 3),
    _pointwise(2, 4, 0, 3, 3),
    _pointwise(2, 37, 20, 5, 5, input_activation="relu", has="br", maps=3),
    _pointwise(1, 40, 50, 9, 16, activation="relu", maps=2, packed=torch.float32),
    _pointwise(2, 37, 53, 5, 5, input_activation="relu", has="br", maps=3, packed=torch.bfloat16),
    _pointwise(3, 64, 112, 7, 7, has="br", packed=torch.bfloat16),
    _pointwise(16, 160, 640, 14, 14, benchmark=True),
    _pointwise(16, 320, 160, 14, 14, benchmark=True),
    _pointwise(16, 192, 192, 14, 14, input_activation="relu", has="br", benchmark=True),
    _pointwise(16, 192, 768, 14, 14, activation="relu", benchmark=True),
    _pointwise(16, 448, 448, 4, 4, input_activation="relu", has="br", benchmark=True),
    _pointwise(1, 160, 640, 14, 14, benchmark=True),
    _feed_forward(1, 1, 1, 1, 1),
    _feed_forward(2, 5, 11, 3, 4, has="br"),
    _feed_forward(2, 37, 74, 5, 5, activation="silu"),
    _feed_forward(1, 16, 20, 7, 7, activation="none", has="r"),
    _feed_forward(2, 21, 43, 9, 10, has="br", packed=torch.float32),
    _feed_forward(3, 21, 43, 9, 10, has="br", packed=torch.bfloat16),
    _feed_forward(1, 32, 64, 5, 5, packed=torch.bfloat16),
    _feed_forward(0, 3, 6, 4, 4),
    _feed_forward(2, 3, 6, 0, 4),
    _feed_forward(16, 192, 384, 14, 14, benchmark=True),
    _feed_forward(16, 384, 768, 7, 7, benchmark=True),
    _feed_forward(16, 448, 896, 4, 4, benchmark=True),
    _feed_forward(1, 192, 384, 14, 14, benchmark=True),
    _squeeze_excite(1, 1, 1, 1, 1),
    _squeeze_excite(2, 37, 11, 9, 8),
    _squeeze_excite(3, 16, 8, 1, 5, bias=False),
    _squeeze_excite(2, 21, 8, 3, 4, packed=torch.float32),
    _squeeze_excite(2, 21, 9, 3, 4, packed=torch.bfloat16),
    _squeeze_excite(9, 130, 35, 5, 7),
    _squeeze_excite(1, 12, 20, 19, 17),
    _squeeze_excite(0, 3, 2, 4, 4),
    _squeeze_excite(2, 0, 2, 3, 3),
    _squeeze_excite(2, 3, 0, 3, 3),
    _squeeze_excite(16, 768, 192, 7, 7, benchmark=True),
    _squeeze_excite(16, 1536, 384, 4, 4, benchmark=True),
)


def cases(op: str | None = None, benchmark: bool | None = None) -> list[Case]:
    """The cases of ``op`` (of all operators when None), with or without the benchmark shapes."""
    return [c for c in CASES if op in (None, c.op) and benchmark in (None, c.benchmark)]


# --- how close is close ------------------------------------------------------------------------------------------


def _floor(dtype: torch.dtype) -> float:
    """The error that is always allowed, relative to the largest element.

    One rounding to ``dtype``, and sixteen of the float32 arithmetic: sums of some hundred terms, in any order.
    """
    rounding = torch.finfo(dtype).eps
    return 16 * rounding if dtype.itemsize >= 4 else rounding + 16 * torch.finfo(torch.float32).eps


def assert_close(actual: Tensor, exact: Tensor, plain: Tensor, what: str = "result", atol: float = 0.0) -> None:
    """Assert that ``actual`` is as close to the truth as twice the plain PyTorch operator.

    Args:
        actual: the result under test.
        exact: the same mathematics in float64, on the same (rounded) arguments.
        plain: the result of the plain PyTorch operator in the dtype of ``actual``.
        what: names the tensor in the failure.
        atol: an error that is always allowed, for results that may all happen to be small differences.

    Raises:
        AssertionError: shapes, dtypes or the places of NaN and infinities differ, or the largest error against
            ``exact`` is over twice that of ``plain``, over a floor of some roundings at the scale of the tensor,
            and over ``atol``.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == plain.dtype, f"{what}: dtype {actual.dtype}, expected {plain.dtype}"
    if not actual.numel():
        return
    actual64, plain64 = actual.detach().double(), plain.detach().double()
    # A result may overflow in the dtype of the call and not in float64: the plain operator says where.
    special = ~plain64.isfinite()
    assert torch.equal(actual64[special].nan_to_num(nan=0.5), plain64[special].nan_to_num(nan=0.5)), (
        f"{what}: NaN or infinities are not those of the plain operator"
    )
    assert actual64[~special].isfinite().all(), f"{what}: NaN or infinities where the plain operator has none"
    exact = exact.detach()[~special]
    if not exact.numel():
        return
    error, plain_error = ((t[~special] - exact).abs().max().item() for t in (actual64, plain64))
    scale = exact.abs().max().item()
    allowed = max(2 * plain_error, _floor(actual.dtype) * scale, atol)
    assert error <= allowed, (
        f"{what}: largest error {error:.3e}, allowed {allowed:.3e} "
        f"(plain operator {plain_error:.3e}, scale {scale:.3e}, {actual.dtype})"
    )


def mamba_ssm_tolerance(dtype: torch.dtype, gradient: str | None = None) -> dict[str, float]:
    """mamba-ssm's own ``rtol`` and ``atol``, for tests shared with it (its ``tests/ops/test_selective_scan.py``).

    Args:
        dtype: of the activations.
        gradient: the argument of ``selective_scan_fn`` whose gradient is compared; None for results.
    """
    rtol, atol = {torch.float32: (6e-4, 2e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2)}[dtype]
    if gradient == "u":
        return {"rtol": 2 * rtol, "atol": 2 * atol}
    if gradient == "delta":
        return {"rtol": 5 * rtol, "atol": 10 * atol}
    if gradient == "A":
        return {"rtol": max(1e-3, rtol), "atol": 5 * max(1e-3, atol)}
    if gradient in ("D", "delta_bias"):
        return {"rtol": max(1e-3, rtol), "atol": max(1e-3, atol)}
    return {"rtol": rtol, "atol": atol}
