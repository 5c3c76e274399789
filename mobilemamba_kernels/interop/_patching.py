"""Puts the functions of this package in place of other projects', and takes them out again."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import itertools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import MethodType, ModuleType
from typing import Any

from torch import nn

from mobilemamba_kernels.interop import causal_conv1d, mamba_ssm, transformers, vim, vmamba, wtconv

_Function = Callable[..., Any]
_Candidates = dict[str, tuple[_Function, ...]]  # by name; the first whose parameters fit
_ABSENT: Any = object()

_lock = threading.RLock()
_changed: dict[str, list[_Change]] = {}
_blocks: Counter[str] = Counter()  # of `patched` that are open


class _Change:
    """``name`` of a module, a class or ``sys.modules`` is another object until it is undone."""

    def __init__(self, owner: Any, name: str, new: Any) -> None:
        self.owner, self.name, self.new = owner, name, new
        self.old = (owner if owner is sys.modules else vars(owner)).get(name, _ABSENT)
        if owner is sys.modules and self.old is new:  # made for another target
            self.old = _ABSENT

    def is_like(self, other: _Change) -> bool:
        return (self.owner, self.name) == (other.owner, other.name) and self.new is other.new

    def __str__(self) -> str:
        if self.owner is sys.modules:
            return f"sys.modules[{self.name!r}]"
        where = (
            self.owner.__name__
            if isinstance(self.owner, ModuleType)
            else f"{self.owner.__module__}.{self.owner.__name__}"
        )
        return f"{where}.{self.name}"

    def do(self) -> None:
        self._set(self.new)

    def undo(self) -> None:
        self._set(self.old)

    def _set(self, value: Any) -> None:
        if self.owner is sys.modules:
            if value is _ABSENT:
                sys.modules.pop(self.name, None)
            else:
                sys.modules[self.name] = value
        elif value is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, value)


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
    if target not in _FINDERS:
        raise ValueError(f"patch: target must be one of {', '.join(_FINDERS)}; got {target!r}")
    with _lock:
        found = list(_FINDERS[target]())
        found = [change for change in found if not any(map(change.is_like, _changed.get(target, ())))]
        for change in found:
            change.do()
        _changed.setdefault(target, []).extend(found)
        return {str(change): None if change.old is _ABSENT else change.old for change in _changed[target]}


def unpatch(target: str | None = None) -> None:
    """Put back what :func:`patch` replaced; for every target when None. Without a patch it does nothing.

    What was imported meanwhile, with the help of a module that patching made, keeps the functions of that module.

    Raises:
        ValueError: no such target.
    """
    if target is not None and target not in _FINDERS:
        raise ValueError(f"unpatch: target must be None or one of {', '.join(_FINDERS)}; got {target!r}")
    with _lock:
        for name in [target] if target else list(_changed):
            kept = [change for changes in _changed.values() for change in changes]
            changes = _changed.pop(name, [])
            for change in reversed(changes):
                if sum(map(change.is_like, kept)) == 1:  # and no other target's too
                    change.undo()
            _put_back(changes)


@contextmanager
def patched(target: str) -> Iterator[dict[str, Any]]:
    """Patch within a ``with`` block, until every thread has left such a block.

    What was patched before the first of them stays so behind the last; a ``patch`` within ends with the block.
    """
    with _lock:
        already = target in _changed and not _blocks[target]
        replaced = patch(target)
        if not already:
            _blocks[target] += 1
    try:
        yield replaced
    finally:
        if not already:
            with _lock:
                _blocks[target] -= 1
                if not _blocks[target]:
                    unpatch(target)


def _modules() -> list[ModuleType]:
    """The imported modules but for this package's."""
    own = ("mobilemamba", "mobilemamba_kernels")
    return [m for name, m in list(sys.modules.items()) if isinstance(m, ModuleType) and name.split(".")[0] not in own]


def _put_back(changes: Iterable[_Change]) -> None:
    """Undo changes in modules that have imported the new objects by their names since."""
    old = {id(c.new): c.old for c in changes if c.old is not _ABSENT and c.owner is not sys.modules}
    for module in _modules() if old else ():
        for name, value in list(vars(module).items()):
            if id(value) in old:
                setattr(module, name, old[id(value)])


def _parameters(function: _Function) -> list[str]:
    """Names; a module's, which is what ``kernels`` makes of a function, are those of its class."""
    if isinstance(function, nn.Module):
        function = MethodType(type(function).forward, function)
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind not in kinds]


def _replacement(theirs: _Function, *ours: _Function, only: _Function | None = None) -> _Function:
    """The one of ``ours`` with the parameters of ``theirs`` (or more), for what ``only(*args, **kwargs)`` allows.

    Raises:
        RuntimeError: there is none.
    """
    wanted = _parameters(theirs)
    fitting = next((f for f in ours if _parameters(f)[: len(wanted)] == wanted), None)
    if fitting is None:
        name = getattr(theirs, "__name__", getattr(theirs, "kernel_layer_name", None))
        raise RuntimeError(
            f"patch: {theirs.__module__}.{name} takes ({', '.join(wanted)}), this package's "
            f"({', '.join(_parameters(ours[0]))}); nothing was replaced; install a version of either that fits"
        )

    @functools.wraps(theirs)
    def call(*args: Any, **kwargs: Any) -> Any:
        return fitting(*args, **kwargs) if only is None or only(*args, **kwargs) else theirs(*args, **kwargs)

    call.mobilemamba_kernels = fitting  # type: ignore[attr-defined]
    return call


def _is_ours(function: Any) -> bool:
    return hasattr(function, "mobilemamba_kernels")


def _functions(ours: _Candidates, *modules: ModuleType, only: dict[str, _Function] | None = None) -> Iterator[_Change]:
    """Replace functions of modules, wherever they were imported by name; some of them only for some arguments.

    Raises:
        RuntimeError: a module lacks one of them, or it takes other arguments.
    """
    new = {}
    for module, (name, candidates) in itertools.product(modules, ours.items()):
        theirs = getattr(module, name, None)
        if theirs is None:
            raise RuntimeError(
                f"patch: {module.__name__} has no {name}; nothing was replaced; install a version that has it"
            )
        if not _is_ours(theirs):
            new[id(theirs)] = _replacement(theirs, *candidates, only=(only or {}).get(name))
    for other in _modules() if new else ():
        for key, value in list(vars(other).items()):
            if id(value) in new:
                yield _Change(other, key, new[id(value)])


def _make_modules(contents: dict[str, dict[str, Any]]) -> dict[str, ModuleType]:
    """Modules of these names; those that contain others are packages."""
    made: dict[str, ModuleType] = {}
    for name, attributes in contents.items():
        module = made[name] = ModuleType(name, "Made by mobilemamba_kernels.patch.")
        vars(module).update(attributes)
        package = any(other.startswith(f"{name}.") for other in contents)
        module.__spec__ = ModuleSpec(name, None, is_package=package)
        if package:
            module.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    return made


def _is_installed(name: str) -> bool:
    """Whether there is a package of that name, other than the one that is made here."""
    if name in sys.modules:
        return sys.modules[name] is not _MADE.get(name)
    return importlib.util.find_spec(name) is not None


def _provide(*names: str) -> list[_Change]:
    """Packages and modules of these names where there are none."""
    missing = [name for name in names if not _is_installed(name)]
    return [_Change(sys.modules, name, m) for name, m in _MADE.items() if name.split(".")[0] in missing]


def _in_transformers() -> Iterator[_Change]:
    if not _is_installed("transformers"):
        raise ImportError("patch: transformers is not installed; install it, for example with pip install transformers")

    names = ("mamba", "falcon_mamba", "jamba", "zamba")
    modules = [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in names]
    ours: _Candidates = {name: (getattr(transformers, name),) for name in transformers.__all__}
    only: dict[str, _Function] = {"causal_conv1d_fn": _serves_fn, "causal_conv1d_update": _serves_update}
    yield from _functions(ours, *modules, only=only)


def _serves_fn(hidden_states: Any, weight: Any, bias: Any = None, activation: Any = None, **kwargs: Any) -> bool:
    return transformers.serves(weight, activation)


def _serves_update(hidden_states: Any, conv_state: Any, weight: Any, bias: Any = None, activation: Any = None) -> bool:
    return transformers.serves(weight, activation)


def _serves_scans(  # some copies of VMamba have other paths than these
    x: Any, in_first: bool = True, out_first: bool = True, one_by_one: bool = False, scans: int = 0, *_: Any, **__: Any
) -> bool:
    return scans in (0, 1, 2)


_CONV: _Candidates = {name: (getattr(causal_conv1d, name),) for name in causal_conv1d.__all__}
_SCAN: _Candidates = {name: (getattr(mamba_ssm, name),) for name in ("selective_scan_fn", "mamba_inner_fn")}
_STEP: _Candidates = {"selective_state_update": (mamba_ssm.selective_state_update,)}
_VIM: _Candidates = {name: (getattr(vim, name),) for name in ("mamba_inner_fn_no_out_proj", "bimamba_inner_fn")}


_INTERFACE, _UPDATE = "mamba_ssm.ops.selective_scan_interface", "mamba_ssm.ops.triton.selective_state_update"


def _first(candidates: _Candidates) -> dict[str, _Function]:
    return {name: functions[0] for name, functions in candidates.items()}


_MADE = _make_modules(
    {
        "causal_conv1d": _first(_CONV),
        "causal_conv1d.causal_conv1d_interface": _first(_CONV),
        "mamba_ssm": _first(_SCAN),
        "mamba_ssm.ops": {},
        _INTERFACE: _first(_SCAN | _VIM),
        "mamba_ssm.ops.triton": {},
        _UPDATE: _first(_STEP),
        "wtconv": {"WTConv2d": wtconv.WTConv2d},
        "wtconv.wtconv2d": {"WTConv2d": wtconv.WTConv2d},
    }
)
_EXTENSIONS = ("selective_scan_cuda", "selective_scan_cuda_core", "selective_scan_cuda_oflex")
for _name in _EXTENSIONS:
    _MADE[_name] = getattr(vmamba, _name)
    _MADE[_name].__spec__ = ModuleSpec(_name, None)


def _in_mamba_ssm(scan: _Candidates = _SCAN, conv: _Candidates = _CONV) -> Iterator[_Change]:
    found = _provide("selective_scan_cuda", "causal_conv1d", "mamba_ssm")
    if _is_installed("causal_conv1d"):
        found += _functions(conv, importlib.import_module("causal_conv1d"))
    if _is_installed("mamba_ssm"):
        with _temporarily(found):
            for module, ours in ((_INTERFACE, scan), (_UPDATE, _STEP)):
                found += _functions(ours, importlib.import_module(module))
    yield from found


@contextmanager
def _temporarily(changes: Iterable[_Change]) -> Iterator[None]:
    """With changes made, so that what needs them can be imported."""
    made = list(changes)
    for change in made:
        change.do()
    try:
        yield
    finally:
        for change in reversed(made):
            change.undo()


def _in_vim() -> Iterator[_Change]:
    return _in_mamba_ssm(_SCAN | _VIM, _CONV | {"causal_conv1d_fn": (vim.causal_conv1d_fn, *_CONV["causal_conv1d_fn"])})


def _in_vmamba() -> Iterator[_Change]:
    ours = {name: (getattr(vmamba, name),) for name in ("selective_scan_fn", "cross_scan_fn", "cross_merge_fn")}
    for module in _modules():
        theirs = {name: vars(module)[name] for name in ours if inspect.isfunction(vars(module).get(name))}
        own = {name: function for name, function in theirs.items() if function.__module__ == module.__name__}
        if "cross_scan_fn" in own or ("selective_scan_fn" in own and "oflex" in _parameters(own["selective_scan_fn"])):
            only = {name: _serves_scans for name in own if name != "selective_scan_fn"}
            yield from _functions({name: ours[name] for name in own}, module, only=only)
    yield from _provide(*_EXTENSIONS)


def _in_wtconv() -> Iterator[_Change]:
    yield from _provide("wtconv")
    if _is_installed("wtconv"):
        importlib.import_module("wtconv")

    def haar(module: Any, x: Any) -> bool:
        return module.wt_filter.shape[-1] == 2 and module.base_conv.kernel_size[0] % 2 == 1

    classes: set[Any] = {vars(module)["WTConv2d"] for module in _modules() if "WTConv2d" in vars(module)}
    for theirs in classes - {wtconv.WTConv2d}:
        forward = getattr(theirs, "forward", None)
        if inspect.isclass(theirs) and forward is not None and not _is_ours(forward):
            yield _Change(theirs, "forward", _replacement(forward, wtconv.WTConv2d.forward, only=haar))


_FINDERS: dict[str, Callable[[], Iterator[_Change]]] = {
    "transformers": _in_transformers,
    "mamba_ssm": _in_mamba_ssm,
    "vmamba": _in_vmamba,
    "vim": _in_vim,
    "wtconv": _in_wtconv,
}
