"""One run of training, from images to weights."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from mobilemamba.checkpoints import write_file
from mobilemamba.predict import reason
from mobilemamba.training.callbacks import (
    AtomicCheckpointIO,
    Bar,
    EveryEpoch,
    History,
    KeepBest,
    KeepLast,
    StopTogether,
)
from mobilemamba.training.data import default_workers, steps_an_epoch, training_loader, validation_loader
from mobilemamba.training.module import Classifier, Teacher, build_network
from mobilemamba.training.pictures import draw_history
from mobilemamba.training.recipe import Recipe
from mobilemamba.training.sources import Source, open_data


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    top1: float
    """Percent of the validation images, of the best epoch and set of weights."""
    top5: float
    weights: str
    """The set: raw or averaged."""
    epoch: int
    seconds: float
    """Since this start."""
    images_per_s: float
    """Median of the epochs' training."""
    unreadable: int
    """Images that could not be read."""
    waiting: float | None
    """Share of a step that waited for images; measured where asked for."""
    best: Path
    """The weights, for :func:`mobilemamba.model_from_checkpoint`."""


def describe(train: Source, val: Source) -> str:
    """Counts and classes."""
    counts = np.bincount(train.labels, minlength=len(train.classes))
    named = ", ".join(train.classes[:10]) + (", …" if len(train.classes) > 10 else "")
    return (
        f"{len(train.labels)} images to train on, {len(val.labels)} to validate on, {len(train.classes)} classes "
        f"({named}), {counts.min()} to {counts.max()} images each"
    )


def _ignore_interrupt(worker: int) -> None:
    """A terminal sends Ctrl-C to readers too, which have to read until the step is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Data(lightning.LightningDataModule):
    def __init__(self, train: Source, val: Source, recipe: Recipe, cfg: dict[str, Any], workers: int) -> None:
        super().__init__()
        self.sources, self.recipe, self.cfg, self.workers = (train, val), recipe, cfg, workers

    def _place(self) -> dict[str, Any]:
        trainer: Any = self.trainer
        pinned = trainer.strategy.root_device.type == "cuda"
        place = {"rank": trainer.global_rank, "processes": trainer.world_size, "pin_memory": pinned}
        return place | {"worker_init_fn": _ignore_interrupt}

    def train_dataloader(self) -> DataLoader:
        persistent = self.workers > 0
        loader = training_loader(
            self.sources[0], self.recipe, self.cfg, self.workers, persistent_workers=persistent, **self._place()
        )
        # Lightning would restore it in the middle of an epoch alone.
        loader.position = self.trainer.lightning_module.position  # type: ignore[union-attr, assignment]
        return loader

    def val_dataloader(self) -> DataLoader:
        return validation_loader(self.sources[1], self.cfg, self.recipe.batch_size, self.workers, **self._place())


def train(
    data: str | os.PathLike[str] | tuple[Source, Source],
    recipe: Recipe,
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    teacher: Teacher | Callable[[Tensor], Tensor] | None = None,
    workers: int | None = None,
    save_every: int = 500,
    max_unreadable: int = 100,
    accelerator: str = "auto",
    devices: int | str = "auto",
    nodes: int = 1,
    profile: bool = False,
    callbacks: Sequence[Callback] = (),
    show: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> Result:
    """Train a network, and keep all that is needed to go on after any interruption.

    A run that is resumed goes on with the losses that it would have had, in the same order of images and with the same
    distortions, whatever stopped it; steps since the last saved state are repeated.

    Args:
        data: see :func:`open_data`; or training and validation images.
        recipe: what to do.
        output: a folder for ``recipe.json``, ``last.ckpt`` (the state), ``best.pth`` (weights), ``history.csv``,
            ``curves.png`` and TensorBoard's events.
        resume: go on with the run in ``output``, which must have the same recipe; begin it where there is no state yet.
        teacher: a network to learn from, images as the student gets them → logits, or a :class:`Teacher`; it takes the
            place of the recipe's.
        workers: processes that read images, for each one that trains; None: as many as processors, at most 8.
        save_every: steps from one saved state to the next within an epoch.
        max_unreadable: images that may fail to be read, in a process, before the run stops.
        accelerator, devices, nodes: Lightning's. Several devices, or "cpu" and a number of processes, train with DDP.
        profile: measure how long steps wait for images; writes ``fit-profile.txt``.
        callbacks: more of Lightning's.
        show: called with lines of text.

    Raises:
        OSError: images, weights or ``output`` cannot be read or written.
        ValueError: the data, recipe and output do not fit each other.
        RuntimeError: too many images cannot be read.
        FloatingPointError: the loss is no number.
    """
    start = time.perf_counter()
    folder = Path(output)
    state = folder / "last.ckpt"
    if state.exists() and not resume:
        raise ValueError(f"{folder} holds a run: resume it, or choose another folder")
    if recipe.teacher and recipe.teacher_checkpoint and not Path(recipe.teacher_checkpoint).is_file():
        raise ValueError(f"there is no file {recipe.teacher_checkpoint} for the teacher")
    sources = data if isinstance(data, tuple) else open_data(data, recipe.val_fraction, recipe.seed)
    rank_zero_only(show)(describe(*sources))
    network = build_network(recipe, sources[0].classes)
    about: dict[str, Any] = {"recipe": asdict(recipe), "network": asdict(network.options)}
    about |= {"classes": list(sources[0].classes), "images": [len(source.labels) for source in sources]}
    for unfinished in folder.glob(".*.*"):
        if unfinished.name.startswith((".last.ckpt.", ".best.pth.")):  # of a process that was killed while it wrote
            unfinished.unlink()

    learnt_from = teacher if isinstance(teacher, Teacher) or teacher is None else Teacher(teacher)
    if learnt_from is None and recipe.teacher:
        learnt_from = Teacher.from_timm(recipe.teacher, len(sources[0].classes), recipe.teacher_checkpoint)
    if recipe.two_heads and learnt_from is None:
        raise ValueError("two_heads needs a teacher, from whom the second head learns: give one, or leave it out")
    history = History(folder / "history.csv", show)
    best = KeepBest(folder / "best.pth")
    profiler = SimpleProfiler(folder, "profile") if profile else None
    stopped = f"stopped: resume the run in {folder}"
    try:
        with _quiet():
            trainer = lightning.Trainer(
                accelerator=accelerator,
                devices=devices,
                num_nodes=nodes,
                precision=recipe.precision,  # type: ignore[arg-type]
                max_epochs=recipe.epochs,
                accumulate_grad_batches=recipe.accumulate,
                gradient_clip_val=recipe.clip_grad or None,
                logger=TensorBoardLogger(folder, name="", version="tensorboard"),
                log_every_n_steps=10,
                callbacks=[*callbacks, history, best, KeepLast(folder, save_every), EveryEpoch(folder)]
                + [StopTogether(stopped)]
                + ([Bar()] if sys.stderr.isatty() else []),
                plugins=[AtomicCheckpointIO()],
                use_distributed_sampler=False,
                num_sanity_val_steps=0,
                enable_progress_bar=sys.stderr.isatty(),
                enable_model_summary=False,
                profiler=profiler,
            )
    except MisconfigurationException as error:
        raise ValueError(f"these devices cannot be used: {reason(error)}") from error
    processes = trainer.num_devices * trainer.num_nodes
    about["processes"] = processes
    about = json.loads(json.dumps(about))
    if state.exists():
        _check_same(folder, about)
    if len(sources[1].labels) < processes:
        raise ValueError(f"{len(sources[1].labels)} validation images are fewer than the {processes} processes")
    images_per_step = recipe.batch_size * processes * recipe.accumulate
    steps = recipe.epochs * steps_an_epoch(len(sources[0].labels), recipe.batch_size, processes, recipe.accumulate)
    module = Classifier(network, recipe, steps, images_per_step, learnt_from, max_unreadable)
    if trainer.is_global_zero and not state.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "recipe.json", lambda file: file.write(json.dumps(about, indent=2).encode()))
    loaders = _Data(*sources, recipe, network.default_cfg, default_workers() if workers is None else workers)
    try:
        with _quiet(), _interrupted_as_terminated():
            trainer.fit(module, loaders, ckpt_path=state if state.exists() else None, weights_only=False)
    except SIGTERMException as error:
        raise RuntimeError(stopped) from error
    except SystemExit as error:  # what Lightning makes of a second interrupt
        raise KeyboardInterrupt from error
    if trainer.is_global_zero:
        draw_history(history.rows, folder / "curves.png")
    return Result(
        **best.best,
        seconds=time.perf_counter() - start,
        images_per_s=float(np.median([row["images_per_s"] for row in history.rows])),
        unreadable=len(module.unreadable),
        waiting=None if profiler is None else _waiting(profiler),
        best=best.path,
    )


def load_recipe(folder: str | os.PathLike[str]) -> Recipe:
    """The recipe of a run's folder, or of a file with one.

    Raises:
        OSError, TypeError, ValueError: there is none, or it is no recipe.
    """
    return Recipe.from_dict(_read_about(Path(folder))["recipe"])


def _read_about(path: Path) -> dict[str, Any]:
    """What a run's folder, or a file of it, says of the run: its recipe at least."""
    path = path / "recipe.json" if path.is_dir() else path
    try:
        about = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} holds no recipe: {reason(error)}") from error
    if not isinstance(about, dict) or not isinstance(about.get("recipe"), dict):
        raise ValueError(f"{path} holds no recipe")
    return about


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advice, and that of DDP for weights that are channels-last."""
    logs = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", "Grad strides do not match")
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such images are skipped with a sentence
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


@contextmanager
def _interrupted_as_terminated() -> Iterator[None]:
    """Ctrl-C ends a run as SIGTERM does, with its state saved; pressed again, at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def terminate(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGINT, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _check_same(folder: Path, about: dict[str, Any]) -> None:
    if not zipfile.is_zipfile(folder / "last.ckpt"):
        raise ValueError(f"{folder / 'last.ckpt'} is damaged: remove it to begin the run anew")
    before = _read_about(folder)
    if before["processes"] != about["processes"]:
        raise ValueError(
            f"{folder} holds a run of {before['processes']} processes, not {about['processes']}: resume it with as many"
        )
    for name, value in about["recipe"].items():
        if before["recipe"].get(name) != value:
            raise ValueError(
                f"{folder} holds a run with {name} {before['recipe'].get(name)!r}, not {value!r}: resume it with the "
                "recipe that it began with, or choose another folder"
            )
    if (before["classes"], before["images"]) != (about["classes"], about["images"]):
        raise ValueError(
            f"{folder} holds a run on {before['images'][0]} and {before['images'][1]} images of "
            f"{len(before['classes'])} classes, and the data are others now: choose another folder"
        )


def _waiting(profiler: SimpleProfiler) -> float:
    """The share of the steps that waited for images, but for the first one, for which the readers start."""
    waits = profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"][1:]
    steps = profiler.recorded_durations["run_training_batch"][1:]
    return sum(waits) / max(sum(waits) + sum(steps), 1e-9)
