"""Which implementation of an operator runs, and why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mobilemamba_kernels import _library

BACKENDS = ("reference", "cpu", "cuda", "triton")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BUILT_BACKENDS = {"cpu": "cpu"}
"""Device type of each backend that this version has kernels for."""


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
    """Return the backend that runs ``op`` on ``tensors``; the first one's device decides.

    Raises:
        RuntimeError: a backend is forced that cannot run the call.
    """
    if _forced == "reference":
        return "reference"
    device = tensors[0].device.type  # type: ignore[union-attr]
    reason = _why_not(op, device, {t.dtype for t in tensors if t is not None})
    if _forced is not None and (BUILT_BACKENDS.get(_forced) != device or reason):
        reason = reason or (
            f"it runs on {BUILT_BACKENDS[_forced]} tensors and got {device} ones"
            if _forced in BUILT_BACKENDS
            else "this version has no such kernels"
        )
        raise RuntimeError(f'{op}: backend "{_forced}" is forced but cannot run this call: {reason}')
    return "reference" if reason else device


def _why_not(op: str, device: str, dtypes: set[torch.dtype]) -> str:
    """Return why no kernel of ``op`` runs on such tensors, or an empty string when one does."""
    if device == "cpu" and _library.COMPILED_ERROR:
        return _library.COMPILED_ERROR
    if device not in _library.KERNELS[op]:
        return f"this version has no {device} kernel for it"
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
    """
    rows = Report()
    for op in _library.KERNELS:
        for device in ("cpu", "cuda"):
            if device == "cuda" and not torch.cuda.is_available():
                continue
            why = _why_not(op, device, set())
            if _forced is not None and _forced != device:
                why = f"backend {_forced!r} is forced"
            backend = "reference" if why else device
            if _forced not in (None, "reference") and BUILT_BACKENDS.get(_forced) != device:
                backend = "none"  # a call raises: the forced backend cannot run it
            detail = "plain PyTorch" if backend == "reference" else ""
            if backend == "cpu":
                detail = f"{_library.cpu_capability()}, {torch.get_num_threads()} threads"
            rows.append(ReportRow(op, device, backend, detail, why))
    return rows
