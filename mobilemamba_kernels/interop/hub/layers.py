"""Layers whose ``forward`` takes the place of those that ``kernels`` makes of transformers' functions.

By ``kernels``' rule they have no state, no other members and the parameters of what they replace, whose ``self`` they
get: ``type(self).forward`` is then transformers' own function.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mobilemamba_kernels.interop import transformers

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "selective_scan_fn", "selective_state_update"]


class causal_conv1d_fn(nn.Module):
    """:func:`mobilemamba_kernels.interop.transformers.causal_conv1d_fn`."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if transformers.serves(weight, activation) or isinstance(self, causal_conv1d_fn):
            return transformers.causal_conv1d_fn(hidden_states, weight, bias, activation, **kwargs)
        return type(self).forward(self, hidden_states, weight, bias, activation, **kwargs)


class causal_conv1d_update(nn.Module):
    """:func:`mobilemamba_kernels.interop.transformers.causal_conv1d_update`."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        if transformers.serves(weight, activation) or isinstance(self, causal_conv1d_update):
            return transformers.causal_conv1d_update(hidden_states, conv_state, weight, bias, activation)
        return type(self).forward(self, hidden_states, conv_state, weight, bias, activation)


class selective_scan_fn(nn.Module):
    """:func:`mobilemamba_kernels.interop.transformers.mamba_selective_scan`."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
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
        return transformers.mamba_selective_scan(
            hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
        )


class selective_state_update(nn.Module):
    """:func:`mobilemamba_kernels.interop.transformers.mamba_selective_state_update`."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
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
        return transformers.mamba_selective_state_update(state, hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, z)
