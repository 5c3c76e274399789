"""MobileMamba: Lightweight Multi-Receptive Visual Mamba Network (arXiv 2411.15941, CVPR 2025).

    model = mobilemamba.create_model("mobilemamba_s6", checkpoint="mobilemamba_s6.pth")
    logits = mobilemamba.fuse(model)(images)  # (batch, 3, 224, 224) → (batch, 1000)

With timm installed, ``timm.create_model("mobilemamba_s6")`` knows the networks too.
"""

from mobilemamba.checkpoints import load_checkpoint, model_from_checkpoint, save_checkpoint
from mobilemamba.factory import create_model
from mobilemamba.inference import fuse
from mobilemamba.model import MobileMamba
from mobilemamba.optimized import optimize_for_inference
from mobilemamba.profile import count_macs, count_parameters
from mobilemamba.timm_models import register_with_timm
from mobilemamba.variants import VARIANTS, Options, Variant, list_models

__all__ = [
    "VARIANTS",
    "MobileMamba",
    "Options",
    "Variant",
    "count_macs",
    "count_parameters",
    "create_model",
    "fuse",
    "list_models",
    "load_checkpoint",
    "model_from_checkpoint",
    "optimize_for_inference",
    "save_checkpoint",
]

register_with_timm()
