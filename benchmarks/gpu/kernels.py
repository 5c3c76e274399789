"""Where the time of S6 goes: its kernels, by PyTorch's profiler, and graph replays one after the other."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence

import torch

from gpu import DRY_RUN
from gpu.device import DEVICE, capture, device_events, environment, on_stream, synchronize, warm_up
from gpu.networks import build_ours, image_size

_ROUNDS = 5
_REPLAYS = 40
_MODEL = "mobilemamba_s6"


def list_kernels(batch: int = 2 if DRY_RUN else 256, dtype: torch.dtype = torch.bfloat16) -> str:
    """A line a kernel, median µs of five forward passes; then the throughput of graph replays, caches as they are."""
    network, size = build_ours(_MODEL, dtype), image_size(_MODEL)
    x = torch.randn(batch, 3, size, size, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), on_stream():
        warm_up(lambda: network(x))
        events = device_events(lambda: [network(x) for _ in range(_ROUNDS)])
        lines = _medians([(event.name, event.time_range.elapsed_us()) for event in events])
        title = f"{_MODEL}, batch {batch}, {dtype}, {environment()['device']}, commit {environment()['commit']}"
        found = [title, *(f"{us:9.1f} µs  {name[:100]}" for name, us in lines)]
        found.append(f"{sum(us for _, us in lines):9.1f} µs in {len(lines)} kernels")
        captured = capture(lambda: network(x))
        if captured is not None:
            milliseconds = _replay(captured[0])
            found.append(f"{milliseconds:.3f} ms a graph replay, {1e3 * batch / milliseconds:.0f} images/s")
    return "\n".join(found) + "\n"


def _medians(events: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Of each kernel over the rounds, which follow each other."""
    count = len(events) // _ROUNDS
    return [(events[i][0], statistics.median(us for _, us in events[i::count])) for i in range(count)]


def _replay(replay: Callable[[], None]) -> float:
    """Milliseconds of the median replay."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_REPLAYS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        replay()
        mark.record()
    synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in itertools.pairwise(marks))
