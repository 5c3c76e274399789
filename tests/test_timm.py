"""The networks in timm's registry."""

import importlib
import subprocess
import sys

import pytest
import torch

import mobilemamba


def test_import_needs_torch_numpy_and_einops_alone():
    """Optional packages are not imported, even where they are installed."""
    optional = ["timm", "torchvision", "safetensors", "PIL", "click", "rich", "sklearn", "matplotlib"]
    code = (
        "import sys, torch; before = set(sys.modules); import mobilemamba; "
        f"print(sorted((set(sys.modules) - before) & set({optional})))"
    )
    assert run(code) == "[]"


@pytest.mark.parametrize(
    "order", ["import timm, mobilemamba", "import mobilemamba, timm", "import mobilemamba, timm.layers, timm"]
)
def test_timm_knows_the_networks_in_any_order_of_import(order):
    pytest.importorskip("timm", reason="timm is not installed")
    names = run(f"{order}; print(*timm.list_models('mobilemamba*'))")
    assert sorted(names.split()) == sorted(mobilemamba.list_models())


def run(code: str) -> str:
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return process.stdout.strip()


def test_timm_builds_the_network():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("mobilemamba_t2", num_classes=5, depths=(1, 1, 1)).eval()
    assert isinstance(model, mobilemamba.MobileMamba)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    config = timm.data.resolve_data_config(model=model)
    assert config["input_size"] == (3, 192, 192)
    assert (config["crop_pct"], config["interpolation"]) == (0.875, "bicubic")
    assert config["mean"] == (0.485, 0.456, 0.406)
    groups = importlib.import_module("timm.optim").param_groups_weight_decay(model, 0.05, model.no_weight_decay())
    assert {id(p) for p in groups[0]["params"]} == {
        id(p) for name, p in model.named_parameters() if name in model.no_weight_decay()
    }


def test_timm_features():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("mobilemamba_s6", features_only=True).eval()
    assert model.feature_info.channels() == [192, 384, 448]
    assert model.feature_info.reduction() == [16, 32, 64]
    maps = model(torch.randn(2, 3, 96, 130))
    assert [tuple(m.shape) for m in maps] == [(2, 192, 6, 9), (2, 384, 3, 5), (2, 448, 2, 3)]
    last = timm.create_model("mobilemamba_s6", features_only=True, out_indices=(-1,)).eval()
    assert [tuple(m.shape) for m in last(torch.randn(1, 3, 64, 64))] == [(1, 448, 1, 1)]
