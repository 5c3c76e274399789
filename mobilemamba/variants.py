"""The six published variants, and the options that change them for the paper's ablations."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

# Option → kind and allowed range. The upper limits are far above any network worth building: they keep a
# checkpoint from a stranger, which names its own options, from exhausting the machine.
_PER_STAGE: dict[str, tuple[type, float, float]] = {
    "widths": (int, 1, 16384),
    "depths": (int, 1, 256),
    "global_ratio": (float, 0, 1),
    "local_ratio": (float, 0, 1),
    "kernels": (int, 1, 31),
}
_SINGLE: dict[str, tuple[type, float, float]] = {
    "ssm_ratio": (float, 0.0625, 16),
    "d_state": (int, 1, 256),
    "scan_directions": (int, 1, 4),
    "wavelet": (bool, 0, 1),
    "local_groups": (int, 1, 15),
    "drop_path_rate": (float, 0, 0.99),
}


@dataclass(frozen=True)
class Options:
    """What a MobileMamba network is made of; three values are one for each stage.

    The defaults are the paper's. A single number stands for all three stages.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option, or the channels that options give together, is out of range.
    """

    widths: tuple[int, ...]
    """Channels; the first a multiple of 8, because the stem starts with an eighth of it."""
    depths: tuple[int, ...]
    """Blocks."""
    global_ratio: tuple[float, ...] = (0.8, 0.7, 0.6)
    """Share ξ of the channels that take the global branch (Mamba and wavelet), rounded to a multiple of 16."""
    local_ratio: tuple[float, ...] = (0.2, 0.2, 0.3)
    """Share μ of the channels that take the local branch; what is left passes unchanged."""
    kernels: tuple[int, ...] = (7, 5, 3)
    """Kernel size of the local branch and of the wavelet branch; odd."""
    ssm_ratio: float = 2.0
    """Scanned channels for each global channel."""
    d_state: int = 1
    """State size N of a scanned channel."""
    scan_directions: int = 2
    """1: row-major; 2: and its reverse; 4: row-major, column-major and the reverses of both."""
    wavelet: bool = True
    """Whether the global branch has its wavelet convolution."""
    local_groups: int = 1
    """Groups of the local channels, of kernel sizes 3, 5, 7, …; 1 means one group with the stage's kernel."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last block; rises linearly from 0."""

    def __post_init__(self) -> None:
        for name, limits in _PER_STAGE.items():
            values = getattr(self, name)
            if isinstance(values, Real):
                values = (values,) * 3
            if not isinstance(values, Sequence) or len(values) != 3:
                raise ValueError(f"{name} must be three values, one for each stage, but is {values!r}")
            object.__setattr__(self, name, tuple(_checked(name, value, *limits) for value in values))
        for name, limits in _SINGLE.items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), *limits))

        if self.widths[0] % 8:
            raise ValueError(f"the first of widths must be a multiple of 8 for the stem, but is {self.widths[0]}")
        if any(kernel % 2 == 0 for kernel in self.kernels):
            raise ValueError(f"kernels must be odd so that the maps keep their size, but are {self.kernels}")
        if self.scan_directions == 3:
            raise ValueError("scan_directions must be 1, 2 or 4, but is 3")
        for stage in range(3):
            global_channels, local_channels, _ = self.split(stage)
            if global_channels > self.widths[stage]:
                raise ValueError(
                    f"global_ratio {self.global_ratio[stage]} of width {self.widths[stage]} rounds to "
                    f"{global_channels} channels, more than there are: choose a smaller ratio or a wider stage"
                )
            if 0 < local_channels < self.local_groups:
                raise ValueError(
                    f"local_groups {self.local_groups} is more than the {local_channels} local channels of stage "
                    f"{stage + 1}: choose fewer groups or a larger local_ratio"
                )

    def split(self, stage: int) -> tuple[int, int, int]:
        """Global, local and untouched channels of a stage (paper section 3.2, MRFFI)."""
        width = self.widths[stage]
        global_channels = (int(self.global_ratio[stage] * width) + 8) // 16 * 16
        local_channels = min(int(self.local_ratio[stage] * width), width - global_channels)
        return global_channels, local_channels, width - global_channels - local_channels


def _checked(name: str, value: Any, kind: type, low: float, high: float) -> Any:
    accepted: Any = {int: Integral, float: Real, bool: bool}[kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} takes {kind.__name__} values, but got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, but got {value!r}")
    return kind(value)


@dataclass(frozen=True)
class Variant:
    """A published network: its options, and the paper's figures."""

    options: Options
    image_size: int
    parameters: float
    """Millions, as published."""
    macs: int
    """Millions of multiply-adds of one image, as published; with the scan and the normalizations."""
    top1: float
    """ImageNet-1K top-1 accuracy, percent."""
    top1_strategies: float
    """The same with the paper's training strategies: distillation and 1000 epochs."""


_B = Options((200, 376, 448), (2, 3, 2), drop_path_rate=0.03)

VARIANTS = {
    "mobilemamba_t2": Variant(Options((144, 272, 368), (1, 2, 2)), 192, 8.8, 255, 73.6, 76.9),
    "mobilemamba_t4": Variant(Options((176, 368, 448), (1, 2, 2)), 192, 14.2, 413, 76.1, 78.9),
    "mobilemamba_s6": Variant(Options((192, 384, 448), (1, 2, 2)), 224, 15.0, 652, 78.0, 80.7),
    "mobilemamba_b1": Variant(_B, 256, 17.1, 1080, 79.9, 82.2),
    "mobilemamba_b2": Variant(_B, 384, 17.1, 2427, 81.6, 83.3),
    "mobilemamba_b4": Variant(_B, 512, 17.1, 4313, 82.5, 83.6),
}


def list_models() -> list[str]:
    """The names that :func:`mobilemamba.create_model` knows, small to large."""
    return list(VARIANTS)


def find_variant(name: str) -> Variant:
    """The variant of that name; ValueError with the known names if there is none."""
    if name not in VARIANTS:
        raise ValueError(f"there is no model {name!r}; the models are {', '.join(VARIANTS)}")
    return VARIANTS[name]


def change_options(options: Options, changes: dict[str, Any]) -> Options:
    """``options`` with ``changes`` applied; TypeError with the known names if one is unknown."""
    known = [field.name for field in dataclasses.fields(Options)]
    for name in changes:
        if name not in known:
            raise TypeError(f"there is no option {name!r}; the options are {', '.join(known)}")
    return dataclasses.replace(options, **changes)
