"""Other projects' functions, by their names and signatures, on this package's operators; ``patch`` puts them there.

A module a project: ``mamba_ssm``, ``causal_conv1d``, ``vim``, ``vmamba``, ``wtconv``, ``transformers``. Each can be
used without patching, as ``from mobilemamba_kernels.interop.mamba_ssm import selective_scan_fn``.
"""

from mobilemamba_kernels.interop._patching import patch, patched, unpatch

__all__ = ["patch", "patched", "unpatch"]
