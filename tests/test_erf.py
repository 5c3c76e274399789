"""Effective receptive fields: against those that are known, and the command that draws them."""

import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

import mobilemamba
from mobilemamba import erf
from mobilemamba.cli import main

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
SMALL = {"widths": (48, 64, 80), "depths": (1, 1, 1)}


class Stack(nn.Sequential):
    """3×3 convolutions as one stage."""

    def __init__(self, strides, channels=1, images=1):
        widths = [images] + [channels] * len(strides)
        pairs = zip(widths, widths[1:], strides, strict=False)
        super().__init__(*(nn.Conv2d(a, b, 3, stride, 1, bias=False) for a, b, stride in pairs))

    def forward_intermediates(self, x, indices, stop_early, output_fmt, intermediates_only):
        return [self(x)]


def with_weights(network, function):
    for p in network.parameters():
        p.data = function(p.data)
    return network


@pytest.mark.parametrize("depth", [1, 3, 10])
def test_ones_give_the_powers_of_a_box(depth):
    """The field of d convolutions is the d-fold convolution of a box, of variance 2 d / 3: nearly a normal."""
    network = with_weights(Stack([1] * depth), torch.ones_like)
    found = erf.effective_receptive_field(network, torch.rand(2, 1, 32, 32), 0)
    line = np.ones(1)
    for _ in range(depth):
        line = np.convolve(line, np.ones(3))
    expected = np.zeros((32, 32))
    expected[16 - depth : 17 + depth, 16 - depth : 17 + depth] = np.outer(line, line)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    marginal = found.sum(0) / found.sum()
    np.testing.assert_allclose((marginal * (np.arange(32) - 16) ** 2).sum(), 2 * depth / 3)
    if depth == 10:
        normal = np.exp(-((np.arange(32) - 16) ** 2) / (4 * depth / 3)) / np.sqrt(4 * np.pi * depth / 3)
        np.testing.assert_allclose(marginal, normal, atol=0.01)


@pytest.mark.parametrize("strides", [(1,), (2, 1), (2, 2, 1, 2), (2, 2, 2, 2)])
def test_support_is_the_receptive_field(strides):
    torch.manual_seed(0)
    network = with_weights(Stack(strides, channels=4, images=3), lambda weight: weight.abs() + 0.01)
    found = erf.effective_receptive_field(network, torch.rand(1, 3, 64, 64), 0)
    radius = sum(np.cumprod([1, *strides[:-1]]))
    expected = np.zeros((64, 64), bool)
    expected[32 - radius : 33 + radius, 32 - radius : 33 + radius] = True
    np.testing.assert_array_equal(found > 0, expected)


def test_channels_are_added_images_averaged_and_negative_parts_left_out():
    network = Stack([1], channels=2, images=3)
    weight = torch.zeros(2, 3, 3, 3)
    weight[0, :, 1, 1] = torch.tensor([1.0, 2.0, -4.0])  # of the centre
    weight[0, 0, 1, 2] = -1  # of the pixel to its right
    weight[1] = -1  # a channel below 0, where the first image is positive
    network[0].weight.data = weight
    images = torch.zeros(2, 3, 4, 4)
    images[0, :2, 2, 2] = 1
    found = erf.effective_receptive_field(network, images, 0)  # the second image moves nothing: its values are 0
    expected = np.zeros((4, 4))
    expected[2, 2] = (1 + 2) / 2
    np.testing.assert_array_equal(found, expected)


def test_fields_are_refused_where_there_are_none():
    with pytest.raises(ValueError, match="N of at least 1"):
        erf.effective_receptive_field(Stack([1]), torch.zeros(0, 1, 8, 8), 0)
    flat = Stack([1])
    flat.append(nn.Flatten(2))
    with pytest.raises(ValueError, match="stage 0 gives no map"):
        erf.effective_receptive_field(flat, torch.zeros(1, 1, 8, 8), 0)


def test_ratios_of_made_up_fields():
    point = np.zeros((10, 20))
    point[5, 10] = 3
    assert erf.high_contribution_ratio(point) == dict.fromkeys((0.2, 0.3, 0.5, 0.99), 1 / 200)
    even = erf.high_contribution_ratio(np.ones((9, 9)), (1 / 81, 0.1, 25 / 81, 0.5, 1))
    assert even == {1 / 81: 1 / 81, 0.1: 9 / 81, 25 / 81: 25 / 81, 0.5: 49 / 81, 1: 1}
    corner = np.zeros((8, 6))
    corner[4, 3], corner[0, 0] = 1, 1  # the square around (4, 3) that holds the corner is cut off at two edges
    assert erf.high_contribution_ratio(corner, (0.5, 0.6)) == {0.5: 1 / 48, 0.6: 1}


@pytest.mark.parametrize("field", [np.zeros((3, 3)), -np.ones((3, 3)), np.full((3, 3), np.nan)])
def test_ratios_of_no_field(field):
    with pytest.raises(ValueError, match="finite, none negative, and not all 0"):
        erf.high_contribution_ratio(field)


@pytest.mark.parametrize("threshold", [0, 1.1, -1])
def test_threshold_is_a_share(threshold):
    with pytest.raises(ValueError, match=f"above 0 and at most 1, but is {threshold}"):
        erf.high_contribution_ratio(np.ones((3, 3)), [threshold])


def network(**options):
    torch.manual_seed(0)
    return erf.Network("small", mobilemamba.create_model("mobilemamba_t2", **SMALL, **options).eval(), None)


def photos(size, count=2):
    return torch.stack([erf.crop(image, size) for image in erf.sample_images(count)])


def test_without_scan_and_wavelet_the_first_stage_sees_less():
    """Then all that is left is convolutions: 31 pixels of the stem, and 16 more for each of 3 + 7 + 3 - 3 positions."""
    fields = {}
    for name, options in {"full": {}, "ablated": {"global_ratio": 0}}.items():
        small = network(**options)
        fields[name] = erf.measure(small, erf.prepare(small, photos(224, 1)), 16)
    rows, columns = (np.flatnonzero(fields["ablated"].erf.any(axis)) for axis in (1, 0))
    assert rows[[0, -1]].tolist() == columns[[0, -1]].tolist() == [112 - 95, 112 + 95]
    assert fields["full"].erf[:16].any()
    assert fields["full"].erf[-16:, -16:].any()
    assert all(fields["ablated"].ratios[t] < fields["full"].ratios[t] for t in erf.THRESHOLDS)


def test_untrained_networks_get_statistics_and_open_blocks():
    small = network()
    images = erf.prepare(small, photos(64, 1))
    norms = [m for m in small.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.weight.any() and not norm.training and norm.num_batches_tracked == 1 for norm in norms)
    x, weight = small.model.patch_embed[0].c(images), small.model.patch_embed[0].bn.running_mean
    torch.testing.assert_close(weight, x.mean((0, 2, 3)), atol=0.05, rtol=0)
    assert [erf.measure(small, images, stride).stage for stride in erf.stages(small.model)] == [1, 2, 3]


def test_trained_networks_stay_as_they_are(tmp_path):
    mobilemamba.save_checkpoint(network(in_chans=1).model, tmp_path / "grey.pth")
    trained = erf.our_network(None, tmp_path / "grey.pth")
    before = {name: value.clone() for name, value in trained.model.state_dict().items()}
    images = erf.prepare(trained, photos(64))
    assert images.shape == (2, 1, 64, 64)
    assert erf.measure(trained, images, 64).erf.shape == (64, 64)
    for name, value in trained.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(ValueError, match="1 or 3 channels, and small takes 4"):
        erf.prepare(network(in_chans=4), photos(64))


def test_a_network_that_looks_at_nothing_is_refused():
    blind = erf.Network("blind", with_weights(network().model, torch.zeros_like), "zeros.pth")
    with pytest.raises(ValueError, match="blind has no finite gradient at stage 1"):
        erf.measure(blind, erf.prepare(blind, photos(64)), 16)


def test_networks_of_timm():
    """Five stages, and one: a transformer of fixed size, whose twelve maps have the same stride."""
    pytest.importorskip("timm")
    assert erf.stages(erf.timm_network("mobilenetv3_small_050", 64).model) == {2: 0, 4: 1, 8: 2, 16: 3, 32: 4}
    vit = erf.timm_network("vit_tiny_patch16_224", 64)
    assert erf.stages(vit.model) == {16: 11}
    field = erf.measure(vit, erf.prepare(vit, photos(64, 1)), 16)
    assert (field.erf > 0).mean() > 0.7


def test_weights_of_networks_of_timm(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    other = timm.create_model("mobilenetv3_small_050", num_classes=3)
    torch.save(other.state_dict(), tmp_path / "three.pth")
    found = erf.timm_network("mobilenetv3_small_050", 64, str(tmp_path / "three.pth"))
    assert found.weights == "three.pth"
    torch.testing.assert_close(found.model.conv_stem.weight, other.conv_stem.weight)
    torch.save({"conv_stem.weight": other.conv_stem.weight}, tmp_path / "stem.pth")
    with pytest.raises(ValueError, match=r"stem\.pth holds no weights of mobilenetv3_small_050: \d+ are missing"):
        erf.timm_network("mobilenetv3_small_050", 64, str(tmp_path / "stem.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pth holds no weights"):
        erf.timm_network("mobilenetv3_small_050", 64, str(tmp_path / "text.pth"))


@pytest.fixture
def small(monkeypatch):
    """The command's networks are small ones."""
    monkeypatch.setattr(erf, "create_model", partial(mobilemamba.create_model, **SMALL))


def run(*arguments):
    return CliRunner().invoke(main, ["erf", "--size", "64", "--count", "1", *map(str, arguments)])


def test_command_with_two_networks(small, tmp_path):
    pytest.importorskip("timm")
    arguments = ("--model", "mobilemamba_t2", "--beside", "mobilenetv3_small_050", "--output", tmp_path / "erf.png")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "The weights of mobilemamba_t2, mobilenetv3_small_050 are random" in result.stderr
    assert result.stdout.count("mobilenetv3_small_050") == 5
    assert f"Picture: {tmp_path / 'erf.png'}" in result.stdout
    with Image.open(tmp_path / "erf.png") as image:
        assert image.width > 1500
    document = json.loads(run(*arguments, "--json").stdout)
    assert (document["images"], document["size"], document["picture"]) == (1, 64, str(tmp_path / "erf.png"))
    shown = [(row["network"], row["checkpoint"], row["stage"], row["stride"]) for row in document["results"]]
    assert shown[:3] == [("mobilemamba_t2", None, stage, 8 << stage) for stage in (1, 2, 3)]
    assert shown[3:] == [("mobilenetv3_small_050", None, stage, 1 << stage) for stage in range(1, 6)]
    for row in document["results"]:
        assert list(row["ratios"]) == ["0.2", "0.3", "0.5", "0.99"]
        assert all(f"{100 * ratio:.2f} %" in result.stdout for ratio in row["ratios"].values())  # the same again


def test_command_with_a_checkpoint_and_images_of_which_one_cannot_be_read(tmp_path):
    mobilemamba.save_checkpoint(network(num_classes=3).model, tmp_path / "small.pth")
    erf.sample_images(1)[0].save(tmp_path / "photo.png")
    (tmp_path / "broken.png").write_text("no image")
    arguments = ("--checkpoint", tmp_path / "small.pth", "--output", tmp_path / "erf.svg")
    result = run(*arguments, "--images", tmp_path / "*.png")
    assert result.exit_code == 1
    assert result.stderr == f"skipped {tmp_path / 'broken.png'}: it is no image\n"
    assert "small.pth" in result.stdout
    assert "random weights" not in (tmp_path / "erf.svg").read_text()
    none = run(*arguments, "--images", tmp_path / "broken.png")
    assert none.exit_code == 1
    assert "none of the images in" in none.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--beside", "nonsense"], "has no network 'nonsense'"),
        (["--beside", "resnet18.nonsense"], "Invalid pretrained tag (nonsense)"),
        (["--beside", "efficientformer_l1"], "efficientformer_l1 takes no images of 64 pixels: give --size 224"),
        (["--beside", "mobilenetv3_small_050=none.pth"], "none.pth: No such file or directory"),
        (["--output", "none/erf.png"], "there is no folder none for the picture"),
        (["--output", "erf.txt"], "must end in one of"),
        (["--images", "none/*.png"], "no images match none/*.png"),
        (["--checkpoint", __file__, "--model", "mobilemamba_t2", "--model", "mobilemamba_t4"], "--model once"),
        (["--checkpoint", __file__], "test_erf.py"),
        (["--model", "nonsense"], "'nonsense' is not one of"),
        (["--size", "0"], "0 is not in the range"),
    ],
)
def test_one_sentence_for_wrong_input(small, arguments, sentence, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert sentence in last


@pytest.mark.parametrize(
    ("missing", "arguments"), [("timm", ["--beside", "resnet18"]), ("matplotlib", []), ("sklearn", [])]
)
def test_missing_package_is_named(small, missing, arguments, monkeypatch, tmp_path):
    for module in [m for m in sys.modules if m.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    result = run(*arguments, "--model", "mobilemamba_t2", "--output", tmp_path / "erf.png")
    assert result.exit_code == 1
    assert "pip install mobilemamba[train]" in result.stderr
    assert missing.replace("sklearn", "scikit-learn") in result.stderr
