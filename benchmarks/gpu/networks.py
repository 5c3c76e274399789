"""The networks: images a second and launches, eager, compiled and as one graph replay, beside plain PyTorch.

The published code is timed too where it is importable, with the extension of its scan.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import cache
from typing import Any, NamedTuple

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
from gpu.engines import why_missing
from mobilemamba_kernels import use_backend
from mobilemamba_kernels.testing import assert_close, mamba_ssm_tolerance

BATCHES = (256, 1, 64)
MODES = ("eager", "graph replay", "compiled")
_COMPILE_S = 180.0
_CHUNK = 64  # images of which the truth is computed at a time


@cache
def _network(name: str) -> Any:
    torch.manual_seed(0)
    options = {"widths": (48, 64, 80)} if DRY_RUN else {}
    network = mobilemamba.create_model(name, **options).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)  # 0 at the end of most branches at the start: nothing of them would show
    return network.to(DEVICE)


def image_size(name: str) -> int:
    return 48 if DRY_RUN else mobilemamba.VARIANTS[name].image_size


def build_ours(name: str, dtype: torch.dtype) -> Any:
    return mobilemamba.optimize_for_inference(_network(name), dtype)


def _plain(name: str, dtype: torch.dtype) -> Any:
    return mobilemamba.fuse(_network(name)).to(dtype=dtype, memory_format=torch.channels_last)


def _official(name: str, dtype: torch.dtype) -> Any:
    """The published network with our weights, its batch norms folded by its own code."""
    code = importlib.import_module(_OFFICIAL)
    source = _network(name)
    settings = getattr(code, f"CFG_MobileMamba_{name.removeprefix('mobilemamba_').upper()}")
    network = code.MobileMamba(**settings | {"embed_dim": source.options.widths})
    network.load_state_dict(source.state_dict())
    code.replace_batchnorm(network)  # on the CPU, where it makes the layers that it puts in
    for key, parameter in network.named_parameters():
        # Its scan takes these in float32 and gives float32, which its normalization then takes; autocast is slower.
        if not key.rpartition("global_atten.")[2].startswith(("A_logs", "Ds", "dt_projs_bias", "out_norm")):
            parameter.data = parameter.data.to(dtype)
    return network.eval().to(DEVICE)


class _Engine(NamedTuple):
    build: Callable[[str, torch.dtype], Any]
    backend: Callable[[], AbstractContextManager] = nullcontext
    layout: torch.memory_format = torch.channels_last  # of the images
    modules: tuple[str, ...] = ()  # of another project, that have to be importable

    def check(self, found: Tensor, exact: Tensor, plain: Tensor) -> None:
        """As close as twice plain PyTorch; another project's as close as shows that it computes the same."""
        if not self.modules:
            assert_close(found.to(plain.dtype), exact, plain, "logits")
            return
        error = ((found.double() - exact).abs().max() / exact.abs().max()).item()
        allowed = mamba_ssm_tolerance(plain.dtype)["atol"]
        assert error <= allowed, f"logits: largest error {error:.1e} of the largest element, allowed {allowed:.1e}"


_OFFICIAL = "model.mobilemamba.mobilemamba"
# Without its extension it would loop over the positions in Python, as it does on a CPU.
_SCAN = () if DRY_RUN else ("selective_scan_cuda_oflex",)
_ENGINES = {
    "ours": _Engine(build_ours),
    "plain PyTorch": _Engine(_plain, lambda: use_backend("reference")),
    # Contiguous, as its own benchmark runs it: around its scan it copies whatever is not.
    "official": _Engine(_official, layout=torch.contiguous_format, modules=(*_SCAN, _OFFICIAL)),
}


def _available(results: Results) -> dict[str, _Engine]:
    """The engines that can run here; why others cannot is noted."""
    found = {}
    for name, engine in _ENGINES.items():
        reason = next(filter(None, map(why_missing, engine.modules)), "")
        if reason:
            results.leave_out(name, reason)
        else:
            found[name] = engine
    return found


def _truth(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in float64, and those of the fused network on plain PyTorch in the type of ``x``."""
    exact = mobilemamba.fuse(_network(name)).double()
    plain = _plain(name, x.dtype)
    with use_backend("reference"), torch.no_grad():
        return torch.cat([exact(part.double()) for part in x.split(_CHUNK)]), plain(x)


def measure(results: Results, dtypes: Sequence[str], models: Sequence[str], batches: Sequence[int]) -> None:
    """Eager and graph replay of all, then what has to be compiled."""
    engines = _available(results)
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
                            _measure_one(results, engines, model, batch, dtype, modes)
                    except torch.OutOfMemoryError:
                        results.leave_out(what, "it does not fit into the device's memory")
                    gc.collect()
                    torch.cuda.empty_cache()


def _measure_one(
    results: Results, engines: dict[str, _Engine], model: str, batch: int, dtype: str, modes: Sequence[str]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, image_size(model), image_size(model), generator=generator)
    x = x.to(DEVICE, DTYPES[dtype]).contiguous(memory_format=torch.channels_last)
    exact, plain = _truth(model, x)
    macs = mobilemamba.count_macs(_network(model), image_size(model))
    ready: list[tuple[dict[str, Any], Run]] = []
    for name, engine in engines.items():
        for mode in modes:
            if DRY_RUN and mode == "graph replay":
                results.leave_out(f"{model}, batch {batch}, {dtype}, {name}, {mode}", "a CPU has no graphs")
                continue
            row = {"model": model, "engine": name, "mode": mode, "batch": batch, "dtype": dtype}
            try:
                with limit(min(_COMPILE_S, max(results.left, 1)), f"{name}, {mode}"):
                    images = x.contiguous(memory_format=engine.layout)
                    run, found, launches = _prepare(engine.build(model, DTYPES[dtype]), images, mode, engine.backend)
                engine.check(found, exact, plain)
                ready.append((row | {"launches": launches}, run))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a failed check or compiler stands in the place of a time
                if expired(error):
                    results.leave_out(f"{model}, batch {batch}, {dtype}, {name}, {mode}", "it took too long to prepare")
                    continue
                message = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
                results.write("network", **row, check=f"failed: {message}", seconds=None)
                print(f"  {name}, {mode}: failed: {message}")
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
        torch._dynamo.config.recompile_limit = 64  # the published code breaks into many graphs, of the same functions
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
