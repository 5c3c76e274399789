"""What a run leaves behind: the state to go on from, the best weights, its history. Every file is replaced whole."""

from __future__ import annotations

import csv
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from mobilemamba.checkpoints import save_checkpoint, write_file

SETS = ("raw", "averaged")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, which appear whole or not at all, also where the disk is full or the process killed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_file(Path(path), lambda file: torch.save(checkpoint, file))


class KeepLast(ModelCheckpoint):
    """``last.ckpt`` after every so many steps, and on SIGTERM.

    Not at an epoch's last batch: Lightning would go on behind the validation that comes there. ``EveryEpoch`` follows.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        super().__init__(folder, "last", every_n_train_steps=steps, enable_version_counter=False)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.is_last_batch or loop._should_accumulate():  # a state holds no gradients
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.received_sigterm:
            trainer.save_checkpoint(Path(self.dirpath or "", "last.ckpt"))


class EveryEpoch(ModelCheckpoint):
    """``last.ckpt`` after every epoch and its validation."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "last", every_n_epochs=1, save_on_train_epoch_end=True, enable_version_counter=False)


class StopTogether(Callback):
    """Several processes end at once when one of them fails or is stopped, and go on from the last regular state.

    Lightning's own handler of SIGTERM waits for the other processes, which may be dead.

    Args:
        said: what is said of a signal.
    """

    def __init__(self, said: str) -> None:
        self.said = said

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: self._stop(trainer))

    def _stop(self, trainer: lightning.Trainer) -> None:
        print(self.said, file=sys.stderr, flush=True)
        self._end_others(trainer)
        os._exit(128 + signal.SIGTERM)

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._end_others(trainer)

    def _end_others(self, trainer: lightning.Trainer) -> None:
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            launcher.kill(signal.SIGKILL)


class KeepBest(Callback):
    """``best.pth``, the weights of the best validation so far, for :func:`model_from_checkpoint`.

    Raw or averaged; among equals the averaged ones, and the later.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best: dict[str, Any] = {"top1": -1.0}

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        measured = {name: float(trainer.callback_metrics[f"val/top1_{name}"]) for name in SETS}
        name = max(SETS, key=lambda n: (measured[n], n == "averaged"))
        if measured[name] < self.best["top1"]:
            return
        top5 = float(trainer.callback_metrics[f"val/top5_{name}"])
        self.best = {"top1": measured[name], "top5": top5, "weights": name, "epoch": trainer.current_epoch + 1}
        if trainer.is_global_zero:
            save_checkpoint(pl_module.network if name == "raw" else pl_module.average.module, self.path)

    def state_dict(self) -> dict[str, Any]:
        return self.best

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict


class History(Callback):
    """``history.csv``, a row an epoch, kept through interruptions.

    Args:
        show: called with a line of text for each epoch.
    """

    def __init__(self, path: Path, show: Callable[[str], None]) -> None:
        self.path, self.show = path, show
        self.rows: list[dict[str, Any]] = []
        self.seconds = 0.0  # of the epoch's training so far
        self.images = 0
        self.started = time.perf_counter()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.images:
            self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.images += len(batch.labels) * trainer.world_size
        self.seconds = time.perf_counter() - self.started

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        loss = float(pl_module.train_loss.compute())
        pl_module.train_loss.reset()
        row: dict[str, Any] = {
            "epoch": trainer.current_epoch + 1,
            "steps": trainer.global_step,
            "learning_rate": trainer.optimizers[0].param_groups[-1]["lr"],
            "train_loss": loss,
        }
        for name in SETS:
            row |= {f"{m}_{name}": float(trainer.callback_metrics[f"val/{m}_{name}"]) for m in ("loss", "top1", "top5")}
        row |= {"images_per_s": self.images / max(self.seconds, 1e-9), "unreadable": len(pl_module.unreadable)}
        self.images = 0
        self.rows.append(row)
        if trainer.is_global_zero:
            text = io.StringIO()
            writer = csv.DictWriter(text, list(row), lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in self.rows)
            write_file(self.path, lambda file: file.write(text.getvalue().encode()))
            self.show(
                f"epoch {row['epoch']}/{trainer.max_epochs}: loss {loss:.4f}, top-1 {row['top1_raw']:.2f} %, averaged "
                f"{row['top1_averaged']:.2f} %, {row['images_per_s']:.1f} images/s"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]


class Bar(RichProgressBar):
    """Lightning's, with images/s and the time left of the whole run."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._since, self._steps = time.perf_counter(), trainer.global_step

    def get_metrics(self, trainer: Any, pl_module: Any) -> Any:
        loss = trainer.callback_metrics.get("train/loss")
        metrics = {} if loss is None else {"loss": f"{float(loss):.3f}"}
        done = trainer.global_step - self._steps
        if done > 0:
            seconds = (time.perf_counter() - self._since) / done
            left = round(seconds * (pl_module.steps - trainer.global_step))
            metrics["images/s"] = f"{pl_module.images_per_step / seconds:.1f}"
            metrics["left"] = f"{left // 3600}:{left % 3600 // 60:02}:{left % 60:02}"
        return metrics
