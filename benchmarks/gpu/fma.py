"""What bounds arithmetic outside of matrix products: a kernel of nothing but multiply-adds, and one of exponentials."""

import torch
import triton
import triton.language as tl

BLOCK = 256


@triton.jit
def _multiply_add_kernel(out, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    factor = 1.0 + i * 1e-12
    a, b, c, d = factor * 1.0, factor * 2.0, factor * 3.0, factor * 4.0
    for _ in range(STEPS):  # four independent chains hide the latency of each
        a = a * factor + 1e-6
        b = b * factor + 1e-6
        c = c * factor + 1e-6
        d = d * factor + 1e-6
    tl.store(out + i, a + b + c + d)


@triton.jit
def _exponential_kernel(out, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b, c, d = i * -1e-9, i * -2e-9, i * -3e-9, i * -4e-9
    for _ in range(STEPS):
        a = tl.exp2(a)
        b = tl.exp2(b)
        c = tl.exp2(c)
        d = tl.exp2(d)
    tl.store(out + i, a + b + c + d)


def multiply_add(out: torch.Tensor, steps: int) -> int:
    """Run it over ``out`` and return the operations: a multiply-add is two."""
    _multiply_add_kernel[(out.numel() // BLOCK,)](out, STEPS=steps, BLOCK=BLOCK)
    return 8 * steps * out.numel()


def exponential(out: torch.Tensor, steps: int) -> int:
    """Run it over ``out`` and return the number of exponentials."""
    _exponential_kernel[(out.numel() // BLOCK,)](out, STEPS=steps, BLOCK=BLOCK)
    return 4 * steps * out.numel()
