"""The network while it learns: loss, distillation, averaged weights, optimizer, and its measures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup, resolve_model_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from mobilemamba.checkpoints import load_checkpoint
from mobilemamba.factory import create_model
from mobilemamba.model import MobileMamba
from mobilemamba.predict import reason
from mobilemamba.training.data import Batch, check_unreadable, seed_all
from mobilemamba.training.recipe import Recipe


def build_network(recipe: Recipe, classes: list[str]) -> MobileMamba:
    """The network that a run starts with, which knows its images and classes.

    Raises:
        OSError, ValueError: the checkpoint cannot be read or does not fit.
    """
    torch.manual_seed(recipe.seed)
    model = create_model(recipe.model, len(classes), recipe.in_chans, distillation=recipe.two_heads, **recipe.options)
    if recipe.checkpoint:
        load_checkpoint(model, recipe.checkpoint, adapt_head=True)
    size = recipe.image_size
    model.default_cfg |= {"input_size": (recipe.in_chans, size, size), "label_names": list(classes)}
    return model


class Teacher:
    """A network to learn from, fed as it was trained: its own size and normalization.

    Args:
        network: images (n, 3, h, w) to logits (n, classes); a timm network or any callable.
        cfg: what the network wants, by timm's names (``input_size``, ``mean``, ``std``); None for images as the student
            gets them.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], cfg: dict[str, Any] | None = None) -> None:
        self.network = network.eval().requires_grad_(False) if isinstance(network, nn.Module) else network
        self.cfg = cfg

    @classmethod
    def from_timm(cls, name: str, classes: int, checkpoint: str = "") -> Teacher:
        """
        Raises:
            ValueError: timm knows no such network, or has no weights for it, or its classes are others.
        """
        try:
            if checkpoint:
                network = timm.create_model(name, num_classes=classes, checkpoint_path=checkpoint)
            else:
                network = timm.create_model(name, pretrained=True)
        except Exception as error:
            raise ValueError(f"the teacher {name} cannot be made for {classes} classes: {reason(error)}") from error
        # Asked for another number of classes, timm would give published weights a new classifier, which knows nothing.
        if network.num_classes != classes:
            raise ValueError(
                f"the teacher {name} knows {network.num_classes} classes, and the data have {classes}: give weights "
                "that were trained on them with --teacher-checkpoint"
            )
        return cls(network, resolve_model_data_config(network))

    def to(self, device: torch.device) -> None:
        if isinstance(self.network, nn.Module):
            self.network.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, student: dict[str, Any]) -> Tensor:
        """Logits for images that are normalized as the student's ``default_cfg`` says."""
        if self.cfg is not None:
            images = images * _column(student["std"], images) + _column(student["mean"], images)
            size = self.cfg["input_size"][1:]
            if images.shape[2:] != size:
                images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
            images = (images - _column(self.cfg["mean"], images)) / _column(self.cfg["std"], images)
        return self.network(images)


def _column(values: Any, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)


class Classifier(lightning.LightningModule):
    """Trains ``network`` and keeps the average of its weights, ``average.module``.

    The loss is the cross-entropy with the smoothed and mixed labels and, with a teacher, weight · T² · KL(teacher ‖
    student) at temperature T, which goes to the second head where there are two.

    Args:
        network: see :func:`build_network`.
        steps: optimizer steps of the whole run.
        images_per_step: images of one, in all processes.
        unreadable: most images that may fail to be read before the run stops.
    """

    def __init__(
        self,
        network: MobileMamba,
        recipe: Recipe,
        steps: int,
        images_per_step: int,
        teacher: Teacher | None = None,
        unreadable: int = 100,
    ) -> None:
        super().__init__()
        self.recipe, self.steps, self.images_per_step, self.teacher = recipe, steps, images_per_step, teacher
        self.learning_rate = recipe.learning_rate * images_per_step / 1024
        self.layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.network = network.to(memory_format=self.layout)
        short = steps * (1 - recipe.ema_decay) < 10
        self.average = ModelEmaV3(
            network, recipe.ema_decay, use_warmup=short if recipe.ema_warmup is None else recipe.ema_warmup
        ).requires_grad_(False)
        if recipe.compile:
            self.network.compile()
        classes, smoothing = network.num_classes, recipe.label_smoothing
        self.mixup = None
        if recipe.mixup or recipe.cutmix:
            self.mixup = Mixup(
                recipe.mixup, recipe.cutmix, None, 1.0, recipe.mixup_switch, "batch", True, smoothing, classes
            )
        self.loss = SoftTargetCrossEntropy() if self.mixup else nn.CrossEntropyLoss(label_smoothing=smoothing)
        self.train_loss = MeanMetric()
        self.measures = nn.ModuleDict({name: _measures(classes) for name in ("raw", "averaged")})
        self.position = 0  # of the loader at the start
        self.most_unreadable = unreadable
        self.unreadable: list[str] = []  # names, and why

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        groups = param_groups_layer_decay(
            self.network, recipe.weight_decay, self.network.no_weight_decay(), layer_decay=recipe.layer_decay
        )
        # Under autocast Lightning refuses to clip gradients for the fused kernel.
        fused = recipe.precision == "32-true"
        optimizer = torch.optim.AdamW(groups, self.learning_rate, betas=recipe.betas, fused=fused)
        warmup = min(round(recipe.warmup_epochs / recipe.epochs * self.steps), self.steps - 1)
        schedule = CosineLRScheduler(
            optimizer,
            t_initial=self.steps - warmup,
            lr_min=self.learning_rate * recipe.final_ratio,
            warmup_t=warmup,
            warmup_lr_init=self.learning_rate * recipe.warmup_ratio,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        images = (
            batch.images.to(device, memory_format=self.layout, non_blocking=True) if len(batch.labels) else batch.images
        )
        return replace(batch, images=images, labels=batch.labels.to(device, non_blocking=True))

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        self._note_unreadable(batch)
        # All that is random in a step, mixing and stochastic depth, depends on the batch's number.
        seed_all(self.recipe.seed, batch.number)
        images, targets = self.mixup(batch.images, batch.labels) if self.mixup else (batch.images, batch.labels)
        outputs = self.network(images)
        logits, taught = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        loss = self.loss(logits.float(), targets)
        if self.teacher is not None:
            t = self.recipe.distill_temperature
            wanted = self.teacher(images, self.network.default_cfg)
            if not isinstance(wanted, Tensor) or wanted.shape != logits.shape:
                given = tuple(wanted.shape) if isinstance(wanted, Tensor) else type(wanted).__name__
                raise ValueError(f"the teacher must give logits of shape {tuple(logits.shape)}, but gives {given}")
            wanted = wanted.float()
            distance = F.kl_div(
                (taught.float() / t).log_softmax(1), (wanted / t).log_softmax(1), reduction="batchmean", log_target=True
            )
            loss = loss + self.recipe.distill_weight * t * t * distance
        if not loss.isfinite():
            if self.teacher is not None and not wanted.isfinite().all():
                raise FloatingPointError(f"the teacher's logits are not finite in step {self.global_step}")
            raise FloatingPointError(
                f"the loss is {loss.item()} in step {self.global_step}: lower the learning rate, or use 32-true"
            )
        self.train_loss.update(loss.detach())
        self.log("train/loss", loss.detach(), batch_size=len(images))
        self.trainer.train_dataloader.position += 1  # type: ignore[union-attr]
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.average.update(self.network, self.global_step + 1)

    def on_validation_epoch_start(self) -> None:
        self.validated = 0
        if self.trainer.world_size > 1:  # all measure the network that the first process saves
            for buffer in (*self.network.buffers(), *self.average.buffers()):
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        self._note_unreadable(batch)
        if not len(batch.labels):
            return
        self.validated += len(batch.labels)
        for name, network in (("raw", self.network), ("averaged", self.average.module)):
            logits = network(batch.images).float()
            of_set: Any = self.measures[name]
            of_set["loss"].update(F.cross_entropy(logits, batch.labels), len(batch.labels))
            of_set["top1"].update(logits, batch.labels)
            of_set["top5"].update(logits, batch.labels)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.strategy.reduce(torch.tensor(self.validated, device=self.device), reduce_op="sum"):
            raise RuntimeError(f"no validation image can be read, such as {self.unreadable[-1]}: repair the data")
        for name, of_set in self.measures.items():
            for measure, metric in of_set.items():  # type: ignore[operator]
                value = metric.compute() * (1 if measure == "loss" else 100)
                self.log(f"val/{measure}_{name}", value)
                metric.reset()

    def _note_unreadable(self, batch: Batch) -> None:
        for why in batch.unreadable:
            if why not in self.unreadable:
                self.unreadable.append(why)
                print(f"skipped {why}", file=sys.stderr)
        check_unreadable(self.unreadable, self.most_unreadable)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["unreadable"] = self.unreadable
        checkpoint["position"] = self.trainer.train_dataloader.position  # type: ignore[union-attr]
        # Of all processes, in an epoch that may be interrupted.
        sums = torch.stack((self.train_loss.mean_value, self.train_loss.weight)).to(self.device)
        checkpoint["train_loss"] = self.trainer.strategy.reduce(sums, reduce_op="sum").cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.unreadable, self.position = checkpoint["unreadable"], checkpoint["position"]
        if self.trainer.is_global_zero:
            self.train_loss.mean_value, self.train_loss.weight = checkpoint["train_loss"].to(self.device)


def _measures(classes: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "loss": MeanMetric(),
            "top1": MulticlassAccuracy(classes, average="micro"),
            "top5": MulticlassAccuracy(classes, top_k=min(5, classes), average="micro"),
        }
    )
