"""mamba-ssm and causal-conv1d: their functions where the packages cannot be installed, such as on a CPU."""

import torch

import mobilemamba_kernels

mobilemamba_kernels.patch("mamba_ssm")  # the one line; where the packages are installed their functions are replaced

from causal_conv1d import causal_conv1d_fn, causal_conv1d_update  # noqa: E402
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # noqa: E402
from mamba_ssm.ops.triton.selective_state_update import selective_state_update  # noqa: E402

batch, dim, length, N = 1, 256, 64, 16
x, z = torch.randn(batch, dim, length), torch.randn(batch, dim, length)
weight, bias = torch.randn(dim, 4), torch.randn(dim)
delta, A, D = torch.randn(batch, dim, length), -torch.rand(dim, N), torch.ones(dim)
B, C = torch.randn(2, batch, N, length)

# a whole sequence at once
u = causal_conv1d_fn(x, weight, bias, activation="silu")
y, last = selective_scan_fn(u, delta, A, B, C, D, z, bias, delta_softplus=True, return_last_state=True)

# and step by step, with states that are changed in place
conv_state, state = torch.zeros(batch, dim, 4), torch.zeros(batch, dim, N)
steps = []
for i in range(length):
    u = causal_conv1d_update(x[..., i], conv_state, weight, bias, activation="silu")
    steps.append(
        selective_state_update(
            state, u, delta[..., i], A, B[..., i], C[..., i], D, z[..., i], dt_bias=bias, dt_softplus=True
        )
    )
torch.testing.assert_close(torch.stack(steps, -1), y, rtol=1e-4, atol=1e-4)
torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)
print(f"{length} positions at once and one by one: the same, within {(torch.stack(steps, -1) - y).abs().max():.1e}")
