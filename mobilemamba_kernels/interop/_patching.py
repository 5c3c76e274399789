"""Puts the functions of this package in place of other projects', and takes them out again."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from mobilemamba_kernels.interop import causal_conv1d, mamba_ssm, transformers, vim, vmamba, wtconv

TARGETS = ("transformers", "mamba_ssm", "vmamba", "vim", "wtconv")

_lock = threading.RLock()
_undo: dict[str, list[Callable[[], None]]] = {}
_replaced: dict[str, dict[str, Any]] = {}


def patch(target: str) -> dict[str, Any]:
    """Make another project's code call this package's operators; models that exist already do so too.

    - "transformers": the functions of its modules for Mamba, FalconMamba, Jamba and Zamba.
    - "mamba_ssm": the functions of mamba-ssm and causal-conv1d, "vim" those and what Vim adds. A package that is not
      installed is made, so that ``from mamba_ssm.ops.selective_scan_interface import selective_scan_fn`` works.
    - "vmamba": ``selective_scan_fn``, ``cross_scan_fn`` and ``cross_merge_fn`` of VMamba's modules that are imported,
      and the extensions ``selective_scan_cuda``, ``_core`` and ``_oflex`` for those that will be.
    - "wtconv": the forward of the classes ``WTConv2d`` that are imported; where there is none, a module ``wtconv``.

    Whoever imported a function by its name gets the replacement as well. Patching again does nothing, but for modules
    that were imported since.

    Args:
        target: one of these names.

    Returns:
        What was replaced, by its full name; None for what was not there.

    Raises:
        ValueError: no such target.
        ImportError: the target has to be installed, and is not.
        RuntimeError: what would be replaced has another signature than this package knows; nothing is replaced then.
    """
    if target not in TARGETS:
        raise ValueError(f"patch: target must be one of {', '.join(TARGETS)}; got {target!r}")
    with _lock:
        changes = _CHANGES[target]()
        undo, replaced = _undo.setdefault(target, []), _replaced.setdefault(target, {})
        for owner, name, new in changes:
            old = owner.get(name) if isinstance(owner, dict) else getattr(owner, name, None)
            prefix = "sys.modules" if isinstance(owner, dict) else _name_of(owner)
            replaced.setdefault(f"{prefix}.{name}", old)
            _set(owner, name, new)
            undo.append(functools.partial(_set, owner, name, old))
        return dict(replaced)


def unpatch(target: str | None = None) -> None:
    """Put back what :func:`patch` replaced; for every target when None. Without a patch it does nothing.

    Raises:
        ValueError: no such target.
    """
    if target is not None and target not in TARGETS:
        raise ValueError(f"unpatch: target must be None or one of {', '.join(TARGETS)}; got {target!r}")
    with _lock:
        for name in [target] if target else list(_undo):
            for undo in reversed(_undo.pop(name, [])):
                undo()
            _replaced.pop(name, None)


@contextmanager
def patched(target: str) -> Iterator[dict[str, Any]]:
    """Patch within a ``with`` block; what was patched before it stays so behind it."""
    with _lock:
        already = target in _undo
        replaced = patch(target)
    try:
        yield replaced
    finally:
        if not already:
            unpatch(target)
