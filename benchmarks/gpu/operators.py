"""Each operator's time beside its peers', against the ceilings; every time comes after a check of the same call."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from gpu import DRY_RUN
from gpu.cases import make_arguments, measured, operations
from gpu.device import (
    BACKENDS,
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
from gpu.engines import ENGINES, Engine, Named, has_kernel
from mobilemamba.bench import DIRECTIONS
from mobilemamba_kernels import use_backend
from mobilemamba_kernels.testing import Case, assert_close, mamba_ssm_tolerance, map_tensors, tensors, traffic

_COMPILE_S = 90.0
_PREPARE_S = 60.0
Truth = tuple[Named, Named]


def measure(results: Results, dtypes: Sequence[str], only: str = "") -> None:
    """Everything but ``torch.compile`` in the first type, then in the others, then ``torch.compile``."""
    available = []
    for engine in ENGINES:
        if engine.missing:
            results.leave_out(engine.name, engine.missing)
        else:
            available.append(engine)
    chosen = [case for case in measured() if only in str(case)]
    passes = [(dtype, [e for e in available if not e.compiled]) for dtype in dtypes]
    # Against our kernels once more, so that they are compared in one breath.
    passes += [(dtype, [e for e in available if e.compiled or e.ours]) for dtype in dtypes[:1]]
    for dtype, engines in passes:
        for direction in DIRECTIONS:
            for case in chosen:
                if not any(has_kernel(backend, case, direction == "backward") for backend in BACKENDS):
                    continue
                what = f"{case} {direction} {dtype}: {', '.join(engine.name for engine in engines)}"
                if results.left <= 0:
                    results.leave_out(what, "the time is up")
                    continue
                print(f"{results.left:4.0f} s left, {what}", flush=True)
                with precision(dtype), on_stream():
                    _measure_one(results, case, direction, dtype, engines)
                gc.collect()
                torch.cuda.empty_cache()


def _gradients_of_results(case: Case, arguments: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        found = case.run(arguments)  # by the kernels: plain PyTorch's results may lie otherwise
    generator = torch.Generator().manual_seed(1)
    # In the strides of the results, as the gradients of operators that keep a layout are.
    return [torch.empty_like(r).copy_(torch.randn(r.shape, generator=generator).half()) for r in found]


def _evaluate(case: Case, arguments: dict[str, Any], grads: Sequence[Tensor] | None) -> Named:
    with use_backend("reference"):
        if grads is None:
            with torch.no_grad():
                return {f"result {i}": r for i, r in enumerate(case.run(arguments))}
        inputs = tensors(map_tensors(lambda t: t.detach().requires_grad_(), arguments))
        given = dict(arguments) | {name: t for name, t in inputs.items() if name in arguments}
        found = torch.autograd.grad(case.run(given), list(inputs.values()), list(grads))
    return dict(zip(inputs, found, strict=True))


def _check(found: Named, truth: Truth, ours: bool, dtype: torch.dtype) -> str:
    """Why results are wrong, or an empty string.

    Ours are as close as twice plain PyTorch; others within mamba-ssm's tolerance of the largest element, which shows
    that they compute the same.
    """
    exact, plain = truth
    try:
        for name, result in found.items():
            if ours:
                assert_close(result, exact[name], plain[name], name)
                continue
            scale = exact[name].abs().max().clamp(min=1e-30)
            error = ((result.double() - exact[name]).abs().max() / scale).item()
            allowed = mamba_ssm_tolerance(dtype)["atol"]
            assert error <= allowed, f"{name}: largest error {error:.1e} of the largest element, allowed {allowed:.1e}"
    except (AssertionError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return ""


def _measure_one(results: Results, case: Case, direction: str, dtype_name: str, engines: Iterable[Engine]) -> None:
    dtype = DTYPES[dtype_name]
    same = {"op": case.op, "case": case.name, "direction": direction, "dtype": dtype_name}
    try:
        arguments = make_arguments(case, dtype, DEVICE)
        grads = _gradients_of_results(case, arguments) if direction == "backward" else None
        doubled = None if grads is None else [g.double() for g in grads]
        truth = _evaluate(case, map_tensors(Tensor.double, arguments), doubled), _evaluate(case, arguments, grads)
    except torch.OutOfMemoryError:
        results.leave_out(f"{case} {direction} {dtype_name}", "the truth does not fit into the device's memory")
        return

    ready: list[tuple[Engine, Run, Run, str, int | None]] = []
    for engine in engines:
        row = same | {"engine": engine.name}
        try:
            with limit(min(_COMPILE_S if engine.compiled else _PREPARE_S, max(results.left, 1)), engine.name):
                call = engine.prepare(case, map_tensors(Tensor.detach, arguments), grads)
                if call is None:
                    continue
                found = warm_up(call.run)
            failure = _check(call.named(found), truth, engine.ours, dtype)
            del found
            captured = None if failure else capture(call.run)
            if captured is not None:
                failure = _check(call.named(captured[1]), truth, engine.ours, dtype)
            if failure:
                results.write("operator", **row, check=f"failed: {failure}", seconds=None)
                print(f"  {engine.name}: failed: {failure}")
                continue
            timed, replay = ("eager", call.run) if captured is None else ("graph replay", captured[0])
            ready.append((engine, replay, call.run, timed, count_launches(call.run)))
        except Exception as error:  # of a peer or a compiler: whatever it is, it stands in the place of a time
            if expired(error):
                results.leave_out(f"{engine.name}, {case} {direction} {dtype_name}", "it took too long to prepare")
                continue
            message = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            results.write("operator", **row, check=f"failed: {message}", seconds=None)
            print(f"  {engine.name}: failed: {message}")
    if not ready:
        return
    budget = 0.0 if DRY_RUN else 0.3
    replayed = time_in_turn([graph for _, graph, *_ in ready], budget)
    eager = time_in_turn([run for _, _, run, *_ in ready], budget)
    moved = traffic(arguments, truth[1]) if grads is None else traffic(arguments, grads, truth[1])
    needed = operations(case, direction)
    floors = _floors(needed, moved, dtype_name)
    for (engine, _, _, timed, launches), timing, whole in zip(ready, replayed, eager, strict=True):
        seconds = timing.median
        results.write(
            "operator",
            **same,
            engine=engine.name,
            check="passed",
            timed=timed,
            seconds=asdict(timing),
            eager_seconds=asdict(whole),
            launches=launches,
            bytes=moved,
            needed=needed,
            gigabytes_per_s=moved / seconds / 1e9,
            share_of_copy=floors["copy"] / seconds,
            share_of_arithmetic=floors["arithmetic"] / seconds,
            share_of_floor=max(floors.values()) / seconds,
        )
        print(
            f"  {engine.name}: {1e6 * seconds:.1f} µs ({timed}), {moved / seconds / 1e9:.0f} GB/s, "
            f"{100 * max(floors.values()) / seconds:.0f} % of the lower ceiling, {launches} launches"
        )


def _floors(needed: dict[str, float], moved: int, dtype: str) -> dict[str, float]:
    """Seconds that the bytes take at the copy bandwidth, and the slowest kind of arithmetic at its ceiling."""
    ceilings = measure_ceilings()
    arithmetic = [
        needed["operations"] / ceilings["multiply_add"],
        needed["products"] / ceilings[f"products {dtype}"],
        needed["exponentials"] / ceilings.get("exponential", float("inf")),
    ]
    return {"copy": moved / ceilings["copy"], "arithmetic": max(arithmetic)}
