"""Which implementation of an operator runs, and why."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mobilemamba_kernels import _library

BACKENDS = ("reference", "cpu", "cuda", "triton")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs its kernels in its interpreter, which takes CPU tensors and is for tests alone."""

TRITON_ERROR: str | None = None if importlib.util.find_spec("triton") else "the package triton is not installed"
"""Why Triton kernels cannot run, or None where they can."""

PREFERENCES: tuple[tuple[str, int, str], ...] = (
    # operator, from so many elements of its first argument on, backend. Measured on an H200 (benchmarks/results), but
    # for the updates, which prefer their hand-written kernel; products are Triton's alone.
    ("selective_scan", 0, "cuda"),
    ("bidirectional_selective_scan", 0, "cuda"),
    ("selective_state_update", 0, "cuda"),
    ("ss2d_bidirectional", 0, "cuda"),
    ("causal_conv1d", 0, "cuda"),
    ("causal_conv1d_update", 0, "cuda"),
    ("cross_scan", 0, "cuda"),
    ("cross_merge", 0, "cuda"),
    ("haar_dwt2d", 0, "cuda"),
    ("haar_idwt2d", 0, "cuda"),
    ("wavelet_depthwise_conv2d", 0, "cuda"),
    ("depthwise_conv2d_act", 0, "cuda"),
    ("conv2d_act", 0, "triton"),
    ("pointwise_conv2d_act", 0, "triton"),
    ("feed_forward", 0, "triton"),
    ("squeeze_excite", 0, "triton"),
)
"""Which backend comes first on CUDA tensors; the other one runs where it cannot, then the reference."""


def _checked(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


# A module global, not a ContextVar: torch.compile guards on it and recompiles when it changes.
_forced = _checked(os.environ.get("MOBILEMAMBA_BACKEND") or None, "MOBILEMAMBA_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every operator of this process onto one backend inside the ``with`` block.

    Args:
        name: ``"reference"`` (plain PyTorch, differentiable twice), ``"cpu"``, ``"cuda"`` or ``"triton"``.

    Raises:
        ValueError: ``name`` is none of these.
        RuntimeError: raised by the operator itself when the forced backend cannot run the call.
    """
    global _forced
    previous, _forced = _forced, _checked(name, "use_backend's name")
    try:
        yield
    finally:
        _forced = previous


def forced_backend() -> str | None:
    """The backend that is forced, by :func:`use_backend` or the environment; None where the operators choose."""
    return _forced


def choose(op: str, *tensors: Tensor | None) -> str:
    """Return the backend that runs ``op`` on ``tensors``; the first one's device, and size, decide.

    Raises:
        RuntimeError: a backend is forced that cannot run the call.
    """
    if _forced == "reference":
        return "reference"
    first: Tensor = tensors[0]  # type: ignore[assignment]
    device, dtypes = first.device.type, {t.dtype for t in tensors if t is not None}
    if _forced is not None:
        reason = _why_not(op, _forced, device, dtypes)
        if reason:
            raise RuntimeError(f'{op}: backend "{_forced}" is forced but cannot run this call: {reason}')
        _refuse_tangents(op, tensors)
        return _forced
    chosen = next((b for b in _candidates(op, device, first) if not _why_not(op, b, device, dtypes)), "reference")
    if chosen != "reference":
        _refuse_tangents(op, tensors)
    return chosen


def _refuse_tangents(op: str, tensors: tuple[Tensor | None, ...]) -> None:
    """PyTorch drops the tangents of operators' arguments without a word.

    Raises:
        NotImplementedError: forward-mode derivatives are wanted, of a kernel.
    """
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise NotImplementedError(
            f'{op}: the kernels have no forward-mode derivatives; use_backend("reference") has them'
        )


def run_update(
    op: str,
    implementations: dict[str, Callable[..., Any]],
    check: Callable[..., None],
    tensors: tuple[Tensor | None, ...],
    changed: Tensor,
    args: tuple[Any, ...],
) -> Any:
    """Run an operator that changes ``changed``, one of ``args``, in place; ``check(*args)`` raises what is wrong.

    The CPU's kernel refuses, before it writes, what it cannot read, so it is asked first: the checks take longer than a
    step. The reference, which is differentiable, runs where a gradient is wanted.
    """
    wants_gradient = torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in tensors)
    compiling = torch.compiler.is_compiling()
    if _forced != "reference":
        _refuse_tangents(op, tensors)
    refusal: Exception | None = None
    if "cpu" in implementations and _forced is None and not wants_gradient and not compiling:
        try:
            if tensors[0].device.type == "cpu":  # type: ignore[union-attr]
                result = implementations["cpu"](*args)
                torch.autograd.graph.increment_version(changed)
                return result
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError) as error:
            refusal = error  # let the checks say what is wrong, or another backend run
    check(*args)
    if wants_gradient and _forced not in (None, "reference"):
        raise RuntimeError(
            f'{op}: backend "{_forced}" is forced but cannot run this call: the kernels of a step have no gradient; '
            "call it within torch.no_grad()"
        )
    backend = "reference" if wants_gradient else choose(op, *tensors)
    if refusal is not None and backend == "cpu":
        raise refusal
    result = implementations[backend](*args)
    if backend != "reference" and not compiling:
        torch.autograd.graph.increment_version(changed)
    return result


def implementations(op: str) -> dict[str, Callable[..., Any]]:
    """What runs ``op`` on each backend, below the checks of its public function; :func:`choose` says which one."""
    return importlib.import_module(f"mobilemamba_kernels.ops.{op}")._run


def _candidates(op: str, device: str, first: Tensor | None = None) -> tuple[str, ...]:
    """The backends with kernels for a type of device, the preferred one (for the size of ``first``) first."""
    if device == "cpu":
        return ("cpu",)
    if device != "cuda":
        return ()
    preferred = "cuda"
    for name, least, backend in PREFERENCES:
        if name == op and (least == 0 or (first is not None and first.numel() >= least)):
            preferred = backend
    return ("cuda", "triton") if preferred == "cuda" else ("triton", "cuda")


def _why_not(op: str, backend: str, device: str, dtypes: set[torch.dtype]) -> str:
    """Return why ``backend`` has no kernel of ``op`` for such tensors, or an empty string when it has one."""
    if backend == "triton":
        if TRITON_ERROR:
            return TRITON_ERROR
        if device != "cuda" and not (device == "cpu" and INTERPRETED):
            return f"it runs on cuda tensors and got {device} ones"
        if op not in _library.TRITON:
            return "this version has no triton kernel for it"
    else:
        if backend != device:
            return f"it runs on {backend} tensors and got {device} ones"
        error = _library.CUDA_ERROR if backend == "cuda" else _library.COMPILED_ERROR
        if error:
            return error
        if backend not in _library.KERNELS[op]:
            return f"this version has no {backend} kernel for it"
    for dtype in dtypes:
        if dtype not in KERNEL_DTYPES:
            return f"the kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return ""


@dataclass(frozen=True)
class ReportRow:
    """What runs one operator on one type of device."""

    op: str
    device: str
    backend: str  # as in use_backend
    detail: str  # instruction set, threads
    why: str  # why nothing faster runs


class Report(list[ReportRow]):
    """Rows of :func:`report`; prints as a table."""

    def __str__(self) -> str:
        table = [("operator", "device", "runs", "detail", "why nothing faster")]
        table += [(r.op, r.device, r.backend, r.detail, r.why) for r in self]
        widths = [max(len(row[i]) for row in table) for i in range(5)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table)


def report() -> Report:
    """Return, and print well, what runs each operator on each type of device in this process, and why nothing faster.

    Float64 tensors always run the reference: the kernels take float32, bfloat16 and float16.
    A gradient runs where its operator does if there is a kernel for it (README), else it is the reference's.
    """
    rows = Report()
    for op in _library.KERNELS:
        for device in ("cpu", "cuda"):
            if device == "cuda" and not torch.cuda.is_available():
                continue
            backend, reasons = "reference", []
            for candidate in _candidates(op, device) if _forced is None else (_forced,):
                reason = "" if candidate == "reference" else _why_not(op, candidate, device, set())
                if not reason:
                    backend = candidate
                    break
                reasons.append(f"{candidate}: {reason}" if device == "cuda" else reason)
            else:
                backend = "reference" if _forced is None else "none"  # a call raises
            why = "; ".join(reasons)
            if _forced is not None and _forced != device:
                why = f"backend {_forced!r} is forced"
            rows.append(ReportRow(op, device, backend, _detail(backend), why))
    return rows


def _detail(backend: str) -> str:
    if backend == "reference":
        return "plain PyTorch"
    if backend == "cpu":
        return f"{_library.cpu_capability()}, {torch.get_num_threads()} threads"
    if backend == "triton":
        return "Triton's interpreter, for tests" if INTERPRETED else f"triton {_triton_version()}"
    return "CUDA C++" if backend == "cuda" else ""


@functools.cache
def _triton_version() -> str:
    return importlib.metadata.version("triton")
