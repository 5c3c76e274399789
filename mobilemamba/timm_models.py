"""The variants in timm's registry, whichever of the two packages is imported first.

timm is not imported here. If it is there already, :func:`register_with_timm` registers at once; else it leaves a
finder on ``sys.meta_path`` that steps aside at timm's import and registers when timm's models are loaded.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from mobilemamba.factory import create_model
from mobilemamba.model import default_config
from mobilemamba.variants import VARIANTS

_TIMM = "timm.models"

# timm looks the configurations up under this name.
default_cfgs = {name: default_config(name, variant.image_size) for name, variant in VARIANTS.items()}


def register_with_timm() -> None:
    """Make ``timm.create_model("mobilemamba_…")`` work, now or as soon as timm is imported."""
    if _TIMM in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterTimm())


class _AfterTimm(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TIMM:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                _register()

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    try:
        from timm.models import register_model

        for name in VARIANTS:
            register_model(_entrypoint(name))
    except Exception as error:  # timm must stay importable whatever its version
        warnings.warn(f"the mobilemamba models are not in timm's registry: {error}", stacklevel=2)


def _entrypoint(name: str) -> Callable[..., Any]:
    def build(pretrained: bool = False, **kwargs: Any) -> Any:
        from timm.models import build_model_with_cfg

        return build_model_with_cfg(
            partial(create_model, name),
            name,
            pretrained,
            feature_cfg={"out_indices": (0, 1, 2), "flatten_sequential": False},
            **kwargs,
        )

    build.__name__ = name
    build.__doc__ = f"timm's entry point for {name}: see :func:`mobilemamba.create_model`."
    return build
