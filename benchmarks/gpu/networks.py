"""The networks: images a second and launches, eager, compiled and as one graph replay, beside plain PyTorch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from torch import Tensor

import mobilemamba
from gpu import DRY_RUN
from gpu.device import (
    DEVICE,
    DTYPES,
    Results,
    Run,
    capture,
    count_launches,
    expired,
    limit,
    measure_ceilings,
    on_stream,
    precision,
    time_in_turn,
    warm_up,
)
from mobilemamba_kernels import use_backend
from mobilemamba_kernels.testing import assert_close

BATCHES = (256, 1, 64)
MODES = ("eager", "graph replay", "compiled")
_COMPILE_S = 180.0
_CHUNK = 64  # images of which the truth is computed at a time


@cache
def _network(name: str) -> Any:
    torch.manual_seed(0)
    options = {"widths": (48, 64, 80)} if DRY_RUN else {}
    return mobilemamba.create_model(name, **options).eval().to(DEVICE)


def _size(name: str) -> int:
    return 48 if DRY_RUN else mobilemamba.VARIANTS[name].image_size


def _ours(name: str, dtype: torch.dtype) -> Any:
    return mobilemamba.optimize_for_inference(_network(name), dtype)


def _plain(name: str, dtype: torch.dtype) -> Any:
    return mobilemamba.fuse(_network(name)).to(dtype=dtype, memory_format=torch.channels_last)


_ENGINES: dict[str, tuple[Callable[[str, torch.dtype], Any], Callable[[], AbstractContextManager]]] = {
    "ours": (_ours, nullcontext),
    "plain PyTorch": (_plain, lambda: use_backend("reference")),
}


def _truth(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in float64, and those of the fused network on plain PyTorch in the type of ``x``."""
    exact = mobilemamba.fuse(_network(name)).double()
    plain = _plain(name, x.dtype)
    with use_backend("reference"), torch.no_grad():
        return torch.cat([exact(part.double()) for part in x.split(_CHUNK)]), plain(x)


def measure(results: Results, dtypes: Sequence[str], models: Sequence[str], batches: Sequence[int]) -> None:
    """Eager and graph replay of all, then what has to be compiled."""
    for modes in (MODES[:2], MODES[2:]):
        for model in models:
            for batch in batches:
                for dtype in dtypes:
                    what = f"{model}, batch {batch}, {dtype}: {', '.join(modes)}"
                    if results.left <= 0:
                        results.leave_out(what, "the time is up")
                        continue
                    print(f"{results.left:4.0f} s left, {what}", flush=True)
                    try:
                        with precision(dtype), on_stream():
                            _measure_one(results, model, batch, dtype, modes)
                    except torch.OutOfMemoryError:
                        results.leave_out(what, "it does not fit into the device's memory")
                    gc.collect()
                    torch.cuda.empty_cache()


def _measure_one(results: Results, model: str, batch: int, dtype: str, modes: Sequence[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, _size(model), _size(model), generator=generator)
    x = x.to(DEVICE, DTYPES[dtype]).contiguous(memory_format=torch.channels_last)
    exact, plain = _truth(model, x)
    macs = mobilemamba.count_macs(_network(model), _size(model))
    ready: list[tuple[dict[str, Any], Run]] = []
    for engine, (build, backend) in _ENGINES.items():
        for mode in modes:
            if DRY_RUN and mode == "graph replay":
                results.leave_out(f"{model}, batch {batch}, {dtype}, {engine}, {mode}", "a CPU has no graphs")
                continue
            row = {"model": model, "engine": engine, "mode": mode, "batch": batch, "dtype": dtype}
            try:
                with limit(min(_COMPILE_S, max(results.left, 1)), f"{engine}, {mode}"):
                    run, found, launches = _prepare(build(model, DTYPES[dtype]), x, mode, backend)
                assert_close(found.to(plain.dtype), exact, plain, "logits")
                ready.append((row | {"launches": launches}, run))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a failed check or compiler stands in the place of a time
                if expired(error):
                    results.leave_out(
                        f"{model}, batch {batch}, {dtype}, {engine}, {mode}", "it took too long to prepare"
                    )
                    continue
                message = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
                results.write("network", **row, check=f"failed: {message}", seconds=None)
                print(f"  {engine}, {mode}: failed: {message}")
    if not ready:
        return
    timings = time_in_turn([run for _, run in ready], 0.0 if DRY_RUN else 1.0)
    for (row, _), timing in zip(ready, timings, strict=True):
        speed = batch / timing.median
        results.write(
            "network",
            **row,
            check="passed",
            seconds=asdict(timing),
            images_per_s=speed,
            share_of_products=2 * macs * speed / measure_ceilings()[f"products {dtype}"],
        )
        print(f"  {row['engine']}, {row['mode']}: {speed:.0f} images/s, {row['launches']} launches")


def _prepare(
    network: Any, x: Tensor, mode: str, backend: Callable[[], AbstractContextManager]
) -> tuple[Run, Tensor, int | None]:
    """What is timed, its logits, and how often it launches: once where a graph is replayed."""
    if mode == "compiled":
        torch.compiler.reset()
        network = torch.compile(network, dynamic=False)

    def run() -> Tensor:
        with backend(), torch.inference_mode():
            return network(x)

    found = warm_up(run)
    if mode != "graph replay":
        return run, found, count_launches(run)
    captured = capture(run)
    if captured is None:
        raise RuntimeError("the network cannot be captured in a graph")
    return *captured, 1
