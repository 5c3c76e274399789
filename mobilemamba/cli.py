"""The command ``mobilemamba``."""

from __future__ import annotations

import csv
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import mobilemamba
from mobilemamba.bench_network import ENGINES
from mobilemamba.variants import VARIANTS
from mobilemamba_kernels import __version__
from mobilemamba_kernels.testing import CASES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_model_option = click.option("--model", type=click.Choice(list(VARIANTS)), help="Variant of the network.")
_dtype_option = click.option(
    "--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True, help="Precision to compute in."
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, with the machine that ran it.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mobilemamba")
def main() -> None:
    """MobileMamba, a light vision network, on its own fast operators (arXiv 2411.15941)."""


@main.command()
def info() -> None:
    """Show the variants: parameters and multiply-adds, computed, beside the paper's figures."""
    table = Table("model", caption="The paper counts the scan and the normalizations among its multiply-adds too.")
    for column in ("image", "parameters", "paper", "multiply-adds", "paper", "top-1", "with strategies"):
        table.add_column(column, justify="right")
    for name, variant in VARIANTS.items():
        model = mobilemamba.create_model(name)
        table.add_row(
            name,
            f"{variant.image_size}²",
            f"{mobilemamba.count_parameters(model) / 1e6:.2f} M",
            f"{variant.parameters} M",
            f"{mobilemamba.count_macs(model, variant.image_size) / 1e6:.1f} M",
            f"{variant.macs} M",
            f"{variant.top1} %",
            f"{variant.top1_strategies} %",
        )
    _stdout().print(table)


@main.command()
@click.argument("images", nargs=-1, required=True)
@_model_option
@click.option("--checkpoint", type=click.Path(exists=True, dir_okay=False), help="Weights; without it they are random.")
@click.option("--classes", type=click.Path(exists=True, dir_okay=False), help="Names of the classes, one a line.")
@click.option("--top-k", type=click.IntRange(1), default=5, show_default=True, help="Classes to show for each image.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Images at once.")
@click.option(
    "--format",
    "output",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
    help="Output.",
)
@_dtype_option
@click.option("--device", default="cpu", show_default=True, help="Where to compute, such as cuda or cuda:1.")
def predict(
    images: tuple[str, ...],
    model: str | None,
    checkpoint: str | None,
    classes: str | None,
    top_k: int,
    batch_size: int,
    output: str,
    dtype: str,
    device: str,
) -> None:
    """Classify IMAGES: files, folders (with what is below them) or quoted glob patterns.

    A checkpoint written by this package says which network it holds; for another one give --model as well. An image
    that cannot be read is named and skipped, and the exit code is 1 at the end.
    """
    from mobilemamba import predict as prediction

    with _sentences():
        files = prediction.find_images(images)
        network, labels = _network(model, checkpoint, classes)
        network = _for_inference(network, _device(device), DTYPES[dtype])
    unreadable: list[Path] = []
    found: list[prediction.Prediction] = []
    stderr = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("predicting", total=len(files))

        def skip(path: Path, error: Exception) -> None:
            unreadable.append(path)
            progress.advance(task)
            click.echo(f"skipped {_text(path)}: {_reason(error)}", err=True)

        with _sentences(), warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such images are skipped with a sentence
            for result in prediction.predict(network, files, top_k=top_k, batch_size=batch_size, unreadable=skip):
                found.append(result)
                progress.advance(task)
    _OUTPUTS[output](found, labels)
    if unreadable:
        raise click.exceptions.Exit(1)


def _network(
    model: str | None, checkpoint: str | None, classes: str | None
) -> tuple[mobilemamba.MobileMamba, list[str] | None]:
    """The network in eval mode, and the names of its classes where there are any."""
    names = None if classes is None else Path(classes).read_text(encoding="utf-8").splitlines()
    if checkpoint is None:
        click.echo("The weights are random, and so are the predictions: give --checkpoint.", err=True)
        network = mobilemamba.create_model(model or "mobilemamba_s6")
    elif model is None:
        network = mobilemamba.model_from_checkpoint(checkpoint)
    else:
        network = mobilemamba.create_model(model, num_classes=len(names or range(1000)), checkpoint=checkpoint)
    if names is not None and len(names) != network.num_classes:
        raise ValueError(f"{classes} names {len(names)} classes, and the network has {network.num_classes}")
    return network, names or network.default_cfg["label_names"]


def _for_inference(
    network: mobilemamba.MobileMamba, device: torch.device, dtype: torch.dtype
) -> mobilemamba.MobileMamba:
    """Optimized where that can be, on CUDA GPUs, and on a CPU in float32 and bfloat16; else fused."""
    if device.type == "cuda" or (device.type == "cpu" and dtype != torch.float16):
        return mobilemamba.optimize_for_inference(network.to(device), dtype)
    return mobilemamba.fuse(network).to(device, dtype)


def _device(name: str) -> torch.device:
    try:
        torch.zeros(1, device=name).item()  # now, and not after a minute of loading
    except Exception as error:  # PyTorch's backends also raise AssertionError and others of their own
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(name)


@main.group()
def bench() -> None:
    """Time operators and networks against their peers, in turn, in one process."""


@bench.command()
@click.option("--op", type=click.Choice(list(dict.fromkeys(case.op for case in CASES))), help="One operator only.")
@_dtype_option
@_json_option
def ops(op: str | None, dtype: str, as_json: bool) -> None:
    """Time every operator, forward and backward, at the network's shapes."""
    from mobilemamba import bench as harness

    with _sentences():
        harness.refuse_fallback()
        measured = list(harness.measured_cases(op))
        if not measured:
            raise ValueError(f"there is nothing to time: {op} has no kernel in this version")
    results = [harness.bench_op(case, way, DTYPES[dtype]) for case, way in _with_progress(measured)]
    if as_json:
        click.echo(harness.as_json(results))
        return
    table = Table("operator", "shape", "", caption=_caption(harness.environment()))
    for column in ("kernel, ms", "p10–p90", "GB/s", "plain PyTorch, ms", "p10–p90", "ratio"):
        table.add_column(column, justify="right")
    for i, r in enumerate(results):
        table.add_row(
            r.op,
            r.case,
            r.direction,
            *_timing(r.kernel),
            f"{r.gigabytes_per_s:.1f}",
            *_timing(r.plain),
            _ratio(r.ratio),
        )
        if i + 1 < len(results) and results[i + 1].op != r.op:
            table.add_section()
    _stdout().print(table)


@bench.command()
@_model_option
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, help="Images at once [default: 1 and 16].")
@click.option("--threads", type=click.IntRange(1), multiple=True, help="Threads [default: 1, and all].")
@click.option(
    "--engine",
    "engines",
    type=click.Choice(list(ENGINES)),
    multiple=True,
    help="Only these [default: all installed].",
)
@click.option("--chart", type=click.Path(dir_okay=False, path_type=Path), help="Draw the speeds into this file.")
@click.option("--profile", is_flag=True, help="Instead: each operator and stage of ours against its own floor.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of --profile [default: float32].")
@_json_option
def network(
    model: str | None,
    batches: tuple[int, ...],
    threads: tuple[int, ...],
    engines: tuple[str, ...],
    chart: Path | None,
    profile: bool,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Time networks against each other, taking turns: the optimized one (S6 unless --model is given) in float32 and
    bfloat16, the same weights on plain PyTorch, compiled, and in OpenVINO, and EfficientViT, as far as installed.
    """
    from mobilemamba import bench as harness
    from mobilemamba import bench_network as networks

    if profile and (engines or chart):
        raise click.UsageError("--profile is of the optimized network alone: leave out --engine and --chart")
    if dtype and not profile:
        raise click.UsageError("--dtype is for --profile: name the engines float32 and bfloat16 with --engine")
    with _sentences():
        harness.refuse_fallback()
        chosen = networks.available(engines)
        if chart is not None and not chart.parent.is_dir():
            raise ValueError(f"there is no folder {chart.parent} for the chart")
    name, batches = model or "mobilemamba_s6", batches or networks.BATCHES
    threads = threads or tuple(dict.fromkeys((torch.get_num_threads(), 1)))
    if profile:
        _profile(name, batches, threads[0], DTYPES[dtype or "float32"], as_json)
        return
    results = [
        result
        for count, batch in _with_progress([(t, b) for t in threads for b in batches])
        for result in networks.bench_networks(name, batch, count, chosen)
    ]
    if chart is not None:
        with _sentences():
            networks.draw(results, chart)
    if as_json:
        click.echo(networks.as_json(results))
        return
    caption = _caption(harness.environment() | {"threads": " and ".join(map(str, threads))})
    table = Table("network and engine", caption=caption + "; ceiling: the best matrix product in the engine's type")
    for column in ("threads", "batch", "ms", "p10–p90", "images/s", "of the ceiling", "peak memory, MiB"):
        table.add_column(column, justify="right")
    for i, r in enumerate(results):
        table.add_row(
            f"{r.label}" if r.model != name else f"{name.removeprefix('mobilemamba_').upper()}, {r.label}",
            str(r.threads),
            str(r.batch),
            *_timing(r.timing),
            f"{r.images_per_s:.1f}",
            "–" if r.share is None else f"{100 * r.share:.0f} %",
            "–" if r.peak_mib is None else f"{r.peak_mib:.0f}",
        )
        if i + 1 < len(results) and (results[i + 1].batch, results[i + 1].threads) != (r.batch, r.threads):
            table.add_section()
    _stdout().print(table)


@bench.command()
@_json_option
def dropins(as_json: bool) -> None:
    """Time other projects' code as it is, and with this package's operators: transformers' Mamba (where transformers is
    installed), mamba-ssm's and causal-conv1d's functions, VMamba's SS2D. Some minutes.
    """
    from mobilemamba import bench as harness
    from mobilemamba import bench_dropins

    with _sentences():
        harness.refuse_fallback()
    results = [comparison.measure() for comparison in _with_progress(list(bench_dropins.comparisons()))]
    if as_json:
        rows = [asdict(r) | {"ratio": r.ratio} for r in results]
        click.echo(json.dumps({"environment": harness.environment(), "results": rows}, indent=2))
        return
    table = Table("project", "what", "beside", caption=_caption(harness.environment()))
    for column in ("without, ms", "p10–p90", "with, ms", "p10–p90", "ratio"):
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(r.project, r.what, r.peer, *_timing(r.theirs), *_timing(r.ours), _ratio(r.ratio))
    _stdout().print(table)


def _profile(name: str, batches: tuple[int, ...], threads: int, dtype: torch.dtype, as_json: bool) -> None:
    from mobilemamba import bench as harness
    from mobilemamba import bench_network as networks
    from mobilemamba.bottlenecks import find_bottlenecks

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ceilings = networks.matrix_ceiling(dtype), networks.matrix_ceiling(torch.float32)
        model = mobilemamba.optimize_for_inference(networks.Setting(name, 1).network(), dtype)
        found = {
            batch: find_bottlenecks(model, networks.Setting(name, batch).images(), ceilings)
            for batch in _with_progress(batches)
        }
    finally:
        torch.set_num_threads(before)
    environment = harness.environment() | {"threads": threads}
    if as_json:
        listed = [asdict(row) | {"batch": batch} for batch, (rows, _) in found.items() for row in rows]
        wholes = [{"batch": batch, "seconds": whole} for batch, (_, whole) in found.items()]
        click.echo(json.dumps({"environment": environment, "results": listed, "whole": wholes}, indent=2))
        return
    for batch, (rows, whole) in found.items():
        title = f"{name}, batch {batch}, {str(dtype).removeprefix('torch.')}"
        table = Table("stage", "operator", title=title, caption=_caption(environment))
        for column in ("calls", "ms", "of the pass", "operations, ms", "bytes, ms", "floor / time"):
            table.add_column(column, justify="right")
        spent = sum(row.seconds for row in rows)
        for row in rows:
            table.add_row(
                row.stage,
                row.operator,
                str(row.calls),
                f"{1e3 * row.seconds:.3f}",
                f"{100 * row.seconds / whole:.1f} %",
                f"{1e3 * row.operations_s:.3f}",
                f"{1e3 * row.bytes_s:.3f}",
                f"{100 * row.floor / row.seconds:.0f} %",
            )
        floor = sum(row.floor for row in rows)
        table.add_section()
        table.add_row("all operators", "", str(sum(row.calls for row in rows)), f"{1e3 * spent:.3f}", "", "", "",
                      f"{100 * floor / spent:.0f} %")  # fmt: skip
        table.add_row("whole pass", "", "", f"{1e3 * whole:.3f}", "", "", "", f"{100 * floor / whole:.0f} %")
        _stdout().print(table)


@main.command()
@click.option("--output", type=click.Path(file_okay=False), default="demo-output", show_default=True, help="Folder.")
@click.option("--quick", is_flag=True, help="Train for two epochs, without asking for accuracy: a check of the parts.")
def demo(output: str, quick: bool) -> None:
    """Train a small MobileMamba on handwritten digits, use it, and measure it.

    Fails with exit code 1 below 97 % of the held-out digits or below a logistic regression. About two minutes.
    """
    with _sentences():
        try:
            from mobilemamba import demo as demonstration
        except ModuleNotFoundError as error:
            raise RuntimeError(f"the demo needs {error.name}: pip install mobilemamba[demo]") from error
        demonstration.run(Path(output), quick=quick)


@contextmanager
def _sentences() -> Iterator[None]:
    """Show what is wrong with the input as one sentence, not as a traceback."""
    try:
        yield
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        raise click.ClickException(where + _reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is no image"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _text(path: Path) -> str:
    """A path fit for any terminal: undecodable bytes of file names become question marks."""
    return str(path).encode(errors="replace").decode()


def _stdout() -> Console:
    """A terminal's width where there is one; in a pipe or file nothing is folded."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=1000)


def _with_progress(items: Iterable[Any]) -> Iterator[Any]:
    stderr = Console(stderr=True)
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        yield from progress.track(list(items))


def _caption(environment: dict) -> str:
    return (
        f"{environment['cpu']}, {environment['instruction_set']}, threads: {environment['threads']}, "
        f"torch {environment['torch']}; medians"
    )


def _timing(timing: Any) -> tuple[str, str]:
    return f"{timing.median * 1e3:.3f}", f"{timing.p10 * 1e3:.3f}–{timing.p90 * 1e3:.3f}"


def _ratio(ratio: float) -> Text:
    return Text(f"{ratio:.2f}×", style="green" if ratio >= 1 else "red")


def _table(found: list, labels: list[str] | None) -> None:
    if not found:
        return
    table = Table("image", "class")
    table.add_column("confidence", justify="right")
    for result in found:
        for rank, (index, confidence) in enumerate(zip(result.classes, result.confidences, strict=True)):
            image = "" if rank else _text(result.image)
            label = f"class {index}" if labels is None else labels[index]
            table.add_row(Text(image, overflow="fold"), Text(label, overflow="fold"), f"{100 * confidence:.1f} %")
        table.add_section()
    _stdout().print(table)


def _rows(found: list, labels: list[str] | None) -> Iterator[dict]:
    for result in found:
        for rank, (index, confidence) in enumerate(zip(result.classes, result.confidences, strict=True)):
            label = None if labels is None else labels[index]
            yield {"image": _text(result.image), "rank": rank + 1, "class": index, "label": label} | {
                "confidence": round(confidence, 6)
            }


def _json(found: list, labels: list[str] | None) -> None:
    images: dict[str, list] = {}
    for row in _rows(found, labels):
        images.setdefault(row.pop("image"), []).append(row)
    documents = [{"image": image, "predictions": predictions} for image, predictions in images.items()]
    click.echo(json.dumps(documents, indent=2, ensure_ascii=False))


def _csv(found: list, labels: list[str] | None) -> None:
    writer = csv.DictWriter(sys.stdout, ["image", "rank", "class", "label", "confidence"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rows(found, labels))


_OUTPUTS = {"table": _table, "json": _json, "csv": _csv}
