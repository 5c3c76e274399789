"""Times of the drop-ins: other projects' code as it is, and with this package's operators in place, in turn."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemamba.bench import Timing, time_in_turn
from mobilemamba_kernels import causal_conv1d_fn, interop, selective_scan_fn, selective_scan_ref, use_backend
from mobilemamba_kernels.interop import vim, vmamba, wtconv
from mobilemamba_kernels.testing import causal_with_conv1d, wtconv_with_convolutions

_Run = Callable[[], Any]
_FEW_S = 6.0  # for both sides of a comparison; each runs at least 9 times


@dataclass(frozen=True)
class Sizes:
    """Of what is timed: those of Mamba 130M, and at 224×224 of Vim-Tiny and of VMamba-Tiny's first stage."""

    layers: int = 24
    width: int = 768
    vocabulary: int = 50280
    state: int = 16
    prompt: int = 512
    length: int = 2048
    images: int = 8
    side: int = 56
    channels: int = 96
    patches: int = 197  # of Vim, with its class token
    vim_width: int = 192


@dataclass(frozen=True)
class DropInResult:
    """One piece of another project's code."""

    project: str
    what: str
    peer: str  # what runs without this package
    theirs: Timing
    ours: Timing

    @property
    def ratio(self) -> float:
        """How many times faster."""
        return self.theirs.median / self.ours.median


@dataclass(frozen=True)
class Comparison:
    """The same work done in two ways, which must agree before they are timed."""

    project: str
    what: str
    peer: str
    theirs: _Run
    ours: _Run

    def measure(self, budget_s: float = _FEW_S) -> DropInResult:
        """Time both.

        Raises:
            RuntimeError: their results differ.
        """
        with torch.inference_mode():
            expected, found = self.theirs(), self.ours()
            error, scale = (expected - found).abs().max().item(), expected.abs().max().item()
            if not error <= 1e-3 * scale:
                raise RuntimeError(f"{self.what}: the results differ by {error:.2g}, at a scale of {scale:.2g}")
            timings = time_in_turn([self.theirs, self.ours], budget_s)
        return DropInResult(self.project, self.what, self.peer, *timings)


def comparisons(sizes: Sizes = Sizes()) -> Iterator[Comparison]:
    """What there is to time with the packages that are installed; each is built when it is its turn."""
    torch.manual_seed(0)
    if importlib.util.find_spec("transformers"):
        yield from _transformers(sizes)
    yield from _operators(sizes)
    yield from _vim(sizes)
    yield from _vmamba(sizes)
    yield from _wtconv(sizes)


def _transformers(s: Sizes) -> Iterator[Comparison]:
    from transformers import MambaConfig, MambaForCausalLM
    from transformers.models.mamba import modeling_mamba
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = MambaConfig(
        vocab_size=s.vocabulary, hidden_size=s.width, state_size=s.state, num_hidden_layers=s.layers, use_cache=True
    )
    model = MambaForCausalLM(config).eval()
    tokens = torch.randint(s.vocabulary, (1, s.prompt))

    ours = {name: getattr(interop.transformers, name) for name in interop.transformers.__all__}
    theirs = {name: getattr(modeling_mamba, name) for name in ours}

    def run_with(functions: dict[str, Any], run: _Run) -> Any:
        vars(modeling_mamba).update(functions)  # as patching does, in less time than is measured
        try:
            return run()
        finally:
            vars(modeling_mamba).update(theirs)

    def compare(what: str, theirs_runs: _Run, ours_runs: _Run) -> Comparison:
        return Comparison(
            "transformers",
            what,
            "its PyTorch path",
            partial(run_with, theirs, theirs_runs),
            partial(run_with, ours, ours_runs),
        )

    def prefill() -> Tensor:
        return model(tokens, use_cache=False).logits

    yield compare(f"Mamba 130M, prompt of {s.prompt}", prefill, prefill)

    with torch.inference_mode():
        caches = [model(tokens[:, :8], use_cache=True).cache for _ in range(2)]

    def decode(cache: Any) -> Tensor:
        return model(tokens[:, 8:9], cache=cache, use_cache=True).logits

    yield compare("Mamba 130M, one token", partial(decode, caches[0]), partial(decode, caches[1]))

    dim = 2 * s.width
    u, z = torch.randn(2, 1, s.prompt, dim).mT
    dt, A = torch.randn(1, dim, s.prompt), -torch.rand(dim, s.state)
    B, C = torch.randn(2, 1, s.prompt, s.state).mT
    D, bias = torch.randn(2, dim)
    weight, token = torch.randn(dim, 4), torch.randn(1, dim, 1)

    def alone(what: str, name: str, run: Callable[..., Tensor], kept: int = s.state) -> Comparison:
        sides = [partial(run, functions[name], torch.zeros(1, dim, kept)) for functions in (theirs, ours)]
        return Comparison("transformers", what, "its PyTorch path", *sides)

    first = [t[..., 0].contiguous() for t in (u, dt, B, C, z)]  # as a sequence of one position has them
    yield alone(
        f"its scan of {s.prompt} positions", "mamba_selective_scan",
        lambda scan, _: scan(u, dt, A, B, C, D, z, bias, True),
    )  # fmt: skip
    yield alone(
        "its step of the scan", "mamba_selective_state_update",
        lambda step, state: step(
            state, *first[:2], A, *first[2:4], D, dt_bias=bias, dt_softplus=True, z=first[4]
        ),
    )  # fmt: skip
    yield alone(
        "its step of the convolution", "causal_conv1d_update",
        lambda step, state: step(token, state, weight, D, "silu"), kept=4,
    )  # fmt: skip


def _parallel_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Softplus of ``delta``, and the scan by pairs of positions, in PyTorch's associative_scan."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    delta = F.softplus(delta)
    decay = torch.exp(delta.unsqueeze(2) * A.unsqueeze(-1))
    drive = (delta * u).unsqueeze(2) * B.unsqueeze(1)
    _, states = associative_scan(combine, (decay, drive), dim=-1, combine_mode="generic")
    return (states * C.unsqueeze(1)).sum(2) + D.unsqueeze(-1) * u


def _operators(s: Sizes) -> Iterator[Comparison]:
    dim = 2 * s.width
    u, delta = torch.randn(2, 1, dim, s.length)
    A, D = -torch.rand(dim, s.state), torch.randn(dim)
    B, C = torch.randn(2, 1, s.state, s.length)
    what = f"selective_scan_fn, {dim}×{s.length}, N = {s.state}"
    ours = partial(selective_scan_fn, u, delta, A, B, C, D, None, None, True)
    loop = partial(selective_scan_ref, u, delta, A, B, C, D, None, None, True)
    yield Comparison("mamba-ssm", what, "loop in PyTorch", loop, ours)
    yield Comparison("mamba-ssm", what, "parallel scan in PyTorch", partial(_parallel_scan, u, delta, A, B, C, D), ours)
    weight = torch.randn(dim, 4)
    for layout, x in (("channels first", u), ("channels last", u.mT.contiguous().mT)):
        yield Comparison(
            "causal-conv1d", f"causal_conv1d_fn, {dim}×{s.length}, {layout}", "conv1d and SiLU",
            partial(causal_with_conv1d, x, weight, D, activation="silu"),
            partial(causal_conv1d_fn, x, weight, D, activation="silu"),
        )  # fmt: skip


def _vim(s: Sizes) -> Iterator[Comparison]:
    """A block between its projections, as Vim writes it: twice, the second time on the flipped sequence."""
    dim, rank = 2 * s.vim_width, -(-s.vim_width // 16)
    xz = torch.randn(s.images, 2 * dim, s.patches)
    ways = [
        (
            torch.randn(dim, 1, 4) / 2, torch.randn(dim),
            torch.randn(rank + 2 * s.state, dim) / dim**0.5, torch.randn(dim, rank) / rank**0.5,
            -torch.rand(dim, s.state), None, None, torch.ones(dim), torch.full((dim,), -3.0),
        )
        for _ in range(2)
    ]  # fmt: skip

    def block() -> Tensor:
        first, second = (vim.mamba_inner_fn_no_out_proj(xz.flip(-1) if k else xz, *ways[k]) for k in range(2))
        return first + second.flip(-1)

    what = f"Vim-Tiny's block, {s.images} images, {dim}×{s.patches}, N = {s.state}"
    yield Comparison("Vim", what, "a loop in PyTorch", partial(_plain, block), block)


def _plain(run: _Run) -> Any:
    with use_backend("reference"):
        return run()


def _wtconv(s: Sizes) -> Iterator[Comparison]:
    """A layer of WTConvNeXt-Tiny's first stage, five levels."""
    layer = wtconv.WTConv2d(s.channels, s.channels, 5, wt_levels=5).eval()
    x = torch.randn(s.images, s.channels, s.side, s.side)

    what = f"WTConv2d, {s.images} images, {s.channels}×{s.side}×{s.side}, k = 5, five levels"
    yield Comparison("WTConv", what, "its convolutions", partial(wtconv_with_convolutions, layer, x), partial(layer, x))


def _vmamba(s: Sizes) -> Iterator[Comparison]:
    """SS2D's core: four directions across the map, as VMamba-Tiny runs it (its forward type v05)."""
    rank = max(1, s.channels // 16)
    x = torch.randn(s.images, s.channels, s.side, s.side)
    x_proj = torch.randn(4 * (rank + 2), s.channels, 1) / s.channels**0.5
    dt_proj = torch.randn(4 * s.channels, rank, 1) / rank**0.5
    A, D, bias = -torch.rand(4 * s.channels, 1), torch.ones(4 * s.channels), torch.full((4 * s.channels,), -3.0)

    def core() -> Tensor:
        xs = vmamba.cross_scan_fn(x).flatten(1, 2)
        projected = F.conv1d(xs, x_proj, groups=4).unflatten(1, (4, -1))
        dts, Bs, Cs = projected.split([rank, 1, 1], dim=2)
        dts = F.conv1d(dts.flatten(1, 2), dt_proj, groups=4)
        ys = vmamba.selective_scan_fn(xs, dts, A, Bs.contiguous(), Cs.contiguous(), D, bias)
        return vmamba.cross_merge_fn(ys.view(s.images, 4, s.channels, s.side, s.side))

    what = f"VMamba-Tiny's SS2D, {s.images} images, {s.channels}×{s.side}×{s.side}"
    yield Comparison("VMamba", what, "its PyTorch path", partial(_plain, core), core)
