"""What a run does: the paper's recipe, a recipe for fine-tuning, and what differs from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mobilemamba.variants import find_variant


@dataclass(frozen=True)
class Recipe:
    """Everything that a run's result depends on but for the images. The defaults are the paper's for ImageNet-1K
    (arXiv 2411.15941, section 4.1 and the published configurations); README lists what differs and why.

    Raises:
        TypeError, ValueError: a value has the wrong type or is out of range.
    """

    model: str = "mobilemamba_s6"
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of :class:`mobilemamba.Options` that differ from the variant's."""
    image_size: int = 0
    """Pixels; 0 for the variant's."""
    in_chans: int = 3
    checkpoint: str = ""
    """Weights to start from; a classifier for other classes starts anew."""

    epochs: int = 300
    batch_size: int = 128
    """Images a process and step."""
    accumulate: int = 1
    """Batches whose gradients are averaged before a step; an epoch has whole steps."""
    learning_rate: float = 1.5e-3
    """For 1024 images a step; proportional to their number."""
    warmup_epochs: float = 20.0
    warmup_ratio: float = 1e-3
    """The first learning rate, of the full one."""
    final_ratio: float = 1e-2
    """The last learning rate, of the full one, at the end of a cosine."""
    layer_decay: float = 1.0
    """Factor on the learning rate from a block to the one below it."""
    weight_decay: float = 0.05
    """AdamW's; none on one-dimensional parameters and biases."""
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: float = 5.0
    """Largest norm of all gradients together; 0 for no limit."""
    ema_decay: float = 0.9998
    """Decay of the averaged weights."""
    ema_warmup: bool | None = None
    """Start with a smaller decay; None: in runs of fewer than 10 / (1 - ema_decay) steps."""

    label_smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_switch: float = 0.5
    """How often CutMix takes MixUp's place."""
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """timm's name of an automatic augmentation; empty for none."""
    color_jitter: float = 0.4
    """Used where there is no automatic augmentation, as in timm."""
    random_erasing: float = 0.25
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Areas of random crops; (1, 1) with hflip 0 keeps whole images."""
    hflip: float = 0.5

    teacher: str = ""
    """timm's name of a network to learn from; empty for none."""
    teacher_checkpoint: str = ""
    """Its weights; empty for timm's published ones."""
    distill_weight: float = 5.0
    distill_temperature: float = 1.0
    two_heads: bool = False
    """Whether the teacher gets a head of its own."""

    val_fraction: float = 0.1
    """The share to validate on, where the data do not say."""
    seed: int = 0
    precision: str = "32-true"
    """Lightning's: 32-true, bf16-mixed or 16-mixed."""
    compile: bool = False
    channels_last: bool = True

    def __post_init__(self) -> None:
        variant = find_variant(self.model)
        if self.image_size == 0:
            object.__setattr__(self, "image_size", variant.image_size)
        for entry in dataclasses.fields(self):
            value, default = getattr(self, entry.name), entry.default
            if isinstance(default, tuple):
                value = tuple(value) if isinstance(value, (list, tuple)) else value
                right = isinstance(value, tuple) and len(value) == len(default) and all(map(_is_number, value))
            elif isinstance(default, bool) or default is None:
                right = isinstance(value, bool) or (default is None and value is None)
            elif isinstance(default, float):
                value = float(value) if _is_number(value) else value
                right = isinstance(value, float)
            elif isinstance(default, (int, str)):
                right = isinstance(value, type(default)) and not isinstance(value, bool)
            else:
                right = isinstance(value, dict)
            if not right:
                like = {} if default is dataclasses.MISSING else default
                raise TypeError(f"{entry.name} must be like {like!r}, but is {value!r}")
            object.__setattr__(self, entry.name, value)
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in self.options.items()}
        object.__setattr__(self, "options", options)
        for names, low, high in _RANGES:
            for name in names.split():
                values = getattr(self, name)
                for value in values if isinstance(values, tuple) else (values,):
                    if not low <= value <= high:
                        raise ValueError(f"{name} must be from {low:g} to {high:g}, but is {value}")
        if self.precision not in (known := ("32-true", "bf16-mixed", "16-mixed")):
            raise ValueError(f"precision must be {', '.join(known)}, but is {self.precision!r}")
        if self.in_chans == 2:
            raise ValueError("in_chans must be 1 (grey) or 3 (RGB), but is 2")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ValueError(f"crop_scale must be two areas, the smaller first and not 0, but is {self.crop_scale}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"batch_size must be even where images are mixed, but is {self.batch_size}")
        if self.teacher_checkpoint and not self.teacher:
            raise ValueError(f"teacher_checkpoint {self.teacher_checkpoint} needs a teacher: give its name in timm")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs must be at most the {self.epochs} epochs, but are {self.warmup_epochs:g}")

    @classmethod
    def paper(cls, model: str = "mobilemamba_s6", **changes: Any) -> Recipe:
        """The paper's: 300 epochs, 1000 with a teacher; in fewer the warm-up keeps its share."""
        epochs = changes.get("epochs", 1000 if changes.get("teacher") else 300)
        warmup = min(20.0, epochs * 20 / 300) if _is_number(epochs) else 0
        return cls.from_dict({"model": model, "epochs": epochs, "warmup_epochs": warmup} | changes)

    @classmethod
    def finetune(cls, model: str, checkpoint: str, **changes: Any) -> Recipe:
        """For a trained network and new images: short, lower layers slower, milder distortions."""
        epochs = changes.get("epochs", 30)
        defaults = {
            "model": model,
            "checkpoint": checkpoint,
            "epochs": epochs,
            "warmup_epochs": min(3.0, epochs / 10) if _is_number(epochs) else 0,
            "batch_size": 32,
            "learning_rate": 4e-3,
            "layer_decay": 0.75,
            "mixup": 0.0,
            "cutmix": 0.0,
            "auto_augment": "rand-m5-mstd0.5-inc1",
            "random_erasing": 0.0,
            "crop_scale": (0.35, 1.0),
        }
        return cls.from_dict(defaults | changes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """
        Raises:
            TypeError, ValueError: a name or a value is not possible.
        """
        known = [entry.name for entry in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise TypeError(f"a recipe has no {name!r}; it has {', '.join(known)}")
        return cls(**values)


_RANGES = (
    ("epochs batch_size accumulate", 1, 1_000_000),
    ("image_size", 1, 8192),
    ("in_chans", 1, 3),
    ("learning_rate", 1e-12, 100),
    ("warmup_epochs clip_grad weight_decay mixup cutmix distill_weight", 0, 1e6),
    ("warmup_ratio final_ratio ema_decay", 0, 1),
    ("betas", 0, 0.999999),
    ("val_fraction", 1e-6, 0.999999),
    ("label_smoothing mixup_switch color_jitter random_erasing crop_scale hflip", 0, 1),
    ("layer_decay", 0.01, 1),
    ("distill_temperature", 1e-3, 1e3),
    ("seed", 0, 2**31 - 1),
)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
