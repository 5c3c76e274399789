"""The harness that every speed figure comes from, and the operators' benchmark: kernels and plain PyTorch in turn."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import mobilemamba_kernels
from mobilemamba_kernels import _library, use_backend
from mobilemamba_kernels.testing import Case, cases, map_tensors, tensors, traffic

DIRECTIONS = ("forward", "backward")
_SAMPLE_S = 5e-3  # what is faster is repeated within a sample


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    p10: float
    p90: float
    samples: int


def time_in_turn(functions: Sequence[Callable[[], Any]], budget_s: float = 2.0) -> list[Timing]:
    """Time functions against each other: one sample of each, then the next round, so that drift meets all alike.

    An untimed call goes before each sample, so that a function finds its own traces in caches and allocator, not the
    other's.
    There are as many rounds as fit into ``budget_s``, but between 7 and 200.
    """
    repeats, round_s = [], 0.0
    for function in functions:
        function()  # memory, caches, the library's choice of algorithm
        start = time.perf_counter()
        function()
        once = time.perf_counter() - start
        repeats.append(max(1, math.ceil(_SAMPLE_S / once)))
        round_s += once * repeats[-1]
    samples: list[list[float]] = [[] for _ in functions]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(min(200, max(7, int(budget_s / round_s)))):
            for function, count, taken in zip(functions, repeats, samples, strict=True):
                function()
                start = time.perf_counter()
                for _ in range(count):
                    function()
                taken.append((time.perf_counter() - start) / count)
    finally:
        if collecting:
            gc.enable()
    result = []
    for taken in samples:
        deciles = statistics.quantiles(taken, n=10, method="inclusive")
        result.append(Timing(statistics.median(taken), deciles[0], deciles[-1], len(taken)))
    return result


@dataclass(frozen=True)
class OpResult:
    """One operator on one shape, in one direction."""

    op: str
    case: str
    direction: str
    dtype: str
    kernel: Timing
    plain: Timing
    gigabytes_per_s: float  # every argument and result moved once, over the kernel's median

    @property
    def ratio(self) -> float:
        """How many times faster than plain PyTorch."""
        return self.plain.median / self.kernel.median


def refuse_fallback() -> None:
    """Make sure that there are kernels to time.

    Raises:
        RuntimeError: they are not loaded, or another backend is forced.
    """
    if _library.COMPILED_ERROR:
        raise RuntimeError(
            f"there is nothing to time: {_library.COMPILED_ERROR}; install a C++17 compiler and reinstall mobilemamba"
        )
    if not any(row.device == "cpu" and row.backend == "cpu" for row in mobilemamba_kernels.report()):
        raise RuntimeError("there is nothing to time: no operator runs a kernel; unset MOBILEMAMBA_BACKEND")


def measured_cases(op: str | None = None) -> Iterator[tuple[Case, str]]:
    """The benchmark cases and directions that this process has a kernel for."""
    for case in cases(op, benchmark=True):
        for direction in DIRECTIONS:
            operator = f"mobilemamba::{case.operator}_{'fwd' if direction == 'forward' else 'bwd'}"
            if torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CPU"):
                yield case, direction


def prepare(case: Case, direction: str, dtype: torch.dtype, plain: bool) -> tuple[Callable[[], Any], int]:
    """A call of ``case`` in the network's layout, ready to be timed, and the bytes that it must move.

    Args:
        case: what to run.
        direction: "forward", or "backward": the gradient of every tensor argument, its graph already built.
        dtype: of the activations.
        plain: plain PyTorch in place of the kernel.
    """
    arguments = case.make(dtype, "channels_last")

    def forward() -> Any:
        if plain:
            return case.peer(arguments)
        with use_backend("cpu"):
            return case.run(arguments)

    if direction == "forward":

        def run() -> Any:
            with torch.inference_mode():
                return forward()

        return run, traffic(arguments, run())

    inputs = list(tensors(map_tensors(torch.Tensor.requires_grad_, arguments)).values())
    results = forward()
    grads = [torch.ones_like(r) for r in results]

    def backward() -> Any:
        return torch.autograd.grad(results, inputs, grads, retain_graph=True)

    return backward, traffic(inputs, inputs, grads)


def bench_op(case: Case, direction: str, dtype: torch.dtype = torch.float32, budget_s: float = 2.0) -> OpResult:
    """Time one operator on one shape."""
    kernel, moved = prepare(case, direction, dtype, plain=False)
    plain, _ = prepare(case, direction, dtype, plain=True)
    kernel_time, plain_time = time_in_turn([kernel, plain], budget_s)
    speed = moved / kernel_time.median / 1e9
    return OpResult(case.op, case.name, direction, str(dtype).removeprefix("torch."), kernel_time, plain_time, speed)


def environment() -> dict[str, Any]:
    """What a figure depends on besides the code under test."""
    return {
        "cpu": _cpu_model(),
        "instruction_set": None if _library.COMPILED_ERROR else _library.cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "mobilemamba": mobilemamba_kernels.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of a source checkout, with "+" where it has been changed; None for an installed package."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode != 0
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def as_json(results: Sequence[OpResult]) -> str:
    """Results and environment for machines; seconds a call."""
    return json.dumps(
        {"environment": environment(), "results": [asdict(r) | {"ratio": r.ratio} for r in results]}, indent=2
    )
