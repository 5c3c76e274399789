"""``pytest -p emulation.plugin``: operators run the CUDA kernels, on the CPU. MOBILEMAMBA_EMULATION: a sanitizer."""

import os

import torch

from emulation import build, load

load(build(os.environ.get("MOBILEMAMBA_EMULATION", "")))

# The library's product with float32 results, which PyTorch has for CUDA alone.
_ATEN = torch.library.Library("aten", "IMPL")
_ATEN.impl("mm.dtype", lambda a, b, dtype: a.to(dtype) @ b.to(dtype), "CPU")
