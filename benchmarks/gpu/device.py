"""The device: its clock, its ceilings, and what a figure depends on besides the code under test."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import mobilemamba_kernels
from gpu import DRY_RUN
from mobilemamba.bench import Timing

ROOT = Path(__file__).parents[2]
DEVICE = "cpu" if DRY_RUN else "cuda"
BACKENDS = {"cuda": "cpu" if DRY_RUN else "cuda", "triton": "triton"}
"""The kernels under test, and what ``use_backend`` calls them here."""

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SLOW_S = 0.02  # what takes longer is timed alone, in few rounds

Run = Callable[[], Any]


def synchronize() -> None:
    """Wait for the device."""
    if not DRY_RUN:
        torch.cuda.synchronize()


@cache
def _stream() -> Any:
    return torch.cuda.Stream()


def on_stream() -> contextlib.AbstractContextManager:
    """One stream for all: a backward pass runs on its forward's, and can be captured on no other."""
    return contextlib.nullcontext() if DRY_RUN else torch.cuda.stream(_stream())


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """TF32 for "tf32", else IEEE float32, in matrix products and convolutions."""
    fast = dtype == "tf32"
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if fast else "highest")
    torch.backends.cudnn.allow_tf32 = fast
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextlib.contextmanager
def limit(seconds: float, what: str) -> Iterator[None]:
    """Raise TimeoutError in Python code that takes longer: a compiler, above all."""

    def stop(signum: int, frame: Any) -> None:
        raise TimeoutError(f"{what} took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def expired(error: BaseException | None) -> bool:
    """Whether an error comes from :func:`limit`, however a compiler has wrapped it."""
    while error is not None and not isinstance(error, TimeoutError):
        error = error.__cause__ or error.__context__
    return error is not None


# --- the clock -----------------------------------------------------------------------------------------------------


@cache
def _larger_than_l2() -> torch.Tensor:
    size = 1 << 10 if DRY_RUN else max(1 << 28, 4 * torch.cuda.get_device_properties(0).L2_cache_size)
    return torch.zeros(size // 4, device=DEVICE)


def _flush() -> None:
    # Read, not written: lines that wait to be written back would take bandwidth from the call that is timed. It also
    # keeps the GPU busy while the CPU enqueues that call.
    _larger_than_l2().amax()


def _sample(run: Run) -> Callable[[], float]:
    """Run once with a cold cache; what is returned gives the seconds, once the device has been waited for."""
    _flush()
    if DRY_RUN:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        return lambda: seconds
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    return lambda: begin.elapsed_time(end) / 1e3


def _rounds(runs: Sequence[Run], count: int) -> list[Timing]:
    samples: list[list[Callable[[], float]]] = [[] for _ in runs]
    for _ in range(count):
        for run, taken in zip(runs, samples, strict=True):
            taken.append(_sample(run))
    synchronize()
    found = []
    for taken in samples:
        seconds = [read() for read in taken]
        deciles = statistics.quantiles(seconds, n=10, method="inclusive")
        found.append(Timing(statistics.median(seconds), deciles[0], deciles[-1], count))
    return found


def time_in_turn(runs: Sequence[Run], budget_s: float = 0.3) -> list[Timing]:
    """Time calls, warm already, against each other with cold caches; slow ones by themselves, in fewer rounds."""
    once = [timing.median for timing in _rounds(runs, 2)]
    fast = [i for i, seconds in enumerate(once) if seconds <= _SLOW_S]
    found: dict[int, Timing] = {}
    if fast:
        round_s = sum(once[i] + 2e-4 for i in fast)
        count = min(100, max(3 if DRY_RUN else 15, int(budget_s / round_s)))
        found |= dict(zip(fast, _rounds([runs[i] for i in fast], count), strict=True))
    for i in set(range(len(runs))) - set(fast):
        count = min(15, max(3, int(budget_s / once[i])))
        found[i] = _rounds([runs[i]], count)[0]
    return [found[i] for i in range(len(runs))]


def warm_up(run: Run) -> Any:
    """Call until compilers, libraries and allocator are through; the last result."""
    for _ in range(2):
        run()
    result = run()
    synchronize()
    return result


def capture(run: Run) -> tuple[Run, Any] | None:
    """The replay of a graph of ``run``, which it keeps, and the results it writes; None where it cannot be captured."""
    if DRY_RUN:
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=_stream()):
            results = run()
    except RuntimeError:
        synchronize()
        return None

    def replay(keep: Run = run) -> None:  # what it reads must not be freed: the next capture empties PyTorch's cache
        graph.replay()

    replay()
    synchronize()
    return replay, results


def device_events(run: Run) -> list[Any]:
    """What PyTorch's profiler saw on the device, in its order: the kernels, copies and fills of a call."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sorted(events, key=lambda event: event.time_range.start)


def count_launches(run: Run) -> int | None:
    """Kernels, copies and fills that a call puts on the device."""
    if DRY_RUN:
        run()
        return None
    return len(device_events(run))


# --- the ceilings --------------------------------------------------------------------------------------------------


@cache
def measure_ceilings() -> dict[str, float]:
    """Bytes a second copied (read and written), operations a second by kind, matrix products by type."""
    size = 1 << 12 if DRY_RUN else 1 << 30
    source = torch.ones(size // 4, device=DEVICE)
    target = torch.empty_like(source)
    found = {"copy": 2 * size / _best(partial(target.copy_, source))}
    with contextlib.suppress(ImportError):
        from gpu import fma

        out = torch.empty(fma.BLOCK * (2 if DRY_RUN else 1 << 14), device=DEVICE)
        steps = 4 if DRY_RUN else 2048
        for name, function in (("multiply_add", fma.multiply_add), ("exponential", fma.exponential)):
            found[name] = function(out, steps) / _best(partial(function, out, steps))
    n = 32 if DRY_RUN else 8192
    for name, dtype in DTYPES.items():
        with precision(name):
            a, b = torch.randn(2, n, n, device=DEVICE).to(dtype).unbind()
            found[f"products {name}"] = 2 * n**3 / _best(partial(torch.mm, a, b))
    # cuBLAS in IEEE float32 is multiply-adds too, and the better of both is the ceiling.
    found["multiply_add"] = max(found.get("multiply_add", 0.0), found["products float32"])
    return found


def _best(run: Run) -> float:
    warm_up(run)
    return time_in_turn([run])[0].p10


# --- the results ---------------------------------------------------------------------------------------------------


@cache
def environment() -> dict[str, Any]:
    """Device, driver, versions, commit."""
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "dry_run": DRY_RUN,
        "commit": os.environ.get("MOBILEMAMBA_COMMIT") or _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "mobilemamba": mobilemamba_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "mamba_ssm": os.environ.get("MOBILEMAMBA_MAMBA_SSM") or _version("mamba_ssm"),
        "system": platform.platform(),
    }
    if not DRY_RUN:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Results:
    """JSON lines, each with the device and the commit, the first ones with all of the environment and the ceilings.

    ``left`` is what is left of the time for the whole; what does not fit is written down with :meth:`leave_out`.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._same = {key: environment().get(key) for key in ("device", "commit", "dry_run")}
        self.write("environment", **environment())
        for name, value in measure_ceilings().items():
            self.write("ceiling", name=name, per_second=value)

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def write(self, kind: str, **fields: Any) -> None:
        """Add a line."""
        print(json.dumps({"kind": kind} | self._same | fields, ensure_ascii=False), file=self._file, flush=True)

    def leave_out(self, what: str, why: str) -> None:
        """Note what is not measured."""
        self.write("left_out", what=what, why=why)
        print(f"left out: {what}: {why}")
