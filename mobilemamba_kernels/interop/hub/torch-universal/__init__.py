"""What ``kernels`` imports from this folder."""

from mobilemamba_kernels.interop.hub import layers

__all__ = ["layers"]
