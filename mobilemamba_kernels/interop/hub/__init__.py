"""Hugging Face's ``kernels`` puts these layers into its models: a second way besides ``patch("transformers")``.

``torch-universal`` is laid out as a kernel of their Hub, so ``kernels`` loads it from this folder without network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobilemamba_kernels.interop.hub import layers

LAYERS = tuple(layers.__all__)
PATH = Path(__file__).parent / "torch-universal"


def kernel_mapping(device: str = "cpu") -> dict[str, dict[str, Any]]:
    """Return what ``kernels.use_kernel_mapping`` takes, for inference and training, compiled or not::

        with kernels.use_kernel_mapping(kernel_mapping()):
            kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")

    Transformers' own functions stay where a model's convolution has an activation or a width that the operators lack.

    Args:
        device: type of the device that the model is on, "cpu" or "cuda".

    Raises:
        ImportError: ``kernels`` is not installed, or is too old.
    """
    try:
        from kernels import LocalLayerRepository
    except ImportError as error:
        raise ImportError(
            "kernel_mapping: kernels is not installed, or is too old; install it, for example with pip install kernels"
        ) from error
    return {name: {device: LocalLayerRepository(PATH, layer_name=name)} for name in LAYERS}
