"""Puts the functions of this package in place of other projects', and takes them out again."""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import inspect
import itertools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import MethodType, ModuleType
from typing import Any

from torch import nn

from mobilemamba_kernels.interop import causal_conv1d, mamba_ssm, transformers, vim, vmamba, wtconv

_Function = Callable[..., Any]
_Candidates = dict[str, tuple[_Function, ...]]  # by name; the first whose parameters fit

_lock = threading.RLock()
_blocks: Counter[str] = Counter()  # of `patched` that are open
_replaced: dict[str, dict[str, Any]] = {}  # by target, what patch returned


class _Swap:
    """A function of another project, and what is called in its place while there are targets that want it.

    Who keeps the latter beyond that, in a closure for example, calls the original again.
    """

    def __init__(self, theirs: _Function, ours: _Function, only: _Function | None) -> None:
        self.theirs, self.targets, self.active = theirs, set[str](), False

        @functools.wraps(theirs)
        def call(*args: Any, **kwargs: Any) -> Any:
            serves = self.active and (only is None or only(*args, **kwargs))
            return ours(*args, **kwargs) if serves else theirs(*args, **kwargs)

        call.mobilemamba_kernels = self  # type: ignore[attr-defined]
        self.call: Any = call

    def start(self) -> None:
        self.active = True

    def end(self) -> None:
        self.active = False


class _Provided:
    """A module that is found under a name while there are targets that want it."""

    def __init__(self, name: str, module: ModuleType) -> None:
        self.name, self.module, self.targets = name, module, set[str]()
        self.old: ModuleType | None = None

    def start(self) -> None:
        if sys.modules.get(self.name) is not self.module:
            self.old, sys.modules[self.name] = sys.modules.get(self.name), self.module

    def end(self) -> None:
        if self.old is not None:
            sys.modules[self.name] = self.old
        else:
            sys.modules.pop(self.name, None)


_swaps: dict[int, _Swap] = {}  # by the original's id; they stay, so that patching again finds them
_provided: dict[str, _Provided] = {}
_Part = _Swap | _Provided


def patch(target: str) -> dict[str, Any]:
    """Make another project's code call this package's operators; models that exist already do so too.

    - "transformers": the functions of its modules for Mamba, FalconMamba, Jamba and Zamba.
    - "mamba_ssm": the functions of mamba-ssm and causal-conv1d, "vim" those and what Vim adds. A package that is not
      installed is made, so that ``from mamba_ssm.ops.selective_scan_interface import selective_scan_fn`` works.
    - "vmamba": ``selective_scan_fn``, ``cross_scan_fn`` and ``cross_merge_fn`` of VMamba's modules that are imported,
      and the extensions ``selective_scan_cuda``, ``_core`` and ``_oflex`` for those that will be.
    - "wtconv": the forward of the classes ``WTConv2d`` that are imported; where there is none, a module ``wtconv``.

    Whoever imported a function by its name, or keeps it as an attribute of a layer, gets the replacement as well.
    Patching again does nothing, but for modules that were imported since.

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
        replaced = _replaced.setdefault(target, {})
        for part in found:
            part.targets.add(target)
            part.start()
        replaced |= {f"sys.modules[{part.name!r}]": None for part in found if isinstance(part, _Provided)}
        calls = [part.call for part in found if isinstance(part, _Swap)]
        held = _exchange({id(call.mobilemamba_kernels.theirs): call for call in calls} | {id(c): c for c in calls})
        replaced |= {place: call.mobilemamba_kernels.theirs for place, call in held.items()}
        return dict(replaced)


def unpatch(target: str | None = None) -> None:
    """Put back what :func:`patch` replaced; for every target when None. Without a patch it does nothing.

    What was imported meanwhile, with the help of a module that patching made, keeps the functions of that module.

    Raises:
        ValueError: no such target.
    """
    if target is not None and target not in _FINDERS:
        raise ValueError(f"unpatch: target must be None or one of {', '.join(_FINDERS)}; got {target!r}")
    with _lock:
        names = {target} if target else set(_replaced)
        ended: list[_Part] = []
        parts: list[_Part] = [*_swaps.values(), *_provided.values()]
        for part in parts:
            if part.targets & names:
                part.targets -= names
                if not part.targets:
                    part.end()
                    ended.append(part)
        for name in names:
            _replaced.pop(name, None)
        _exchange({id(part.call): part.theirs for part in ended if isinstance(part, _Swap)})


@contextmanager
def patched(target: str) -> Iterator[dict[str, Any]]:
    """Patch within a ``with`` block, until every thread has left such a block.

    What was patched before the first of them stays so behind the last; a ``patch`` within ends with the block.
    """
    with _lock:
        already = target in _replaced and not _blocks[target]
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


_OWN = ("mobilemamba", "mobilemamba_kernels")


def _modules() -> list[ModuleType]:
    """The imported modules but for this package's."""
    return [m for name, m in list(sys.modules.items()) if isinstance(m, ModuleType) and name.split(".")[0] not in _OWN]


def _classes(base: type[nn.Module] = nn.Module) -> Iterator[type[nn.Module]]:
    for derived in base.__subclasses__():
        yield derived
        yield from _classes(derived)


def _held(wanted: Collection[int]) -> Iterator[tuple[str, Any, str, Any]]:
    """(place, owner, name, value) where modules, classes of layers and layers hold objects of these ids."""
    owners: list[tuple[str, Any]] = [(module.__name__, module) for module in _modules()]
    owners += [(f"{c.__module__}.{c.__qualname__}", c) for c in {*_classes()} if c.__module__.split(".")[0] not in _OWN]
    layers = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
    owners += [(f"a {type(layer).__module__}.{type(layer).__qualname__}", layer) for layer in layers]
    for place, owner in owners:
        for name, value in list(vars(owner).items()):
            held = value.__func__ if type(value) is staticmethod else value
            if id(held) in wanted:
                yield f"{place}.{name}", owner, name, held


def _exchange(new: dict[int, _Function]) -> dict[str, Any]:
    """Put other functions, by the ids of those that they replace, wherever these are held; return them by place."""
    placed = {}
    for place, owner, name, value in list(_held(new)) if new else ():
        placed[place] = function = new[id(value)]
        if type(vars(owner)[name]) is staticmethod:
            setattr(owner, name, staticmethod(function))
        elif isinstance(owner, nn.Module):
            vars(owner)[name] = function
        else:
            setattr(owner, name, function)
    return placed


def _parameters(function: _Function) -> list[str]:
    """Names; a module's, which is what ``kernels`` makes of a function, are those of its class."""
    if isinstance(function, nn.Module):
        function = MethodType(type(function).forward, function)
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind not in kinds]


def _swap(theirs: _Function, *ours: _Function, only: _Function | None = None) -> _Swap:
    """Of a function and the one of ``ours`` with its parameters (or more), for what ``only(*args, **kwargs)`` allows.

    Raises:
        RuntimeError: there is none.
    """
    known = getattr(theirs, "mobilemamba_kernels", None) or _swaps.get(id(theirs))
    if known is not None:
        return known
    wanted = _parameters(theirs)
    fitting = next((f for f in ours if _parameters(f)[: len(wanted)] == wanted), None)
    if fitting is None:
        name = getattr(theirs, "__name__", getattr(theirs, "kernel_layer_name", None))
        raise RuntimeError(
            f"patch: {theirs.__module__}.{name} takes ({', '.join(wanted)}), this package's "
            f"({', '.join(_parameters(ours[0]))}); nothing was replaced; install a version of either that fits"
        )
    return _swaps.setdefault(id(theirs), _Swap(theirs, fitting, only))


def _functions(ours: _Candidates, *modules: ModuleType, only: dict[str, _Function] | None = None) -> Iterator[_Swap]:
    """Replace functions of modules; some of them only for some arguments.

    Raises:
        RuntimeError: a module lacks one of them, or it takes other arguments.
    """
    for module, (name, candidates) in itertools.product(modules, ours.items()):
        theirs = getattr(module, name, None)
        if theirs is None:
            raise RuntimeError(
                f"patch: {module.__name__} has no {name}; nothing was replaced; install a version that has it"
            )
        yield _swap(theirs, *candidates, only=(only or {}).get(name))


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


def _works(name: str) -> bool:
    """Whether it is installed, with what it needs."""
    if not _is_installed(name):
        return False
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _provide(*names: str) -> list[_Provided]:
    """Those of the modules that are made here, with what is in them."""
    made = {name: m for name, m in _MADE.items() if any(name == n or name.startswith(f"{n}.") for n in names)}
    return [_provided.setdefault(name, _Provided(name, module)) for name, module in made.items()]


def _missing(*names: str) -> list[str]:
    return [name for name in names if not _works(name)]


def _in_transformers() -> Iterator[_Part]:
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


_CONV: _Candidates = {name: (getattr(causal_conv1d, name),) for name in ("causal_conv1d_fn", "causal_conv1d_update")}
_SCAN: _Candidates = {name: (getattr(mamba_ssm, name),) for name in ("selective_scan_fn", "mamba_inner_fn")}
_STEP: _Candidates = {"selective_state_update": (mamba_ssm.selective_state_update,)}
_VIM: _Candidates = {name: (getattr(vim, name),) for name in ("mamba_inner_fn_no_out_proj", "bimamba_inner_fn")}


_INTERFACE, _UPDATE = "mamba_ssm.ops.selective_scan_interface", "mamba_ssm.ops.triton.selective_state_update"


def _first(candidates: _Candidates) -> dict[str, _Function]:
    return {name: functions[0] for name, functions in candidates.items()}


_REFERENCES: dict[str, dict[str, _Function]] = {  # that networks import beside the functions
    "causal_conv1d": {name: getattr(causal_conv1d, name) for name in ("causal_conv1d_ref", "causal_conv1d_update_ref")},
    "mamba_ssm": {"selective_scan_ref": mamba_ssm.selective_scan_ref},
}
_MADE = _make_modules(
    {
        "causal_conv1d": _first(_CONV),
        "causal_conv1d.causal_conv1d_interface": _first(_CONV) | _REFERENCES["causal_conv1d"],
        "mamba_ssm": _first(_SCAN),
        "mamba_ssm.ops": {},
        _INTERFACE: _first(_SCAN | _VIM) | _REFERENCES["mamba_ssm"],
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


def _in_mamba_ssm(scan: _Candidates = _SCAN, conv: _Candidates = _CONV) -> Iterator[_Part]:
    found: list[_Part] = [*_provide(*_missing("selective_scan_cuda", "causal_conv1d"))]
    if _is_installed("causal_conv1d") and not any(part.name == "causal_conv1d" for part in _provided_of(found)):
        found += _functions(conv, importlib.import_module("causal_conv1d"))
    if not _is_installed("mamba_ssm"):
        found += _provide("mamba_ssm")
    else:
        with _temporarily(_provided_of(found)):
            try:
                found += _functions(scan, importlib.import_module(_INTERFACE))
            except ImportError as error:
                raise ImportError(
                    f"patch: mamba_ssm is installed but cannot be imported ({error}); nothing was replaced; install "
                    "what it needs, or uninstall it and have its functions from this package"
                ) from error
            found += _functions(_STEP, importlib.import_module(_UPDATE)) if _works(_UPDATE) else _provide(_UPDATE)
    yield from found


def _provided_of(parts: Iterable[_Part]) -> list[_Provided]:
    return [part for part in parts if isinstance(part, _Provided)]


@contextmanager
def _temporarily(modules: Iterable[_Provided]) -> Iterator[None]:
    """With modules in place, so that what needs them can be imported."""
    new = [module for module in modules if not module.targets]
    for module in new:
        module.start()
    try:
        yield
    finally:
        for module in new:
            module.end()


def _in_vim() -> Iterator[_Part]:
    return _in_mamba_ssm(_SCAN | _VIM, _CONV | {"causal_conv1d_fn": (vim.causal_conv1d_fn, *_CONV["causal_conv1d_fn"])})


def _in_vmamba() -> Iterator[_Part]:
    ours = {name: (getattr(vmamba, name),) for name in ("selective_scan_fn", "cross_scan_fn", "cross_merge_fn")}
    for module in _modules():
        theirs = {name: vars(module)[name] for name in ours if inspect.isfunction(vars(module).get(name))}
        own = {name: function for name, function in theirs.items() if function.__module__ == module.__name__}
        if "cross_scan_fn" in own or ("selective_scan_fn" in own and "oflex" in _parameters(own["selective_scan_fn"])):
            only = {name: _serves_scans for name in own if name != "selective_scan_fn"}
            yield from _functions({name: ours[name] for name in own}, module, only=only)
    yield from _provide(*_missing(*_EXTENSIONS))


def _in_wtconv() -> Iterator[_Part]:
    yield from _provide(*_missing("wtconv"))
    classes: set[Any] = {vars(module)["WTConv2d"] for module in _modules() if "WTConv2d" in vars(module)}
    for theirs in classes - {wtconv.WTConv2d}:
        if inspect.isclass(theirs) and hasattr(theirs, "forward"):
            yield _swap(theirs.forward, wtconv.WTConv2d.forward, only=wtconv.serves)


_FINDERS: dict[str, Callable[[], Iterator[_Part]]] = {
    "transformers": _in_transformers,
    "mamba_ssm": _in_mamba_ssm,
    "vmamba": _in_vmamba,
    "vim": _in_vim,
    "wtconv": _in_wtconv,
}
