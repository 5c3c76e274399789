"""The compiled part, and the one way in which an operator is declared to PyTorch."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COMPILED_ERROR: str | None = None
"""Why the C++ kernels are not available, or None where they are loaded."""

try:
    _C: Any = importlib.import_module("mobilemamba_kernels._C")
except ImportError as error:
    COMPILED_ERROR = f"the C++ kernels are not loaded: {error}"
    warnings.warn(
        f"mobilemamba_kernels runs as plain PyTorch because {COMPILED_ERROR}; "
        "install a C++17 compiler, then reinstall mobilemamba",
        RuntimeWarning,
        stacklevel=2,
    )

CUDA_ERROR: str | None = COMPILED_ERROR
"""Why the CUDA C++ kernels are not available, or None where they are loaded."""

if COMPILED_ERROR is None:
    if torch.version.cuda is None:
        CUDA_ERROR = "this PyTorch is built without CUDA"
    else:
        try:
            importlib.import_module("mobilemamba_kernels._C_cuda")
        except ImportError as error:
            CUDA_ERROR = f"the CUDA C++ kernels are not loaded: {error}"

TRITON = frozenset(path.stem for path in (Path(__file__).parent / "triton").glob("[!_]*.py"))
"""The operators that have Triton kernels: each has a module of its name there."""

LIBRARY = torch.library.Library("mobilemamba", "FRAGMENT")
TRITON_LIBRARY = torch.library.Library("mobilemamba_triton", "FRAGMENT")
KERNELS: dict[str, tuple[str, ...]] = {}
"""The declared operators, each with the types of device that have a kernel for its forward.

Asked of the dispatcher once, when an operator is declared: torch.compile cannot trace the question.
"""

_Function = Callable[..., Any]
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality  # type: ignore[attr-defined]


def define_operator(
    name: str,
    schema: str,
    reference: _Function,
    fake: _Function,
    composed: Callable[[str], _Function] | None = None,
) -> dict[str, _Function]:
    """Declare ``mobilemamba::<name>_fwd``, its gradient ``mobilemamba::<name>_bwd``, and both for Triton.

    ``<name>_bwd(*grad_outputs, *inputs)`` returns a gradient for every tensor input, an empty tensor for an
    absent one and for one of integers. Both run the reference, or its vector-Jacobian product, on every device; the
    compiled parts override either of them for a device with ``STABLE_TORCH_LIBRARY_IMPL``. In ``mobilemamba_triton``
    they are ``forward`` and ``backward`` of ``mobilemamba_kernels/triton/<name>.py``, where that exists.

    Args:
        name: the public function's name.
        schema: the arguments and results of the forward, in the syntax of ``torch.library``.
        reference: plain differentiable PyTorch with the arguments of ``schema``.
        fake: allocates the outputs (shape, dtype, strides) from the arguments of ``schema``.
        composed: gives for a backend the reference on other operators' kernels. Its vector-Jacobian product is the
            gradient on that backend, for an operator without a backward kernel of its own.

    Returns:
        What runs the forward on each backend, differentiable once (the reference any number of times).
    """
    parsed = torch._C.parse_schema(f"{name}{schema}")
    arguments = [(a.name, str(a.type)) for a in parsed.arguments]
    tensors = [i for i, (_, kind) in enumerate(arguments) if kind in ("Tensor", "Optional[Tensor]")]
    outputs = len(parsed.returns)
    grads_in = ", ".join(f"Tensor grad_{i}" for i in range(outputs))
    grads_out = ", ".join("Tensor" for _ in tensors)
    backward_schema = f"({grads_in}, {schema[1:].split('->')[0].rstrip()[:-1]}) -> ({grads_out})"

    def run_reference(*args: Any) -> Any:
        allocated, computed = fake(*args), reference(*args)
        if isinstance(computed, Tensor):
            return allocated.copy_(computed)
        return tuple(a.copy_(c) for a, c in zip(allocated, computed, strict=True))

    def has_gradient(value: Tensor | None) -> bool:
        return value is not None and value.is_floating_point()  # which an index is not

    def allocate_gradients(*args: Any) -> list[Tensor]:
        inputs = args[outputs:]
        first = next(inputs[i] for i in tensors if inputs[i] is not None)
        return [torch.empty_like(inputs[i]) if has_gradient(inputs[i]) else first.new_empty(0) for i in tensors]

    def as_returned(gradients: list[Tensor]) -> Any:
        return gradients[0] if len(gradients) == 1 else gradients

    def fake_backward(*args: Any) -> Any:
        return as_returned(allocate_gradients(*args))

    def run_vjp(function: _Function, *args: Any) -> Any:
        grads, inputs = args[:outputs], list(args[outputs:])
        present = [i for i in tensors if has_gradient(inputs[i])]
        # The dispatcher calls this with autograd switched off. torch.func.vjp works so too, but not within opcheck.
        with torch._C._SetExcludeDispatchKeyGuard(_AUTOGRAD, False), torch.enable_grad():
            for i in present:
                inputs[i] = inputs[i].detach().requires_grad_()
            computed = function(*inputs)
            pairs = zip((computed,) if outputs == 1 else computed, grads, strict=True)
            used = [(c, g) for c, g in pairs if c.requires_grad]  # not the last state of an empty sequence
            found = torch.autograd.grad(
                [c for c, _ in used],
                [inputs[i] for i in present],
                [g for _, g in used],
                allow_unused=True,
                materialize_grads=True,
            )
        allocated = allocate_gradients(*args)
        for i, gradient in zip(present, found, strict=True):
            allocated[tensors.index(i)].copy_(gradient)
        return as_returned(allocated)

    def run_triton_backward(*args: Any) -> Any:
        module = _triton_module(name)
        if hasattr(module, "backward"):
            return module.backward(*args)
        return run_vjp(reference if composed is None else composed("triton"), *args)

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{name}: the kernels have no second derivative; compute it under "
            'mobilemamba_kernels.use_backend("reference")'
        )

    def declare(library: torch.library.Library, forward: _Function, backward: _Function) -> _Function:
        qualified = f"{library.ns}::{name}"
        library.define(f"{name}_fwd{schema}")
        library.define(f"{name}_bwd{backward_schema}")
        library.impl(f"{name}_fwd", forward, "CompositeExplicitAutograd")
        library.impl(f"{name}_bwd", backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{qualified}_fwd", fake, lib=library)
        torch.library.register_fake(f"{qualified}_bwd", fake_backward, lib=library)
        gradient = getattr(getattr(torch.ops, library.ns), f"{name}_bwd").default

        def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
            ctx.save_for_backward(*(inputs[i] for i in tensors))
            ctx.others = [None if i in tensors else value for i, value in enumerate(inputs)]

        def differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            inputs = list(ctx.others)
            for i, value in zip(tensors, ctx.saved_tensors, strict=True):
                inputs[i] = value
            result: list[Tensor | None] = [None] * len(inputs)
            computed = gradient(*grads, *inputs)
            for i, grad in zip(tensors, (computed,) if len(tensors) == 1 else computed, strict=True):
                result[i] = grad if has_gradient(inputs[i]) else None
            return tuple(result)

        torch.library.register_autograd(f"{qualified}_fwd", differentiate, setup_context=setup_context, lib=library)
        torch.library.register_autograd(f"{qualified}_bwd", refuse, lib=library)
        return getattr(getattr(torch.ops, library.ns), f"{name}_fwd").default

    compiled = declare(LIBRARY, run_reference, partial(run_vjp, reference))
    KERNELS[name] = _devices_of(f"{name}_fwd")
    runs = {"reference": reference} | dict.fromkeys(KERNELS[name], compiled)
    for device in KERNELS[name]:
        if composed is not None:
            LIBRARY.impl(f"{name}_bwd", partial(run_vjp, composed(device)), device.upper())
    if name in TRITON:
        runs["triton"] = declare(TRITON_LIBRARY, partial(_run_triton, name), run_triton_backward)
    return runs


def define_update(name: str, schema: str, reference: _Function, fake: _Function) -> dict[str, _Function]:
    """Declare ``mobilemamba::<name>``, which changes arguments in place and has no gradient, and the same for Triton.

    Arguments, results and kernels are as in :func:`define_operator`, but for the suffix; ``schema`` marks what changes.
    """

    def allocate(*args: Any) -> Any:
        # One tensor of the device "meta" brings real ones here.
        if len({a.device for a in args if isinstance(a, Tensor)}) > 1:
            raise RuntimeError(f"{name}: the tensors are on different devices")
        return fake(*args)

    def declare(library: torch.library.Library, forward: _Function) -> _Function:
        library.define(f"{name}{schema}")
        library.impl(name, forward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{library.ns}::{name}", allocate, lib=library)
        return getattr(getattr(torch.ops, library.ns), name).default

    compiled = declare(LIBRARY, reference)
    KERNELS[name] = _devices_of(name)
    runs = {"reference": reference} | dict.fromkeys(KERNELS[name], compiled)
    if name in TRITON:
        runs["triton"] = declare(TRITON_LIBRARY, partial(_run_triton, name))
    return runs


def _devices_of(operator: str) -> tuple[str, ...]:
    """The types of device for which a compiled part has registered the operator."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return tuple(device for device in ("cpu", "cuda") if has_kernel(f"mobilemamba::{operator}", device.upper()))


def _triton_module(name: str) -> Any:
    return importlib.import_module(f"mobilemamba_kernels.triton.{name}")


def _run_triton(name: str, *args: Any) -> Any:
    return _triton_module(name).forward(*args)


def cpu_capability() -> str:
    """The instruction set that the C++ kernels run: "default", "avx2" or "avx512"."""
    return _C.cpu_capability()
