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
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import mobilemamba
from mobilemamba.ablations import STUDIES
from mobilemamba.bench_network import ENGINES
from mobilemamba.predict import reason as _reason
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


@main.command()
@click.argument("data")
@click.option("--checkpoint", type=click.Path(exists=True, dir_okay=False), required=True, help="Weights.")
@_model_option
@click.option("--optimized/--fused", default=None, help="[default: optimized where it can be]")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Images at once.")
@click.option("--workers", type=click.IntRange(0), help="Processes that read images [default: a processor each, to 8].")
@click.option("--max-unreadable", type=click.IntRange(0), default=100, show_default=True, help="Images that may fail.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default="confusion.png",
    show_default=True,
    help="Picture of the confusions.",
)
@_dtype_option
@click.option("--device", default="cpu", show_default=True, help="Where to compute, such as cuda or cuda:1.")
@_json_option
def validate(
    data: str,
    checkpoint: str,
    model: str | None,
    optimized: bool | None,
    batch_size: int,
    workers: int | None,
    max_unreadable: int,
    output: Path,
    dtype: str,
    device: str,
    as_json: bool,
) -> None:
    """Measure a network's accuracy on DATA, as `train` takes it: its images to validate on, or all of a folder that is
    not divided. Classes are matched by name where the checkpoint has names.

    A checkpoint written by this package says which network it holds; for another one give --model as well. An image
    that cannot be read is named and skipped, and the exit code is 1 at the end.
    """
    from mobilemamba.bench import environment

    with _sentences(), _extra("train"):
        from mobilemamba.erf import check_picture
        from mobilemamba.training import open_images, pictures, validation

        check_picture(output)
        place, source = _device(device), open_images(data)
        if model is None:
            network = mobilemamba.model_from_checkpoint(checkpoint)
        else:
            network = mobilemamba.create_model(model, num_classes=len(source.classes), checkpoint=checkpoint)
        network = _for_inference(network.eval(), place, DTYPES[dtype], optimized)
        stderr = Console(stderr=True)
        columns = (TextColumn("validating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with (
            Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such images are skipped with a sentence
            task = progress.add_task("", total=len(source.labels))

            def note(images: int, unreadable: list[str]) -> None:
                progress.advance(task, images)
                for why in unreadable:
                    click.echo(f"skipped {_text(why)}", err=True)

            result = validation.validate(
                source,
                network,
                batch_size=batch_size,
                workers=workers,
                max_unreadable=max_unreadable,
                progress=note,
            )
        pictures.draw_confusion(result.confusion, result.classes, output)
    if as_json:
        about = {"device": device, "dtype": dtype, "optimized": network.optimized, "picture": str(output)}
        click.echo(json.dumps({"environment": environment() | about} | result.as_dict(), indent=2))
    else:
        _print_validation(result)
        click.echo(f"Picture: {_text(output)}")
    if result.unreadable:
        raise click.exceptions.Exit(1)


def _print_validation(result: Any) -> None:
    present = [index for index in result.accuracy.argsort(kind="stable") if result.counts[index]]
    table = Table("class", caption=f"The 50 worst of {len(present)} classes." if len(present) > 50 else None)
    for column in ("images", "right"):
        table.add_column(column, justify="right")
    table.add_column("most often taken for")
    for index in present[:50]:
        wrong = result.confusion[index].copy()
        wrong[index] = 0
        other = f"{result.classes[wrong.argmax()]} ({wrong.max()})" if wrong.any() else ""
        share = f"{result.accuracy[index]:.1f} %"
        table.add_row(Text(_text(result.classes[index])), str(result.counts[index]), share, Text(_text(other)))
    _stdout().print(table)
    skipped = f"; {len(result.unreadable)} could not be read" if result.unreadable else ""
    click.echo(f"Top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} % of {result.counts.sum()} images{skipped}")
    click.echo(
        f"{result.images_per_s:.1f} images/s, reading them included; the network alone "
        f"{result.network_images_per_s:.1f} images/s"
    )


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
    network: mobilemamba.MobileMamba, device: torch.device, dtype: torch.dtype, optimized: bool | None = None
) -> mobilemamba.MobileMamba:
    """Optimized where that can be, on CUDA GPUs, and on a CPU in float32 and bfloat16; else fused; or as asked for."""
    if optimized is None:
        optimized = device.type == "cuda" or (device.type == "cpu" and dtype != torch.float16)
    if optimized:
        return mobilemamba.optimize_for_inference(network.to(device), dtype)
    return mobilemamba.fuse(network).to(device, dtype)


def _device(name: str) -> torch.device:
    try:
        torch.zeros(1, device=name).item()  # now, and not after a minute of loading
    except Exception as error:  # PyTorch's backends also raise AssertionError and others of their own
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(name)


@main.command()
@click.argument("data")
@_model_option
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of the run.")
@click.option("--resume", is_flag=True, help="Go on with the run in --output, with the recipe that it began with.")
@click.option("--checkpoint", type=click.Path(exists=True, dir_okay=False), help="Weights to fine-tune.")
@click.option("--epochs", type=click.IntRange(1), help="[default: 300, with a teacher 1000, to fine-tune 30]")
@click.option("--batch-size", type=click.IntRange(1), help="Images a process and step [default: 128, to fine-tune 32].")
@click.option("--accumulate", type=click.IntRange(1), help="Batches whose gradients make a step [default: 1].")
@click.option("--image-size", type=click.IntRange(1), help="Pixels [default: the model's].")
@click.option("--learning-rate", type=float, help="For 1024 images a step [default: 1.5e-3, to fine-tune 4e-3].")
@click.option("--distill", is_flag=True, help="Learn from the paper's teacher, TResNet-L.")
@click.option("--teacher", help="Learn from this network of timm's.")
@click.option("--teacher-checkpoint", type=click.Path(exists=True, dir_okay=False), help="Its weights.")
@click.option("--precision", help="32-true, bf16-mixed or 16-mixed [default: 32-true].")
@click.option("--compile", "compiled", is_flag=True, default=None, help="Compile the network.")
@click.option("--seed", type=click.IntRange(0), help="[default: 0]")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Any other field of the recipe.")
@click.option("--recipe", type=click.Path(exists=True), help="Start from the recipe.json of another run.")
@click.option("--val-fraction", type=float, help="Share to validate on, where DATA has none [default: 0.1].")
@click.option("--workers", type=click.IntRange(0), help="Processes that read images [default: a processor each, to 8].")
@click.option("--save-every", type=click.IntRange(1), default=500, show_default=True, help="Steps between states.")
@click.option("--max-unreadable", type=click.IntRange(0), default=100, show_default=True, help="Images that may fail.")
@click.option("--accelerator", default="auto", show_default=True, help="cpu, gpu or what else Lightning knows.")
@click.option("--devices", default="auto", show_default=True, help="How many; several train with DDP.")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="Machines.")
@click.option("--profile", is_flag=True, help="Measure how long steps wait for images.")
def train(
    data: str,
    output: Path,
    resume: bool,
    checkpoint: str | None,
    distill: bool,
    compiled: bool | None,
    settings: tuple[str, ...],
    recipe: str | None,
    workers: int | None,
    save_every: int,
    max_unreadable: int,
    accelerator: str,
    devices: str,
    nodes: int,
    profile: bool,
    **changes: Any,
) -> None:
    """Train on DATA: a folder with a folder for each class, in train and val or to be split; one with WebDataset's tar
    shards or Hugging Face's Parquet files; or "digits".

    The recipe is the paper's; with --checkpoint one for fine-tuning. The output folder has it, with everything else
    that is needed to go on after an interruption. Under torchrun, or with --devices, several processes train together.
    """
    with _sentences(), _extra("train"):
        from mobilemamba import training
        from mobilemamba.training.command import recipe_from, summary

        changes |= {"compile": compiled}
        if distill and changes["teacher"] is None:
            changes["teacher"] = "tresnet_l"
        begun = resume and (output / "recipe.json").exists()
        if begun and (checkpoint or recipe or settings or any(value is not None for value in changes.values())):
            raise ValueError(f"the recipe of the run in {output} stands: leave out what changes it, or --resume")
        chosen = training.load_recipe(output) if begun else recipe_from(changes, settings, checkpoint, recipe)
        result = training.train(
            data, chosen, output, resume=resume, workers=workers, save_every=save_every,
            max_unreadable=max_unreadable, accelerator=accelerator, nodes=nodes, profile=profile,
            devices=int(devices) if devices.isdecimal() else devices,
        )  # fmt: skip
        click.echo(summary(result))


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
    installed), mamba-ssm's and causal-conv1d's functions, Vim's block, VMamba's SS2D, a layer of WTConv. Some minutes.
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
    with _sentences(), _extra("train"):
        from mobilemamba import demo as demonstration

        demonstration.run(Path(output), quick=quick)


@main.command()
@click.argument("study", type=click.Choice(list(STUDIES)))
@_model_option
@click.option("--data", help="Train every row on these images, and show its accuracy: a folder, or digits.")
@click.option("--epochs", type=click.IntRange(1), help="In place of the paper's 300; its 1000 in proportion.")
@click.option("--teacher", help="timm's name of a network that rows with distillation learn from.")
@click.option("--teacher-checkpoint", type=click.Path(dir_okay=False), help="Its weights [default: timm's].")
@click.option("--output", type=click.Path(file_okay=False), help="Folder of what is trained [default: ablations].")
@click.option("--seed", type=click.IntRange(0), help="Of training [default: 0].")
@click.option(
    "--batch-size", type=click.IntRange(1), help="Images at once, timed [default: 16] and trained with [default: 128]."
)
@click.option("--threads", type=click.IntRange(1), help="Of the CPU, where speed is timed [default: all].")
@click.option("--device", help="Where speed is timed, such as cuda [default: cpu].")
@click.option("--no-speed", is_flag=True, help="Only count parameters and multiply-adds.")
@_json_option
def ablate(
    study: str,
    model: str | None,
    data: str | None,
    epochs: int | None,
    teacher: str | None,
    teacher_checkpoint: str | None,
    output: str | None,
    seed: int | None,
    batch_size: int | None,
    threads: int | None,
    device: str | None,
    no_speed: bool,
    as_json: bool,
) -> None:
    """One of the paper's ablations: parameters, multiply-adds and speed of every row, beside the paper's figures.

    With --data every row is trained too. A row that was trained before is not trained again, and one that was
    interrupted goes on.
    """
    from mobilemamba import ablations
    from mobilemamba import bench as harness

    if data is None and (epochs or teacher or teacher_checkpoint or output or seed is not None):
        raise click.UsageError("--epochs, --teacher, --output and --seed are for training: give --data as well")
    if no_speed and (threads or device):
        raise click.UsageError("--threads and --device are for speed: leave out --no-speed")
    with _sentences(), _extra("train"):
        place = _device(device or "cpu")
        if not no_speed and place.type == "cpu":
            harness.refuse_fallback()
        rows = ablations.rows(study, model)
        results: list[dict[str, float] | None] = [None] * len(rows)
        if teacher and not any(row.distillation for row in rows):
            raise ValueError(f"no row of {study} learns from a teacher: leave out --teacher")
        if data is not None:
            changes: dict[str, Any] = {"teacher": teacher or "", "teacher_checkpoint": teacher_checkpoint or ""}
            changes |= {"seed": seed or 0} | ({"batch_size": batch_size} if batch_size else {})
            recipes = [ablations.recipe(row, epochs, **changes) for row in rows]
            pairs = zip(rows, recipes, strict=True)
            results = [ablations.accuracy(row, data, recipe, output or "ablations") for row, recipe in pairs]
        measured = ablations.measure(rows, batch_size or 16, threads, place, speed=not no_speed)
    environment = harness.environment() | ({"threads": threads} if threads else {})
    if place.type == "cuda":
        environment["gpu"] = torch.cuda.get_device_name(place)
    if as_json:
        listed = [
            asdict(m) | {"images_per_s": m.images_per_s, "paper": asdict(ablations.published(m.row)), "result": result}
            for m, result in zip(measured, results, strict=True)
        ]
        click.echo(json.dumps({"environment": environment, "study": study, "results": listed}, indent=2))
        return
    _ablation_table(study, measured, results, environment)


def _ablation_table(study: str, measured: list, results: list[dict[str, float] | None], environment: dict) -> None:
    from mobilemamba import ablations

    timed, trained = measured[0].timing is not None, results[0] is not None
    caption = (
        f"After arXiv 2411.15941, {STUDIES[study].table}; the rows are ours. Paper: its figures of its variants, which "
        "count the scan and the normalizations as multiply-adds too; –: the paper's figure is not reproduced here."
    )
    if timed:
        where = environment.get("gpu") or _caption(environment)
        caption += f" Its images/s, on its GPU, are read off a chart; ours: {where}, batch {measured[0].batch_size}."
    table = Table("", title=f"{measured[0].row.model}: {STUDIES[study].title}", caption=caption)
    columns = ["image", "parameters", "paper", "multiply-adds", "paper"]
    columns += ["images/s", "p10–p90", "paper"] * timed + ["top-1"] * trained + ["paper's top-1"]
    for column in columns:
        table.add_column(column, justify="right")
    for m, result in zip(measured, results, strict=True):
        paper = ablations.published(m.row)
        cells = [
            f"{m.row.image_size}²",
            f"{m.parameters / 1e6:.2f} M",
            _or_dash(paper.parameters, "{} M"),
            f"{m.macs / 1e6:.1f} M",
            _or_dash(paper.macs, "{} M"),
        ]
        if timed:
            slow, fast = (m.batch_size / seconds for seconds in (m.timing.p90, m.timing.p10))
            cells += [f"{m.images_per_s:.1f}", f"{slow:.1f}–{fast:.1f}", _or_dash(paper.images_per_s, "≈ {}")]
        if result is not None:
            cells.append(f"{result['top1']:.2f} %")
        table.add_row(m.row.label, *cells, _or_dash(paper.top1, "{} %"))
    _stdout().print(table)


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


@main.command()
@click.option(
    "--model",
    "models",
    type=click.Choice(list(VARIANTS)),
    multiple=True,
    help="Variant of the network [default: mobilemamba_s6].",
)
@click.option(
    "--checkpoint", type=click.Path(exists=True, dir_okay=False), help="Weights of the one variant [default: random]."
)
@click.option(
    "--beside", multiple=True, metavar="NAME[=FILE]", help="Another network by timm's name, with its weights."
)
@click.option("--images", "sources", multiple=True, help="File, folder or quoted pattern [default: samples].")
@click.option("--size", type=click.IntRange(1), help="Of the images, in pixels [default: the first variant's].")
@click.option("--count", type=click.IntRange(1), default=16, show_default=True, help="Most images to use.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default="erf.png",
    show_default=True,
    help="The picture.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def erf(
    models: tuple[str, ...],
    checkpoint: str | None,
    beside: tuple[str, ...],
    sources: tuple[str, ...],
    size: int | None,
    count: int,
    output: Path,
    as_json: bool,
) -> None:
    """Draw effective receptive fields: what each pixel contributes to the centre of every stage's map.

    Shown are RepLKNet's ratios: the share of the image, around its centre, that holds 20, 30, 50 and 99 % of all
    contributions. --model, --beside and --images may be given several times. A checkpoint written by this package says
    which network it holds; for another one give --model as well.
    """
    from mobilemamba import erf as receptive

    if checkpoint and len(models) > 1:
        raise click.UsageError("--checkpoint is for one variant: give --model once, or not at all")
    with _sentences(), _extra("train"):
        receptive.check_picture(output)
        torch.manual_seed(0)
        networks = [receptive.our_network(name, checkpoint) for name in models or (None,)]
        size = size or int(networks[0].model.default_cfg["input_size"][-1])
        for name, _, weights in (text.partition("=") for text in beside):
            networks.append(receptive.timm_network(name, size, weights or None))
        crops, skipped = _crops(sources, count, size)
        if untrained := [network.name for network in networks if network.checkpoint is None]:
            click.echo(
                f"The weights of {', '.join(untrained)} are random: their batch norms take the statistics of the "
                "images, and those of weight 0, which close blocks at the start of training, take 1.",
                err=True,
            )
        prepared = [(network, receptive.prepare(network, crops)) for network in networks]
        jobs = [(n, images, stride) for n, images in prepared for stride in receptive.stages(n.model)]
        fields = [receptive.measure(*job) for job in _with_progress(jobs)]
        receptive.draw(fields, len(crops), output)
    if as_json:
        results = [
            {"network": f.network.name, "checkpoint": f.network.checkpoint, "stage": f.stage, "stride": f.stride}
            | {"ratios": f.ratios}
            for f in fields
        ]
        document = {"images": len(crops), "size": size, "picture": _text(output), "results": results}
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        caption = f"Share of the image that holds so much of all contributions; images: {len(crops)}, of {size}²."
        table = Table("network", "weights", caption=caption)
        for column in ("stage", "stride", *(f"{100 * t:g} %" for t in receptive.THRESHOLDS)):
            table.add_column(column, justify="right")
        for i, f in enumerate(fields):
            ratios = (f"{100 * ratio:.2f} %" for ratio in f.ratios.values())
            table.add_row(f.network.name, Text(f.network.weights), str(f.stage), str(f.stride), *ratios)
            if i + 1 < len(fields) and fields[i + 1].network is not f.network:
                table.add_section()
        _stdout().print(table)
        click.echo(f"Picture: {_text(output)}")
    if skipped:
        raise click.exceptions.Exit(1)


def _crops(sources: tuple[str, ...], count: int, size: int) -> tuple[torch.Tensor, bool]:
    """At most ``count`` images (N, 3, size, size), and whether one could not be read."""
    from mobilemamba import erf as receptive
    from mobilemamba import predict as prediction

    if not sources:
        return torch.stack([receptive.crop(image, size) for image in receptive.sample_images(count)]), False
    crops: list[torch.Tensor] = []
    skipped = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such images are skipped with a sentence
        for path in prediction.find_images(sources):
            if len(crops) == count:
                break
            try:
                crops.append(receptive.crop(prediction.read_image(path, 3), size))
            except Exception as error:  # decoders raise what they like
                skipped = True
                click.echo(f"skipped {_text(path)}: {_reason(error)}", err=True)
    if not crops:
        raise ValueError(f"there is nothing to look at: none of the images in {', '.join(sources)} can be read")
    return torch.stack(crops), skipped


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """A sentence where a package of an extra is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise RuntimeError(f"this needs {error.name}: pip install mobilemamba[{name}]") from error


@contextmanager
def _sentences() -> Iterator[None]:
    """Show what is wrong with the input as one sentence, not as a traceback."""
    try:
        yield
    except (OSError, ValueError, TypeError, RuntimeError, FloatingPointError) as error:
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        raise click.ClickException(where + _reason(error)) from error


def _text(path: Path | str) -> str:
    """A path or name fit for any terminal: undecodable bytes of file names become question marks."""
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
