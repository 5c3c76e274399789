"""MobileMamba: Lightweight Multi-Receptive Visual Mamba Network (arXiv 2411.15941), with timm's interface."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mobilemamba.cuda_graphs import CudaGraphs
from mobilemamba.layers import MRFFI, Block, ConvBN, GlobalOp, Head, LocalGroups, LocalOp, PatchMerging, depthwise_pair
from mobilemamba.variants import Options
from mobilemamba_kernels.backends import forced_backend

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


_PIXELS_TOGETHER = 1 << 20


class MobileMamba(nn.Module):
    """The network: a stem of stride 16 and three stages of stride 16, 32 and 64.

    Images are (batch, in_chans, height, width), normalized, floating point, of any size from 1×1, in channels-first or
    channels-last memory. The result is (batch, num_classes); an empty batch gives an empty result in eval mode.

    Args:
        options: the stages' make-up.
        num_classes: 0 for no classifier; the result is then the pooled features (batch, num_features).
        in_chans: channels of the images.
        distillation: a second head for a teacher's labels. Training returns both results, evaluation their mean.
        image_size: height and width that the network is meant for; noted in ``default_cfg``.
        variant: the name it was built by; noted in ``default_cfg``.

    ``default_cfg`` (also ``pretrained_cfg``) says how to prepare images, by timm's names: ``input_size``, ``crop_pct``,
    ``interpolation``, ``mean``, ``std``; and ``label_names``, the names of the classes or None. Change it where the
    training data differ: checkpoints carry it.
    """

    def __init__(
        self,
        options: Options,
        num_classes: int = 1000,
        in_chans: int = 3,
        distillation: bool = False,
        image_size: int = 224,
        variant: str = "mobilemamba",
    ) -> None:
        super().__init__()
        for name, value, least in (("num_classes", num_classes, 0), ("in_chans", in_chans, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, but is {value!r}")
        self.options = options
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.distillation = distillation
        self.fused = False
        self.optimized = False
        self.backend = ""  # of an optimized network
        self.map_dtype = torch.float32  # of its images, and of the maps between its layers
        self.graphs: CudaGraphs | None = None
        self.grad_checkpointing = False

        width1, width2, width3 = options.widths
        stem: list[nn.Module] = []
        previous = in_chans
        for width in (width1 // 8, width1 // 4, width1 // 2, width1):
            stem += [ConvBN(previous, width, 3, stride=2), nn.ReLU()]
            previous = width
        self.patch_embed = nn.Sequential(*stem[:-1])

        blocks = sum(options.depths)
        rates = iter([options.drop_path_rate * i / max(1, blocks - 1) for i in range(blocks)])
        self.blocks1 = nn.Sequential(*_blocks(options, 0, rates))
        self.blocks2 = nn.Sequential(*_downsample(width1, width2), *_blocks(options, 1, rates))
        self.blocks3 = nn.Sequential(*_downsample(width2, width3), *_blocks(options, 2, rates))
        self.num_features = self.head_hidden_size = width3
        self.head: nn.Module
        self.head_dist: nn.Module | None
        self._build_heads()

        self.feature_info = [
            {"num_chs": width, "reduction": 16 << stage, "module": f"blocks{stage + 1}"}
            for stage, width in enumerate(options.widths)
        ]
        self.default_cfg = default_config(variant, image_size, num_classes, in_chans, distillation)
        self.pretrained_cfg = self.default_cfg

    def _build_heads(self) -> None:
        def build() -> nn.Module:
            return Head(self.num_features, self.num_classes) if self.num_classes else nn.Identity()

        self.head = build()
        self.head_dist = build() if self.distillation else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images (B, in_chans, H, W) → (B, num_classes); two such results when training with distillation.

        Raises:
            TypeError: the images' dtype is not the network's (outside autocast).
            ValueError: their rank, channels or size is wrong.
        """
        if self.graphs is None or self.training:
            return self._forward(x)
        self._check(x)
        return self.graphs(self._forward, x, self.map_dtype)

    def _forward(self, x: Tensor) -> Any:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) → the last stage's map (B, num_features, ⌈H/64⌉, ⌈W/64⌉)."""
        parts = self._parts(x)
        if len(parts) > 1:
            return torch.cat([self.forward_features(part) for part in parts])
        x = self._stem(x)
        for stage in (self.blocks1, self.blocks2, self.blocks3):
            x = self._run(stage, x)
        return x

    def _parts(self, x: Tensor) -> Sequence[Tensor]:
        """The images that are computed together: in a network optimized for a CPU as many as suit caches and memory.

        Not where a graph is captured, which holds for any number of images, or where hooks wait for all of them.
        """
        if not self.optimized or x.device.type != "cpu" or torch.compiler.is_compiling() or x.ndim != 4:
            return (x,)
        count = min(x.shape[0], -(-x.shape[0] * x.shape[2] * x.shape[3] // _PIXELS_TOGETHER))
        hooked = count > 1 and any(m._forward_hooks or m._forward_pre_hooks for m in self.modules())
        return (x,) if hooked or count < 2 else x.tensor_split(count)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The last stage's map (B, num_features, h, w) → (B, num_classes), or pooled features if ``pre_logits``."""
        x = x.mean((2, 3), dtype=torch.float32 if self.optimized else None)
        if pre_logits or self.head_dist is None:
            return x if pre_logits else self.head(x)
        results = self.head(x), self.head_dist(x)
        return results if self.training else (results[0] + results[1]) / 2

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The stages' maps, as timm gives them.

        Args:
            x: images (B, in_chans, H, W).
            indices: which stages: the last so many, or a list (negative from the end); None for all three.
            norm: without effect: no normalization follows the last stage.
            stop_early: leave out the stages after the last one asked for.
            output_fmt: "NCHW" only.
            intermediates_only: return the list alone.

        Returns:
            The last map computed and the list of maps (B, C, ⌈H/s⌉, ⌈W/s⌉), s = 16, 32, 64.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', but is {output_fmt!r}")
        if isinstance(indices, int) and not 1 <= indices <= 3:
            raise ValueError(f"indices must be from 1 to 3 when it is a number of stages, but is {indices}")
        chosen = range(3)[-indices:] if isinstance(indices, int) else range(3) if indices is None else indices
        if not chosen or any(not -3 <= index < 3 for index in chosen):
            raise ValueError(f"indices must name stages from -3 to 2, but are {list(chosen)}")
        wanted = [index % 3 for index in chosen]

        x = self._stem(x)
        maps = []
        for index, stage in enumerate((self.blocks1, self.blocks2, self.blocks3)):
            if stop_early and index > max(wanted):
                break
            x = self._run(stage, x)
            if index in wanted:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def _stem(self, x: Tensor) -> Tensor:
        self._check(x)
        if self.optimized:
            x = x.to(self.map_dtype, memory_format=torch.channels_last)
        return self.patch_embed(x)

    def _check(self, x: Tensor) -> None:
        """Check images.

        Raises:
            TypeError, ValueError: see :meth:`forward`.
            RuntimeError: the network is optimized for other backends than the one that is forced.
        """
        weight = next(self.patch_embed.parameters())
        if x.ndim != 4 or x.shape[1] != self.in_chans or 0 in x.shape[2:]:
            raise ValueError(
                f"images must be (batch, {self.in_chans}, height, width) with no side of 0, but are {tuple(x.shape)}"
            )
        if self.optimized:
            if forced_backend() not in (None, self.backend):
                raise RuntimeError(
                    f'the network is optimized for the backend {self.backend}, but backend "{forced_backend()}" is '
                    "forced: use the network that it was made from"
                )
            if x.device != weight.device:
                raise ValueError(f"images must be on {weight.device}, as the network is, but are on {x.device}")
            if not x.is_floating_point():
                raise TypeError(f"images must be floating point, but are {x.dtype}: convert them")
        elif not x.is_floating_point() or (x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type)):
            raise TypeError(
                f"images must be {weight.dtype}, as the network's weights are, but are {x.dtype}: convert them"
            )

    def _run(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and self.training and torch.is_grad_enabled()):
            return stage(x)
        for layer in stage:
            contexts = partial(_checkpoint_contexts, layer)
            x = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)  # type: ignore[assignment]
        return x

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The head, or both heads."""
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head (both, with distillation) by a new one; 0 classes for none.

        Args:
            num_classes: classes of the new head.
            global_pool: timm's argument; the pooling is always the mean ("avg").

        Raises:
            ValueError: the network is fused, where a new head would bring a batch norm back.
        """
        if self.fused and num_classes:
            raise ValueError("a fused network takes no new head: reset the unfused network's, then fuse it again")
        if global_pool not in (None, "", "avg"):
            raise ValueError(f"global_pool must be 'avg', but is {global_pool!r}")
        like = next(self.patch_embed.parameters())
        self.num_classes = self.default_cfg["num_classes"] = num_classes
        self.default_cfg["label_names"] = None
        self._build_heads()
        if self.graphs is not None:
            self.graphs.clear()
        for head in (self.head, self.head_dist):
            if head is not None:
                head.to(device=like.device, dtype=like.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MobileMamba":
        if self.optimized:
            for dtype, device in {(p.dtype, p.device) for p in self.parameters()}:
                moved = fn(torch.empty(0, dtype=dtype, device=device))
                if (moved.dtype, moved.device) != (dtype, device):
                    raise TypeError(
                        f"an optimized network stays on {'the CPU' if device.type == 'cpu' else device} with its "
                        f"{dtype}, but was to become {moved.dtype} on {moved.device}: convert the network that it was "
                        "made from"
                    )
            if self.graphs is not None:
                self.graphs.clear()
        return super()._apply(fn, recurse)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations. Results stay the same."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The layers from the images to the classifier, by timm's patterns, for learning rates layer by layer."""
        return {"stem": r"^patch_embed", "blocks": r"^blocks(\d)" if coarse else r"^blocks(\d)\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the paper's recipe does not decay: one-dimensional ones and biases."""
        return {name for name, p in self.named_parameters() if p.ndim <= 1 or name.endswith(".bias")}


def default_config(
    variant: str, image_size: int, num_classes: int = 1000, in_chans: int = 3, distillation: bool = False
) -> dict[str, Any]:
    """What timm's tools want to know of a network, with the paper's preparation of images."""
    # Other numbers of channels have no statistics of their own: take the mean over the colours.
    mean, std = (v if in_chans == 3 else (round(sum(v) / 3, 3),) * in_chans for v in (IMAGENET_MEAN, IMAGENET_STD))
    return {
        "architecture": variant,
        "input_size": (in_chans, image_size, image_size),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": mean,
        "std": std,
        "num_classes": num_classes,
        "label_names": None,
        "first_conv": "patch_embed.0.c",
        "classifier": ("head.l", "head_dist.l") if distillation else "head.l",
    }


def _blocks(options: Options, stage: int, rates: Iterator[float]) -> Iterator[Block]:
    global_channels, local_channels, rest = options.split(stage)
    kernel_size = options.kernels[stage]
    for _ in range(options.depths[stage]):
        global_op: nn.Module | None = None
        local_op: nn.Module | None = None
        if global_channels:
            global_op = GlobalOp(
                global_channels,
                kernel_size,
                options.ssm_ratio,
                options.d_state,
                options.scan_directions,
                options.wavelet,
            )
        if local_channels and options.local_groups > 1:
            local_op = LocalGroups(local_channels, options.local_groups)
        elif local_channels:
            local_op = LocalOp(local_channels, kernel_size)
        attn = MRFFI((global_channels, local_channels, rest), global_op, local_op)
        yield Block(attn, options.widths[stage], next(rates))


def _downsample(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Sequential(*depthwise_pair(in_channels, scale=1)),
        PatchMerging(in_channels, out_channels),
        nn.Sequential(*depthwise_pair(out_channels, scale=1)),
    ]


def _checkpoint_contexts(
    layer: nn.Module,
) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    return contextlib.nullcontext(), _frozen_statistics(layer)


@contextlib.contextmanager
def _frozen_statistics(layer: nn.Module) -> Iterator[None]:
    """Keep a recomputed forward pass from counting its batch twice in the running statistics."""
    kept = [(m, dict(m._buffers)) for m in layer.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm, buffers in kept:
        norm._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in kept:
            norm._buffers.update(buffers)
