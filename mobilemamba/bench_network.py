"""Networks against each other: ours, the same weights on plain PyTorch and other engines, and EfficientViT.

All that run at one batch size and number of threads take turns in one process.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mobilemamba import bench
from mobilemamba.bench import Timing
from mobilemamba.factory import create_model
from mobilemamba.inference import fuse
from mobilemamba.optimized import optimize_for_inference
from mobilemamba.profile import count_macs
from mobilemamba.variants import find_variant
from mobilemamba_kernels import _library, pack_weight, pointwise_conv2d_act, use_backend

BATCHES = (1, 16)
_Run = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """What an engine is to run. Images are ``size``² and channels-last, weights random."""

    model: str
    batch: int

    @property
    def size(self) -> int:
        """Height and width of the images."""
        return find_variant(self.model).image_size

    def images(self, size: int | None = None) -> torch.Tensor:
        """Random images."""
        size = size or self.size
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, 3, size, size, generator=generator)
        return x.contiguous(memory_format=torch.channels_last)

    def network(self) -> Any:
        """The network, the same one every time, in eval mode."""
        torch.manual_seed(0)
        return create_model(self.model).eval()


def _ours(dtype: torch.dtype, setting: Setting) -> _Run:
    return _eager(optimize_for_inference(setting.network(), dtype), setting.images())


def _plain(setting: Setting) -> _Run:
    return _on_references(_eager(fuse(setting.network()), setting.images()))


def _compiled(setting: Setting) -> _Run:
    import torch._inductor.config as inductor

    model, x = fuse(setting.network()), setting.images()
    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=False)

    def run() -> Any:
        with torch.no_grad(), inductor.patch(freezing=True):
            return compiled(x)

    return _on_references(run)


def _efficientvit(name: str, setting: Setting) -> _Run:
    return _eager(_efficientvit_model(name), setting.images(224))


def _efficientvit_model(name: str) -> Any:
    import timm
    from timm.utils import reparameterize_model

    return reparameterize_model(timm.create_model(name).eval()).to(memory_format=torch.channels_last)


def _openvino(dtype: str, model: Callable[[Setting], Any], size: int | None, setting: Setting) -> _Run:
    import openvino

    x = setting.images(size).contiguous()
    with use_backend("reference"), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # EfficientViT caches its biases while it is exported
        converted = openvino.convert_model(torch.export.export(model(setting), (x,)).run_decompositions())
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(converted, "CPU", settings | {"INFERENCE_PRECISION_HINT": dtype})
    request, array = compiled.create_infer_request(), x.numpy()
    return lambda: request.infer([array])


def _eager(model: Any, x: torch.Tensor) -> _Run:
    def run() -> Any:
        with torch.inference_mode():
            return model(x)

    return run


def _on_references(function: _Run) -> _Run:
    def run() -> Any:
        with use_backend("reference"):
            return function()

    return run


@dataclass(frozen=True)
class Engine:
    """A way to run a network."""

    label: str
    build: Callable[[Setting], _Run]
    module: str = ""  # that has to be installed for it
    efficientvit: str = ""  # the network, where it is not ours
    forks: bool = True  # whether it is built quickly enough to measure its memory in a process of its own

    @property
    def needs(self) -> list[str]:
        """What has to be installed for it."""
        return [name for name in (self.module, "timm" if self.efficientvit else "") if name]

    @property
    def missing(self) -> bool:
        """Whether it cannot run here."""
        return any(importlib.util.find_spec(name) is None for name in self.needs)


def _engines() -> dict[str, Engine]:
    engines = {
        "float32": Engine("ours, float32", partial(_ours, torch.float32)),
        "bfloat16": Engine("ours, bfloat16", partial(_ours, torch.bfloat16)),
        "plain": Engine("plain PyTorch", _plain),
        "compile": Engine("plain PyTorch, compiled and frozen", _compiled, forks=False),
        "openvino": Engine(
            "plain PyTorch in OpenVINO",
            partial(_openvino, "f32", lambda s: fuse(s.network()), None),
            "openvino",
            forks=False,
        ),
    }
    for size in ("m2", "m4", "m5"):
        name = f"efficientvit_{size}"
        label = f"EfficientViT-{size.upper()}"
        engines[name] = Engine(label, partial(_efficientvit, name), efficientvit=name)
    for dtype, hint in (("float32", "f32"), ("bfloat16", "bf16")):
        build = partial(_openvino, hint, lambda s: _efficientvit_model("efficientvit_m5"), 224)
        engines[f"efficientvit_m5-openvino-{dtype}"] = Engine(
            f"EfficientViT-M5 in OpenVINO, {dtype}", build, "openvino", "efficientvit_m5"
        )
    return engines


ENGINES = _engines()
"""By the name that the command line takes."""


@dataclass(frozen=True)
class NetworkResult:
    """One engine at one batch size and number of threads."""

    engine: str
    label: str
    model: str
    batch: int
    threads: int
    timing: Timing
    images_per_s: float
    share: float | None  # of the machine's matrix-product ceiling, that of the engine's type; None for other networks
    peak_mib: float | None  # over the process at rest with its weights; None where it is not measured


def available(names: Sequence[str] = ()) -> list[str]:
    """The named engines, or all that can run here.

    Raises:
        RuntimeError: a named one needs what is not installed.
    """
    for name in names:
        engine = ENGINES[name]
        if engine.missing:
            needed = " and ".join(engine.needs)
            raise RuntimeError(
                f"the engine {name} needs {needed}, which is not installed: pip install {' '.join(engine.needs)}"
            )
    return list(names) or [name for name, engine in ENGINES.items() if not engine.missing]


def bench_networks(
    model: str,
    batch: int,
    threads: int,
    engines: Sequence[str],
    budget_s: float = 30.0,
    memory: bool = True,
) -> list[NetworkResult]:
    """Time engines in turn at one batch size and number of threads."""
    setting = Setting(model, batch)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ceilings = {dtype: matrix_ceiling(dtype) for dtype in (torch.float32, torch.bfloat16)}
        timings = bench.time_in_turn([ENGINES[name].build(setting) for name in engines], budget_s)
    finally:
        torch.set_num_threads(before)
    work = 2 * count_macs(setting.network(), setting.size) * batch
    results = []
    for name, timing in zip(engines, timings, strict=True):
        engine = ENGINES[name]
        ceiling = ceilings[torch.bfloat16 if name == "bfloat16" else torch.float32]
        share = None if engine.efficientvit else work / timing.median / ceiling
        peak = _peak_in_new_process(name, model, batch) if memory and engine.forks else None
        speed = batch / timing.median
        results.append(
            NetworkResult(name, engine.label, engine.efficientvit or model, batch, threads, timing, speed, share, peak)
        )
    return results


def matrix_ceiling(dtype: torch.dtype) -> float:
    """The most operations a second that PyTorch's matrix product, or ours, reaches here with PyTorch's threads."""
    # Without instructions for it PyTorch's product of bfloat16 takes minutes, and ours converts to float32.
    multiplied = not _library.COMPILED_ERROR and _library.cpu_capability() in ("avx512_bf16", "amx")
    a, b = torch.randn(2, 1536, 1536).to(dtype if multiplied else torch.float32).unbind()
    x = torch.randn(1, 768, 32, 48).contiguous(memory_format=torch.channels_last)
    weight, bias = pack_weight(torch.randn(768, 768), dtype), torch.zeros(768)

    def ours() -> Any:
        with torch.inference_mode():
            return pointwise_conv2d_act(x, weight, bias)

    theirs, mine = bench.time_in_turn([lambda: a @ b, ours], 1.0)
    return max(2 * 1536**3 / theirs.p10, 2 * 1536 * 768**2 / mine.p10)


def _peak_in_new_process(*arguments: str | int) -> float | None:
    """Peak memory of some forward passes, MiB. A process of its own: an allocator gives nothing back."""
    command = [sys.executable, "-m", "mobilemamba.bench_network", json.dumps(arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def _measure_peak(engine: str, model: str, batch: int) -> float | None:
    run = ENGINES[engine].build(Setting(model, batch))
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


def as_json(results: Sequence[NetworkResult]) -> str:
    """Results and environment for machines; seconds a call."""
    return json.dumps({"environment": bench.environment(), "results": [asdict(r) for r in results]}, indent=2)


def draw(results: Sequence[NetworkResult], path: Path) -> None:
    """Draw images a second, a panel for each batch size and number of threads.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise RuntimeError("a chart needs matplotlib: pip install mobilemamba[train]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups: dict[tuple[int, int], list[NetworkResult]] = {}
    for result in results:
        groups.setdefault((result.threads, result.batch), []).append(result)
    rows, columns = len({t for t, _ in groups}), max(1, len({b for _, b in groups}))
    most = max(map(len, groups.values()))
    figure, axes = plt.subplots(
        rows, columns, figsize=(6.4 * columns, (0.36 * most + 1.1) * rows), squeeze=False, layout="constrained"
    )
    for axis, ((threads, batch), group) in zip(axes.flat, sorted(groups.items()), strict=False):
        speeds = [r.images_per_s for r in group]
        colours = ["#c44e52" if r.engine in ("float32", "bfloat16") else "#8c9bb0" for r in group]
        low = [r.images_per_s - r.batch / r.timing.p90 for r in group]
        high = [r.batch / r.timing.p10 - r.images_per_s for r in group]
        bars = axis.barh([r.label for r in group], speeds, xerr=[low, high], color=colours, error_kw={"alpha": 0.4})
        axis.bar_label(bars, [f" {speed:.0f}" for speed in speeds], padding=6)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.2 * max(speeds))
        axis.set_title(f"batch {batch}, {threads} thread{'s' * (threads > 1)}", fontsize=10)
        axis.set_xlabel("images a second (p10 to p90)")
        axis.spines[["top", "right"]].set_visible(False)
    environment = bench.environment()
    ours = next((r.model for r in results if r.engine in ("float32", "plain", "bfloat16")), results[0].model)
    figure.suptitle(f"{ours} on {environment['cpu']}, torch {environment['torch']}", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # OpenVINO and timm write there, where the figure goes
        measured = _measure_peak(*json.loads(sys.argv[1]))
    print(json.dumps(measured))
