"""WTConv: its layer, with the original parameter names, three levels deep."""

import torch

import mobilemamba_kernels

mobilemamba_kernels.patch("wtconv")  # the one line; where WTConv is imported its layers run on these operators

from wtconv import WTConv2d  # noqa: E402

layer = WTConv2d(64, 64, kernel_size=5, wt_levels=3)
x = torch.randn(2, 64, 56, 56, requires_grad=True)
layer(x).sum().backward()
names = [name for name, _ in layer.named_parameters()]
print(f"WTConv2d: {tuple(x.shape)}, gradients of the input and of {len(names)} parameters: {', '.join(names[2:5])}, …")
