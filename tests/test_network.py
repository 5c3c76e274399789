"""The network against the published one's outputs, and its behaviour as a PyTorch and timm model."""

import json
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from data.fill import filled_state_dict, input_images
from torch import nn

import mobilemamba
from mobilemamba import layers

DATA = Path(__file__).parent / "data"
SPECS = json.loads((DATA / "state_dict.json").read_text())
MACS = {"t2": 251.7, "t4": 408.7, "s6": 646.7, "b1": 1069.9, "b2": 2404.9, "b4": 4274.0}  # millions
SMALL = {"widths": (32, 40, 48), "depths": (1, 1, 2), "num_classes": 10}

create_small = partial(mobilemamba.create_model, "mobilemamba_t2", **SMALL)


@lru_cache
def golden_model(short: str) -> mobilemamba.MobileMamba:
    model = mobilemamba.create_model(f"mobilemamba_{short}").eval()
    model.load_state_dict(filled_state_dict(SPECS[short]), strict=False)
    return model


def filled(model: mobilemamba.MobileMamba) -> mobilemamba.MobileMamba:
    """Weights under which every layer matters; at the start most residual branches are zero."""
    spec = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(filled_state_dict(spec), strict=False)
    return model.eval()


@torch.no_grad()
def golden_errors(model: mobilemamba.MobileMamba, short: str) -> dict[str, float]:
    """The largest error of each golden tensor, relative to that tensor's largest magnitude."""
    images = input_images(2, mobilemamba.VARIANTS[f"mobilemamba_{short}"].image_size)
    last, maps = model.forward_intermediates(images)
    results = {f"stage{i + 1}": stage[:, ::16] for i, stage in enumerate(maps)}
    results["logits"] = model.forward_head(last)
    with np.load(DATA / "golden.npz") as golden:
        wanted = {name: torch.from_numpy(golden[f"{short}.{name}"]) for name in results}
    return {name: relative_error(result, wanted[name]) for name, result in results.items()}


def relative_error(result: torch.Tensor, wanted: torch.Tensor) -> float:
    assert result.shape == wanted.shape
    return ((result - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("short", SPECS)
def test_golden(short):
    model = golden_model(short)
    for network in (model, mobilemamba.fuse(model)):
        errors = golden_errors(network, short)
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("short", SPECS)
def test_names_shapes_and_order_are_the_published_ones(short):
    state = golden_model(short).state_dict()
    assert [(name, list(tensor.shape)) for name, tensor in state.items()] == list(SPECS[short].items())


def flip_directions(x, z, *parameters):
    return x, z, *(p.flip(0) for p in parameters[:5]), *parameters[5:]


def first_direction_only(x, z, x_proj, dt, bias, a, d, *norm):
    state = a.shape[-1]
    keep = torch.tensor([1.0, 0.0]).view(2, 1, 1)
    rows = torch.cat([x_proj[:, :-state], x_proj[:, -state:] * keep], 1)  # the last rows give C
    return x, z, rows, dt, bias, a, d * keep[:, :, 0], *norm


BREAKS = {
    # exp(Δ A) is 0 with A = -exp(30), so each position forgets the ones before
    "no recurrence": lambda x, z, x_proj, dt, bias, a, d, *norm: (x, z, x_proj, dt, bias, a + 30, d, *norm),
    "one direction": first_direction_only,
    "directions swapped": flip_directions,
    "no D": lambda x, z, x_proj, dt, bias, a, d, *norm: (x, z, x_proj, dt, bias, a, 0 * d, *norm),
    "A off by 5 %": lambda x, z, x_proj, dt, bias, a, d, *norm: (x, z, x_proj, dt, bias, a + np.log(1.05), d, *norm),
}


@pytest.mark.parametrize("name", BREAKS)
@pytest.mark.parametrize("fused", [False, True])
def test_golden_check_fails_a_broken_scan(name, fused, monkeypatch):
    operator = layers.ss2d_bidirectional
    monkeypatch.setattr(layers, "ss2d_bidirectional", lambda *args: operator(*BREAKS[name](*args)))
    model = golden_model("t2")
    errors = golden_errors(mobilemamba.fuse(model) if fused else model, "t2")
    # That it was broken as meant, and not otherwise: A alone moves little.
    assert max(errors.values()) > (1e-4 if name.startswith("A") else 1e-3), errors


def test_golden_check_fails_swapped_bands(monkeypatch):
    operator = layers.wavelet_depthwise_conv2d

    def swapped(x, weight, scale, base):
        bands = weight.unflatten(0, (-1, 4))[:, [0, 2, 1, 3]].flatten(0, 1)
        scales = scale.unflatten(1, (-1, 4))[:, :, [0, 2, 1, 3]].flatten(1, 2)
        return operator(x, bands, scales, base)

    monkeypatch.setattr(layers, "wavelet_depthwise_conv2d", swapped)
    errors = golden_errors(golden_model("t2"), "t2")
    assert max(errors.values()) > 1e-3, errors


@pytest.mark.parametrize("short", SPECS)
def test_counts(short):
    model, variant = golden_model(short), mobilemamba.VARIANTS[f"mobilemamba_{short}"]
    assert round(mobilemamba.count_parameters(model) / 1e6, 1) == variant.parameters
    for network in (model, mobilemamba.fuse(model)):
        assert round(mobilemamba.count_macs(network, variant.image_size) / 1e6, 1) == MACS[short]


def test_count_macs_leaves_the_model_alone():
    model = create_small()
    mobilemamba.count_macs(model, (64, 96))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_start_values():
    model = create_small(drop_path_rate=0.3)
    attn = model.blocks1[0].mixer.m.attn
    scan = attn.global_op.global_atten
    assert not scan.A_logs.any()
    assert (scan.Ds == 1).all()
    assert (attn.global_op.base_scale.weight == 1).all()
    assert (attn.global_op.wavelet_scale[0].weight == torch.tensor(0.1)).all()
    for values in (scan.dt_projs_weight, scan.dt_projs_bias):
        assert 0 <= values.min() < 0.02
        assert 0.08 < values.max() < 0.1
    assert scan.x_proj_weight.abs().max() <= scan.x_proj_weight.shape[-1] ** -0.5
    assert not attn.proj[1].bn.weight.any()
    assert (model.blocks2[0][0].m.bn.weight == 1).all()
    blocks = [module for module in model.modules() if isinstance(module, layers.Block)]
    assert [block.drop_path.rate for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert not model.head.l.bias.any()
    assert model.head.l.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_drop_path_drops_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    result = layers.DropPath(0.25).train()(torch.ones(4000, 3, 2, 2))
    assert result.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (result == result[:, :1, :1, :1]).all()
    assert result.mean().item() == pytest.approx(1, abs=0.05)


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (37, 91), (64, 64), (130, 65)])
def test_any_size_and_each_image_by_itself(size):
    model = filled(create_small())
    images = torch.randn(3, 3, *size)
    for network in (model, mobilemamba.fuse(model)):
        result = network(images)
        assert result.shape == (3, 10)
        assert relative_error(torch.cat([network(image[None]) for image in images]), result) < 1e-5
        assert network(images[:0]).shape == (0, 10)


@torch.no_grad()
def test_channels_last():
    model = filled(create_small())
    images = torch.randn(2, 3, 70, 64)
    wanted = model(images)
    for network in (model, mobilemamba.fuse(model)):
        network = network.to(memory_format=torch.channels_last)
        assert relative_error(network(images.to(memory_format=torch.channels_last)), wanted) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["autocast", "bfloat16", "float64"])
def test_dtypes(kind):
    model = filled(create_small())
    images = torch.randn(2, 3, 64, 64)
    wanted = model(images)
    for network in (model, mobilemamba.fuse(model)):
        if kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                result = network(images)
            assert result.dtype == torch.bfloat16
        else:
            dtype = getattr(torch, kind)
            result = network.to(dtype)(images.to(dtype))
            network.float()
            assert result.dtype == dtype
        # bfloat16 keeps 8 bits, and 30 layers' roundings add up.
        assert relative_error(result.float(), wanted) < (1e-5 if kind == "float64" else 0.1)


@pytest.mark.parametrize(("fused", "directions"), [(False, 2), (True, 2), (False, 4)])
def test_compile_without_graph_breaks(fused, directions):
    model = filled(create_small(scan_directions=directions))
    network = mobilemamba.fuse(model) if fused else model
    images = torch.randn(2, 3, 32, 48)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(images), network(images)) < 1e-5


@pytest.mark.parametrize("fused", [False, True])
def test_export_with_dynamic_batch(fused):
    model = filled(create_small())
    network = mobilemamba.fuse(model) if fused else model
    batch = torch.export.Dim("batch")
    exported = torch.export.export(network, (torch.randn(2, 3, 32, 48),), dynamic_shapes=({0: batch},))
    images = torch.randn(5, 3, 32, 48)
    with torch.no_grad():
        assert relative_error(exported.module()(images), network(images)) < 1e-5


def test_gradient_checkpointing_changes_nothing():
    images = torch.randn(4, 3, 64, 64)
    results = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = create_small(drop_path_rate=0.5).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        model(images).square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((gradients, model.state_dict()))
    for plain, recomputed in zip(*results, strict=True):  # gradients, then weights and running statistics
        assert plain.keys() == recomputed.keys()
        for name in plain:
            torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-5, atol=1e-6, msg=name)


def test_fuse():
    model = filled(create_small(distillation=True)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = mobilemamba.fuse(model)
    assert model.training
    assert not fused.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    assert not any(p.requires_grad for p in fused.parameters())
    assert isinstance(fused.get_classifier(), nn.Linear)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(fused(images), model.eval()(images)) < 1e-5
        assert torch.equal(mobilemamba.fuse(fused)(images), fused(images))
    with pytest.raises(ValueError, match="fused network"):
        fused.reset_classifier(5)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"scan_directions": 1},
        {"scan_directions": 4},
        {"scan_directions": 4, "d_state": 3},
        {"d_state": 4},
        {"ssm_ratio": 1.5},
        {"wavelet": False},
        {"global_ratio": 0},
        {"local_ratio": 0.0},
        {"global_ratio": 0.5, "local_ratio": (0.5, 0.5, 0.3), "local_groups": 3},
        {"kernels": (3, 3, 5)},
        {"num_classes": 0},
        {"in_chans": 1},
    ],
)
def test_options(options):
    model = filled(create_small(**options))
    images = torch.randn(2, options.get("in_chans", 3), 64, 48)
    result = model(images)
    assert result.isfinite().all()
    assert relative_error(mobilemamba.fuse(model)(images), result) < 1e-5
    state = model.state_dict()
    if directions := options.get("scan_directions"):
        scan = "blocks1.0.mixer.m.attn.global_op.global_atten"
        assert state[f"{scan}.x_proj_weight"].shape[0] == directions
        assert state[f"{scan}.Ds"].shape[0] == directions * 64
    if options.get("local_groups"):
        assert state["blocks2.3.mixer.m.attn.local_op.parts.2.dwconv3x3.weight"].shape == (8, 1, 7, 7)
    assert any("wavelet" in name or "wt_filter" in name for name in state) == (
        options.get("wavelet", True) and options.get("global_ratio") != 0
    )


@torch.no_grad()
def test_scan_directions_agree():
    """Two directions of the general scan are the fused operator; the column-major pair is that on the transpose."""
    torch.manual_seed(0)
    pair, four = (layers.SS2D(16, 2.0, 2, k).eval() for k in (2, 4))
    for parameter in (pair.A_logs, pair.Ds, pair.conv2d.bias):
        nn.init.normal_(parameter)
    pair.x_proj_weight.mul_(8)
    # VMamba's order is rows, columns, rows back, columns back. A direction of zero C and D adds nothing.
    x, z = torch.randn(2, 2, 32, 5, 7).unbind()

    def scan_four(forward, back):
        for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"):
            values = getattr(pair, name).unflatten(0, (2, -1)) if name in ("A_logs", "Ds") else getattr(pair, name)
            target = torch.zeros(4, *values.shape[1:])
            target[forward], target[back] = values
            getattr(four, name).copy_(target.view_as(getattr(four, name)))
        return four.scan_any(x, z)

    assert relative_error(scan_four(0, 2), pair.scan_pair(x, z)) < 1e-5
    assert relative_error(scan_four(1, 3), pair.scan_pair(x.mT, z.mT).mT) < 1e-5

    one = layers.SS2D(16, 2.0, 2, 1).eval()
    for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"):
        getattr(one, name).copy_(getattr(pair, name)[: len(getattr(one, name))])
    pair.x_proj_weight[1] = 0
    pair.Ds[32:] = 0
    assert relative_error(one.scan_any(x, z), pair.scan_pair(x, z)) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"name": "mobilemamba_s7"}, ValueError, "mobilemamba_s7.*mobilemamba_s6"),
        ({"depth": 3}, TypeError, "depth.*depths"),
        ({"depths": (1, 2)}, ValueError, "three values"),
        ({"depths": (1, 0, 2)}, ValueError, "depths must be from 1"),
        ({"depths": (1, 2.5, 2)}, TypeError, "depths takes int"),
        ({"widths": (100, 200, 300)}, ValueError, "multiple of 8.*100"),
        ({"widths": (24, 40, 48), "global_ratio": 1}, ValueError, "32 channels, more than there are"),
        ({"widths": "abc"}, TypeError, "widths takes int"),
        ({"kernels": (7, 4, 3)}, ValueError, "odd"),
        ({"scan_directions": 3}, ValueError, "1, 2 or 4"),
        ({"d_state": 0}, ValueError, "d_state must be from 1"),
        ({"d_state": 257}, ValueError, "to 256"),
        ({"wavelet": 1}, TypeError, "wavelet takes bool"),
        ({"local_groups": True}, TypeError, "local_groups takes int"),
        ({"local_groups": 15, "local_ratio": 0.05}, ValueError, "fewer groups"),
        ({"drop_path_rate": 1.0}, ValueError, "drop_path_rate"),
        ({"drop_path_rate": float("nan")}, ValueError, "drop_path_rate"),
        ({"num_classes": -1}, ValueError, "num_classes"),
        ({"in_chans": 0}, ValueError, "in_chans"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words) as caught:
        mobilemamba.create_model(**{"name": "mobilemamba_t2", **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (torch.zeros(3, 64, 64), ValueError, r"batch, 3, height, width.*\(3, 64, 64\)"),
        (torch.zeros(1, 1, 64, 64), ValueError, r"\(1, 1, 64, 64\)"),
        (torch.zeros(1, 3, 0, 64), ValueError, "no side of 0"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "float32.*uint8"),
        (torch.zeros(1, 3, 64, 64).double(), TypeError, "float32.*float64"),
        (torch.zeros(1, 3, 64, 64).bfloat16(), TypeError, "float32.*bfloat16"),
    ],
)
def test_bad_images(images, error, words):
    model = create_small().eval()
    for network in (model, mobilemamba.fuse(model)):
        with pytest.raises(error, match=words):
            network(images)


def test_timm_interface():
    model = filled(create_small(distillation=True))
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        features = model.forward_features(images)
        assert features.shape == (2, 48, 2, 1)
        assert torch.equal(model.forward_head(features, pre_logits=True), features.mean((2, 3)))
        assert torch.equal(model.forward_head(features), model(images))
        last, maps = model.forward_intermediates(images)
        assert torch.equal(last, features)
        assert [tuple(m.shape[1:]) for m in maps] == [(32, 6, 4), (40, 3, 2), (48, 2, 1)]
        assert [(i["num_chs"], i["reduction"]) for i in model.feature_info] == [(32, 16), (40, 32), (48, 64)]
        first = model.forward_intermediates(images, indices=[-3], stop_early=True, intermediates_only=True)
        assert len(first) == 1
        assert torch.equal(first[0], maps[0])
        assert len(model.forward_intermediates(images, indices=2, intermediates_only=True)) == 2
    for bad in (0, 4, [3], []):
        with pytest.raises(ValueError, match="indices"):
            model.forward_intermediates(images, indices=bad)

    both = model.train()(images)
    assert [tuple(result.shape) for result in both] == [(2, 10), (2, 10)]
    undecayed = model.no_weight_decay()
    assert "blocks1.0.mixer.m.attn.global_op.global_atten.Ds" in undecayed
    assert "head.l.bias" in undecayed
    assert not any(name.endswith(("A_logs", "dt_projs_bias", "scale.weight")) for name in undecayed)

    model.eval().reset_classifier(7)
    assert model(images).shape == (2, 7)
    assert model.num_classes == model.default_cfg["num_classes"] == 7
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)
