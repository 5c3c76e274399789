"""Every kernel on the small cases, in every type and layout, with nothing around it: what compute-sanitizer watches."""

from __future__ import annotations

import time

import torch

from gpu import DRY_RUN
from gpu.device import BACKENDS, DEVICE, synchronize
from gpu.engines import has_kernel
from mobilemamba_kernels import use_backend
from mobilemamba_kernels.backends import KERNEL_DTYPES
from mobilemamba_kernels.testing import LAYOUTS, cases, tensors


def exercise(backend: str, seconds: float) -> str:
    """Run calls and their gradients until all are through or the time is up; says how many."""
    end = time.monotonic() + seconds
    chosen = [case for case in cases(benchmark=False) if has_kernel(backend, case, backward=False)]
    if DRY_RUN:
        chosen = list({case.op: case for case in chosen}.values())
    # All operators come early, whatever the time allows.
    plan = [(case, dtype, layout) for layout in LAYOUTS for dtype in KERNEL_DTYPES for case in chosen]
    plan = plan[:: len(KERNEL_DTYPES) * len(LAYOUTS)] if DRY_RUN else plan
    done = 0
    for case, dtype, layout in plan:
        if time.monotonic() > end:
            break
        arguments = case.make(dtype, layout, DEVICE)
        inputs = list(tensors(arguments).values())
        backward = has_kernel(backend, case, backward=True)
        with use_backend(BACKENDS[backend]):
            for tensor in inputs:
                tensor.requires_grad_(backward)
            results = case.run(arguments)
            used = [r for r in results if r.requires_grad]
            if used:
                torch.autograd.grad(used, inputs, [torch.ones_like(r) for r in used], allow_unused=True)
        synchronize()
        done += 1
    left = f"; {len(plan) - done} did not fit into {seconds:.0f} s" if done < len(plan) else ""
    return f"{backend}: {done} calls of {len(chosen)} cases{left}"
