"""Measurements on a GPU; ``benchmarks/gpu.sh`` runs them.

With MOBILEMAMBA_GPU_DRY_RUN=1 the CPU stands in for the GPU: CUDA kernels run by tests/emulation, Triton's by its
interpreter (TRITON_INTERPRET=1), tiny shapes. It shows that the measurements work; its figures mean nothing.
"""

import importlib
import os

DRY_RUN = os.environ.get("MOBILEMAMBA_GPU_DRY_RUN") == "1"


def stand_in() -> None:
    """In a dry run, emulate the GPU; to be called before mobilemamba_kernels is imported."""
    if DRY_RUN:
        importlib.import_module("emulation.plugin")
        importlib.import_module("conftest")  # corrects Triton's interpreter
