"""``pytest -p emulation.plugin``: the operators run their CUDA kernels, on the CPU. MOBILEMAMBA_EMULATION: a sanitizer."""

import os

from emulation import build, load

load(build(os.environ.get("MOBILEMAMBA_EMULATION", "")))
