"""A small run of training in a process of its own, which test_training.py stops in every way it can be stopped.

    python training_run.py OUTPUT [--stop HOOK COUNT SIGNAL] [--devices N] [--accumulate N]

The losses of its steps go into OUTPUT/losses.txt, a line a step: the batch's number and the loss, exactly.
"""

import argparse
import os
import signal
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

from mobilemamba.training import Recipe, train
from mobilemamba.training.sources import Subset, digits

EPOCHS, BATCH, IMAGES = 3, 8, 100  # 12 batches an epoch
OPTIONS = {"widths": (16, 32, 32), "depths": (1, 1, 1), "drop_path_rate": 0.2}


def recipe(**changes):
    return Recipe.paper(
        "mobilemamba_t2", options=OPTIONS, image_size=32, **{"epochs": EPOCHS, "batch_size": BATCH} | changes
    )


def sources():
    train_images, val_images = digits()
    return Subset(train_images, torch.arange(IMAGES).numpy()), Subset(val_images, torch.arange(20).numpy())


class Watch(Callback):
    def __init__(self, output, stop):
        self.path, self.stop = Path(output) / "losses.txt", stop
        self.counts = {}

    def _reach(self, hook):
        self.counts[hook] = self.counts.get(hook, 0) + 1
        if self.stop and (hook, self.counts[hook]) == (self.stop[0], int(self.stop[1])):
            if self.stop[2] == "ERROR":
                if os.environ.get("LOCAL_RANK", "0") != "0":
                    raise RuntimeError("of the second process")
                return
            os.kill(os.getpid(), getattr(signal, self.stop[2]))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self._reach("batch")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        with open(self.path, "a") as file:
            file.write(f"{batch.number} {trainer.callback_metrics['train/loss'].item().hex()}\n")

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self._reach("validation")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("--stop", nargs=3)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=1)
    options = parser.parse_args()
    os.makedirs(options.output, exist_ok=True)
    watch = Watch(options.output, options.stop)
    replace = os.replace

    def replaced(source, target):
        if str(target).endswith("last.ckpt"):
            watch._reach("writing")
        replace(source, target)

    os.replace = replaced
    train(
        sources(), recipe(accumulate=options.accumulate), options.output, resume=True, workers=2, save_every=5,
        accelerator="cpu", devices=options.devices, callbacks=[watch],
    )  # fmt: skip


if __name__ == "__main__":
    main()
