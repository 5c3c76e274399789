"""VMamba: the four-way scan of SS2D, and the extensions that VMamba, LocalMamba and others import.

In a clone of VMamba, import its modules and then patch: its own models run on these operators.
"""

import torch
import torch.nn.functional as F

import mobilemamba_kernels

mobilemamba_kernels.patch("vmamba")  # the one line

import selective_scan_cuda_oflex  # noqa: E402

from mobilemamba_kernels.interop.vmamba import cross_merge_fn, cross_scan_fn, selective_scan_fn  # noqa: E402

batch, dim, height, width, N, rank = 2, 96, 28, 28, 1, 6
x = torch.randn(batch, dim, height, width)
sequences = cross_scan_fn(x).flatten(1, 2)  # (batch, 4 dim, L): rows, columns, and both backwards
projected = F.conv1d(sequences, torch.randn(4 * (rank + 2 * N), dim, 1) / dim**0.5, groups=4)
dt, B, C = projected.unflatten(1, (4, -1)).split([rank, N, N], dim=2)
dt = F.conv1d(dt.flatten(1, 2), torch.randn(4 * dim, rank, 1) / rank**0.5, groups=4)
A, D, bias = -torch.rand(4 * dim, N), torch.ones(4 * dim), torch.full((4 * dim,), -3.0)
arguments = (sequences, dt, A, B.contiguous(), C.contiguous(), D, bias)
y = selective_scan_fn(*arguments)
merged = cross_merge_fn(y.view(batch, 4, dim, height, width)).view_as(x)

out, *_ = selective_scan_cuda_oflex.fwd(*arguments, True, 1, True)  # as networks call the extension
torch.testing.assert_close(out, y)
print(f"SS2D's core: {tuple(x.shape)} to {tuple(merged.shape)}")
