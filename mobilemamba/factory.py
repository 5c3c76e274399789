"""Networks by name."""

import os
from typing import Any

from mobilemamba.checkpoints import load_checkpoint
from mobilemamba.model import MobileMamba
from mobilemamba.variants import change_options, find_variant


def create_model(
    name: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    distillation: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    **options: Any,
) -> MobileMamba:
    """Build a network, with random weights or those of a checkpoint.

    Args:
        name: one of :func:`list_models`.
        num_classes: 0 for no classifier.
        in_chans: channels of the images.
        distillation: a second head for a teacher's labels.
        checkpoint: a file for :func:`load_checkpoint`.
        **options: fields of :class:`Options` that differ from the variant's, for the paper's ablations.

    Raises:
        TypeError: an option is unknown or has the wrong type.
        ValueError: a name or value is not possible, or the checkpoint does not fit.
        OSError: the checkpoint cannot be opened.
    """
    variant = find_variant(name)
    model = MobileMamba(
        change_options(variant.options, options),
        num_classes=num_classes,
        in_chans=in_chans,
        distillation=distillation,
        image_size=variant.image_size,
        variant=name,
    )
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model
