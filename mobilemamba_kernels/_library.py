"""The compiled part, and the one way in which an operator is declared to PyTorch."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
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

LIBRARY = torch.library.Library("mobilemamba", "FRAGMENT")
KERNELS: dict[str, tuple[str, ...]] = {}
"""The declared operators, each with the types of device that have a kernel for its forward.

Asked of the dispatcher once, when an operator is declared: torch.compile cannot trace the question.
"""

_Function = Callable[..., Any]
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality  # type: ignore[attr-defined]


def define_operator(
    name: str, schema: str, reference: _Function, fake: _Function, composed: _Function | None = None
) -> _Function:
    """Declare ``mobilemamba::<name>_fwd`` and its gradient ``mobilemamba::<name>_bwd``.

    ``<name>_bwd(*grad_outputs, *inputs)`` returns a gradient for every tensor input, an empty tensor for an
    absent one. Both run the reference, or its vector-Jacobian product, on every device; the compiled parts
    override either of them for a device with ``STABLE_TORCH_LIBRARY_IMPL``.

    Args:
        name: the public function's name.
        schema: the arguments and results of the forward, in the syntax of ``torch.library``.
        reference: plain differentiable PyTorch with the arguments of ``schema``.
        fake: allocates the outputs (shape, dtype, strides) from the arguments of ``schema``.
        composed: the reference on other operators' kernels. Its vector-Jacobian product is the gradient on CPUs with
            compiled kernels, for an operator without a backward kernel of its own.

    Returns:
        The forward operator, differentiable once.
    """
    parsed = torch._C.parse_schema(f"{name}{schema}")
    arguments = [(a.name, str(a.type)) for a in parsed.arguments]
    tensors = [i for i, (_, kind) in enumerate(arguments) if kind in ("Tensor", "Optional[Tensor]")]
    outputs = len(parsed.returns)
    qualified = f"mobilemamba::{name}"
    grads_in = ", ".join(f"Tensor grad_{i}" for i in range(outputs))
    grads_out = ", ".join("Tensor" for _ in tensors)
    LIBRARY.define(f"{name}_fwd{schema}")
    LIBRARY.define(f"{name}_bwd({grads_in}, {schema[1:].split('->')[0].rstrip()[:-1]}) -> ({grads_out})")

    def run_reference(*args: Any) -> Any:
        allocated, computed = fake(*args), reference(*args)
        if isinstance(computed, Tensor):
            return allocated.copy_(computed)
        return tuple(a.copy_(c) for a, c in zip(allocated, computed, strict=True))

    def allocate_gradients(*args: Any) -> list[Tensor]:
        inputs = args[outputs:]
        first = next(inputs[i] for i in tensors if inputs[i] is not None)
        return [first.new_empty(0) if inputs[i] is None else torch.empty_like(inputs[i]) for i in tensors]

    def as_returned(gradients: list[Tensor]) -> Any:
        return gradients[0] if len(gradients) == 1 else gradients

    def fake_backward(*args: Any) -> Any:
        return as_returned(allocate_gradients(*args))

    def run_vjp(function: _Function, *args: Any) -> Any:
        grads, inputs = args[:outputs], list(args[outputs:])
        present = [i for i in tensors if inputs[i] is not None]
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

    LIBRARY.impl(f"{name}_fwd", run_reference, "CompositeExplicitAutograd")
    LIBRARY.impl(f"{name}_bwd", partial(run_vjp, reference), "CompositeExplicitAutograd")
    if composed is not None and COMPILED_ERROR is None:
        LIBRARY.impl(f"{name}_bwd", partial(run_vjp, composed), "CPU")
    torch.library.register_fake(f"{qualified}_fwd", fake, lib=LIBRARY)
    torch.library.register_fake(f"{qualified}_bwd", fake_backward, lib=LIBRARY)
    forward = getattr(torch.ops.mobilemamba, f"{name}_fwd").default
    backward = getattr(torch.ops.mobilemamba, f"{name}_bwd").default

    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        ctx.save_for_backward(*(inputs[i] for i in tensors))
        ctx.others = [None if i in tensors else value for i, value in enumerate(inputs)]

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = list(ctx.others)
        for i, value in zip(tensors, ctx.saved_tensors, strict=True):
            inputs[i] = value
        result: list[Tensor | None] = [None] * len(inputs)
        computed = backward(*grads, *inputs)
        for i, grad in zip(tensors, (computed,) if len(tensors) == 1 else computed, strict=True):
            result[i] = None if inputs[i] is None else grad
        return tuple(result)

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{name}: the kernels have no second derivative; compute it under "
            'mobilemamba_kernels.use_backend("reference")'
        )

    torch.library.register_autograd(f"{qualified}_fwd", differentiate, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_autograd(f"{qualified}_bwd", refuse, lib=LIBRARY)
    KERNELS[name] = tuple(
        device
        for device in ("cpu", "cuda")
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{qualified}_fwd", device.upper())
    )
    return forward


def cpu_capability() -> str:
    """The instruction set that the C++ kernels run: "default", "avx2" or "avx512"."""
    return _C.cpu_capability()
