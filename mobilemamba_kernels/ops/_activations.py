"""The activations that the convolution operators fuse."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("none", "relu", "silu")


def check_activation(op: str, name: str, activation: str) -> None:
    """Check that ``activation`` is one of :data:`ACTIVATIONS`.

    Raises:
        ValueError: it is not.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: {name} must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply one of :data:`ACTIVATIONS`."""
    if activation == "relu":
        return F.relu(x)
    return F.silu(x) if activation == "silu" else x
