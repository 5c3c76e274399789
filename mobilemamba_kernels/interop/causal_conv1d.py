"""causal-conv1d's functions (https://github.com/Dao-AILab/causal-conv1d)."""

from mobilemamba_kernels.ops.causal_conv1d import causal_conv1d_fn
from mobilemamba_kernels.ops.causal_conv1d_update import causal_conv1d_update

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]
