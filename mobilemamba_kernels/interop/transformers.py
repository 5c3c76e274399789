"""Hugging Face transformers' functions of its Mamba models, by the names and signatures of their modules.

Those of Mamba, FalconMamba, Jamba and Zamba run a Python loop on a CPU. ``mamba_inner_fn`` is not among them: without
it a model in training calls the others, which are as fast and apply its attention mask.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mobilemamba_kernels.ops.causal_conv1d import WIDTHS
from mobilemamba_kernels.ops.causal_conv1d import causal_conv1d_fn as _causal_conv1d_fn
from mobilemamba_kernels.ops.causal_conv1d_update import causal_conv1d_update as _causal_conv1d_update
from mobilemamba_kernels.ops.selective_scan import selective_scan_fn
from mobilemamba_kernels.ops.selective_state_update import selective_state_update

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "mamba_selective_scan", "mamba_selective_state_update"]


def serves(weight: Tensor, activation: str | None = None) -> bool:
    """Whether the operators have this convolution; models with another one keep transformers' function."""
    return weight.shape[-1] in WIDTHS and activation in (None, "silu", "swish")


def causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """As :func:`mobilemamba_kernels.causal_conv1d_fn`.

    Raises:
        ValueError: packed sequences (``cu_seqlens``, ``seq_idx``), which the scan would run across; pad them instead.
    """
    for name in ("cu_seqlens", "seq_idx"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"causal_conv1d_fn: {name} is not supported, as the scan would mix the sequences; pad them"
            )
    return _causal_conv1d_fn(hidden_states, weight, bias, activation=activation)  # type: ignore[return-value]


def causal_conv1d_update(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """As :func:`mobilemamba_kernels.causal_conv1d_update`."""
    return _causal_conv1d_update(hidden_states, conv_state, weight, bias, activation)


def mamba_selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`mobilemamba_kernels.selective_scan_fn`; the two ``use_`` options choose slower ways to the same."""
    return selective_scan_fn(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def mamba_selective_state_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """As :func:`mobilemamba_kernels.selective_state_update`."""
    return selective_state_update(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)
