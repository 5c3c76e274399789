"""causal-conv1d's functions (https://github.com/Dao-AILab/causal-conv1d)."""

from __future__ import annotations

from torch import Tensor

from mobilemamba_kernels.ops.causal_conv1d import causal_conv1d_fn
from mobilemamba_kernels.ops.causal_conv1d_update import causal_conv1d_update

__all__ = ["causal_conv1d_fn", "causal_conv1d_ref", "causal_conv1d_update", "causal_conv1d_update_ref"]


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`causal_conv1d_fn` under the name and with the arguments of the original's plain version."""
    return causal_conv1d_fn(x, weight, bias, None, initial_states, return_final_states, final_states_out, activation)


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """:func:`causal_conv1d_update` under the name and with the arguments of the original's plain version."""
    return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens)
