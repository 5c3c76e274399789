"""The optimized network is the network."""

import copy
import io

import pytest
import torch
from sklearn.datasets import load_sample_images
from test_network import SPECS, create_small, filled, golden_errors, golden_model
from torch import nn

import mobilemamba
from mobilemamba_kernels import _library, use_backend

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}  # of the logits' scale, of small networks
VARIATIONS = {
    "published": {},
    "two states": {"d_state": 2},
    "one direction": {"scan_directions": 1},
    "four directions": {"scan_directions": 4},
    "no wavelet": {"wavelet": False},
    "local groups": {"local_groups": 2, "local_ratio": 0.5, "global_ratio": 0.5},
    "no global branch": {"global_ratio": 0},
    "no local branch": {"local_ratio": 0},
    "identity only": {"global_ratio": 0, "local_ratio": 0},
    "all global": {"global_ratio": 1, "widths": (32, 48, 64)},
    "two channels": {"in_chans": 2},
    "one channel, no classes": {"in_chans": 1, "num_classes": 0},
    "two heads": {"distillation": True},
}


def compare(model: mobilemamba.MobileMamba, optimized: mobilemamba.MobileMamba, x: torch.Tensor, tolerance: float):
    with torch.inference_mode():
        wanted, found = model(x.to(next(model.parameters()).dtype)), optimized(x)
    assert found.shape == wanted.shape
    assert found.dtype == torch.float32
    if found.numel():
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("short", SPECS)
def test_golden(short):
    model = golden_model(short)
    errors = golden_errors(mobilemamba.optimize_for_inference(model), short)
    assert max(errors.values()) < 1e-5, errors
    errors = golden_errors(mobilemamba.optimize_for_inference(model, torch.bfloat16), short)
    assert errors["logits"] < 0.02, errors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIATIONS)
def test_every_option(name, dtype, instruction_set):
    model = filled(create_small(**VARIATIONS[name]))
    optimized = mobilemamba.optimize_for_inference(model, dtype)
    compare(model, optimized, torch.randn(2, model.in_chans, 70, 45), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3, 3, 17, 200), (0, 3, 32, 32), (5, 3, 64, 63), (1, 3, 130, 130)])
def test_every_size_and_layout(shape, dtype):
    model = filled(create_small())
    optimized = mobilemamba.optimize_for_inference(model, dtype)
    x = torch.randn(shape)
    compare(model, optimized, x, TOLERANCE[dtype])
    compare(model, optimized, x.to(memory_format=torch.channels_last), TOLERANCE[dtype])
    compare(model, optimized, x.flip(2).mT.contiguous().mT[:, :, ::2], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_images_of_other_types(dtype):
    optimized = mobilemamba.optimize_for_inference(filled(create_small()))
    x = torch.randn(2, 3, 64, 64).to(dtype)
    with torch.inference_mode():
        assert torch.equal(optimized(x), optimized(x.float()))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(optimized(x), optimized(x.float()))


def test_of_a_fused_network_in_another_type():
    model = filled(create_small())
    x = torch.randn(2, 3, 64, 64)
    for other in (mobilemamba.fuse(model), copy.deepcopy(model).double(), copy.deepcopy(model).train()):
        compare(model, mobilemamba.optimize_for_inference(other), x, TOLERANCE[torch.float32])


def test_the_original_is_left_alone():
    model = filled(create_small()).train()
    before = copy.deepcopy(model.state_dict())
    optimized = mobilemamba.optimize_for_inference(model, torch.bfloat16)
    with torch.inference_mode():
        optimized(torch.randn(2, 3, 64, 64))
    assert model.training
    assert not optimized.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad == (not name.endswith("wt_filter")) for name, p in model.named_parameters())
    assert not any(p.requires_grad for p in optimized.parameters())


def test_features_and_intermediates():
    model = filled(create_small())
    optimized = mobilemamba.optimize_for_inference(model)
    x = torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        wanted, found = model.forward_intermediates(x), optimized.forward_intermediates(x)
        pairs = [(wanted[0], found[0]), *zip(wanted[1], found[1], strict=True)]
        pairs += [(model.forward_features(x), optimized.forward_features(x))]
        pooled = [m.forward_head(found[0], pre_logits=True) for m in (model, optimized)]
    for a, b in (*pairs, pooled):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4 * a.abs().max().item())
    optimized.reset_classifier(0)
    with torch.inference_mode():
        torch.testing.assert_close(optimized(x), pooled[1])


def test_copies_and_files():
    optimized = mobilemamba.optimize_for_inference(filled(create_small()), torch.bfloat16)
    file = io.BytesIO()
    torch.save(optimized, file)
    file.seek(0)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        wanted = optimized(x)
        assert torch.equal(copy.deepcopy(optimized)(x), wanted)
        assert torch.equal(torch.load(file, weights_only=False)(x), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_at_any_number_of_threads_and_batch(dtype, restore_threads):
    optimized = mobilemamba.optimize_for_inference(filled(create_small()), dtype)
    if not _library.COMPILED_ERROR and _library.cpu_capability() == "amx" and dtype == torch.bfloat16:
        pytest.skip("matrix products are the vendor library's")
    x = torch.randn(5, 3, 100, 90)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with torch.inference_mode():
            results += [optimized(x), torch.cat([optimized(x[:1]), optimized(x[1:])])]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiles_whole(dtype, backend):
    torch.compiler.reset()
    optimized = mobilemamba.optimize_for_inference(filled(create_small()), dtype)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(optimized, fullgraph=True, backend=backend)(x), optimized(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exports_with_a_dynamic_batch(dtype):
    optimized = mobilemamba.optimize_for_inference(filled(create_small()), dtype)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(optimized, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: batch},))
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), optimized(x))


def test_counts_stay():
    model = create_small()
    optimized = mobilemamba.optimize_for_inference(model)
    assert mobilemamba.count_macs(optimized, 96) == mobilemamba.count_macs(mobilemamba.fuse(model), 96)


def crops(pictures: list[torch.Tensor], count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Random crops of pictures, resized and recoloured."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    found = []
    for _ in range(count):
        picture, side = pictures[draw(0, len(pictures))], draw(64, 400)
        y, x = draw(0, picture.shape[1] - side + 1), draw(0, picture.shape[2] - side + 1)
        crop = picture[None, :, y : y + side, x : x + side]
        crop = nn.functional.interpolate(crop, size=(size, size), mode="bilinear", antialias=True)[0]
        found.append((crop - 0.45) / 0.23 * (0.6 + 0.8 * torch.rand(3, 1, 1, generator=generator)))
    return torch.stack(found)


def test_bfloat16_predicts_the_same():
    """Wherever the two best classes lie further apart than what bfloat16 changes: on at least 200 photographs."""
    pictures = [torch.tensor(p).permute(2, 0, 1).float() / 255 for p in load_sample_images().images]
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = mobilemamba.create_model("mobilemamba_t2")
    # Every branch counts, features differ from photograph to photograph, and classes from each other.
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            nn.init.uniform_(module.weight, 0.3, 1.0)
            module.momentum = None
    with torch.no_grad():
        for _ in range(4):
            model.train()(crops(pictures, 16, 192, generator))
    nn.init.normal_(model.head.l.weight, std=0.1)
    exact = mobilemamba.optimize_for_inference(model)
    rounded = mobilemamba.optimize_for_inference(model, torch.bfloat16)
    logits, others = [], []
    with torch.inference_mode():
        for _ in range(20):
            x = crops(pictures, 32, 192, generator)
            logits.append(exact(x)), others.append(rounded(x))
    logits, others = torch.cat(logits), torch.cat(others)
    best = logits.topk(2)
    decided = best.values[:, 0] - best.values[:, 1] > (others - logits).abs().max()
    assert decided.sum() >= 200
    assert best.indices[decided, 0].unique().numel() >= 50
    assert torch.equal(best.indices[decided, 0], others.argmax(1)[decided])


class Shifted(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


class Cosine(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight))


def with_weight_norm(model):
    for module in [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
        nn.utils.parametrizations.weight_norm(module)


def without_affine(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight = module.bias = None


def with_gelu(model):
    model.patch_embed[1] = model.blocks2[1].act = model.blocks1[0].ffn1.m.act = nn.GELU()
    model.blocks2[2][1].m.act = model.blocks1[0].mixer.m.attn.proj[0] = nn.GELU()
    model.blocks1[0].mixer.m.attn.global_op.global_atten.act = nn.GELU()


def with_a_larger_second_filter(model):
    local = model.blocks2[-1].mixer.m.attn.local_op
    channels = local.dwconv1x1.in_channels
    local.dwconv1x1 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)


CHANGES = {
    "a larger second filter of the local branch": with_a_larger_second_filter,
    "a head of another kind": lambda m: setattr(m, "head", Cosine(m.num_features, 7)),
    "a head without a bias": lambda m: setattr(m, "head", nn.Linear(m.num_features, 7, bias=False)),
    "a head of several layers": lambda m: setattr(m, "head", Shifted(nn.Identity(), nn.Linear(m.num_features, 7))),
    "a stage with a forward of its own": lambda m: setattr(m, "blocks2", Shifted(*m.blocks2)),
    "a forward of one module": lambda m: setattr(m.blocks1[0].dw0.m, "forward", lambda x: x * 2),
    "other activations": with_gelu,
    "weight norm": with_weight_norm,
    "no affine part": without_affine,
    "synchronized batch norm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "a convolution with a bias": lambda m: m.blocks1[0].ffn0.m.pw1.c.register_parameter(
        "bias", nn.Parameter(torch.ones(m.blocks1[0].ffn0.m.pw1.c.out_channels))
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_networks_that_others_changed(name):
    """What has a forward of its own is kept as it is; what only computes its weights otherwise is folded."""
    model = filled(create_small())
    changed = CHANGES[name](model)
    model = (changed if isinstance(changed, mobilemamba.MobileMamba) else model).eval()
    x = torch.randn(2, 3, 64, 64)
    compare(model, mobilemamba.fuse(model), x, TOLERANCE[torch.float32])
    compare(model, mobilemamba.optimize_for_inference(model), x, TOLERANCE[torch.float32])
    compare(model, mobilemamba.optimize_for_inference(model, torch.bfloat16), x, TOLERANCE[torch.bfloat16])


def test_two_heads_of_another_kind_are_both_kept():
    model = filled(create_small(distillation=True))
    model.head, model.head_dist = Shifted(nn.Linear(model.num_features, 7)), nn.Linear(model.num_features, 7)
    compare(model, mobilemamba.optimize_for_inference(model), torch.randn(2, 3, 64, 64), TOLERANCE[torch.float32])


def test_a_network_in_sixteen_bits_loses_nothing_more():
    model = filled(create_small()).bfloat16()
    found = mobilemamba.optimize_for_inference(model)
    compare(copy.deepcopy(model).float(), found, torch.randn(2, 3, 64, 64), TOLERANCE[torch.float32])


def test_many_images_are_computed_in_parts(monkeypatch):
    """With the same bits; where hooks wait for all of them, together."""
    model = create_small()
    x = torch.randn(5, 3, 64, 32)
    optimized = mobilemamba.optimize_for_inference(model)
    batches = []
    with torch.inference_mode():
        wanted = optimized(x)
        monkeypatch.setattr(mobilemamba.model, "_PIXELS_TOGETHER", 2 * 64 * 32)
        assert [len(part) for part in optimized._parts(x)] == [2, 2, 1]
        assert torch.equal(optimized(x), wanted)
        assert optimized(x[:0]).shape == (0, model.num_classes)
        model.blocks2.register_forward_hook(lambda module, inputs, output: batches.append(len(output)))
        assert torch.equal(mobilemamba.optimize_for_inference(model)(x), wanted)
    assert batches == [5]


def test_made_in_inference_mode_and_called_outside():
    with torch.inference_mode():
        optimized = mobilemamba.optimize_for_inference(torch.compile(create_small(), backend="eager"))
    optimized(torch.randn(1, 3, 64, 64, requires_grad=True)).sum().backward()


def test_no_head_in_any_type():
    for in_chans in (3, 4):
        model = filled(create_small(in_chans=in_chans))
        optimized = mobilemamba.optimize_for_inference(model, torch.bfloat16)
        x = torch.randn(2, in_chans, 64, 64)
        with torch.inference_mode():
            wanted = optimized.forward_head(optimized.forward_features(x), pre_logits=True)
            optimized.reset_classifier(0)
            assert torch.equal(optimized(x), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_stays_as_it_is(dtype):
    optimized = mobilemamba.optimize_for_inference(create_small(), dtype)
    before = {name: tensor.clone() for name, tensor in optimized.state_dict().items()}
    for change in (optimized.half, optimized.double, lambda: optimized.to("meta")):
        with pytest.raises(TypeError, match="an optimized network stays on the CPU with its"):
            change()
    optimized.to(memory_format=torch.channels_last).cpu()
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimized.state_dict().items())


def test_what_it_refuses():
    model = create_small()
    with pytest.raises(TypeError, match="must be a MobileMamba, but is a Linear"):
        mobilemamba.optimize_for_inference(nn.Linear(3, 3))
    other = create_small()
    other.patch_embed[0].bn = nn.Identity()
    with pytest.raises(TypeError, match=r"and Identity.* cannot be fused"):
        mobilemamba.optimize_for_inference(other)
    with pytest.raises(TypeError, match=r"dtype must be torch.float32 or torch.bfloat16, but is torch.float16"):
        mobilemamba.optimize_for_inference(model, torch.float16)
    with pytest.raises(ValueError, match="must be on a CPU or a CUDA GPU to be optimized, but is on meta"):
        mobilemamba.optimize_for_inference(copy.deepcopy(model).to("meta"))
    optimized = mobilemamba.optimize_for_inference(model)
    with pytest.raises(ValueError, match="optimized already"):
        mobilemamba.optimize_for_inference(optimized)
    with pytest.raises(ValueError, match="takes no new head"):
        optimized.reset_classifier(3)
    with pytest.raises(TypeError, match=r"images must be floating point, but are torch.int64"):
        optimized(torch.ones(1, 3, 64, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match="images must be"):
        optimized(torch.ones(1, 4, 64, 64))
    with use_backend("reference"), pytest.raises(RuntimeError, match='backend "reference" is forced'):
        optimized(torch.ones(1, 3, 64, 64))
