"""What computes an operator: the kernels under test, plain PyTorch, and other projects' kernels where importable."""

from __future__ import annotations

import importlib
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mobilemamba_kernels
from gpu.device import BACKENDS, DEVICE, Run
from mobilemamba_kernels import _library, use_backend
from mobilemamba_kernels.testing import PEERS, Case, tensors

Named = dict[str, Tensor]


class Call(NamedTuple):
    """``run`` is timed; ``named`` gives its results the names of the truth, and is not."""

    run: Run
    named: Callable[[Any], Named]


def why_missing(module: str) -> str:
    """Why another project's module cannot be imported here, or an empty string."""
    try:
        importlib.import_module(module)
    except Exception as error:  # extensions that compile themselves raise what they like
        lines = str(error).strip().splitlines() or [""]
        return f"{module} is not importable: {type(error).__name__}: {lines[0]}"
    return ""


@dataclass(frozen=True)
class Engine:
    """``prepare(case, arguments, grads)`` is the forward, or with ``grads`` the backward; None where it has none."""

    name: str
    prepare: Callable[[Case, dict[str, Any], Sequence[Tensor] | None], Call | None]
    ours: bool = False  # and held to our rule of how close is close
    module: str = ""  # that has to be importable
    compiled: bool = False

    @property
    def missing(self) -> str:
        """Why it cannot run here, or an empty string."""
        return why_missing(self.module) if self.module else ""


def _named_results(results: Any) -> Named:
    return {f"result {i}": r for i, r in enumerate(results if isinstance(results, tuple) else (results,))}


def _differentiable(
    function: Callable[[Case, dict[str, Any]], Any],
    case: Case,
    arguments: dict[str, Any],
    grads: Sequence[Tensor] | None,
) -> Call:
    """A function of the arguments, with PyTorch's autograd."""
    if grads is None:

        def forward() -> Any:
            with torch.no_grad():
                return function(case, arguments)

        return Call(forward, _named_results)
    inputs = tensors(arguments)
    for tensor in inputs.values():
        tensor.requires_grad_()
    results = function(case, arguments)
    results = results if isinstance(results, tuple) else (results,)

    def backward() -> Any:
        return torch.autograd.grad(results, list(inputs.values()), list(grads), retain_graph=True)

    return Call(backward, lambda found: dict(zip(inputs, found, strict=True)))


def has_kernel(backend: str, case: Case, backward: bool) -> bool:
    """Whether "cuda" or "triton" has a kernel of its own for a direction."""
    op = case.operator
    if backend == "triton":
        if op not in _library.TRITON:
            return False
        module = importlib.import_module(f"mobilemamba_kernels.triton.{op}")
        return not backward or hasattr(module, "backward")
    name = f"mobilemamba::{op}_{'bwd' if backward else 'fwd'}"
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, DEVICE.upper())


def _ours(backend: str, case: Case, arguments: dict[str, Any], grads: Sequence[Tensor] | None) -> Call | None:
    if not has_kernel(backend, case, grads is not None):
        return None

    def function(case: Case, arguments: dict[str, Any]) -> Any:
        with use_backend(BACKENDS[backend]):
            return case.run(arguments)

    return _differentiable(function, case, arguments, grads)


def _loops(case: Case, arguments: dict[str, Any]) -> bool:
    """Whether plain PyTorch would launch thousands of kernels, one position after the other."""
    return case.op in ("selective_scan_fn", "bidirectional_selective_scan") and arguments["u"].shape[-1] > 512


def _plain(case: Case, arguments: dict[str, Any], grads: Sequence[Tensor] | None) -> Call | None:
    if _loops(case, arguments):
        return None
    return _differentiable(lambda case, arguments: case.peer(arguments), case, arguments, grads)


def _compiled(case: Case, arguments: dict[str, Any], grads: Sequence[Tensor] | None) -> Call | None:
    if _loops(case, arguments):
        return None
    torch.compiler.reset()
    function = torch.compile(PEERS.get(case.op) or getattr(mobilemamba_kernels, case.op), dynamic=False)

    def run(case: Case, arguments: dict[str, Any]) -> Any:
        with use_backend("reference"):
            return function(**arguments)

    return _differentiable(run, case, arguments, grads)


# --- scans -----------------------------------------------------------------------------------------------------------


def _one_way(case: Case, a: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The scans in one direction that make up a case, their arguments flipped beforehand."""
    if case.op == "selective_scan_fn":
        if a["B"].ndim == 2:
            return None
        grouped = {name: a[name] if a[name].ndim == 4 else a[name].unsqueeze(1) for name in ("B", "C")}
        return [a | grouped]
    if case.op != "bidirectional_selective_scan" or a["u"].ndim == 4 or "z" in a:
        return None
    ways = []
    for k, turn in enumerate((lambda t: t, lambda t: t.flip(-1))):
        way = {"u": turn(a["u"]), "delta": turn(a["delta"][:, k]), "A": a["A"][k]}
        way |= {name: turn(a[name][:, k : k + 1]) for name in ("B", "C")}
        ways.append(way | {name: a[name][k] for name in ("D", "delta_bias") if name in a})
    return ways


def _contiguous(a: dict[str, Any]) -> list[Tensor | None]:
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    return [None if a.get(name) is None else a[name].detach().contiguous() for name in names]


def _merge(case: Case, ways: Sequence[Named]) -> Named:
    """Gradients of the arguments of a case from those of its one-way scans."""
    if case.op == "selective_scan_fn":
        return dict(ways[0])
    first, second = ways
    merged = {"u": first["u"] + second["u"].flip(-1)}
    merged["delta"] = torch.stack([first["delta"], second["delta"].flip(-1)], 1)
    merged |= {name: torch.cat([first[name], second[name].flip(-1)], 1) for name in ("B", "C")}
    return merged | {
        name: torch.stack([first[name], second[name]]) for name in ("A", "D", "delta_bias") if name in first
    }


def _sum_ways(case: Case, ys: Sequence[Tensor]) -> Tensor:
    return ys[0] if len(ys) == 1 else ys[0] + ys[1].flip(-1)


def _named_gradients(case: Case, a: dict[str, Any], ways: Sequence[dict[str, Tensor | None]]) -> Named:
    merged = _merge(case, [{k: v for k, v in way.items() if v is not None} for way in ways])
    return {name: merged[name].view_as(a[name]) for name in tensors(a)}


_GRADIENTS = ("u", "delta", "A", "B", "C", "D", "delta_bias", "z")


def _mamba_ssm(case: Case, a: dict[str, Any], grads: Sequence[Tensor] | None) -> Call | None:
    """mamba-ssm's kernel, once a direction; flips of arguments and results are not timed."""
    import selective_scan_cuda as kernel

    ways = _one_way(case, a)
    if ways is None:
        return None
    given = [_contiguous(way) for way in ways]
    softplus = case.options["delta_softplus"]

    def forward() -> list[Any]:
        return [kernel.fwd(*arguments, softplus) for arguments in given]

    if grads is None:
        # out, x and, with a gate, the gated result
        return Call(forward, lambda found: {"result 0": _sum_ways(case, [f[2] if len(f) > 2 else f[0] for f in found])})
    kept = forward()
    turned = [grads[0].contiguous(), grads[0].flip(-1).contiguous()]

    def backward() -> list[Any]:
        return [
            kernel.bwd(*arguments, grad, f[1], f[0], None, softplus, False)
            for arguments, f, grad in zip(given, kept, turned, strict=False)
        ]

    return Call(
        backward, lambda found: _named_gradients(case, a, [dict(zip(_GRADIENTS, f, strict=False)) for f in found])
    )


def _oflex(case: Case, a: dict[str, Any], grads: Sequence[Tensor] | None) -> Call | None:
    """VMamba's kernel: both directions as groups of one call, on copies that are not timed."""
    import selective_scan_cuda_oflex as kernel

    ways = _one_way(case, a)
    if ways is None or "z" in a:
        return None
    dims = {"u": 1, "delta": 1, "B": 1, "C": 1}
    names = ("u", "delta", "A", "B", "C", "D", "delta_bias")
    given = [
        torch.cat([way[name].detach() for way in ways], dims.get(name, 0)).contiguous() if name in ways[0] else None
        for name in names
    ]
    softplus, count = case.options["delta_softplus"], len(ways)

    def forward() -> Any:
        return kernel.fwd(*given, softplus, 1, True)

    if grads is None:
        return Call(forward, lambda found: {"result 0": _sum_ways(case, found[0].chunk(count, 1)).to(a["u"].dtype)})
    kept = forward()
    grad = torch.cat([grads[0], grads[0].flip(-1)][:count], 1).to(kept[0].dtype).contiguous()

    def backward() -> Any:
        return kernel.bwd(*given, grad, kept[1], softplus, 1)

    def named(found: Any) -> Named:
        parts = [
            {n: None if f is None else f.chunk(count, dims.get(n, 0))[k] for n, f in zip(names, found, strict=False)}
            for k in range(count)
        ]
        return _named_gradients(case, a, parts)

    return Call(backward, named)


def _accelerated_scan(case: Case, a: dict[str, Any], grads: Sequence[Tensor] | None) -> Call | None:
    """accelerated-scan's recurrence in float32, with PyTorch around it; it takes powers of two and one state."""
    from accelerated_scan.warp import scan

    if case.op != "selective_scan_fn" or a["A"].shape[1] != 1 or a["B"].ndim == 2:
        return None

    def function(case: Case, a: dict[str, Any]) -> Tensor:
        batch, _, length = a["u"].shape
        u, step = a["u"].float(), a["delta"].float()
        B, C = (a[name].float().reshape(batch, -1, length) for name in ("B", "C"))
        if "delta_bias" in a:
            step = step + a["delta_bias"].unsqueeze(-1)
        if case.options["delta_softplus"]:
            step = F.softplus(step)
        room = (0, max(32, 1 << (length - 1).bit_length()) - length)
        h = scan(*(F.pad(t, room).contiguous() for t in (torch.exp(step * a["A"]), step * B * u)))[..., :length]
        y = C * h
        if "D" in a:
            y = y + a["D"].unsqueeze(-1) * u
        if "z" in a:
            y = y * F.silu(a["z"].float())
        return y.to(a["u"].dtype)

    if a["B"].ndim == 4 and a["B"].shape[1] != 1:
        return None
    return _differentiable(function, case, a, grads)


# --- wavelets --------------------------------------------------------------------------------------------------------


def _wtconv(case: Case, a: dict[str, Any], grads: Sequence[Tensor] | None) -> Call | None:
    """WTConv's fused CUDA kernels, channels first as they take them."""
    from fast_wtconv.cuda_haar import haar_cuda

    if case.op != "wavelet_depthwise_conv2d" or not {"scale", "base"} <= set(a):
        return None
    k, dtype = a["weight"].shape[-1], a["x"].dtype
    first = {name: a[name].detach().contiguous() for name in ("x", "base")}
    first |= {"weight": a["weight"].detach().to(dtype), "scale": a["scale"].detach().reshape(1, -1, 1, 1).to(dtype)}

    def function(case: Case, given: dict[str, Any]) -> Any:
        return haar_cuda.wavelet_branch(given["x"], given["base"], [given["weight"]], [given["scale"]], k)

    call = _differentiable(function, case, first, None if grads is None else [g.contiguous() for g in grads])
    if grads is None:
        return call
    return Call(call.run, lambda found: {n: f.view_as(a[n]).to(a[n].dtype) for n, f in call.named(found).items()})


ENGINES = [
    Engine("cuda", partial(_ours, "cuda"), ours=True),
    Engine("triton", partial(_ours, "triton"), ours=True),
    Engine("plain PyTorch", _plain),
    Engine("mamba-ssm", _mamba_ssm, module="selective_scan_cuda"),
    Engine("VMamba oflex", _oflex, module="selective_scan_cuda_oflex"),
    Engine("accelerated-scan", _accelerated_scan, module="accelerated_scan.warp"),
    Engine("WTConv fused", _wtconv, module="fast_wtconv.cuda_haar.haar_cuda"),
    Engine("torch.compile", _compiled, compiled=True),
]


def build_mamba_ssm(archive: Path, folder: Path) -> Path:
    """Build mamba-ssm's extension, and nothing of the package around it, from its source distribution."""
    from torch.utils import cpp_extension

    source = folder / "source"
    with tarfile.open(archive) as opened:
        opened.extractall(source, filter="data")
    (scan,) = source.glob("*/csrc/selective_scan")
    files = [scan / "selective_scan.cpp", *sorted(scan.glob("selective_scan_fwd_*.cu"))]
    files += sorted(scan.glob("selective_scan_bwd_*.cu"))
    undefined = [f"-U__CUDA_NO_{t}_{w}__" for t in ("HALF", "BFLOAT16") for w in ("OPERATORS", "CONVERSIONS")]
    flags = ["-O3", "--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda", *undefined]
    module = cpp_extension.load(
        "selective_scan_cuda",
        [str(file) for file in files],
        extra_cflags=["-O3"],
        extra_cuda_cflags=flags,
        extra_include_paths=[str(scan)],
        build_directory=str(folder),
    )
    return Path(module.__file__)
