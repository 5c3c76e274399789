"""The harness that every speed figure comes from: kernels and plain PyTorch in turn, in one process."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import mobilemamba_kernels
from mobilemamba.factory import create_model
from mobilemamba.inference import fuse
from mobilemamba.variants import find_variant
from mobilemamba_kernels import _library, use_backend
from mobilemamba_kernels.testing import Case, cases, map_tensors, tensors, traffic

BATCHES = (1, 16)
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


@dataclass(frozen=True)
class NetworkResult:
    """The fused network at one batch size."""

    model: str
    batch: int
    dtype: str
    kernel: Timing
    plain: Timing
    kernel_peak_mib: float | None  # over the process at rest with its weights; None where it cannot be measured
    plain_peak_mib: float | None

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


def bench_network(
    name: str, batch: int, dtype: torch.dtype = torch.float32, budget_s: float = 10.0, memory: bool = True
) -> NetworkResult:
    """Time a fused network on the kernels against the same network on plain PyTorch."""
    kernel, plain = time_in_turn([prepare_network(name, batch, dtype, p) for p in (False, True)], budget_s)
    dtype_name = str(dtype).removeprefix("torch.")
    peaks = [_peak_in_new_process(name, batch, dtype_name, p) if memory else None for p in (False, True)]
    return NetworkResult(name, batch, dtype_name, kernel, plain, peaks[0], peaks[1])


def prepare_network(name: str, batch: int, dtype: torch.dtype, plain: bool) -> Callable[[], Any]:
    """A forward pass of a fused network with random weights, ready to be timed."""
    torch.manual_seed(0)
    model = fuse(create_model(name)).to(dtype)
    size = find_variant(name).image_size
    x = torch.randn(batch, 3, size, size).to(dtype=dtype, memory_format=torch.channels_last)

    def run() -> Any:
        with use_backend("reference") if plain else contextlib.nullcontext(), torch.inference_mode():
            return model(x)

    return run


def _peak_in_new_process(*arguments: str | int) -> float | None:
    """Peak memory of some forward passes, MiB. A process of its own: an allocator gives nothing back."""
    command = [sys.executable, "-m", "mobilemamba.bench", json.dumps(arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **_import_path()})
    return json.loads(done.stdout)


def _import_path() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _measure_peak(name: str, batch: int, dtype: str, plain: bool) -> float | None:
    run = prepare_network(name, batch, getattr(torch, dtype), plain)
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew (Linux)
        resting = _status("VmRSS")
        for _ in range(3):
            run()
        return (_status("VmHWM") - resting) / 1024
    except OSError:
        return None


def _status(field: str) -> int:
    """A field of this process's status in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


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


def as_json(results: Sequence[OpResult | NetworkResult]) -> str:
    """Results and environment for machines; seconds a call."""
    return json.dumps(
        {"environment": environment(), "results": [asdict(r) | {"ratio": r.ratio} for r in results]}, indent=2
    )


if __name__ == "__main__":
    print(json.dumps(_measure_peak(*json.loads(sys.argv[1]))))
