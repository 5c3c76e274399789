"""Checkpoints: every format, every way they can be wrong, and that a failure changes nothing."""

import os
import pickle
import stat
from functools import partial

import pytest
import torch
from data.fill import filled_state_dict

import mobilemamba
from mobilemamba import checkpoints

OPTIONS = {"widths": (32, 40, 48), "depths": (1, 1, 1), "wavelet": False}
create_small = partial(mobilemamba.create_model, "mobilemamba_t2", **OPTIONS)


@pytest.fixture
def model():
    return filled(create_small(num_classes=3))


def filled(model):
    spec = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(filled_state_dict(spec), strict=False)
    return model


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model, state):
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 3},
        {"num_classes": 0, "in_chans": 1},
        {"distillation": True, "d_state": 2, "scan_directions": 4, "wavelet": True, "drop_path_rate": 0.1},
    ],
)
def test_a_checkpoint_alone_rebuilds_the_network(tmp_path, suffix, options):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    model = filled(create_small(**options))
    channels = model.in_chans
    model.default_cfg.update(mean=(0.25,) * channels, std=(0.5,) * channels, input_size=(channels, 96, 64))
    if model.num_classes == 3:
        model.default_cfg["label_names"] = ["cat", "dog", "Größe"]
    path = tmp_path / f"model{suffix}"
    mobilemamba.save_checkpoint(model, path)
    rebuilt = mobilemamba.model_from_checkpoint(path)
    assert not rebuilt.training
    assert rebuilt.options == model.options
    assert rebuilt.default_cfg == model.default_cfg
    assert_same(rebuilt, snapshot(model))
    again = create_small(**options, checkpoint=path)
    assert_same(again, snapshot(model))
    assert again.default_cfg == model.default_cfg


@pytest.mark.parametrize("key", ["net", "net_E", "state_dict", None])
def test_published_formats(tmp_path, model, key):
    state = snapshot(model)
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "model.pth")
    other = create_small(num_classes=3)
    mobilemamba.load_checkpoint(other, tmp_path / "model.pth", ema=key == "net_E")
    assert_same(other, state)


def test_ema_chooses_the_averaged_weights(tmp_path, model):
    state = snapshot(model)
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"net": state, "net_E": averaged}, tmp_path / "both.pth")
    mobilemamba.load_checkpoint(model, tmp_path / "both.pth", ema=True)
    assert_same(model, averaged)
    mobilemamba.load_checkpoint(model, tmp_path / "both.pth")
    assert_same(model, state)
    torch.save({"net": state}, tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="no averaged weights"):
        mobilemamba.load_checkpoint(model, tmp_path / "plain.pth", ema=True)


def test_adapt_head_keeps_the_new_head_alone(tmp_path, model):
    model.default_cfg["label_names"] = ["a", "b", "c"]
    mobilemamba.save_checkpoint(model, tmp_path / "three.pth")
    five = create_small(num_classes=5)
    head = five.head.l.weight.clone()
    with pytest.raises(ValueError, match=r"head\.l\.weight \(3, 48\) instead of \(5, 48\).*adapt_head"):
        mobilemamba.load_checkpoint(five, tmp_path / "three.pth")
    mobilemamba.load_checkpoint(five, tmp_path / "three.pth", adapt_head=True)
    assert torch.equal(five.head.l.weight, head)
    assert torch.equal(five.head.bn.weight, model.head.bn.weight)
    assert torch.equal(five.blocks1[0].dw0.m.c.weight, model.blocks1[0].dw0.m.c.weight)
    assert five.default_cfg["label_names"] is None

    same = create_small(num_classes=3)
    mobilemamba.load_checkpoint(same, tmp_path / "three.pth", adapt_head=True)
    assert torch.equal(same.head.l.weight, model.head.l.weight)


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["CHECKPOINT_TEST_TARGET"],)


def damaged(kind, state):
    name = "blocks1.0.dw0.m.c.weight"
    return {
        "missing": {k: v for k, v in state.items() if not k.startswith("head.bn")},
        "unexpected": {**state, "extra.weight": torch.zeros(1), "other": torch.zeros(1)},
        "misshapen": {**state, name: torch.zeros(32, 1, 5, 5)},
        "integer": {**state, name: torch.zeros(32, 1, 3, 3, dtype=torch.int64)},
        "complex": {**state, name: torch.zeros(32, 1, 3, 3, dtype=torch.complex64)},
        "sparse": {**state, name: torch.zeros(32, 1, 3, 3).to_sparse()},
        "meta": {**state, name: torch.zeros(32, 1, 3, 3, device="meta")},
        "not a tensor": {**state, name: 3},
        "no names": {**state, 5: torch.zeros(1)},
        "empty": {},
        "list": [1, 2],
        "tensor": torch.zeros(3),
        "other network": {"net": {"conv.weight": torch.zeros(1)}},
        "nothing inside": {"net": {}, "optimizer": {"lr": 0.1}},
        "malicious": {"net": state, "args": Malicious()},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "missing: head.bn.weight, head.bn.bias, head.bn.running_mean"),
        ("unexpected", "unexpected: extra.weight, other"),
        ("misshapen", r"blocks1.0.dw0.m.c.weight \(32, 1, 5, 5\) instead of \(32, 1, 3, 3\)"),
        ("integer", "blocks1.0.dw0.m.c.weight torch.int64"),
        ("complex", "blocks1.0.dw0.m.c.weight torch.complex64"),
        ("sparse", "blocks1.0.dw0.m.c.weight"),
        ("meta", "blocks1.0.dw0.m.c.weight"),
        ("not a tensor", "no network weights"),
        ("no names", "unexpected: 5"),
        ("empty", "no network weights"),
        ("list", "no network weights"),
        ("tensor", "no network weights"),
        ("other network", "unexpected: conv.weight"),
        ("nothing inside", "no network weights"),
        ("malicious", "holds code"),
    ],
)
def test_damaged_content_changes_nothing(tmp_path, model, monkeypatch, kind, words):
    monkeypatch.setenv("CHECKPOINT_TEST_TARGET", str(tmp_path / "touched"))
    torch.save(damaged(kind, snapshot(model)), tmp_path / "bad.pth")
    assert_rejected(model, tmp_path / "bad.pth", words)
    assert not (tmp_path / "touched").exists()


def test_unreadable_files_change_nothing(tmp_path, model, monkeypatch):
    monkeypatch.setenv("CHECKPOINT_TEST_TARGET", str(tmp_path / "touched"))
    path = tmp_path / "good.pth"
    mobilemamba.save_checkpoint(model, path)
    good = path.read_bytes()
    contents = [
        b"",
        b"\x00",
        b"not a checkpoint",
        good[:100],
        good[: len(good) // 2],
        good[:-1],
        pickle.dumps(Malicious()),
    ]
    contents += [b"\xff" * 8 + b"{", (10).to_bytes(8, "little") + b"{}", bytes(8) + b"{" + good]
    for content in contents:
        path.write_bytes(content)
        assert_rejected(model, path, "read safely")
    assert not (tmp_path / "touched").exists()
    with pytest.raises(FileNotFoundError):
        mobilemamba.load_checkpoint(model, tmp_path / "none.pth")


def assert_rejected(model, path, words):
    before, cfg = snapshot(model), dict(model.default_cfg)
    with pytest.raises(ValueError, match=words) as caught:
        mobilemamba.load_checkpoint(model, path)
    assert "\n" not in str(caught.value)
    assert_same(model, before)
    assert model.default_cfg == cfg


def test_truncated_safetensors(tmp_path, model):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    path = tmp_path / "model.safetensors"
    mobilemamba.save_checkpoint(model, path)
    path.write_bytes(path.read_bytes()[:-7])
    assert_rejected(model, path, "read safely")


def test_another_wavelet_is_refused(tmp_path):
    model = create_small(wavelet=True)
    state = snapshot(model)
    state["blocks1.0.mixer.m.attn.global_op.wt_filter"] *= 1.1
    torch.save(state, tmp_path / "other.pth")
    assert_rejected(model, tmp_path / "other.pth", "another wavelet.*wt_filter")


@pytest.mark.parametrize(
    "change",
    [
        {"options": None},
        {"options": {"widths": [32, 40, 48]}},
        {"options": {"widths": [16384] * 3, "depths": [1, 1, 1]}},
        {"options": {"widths": [10**30] * 3, "depths": [1, 1, 1]}},
        {"options": {"widths": [32, 40, 48], "depths": [256] * 3}},
        {"options": {"widths": [32, 40, 48], "depths": [1, 1, 1], "surprise": 1}},
        {"num_classes": 10**12},
        {"num_classes": "many"},
        {"in_chans": None},
        {"input_size": 3},
        {"input_size": [3, -1, 5]},
        {"input_size": [3, "a", "b"]},
        {"mean": [0.1]},
        {"std": [0, 0, 0]},
        {"std": [float("nan")] * 3},
        {"label_names": ["one"]},
        {"label_names": [1, 2, 3]},
        {"crop_pct": "all"},
    ],
)
def test_a_description_that_cannot_be_right_is_refused(tmp_path, model, change):
    path = tmp_path / "model.pth"
    mobilemamba.save_checkpoint(model, path)
    content = torch.load(path, weights_only=True)
    content["mobilemamba"].update(change)
    torch.save(content, path)
    with pytest.raises(ValueError, match=str(path)) as caught:
        mobilemamba.model_from_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_weights_without_a_description_need_a_name(tmp_path, model):
    torch.save({"net": snapshot(model)}, tmp_path / "published.pth")
    with pytest.raises(ValueError, match="build it by name"):
        mobilemamba.model_from_checkpoint(tmp_path / "published.pth")


def test_saving_is_all_or_nothing(tmp_path, model, monkeypatch):
    path = tmp_path / "model.pth"
    path.write_bytes(b"before")

    def fail(content, file):
        file.write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(checkpoints.torch, "save", fail)
    with pytest.raises(OSError, match="full"):
        mobilemamba.save_checkpoint(model, path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_saved_files_have_the_permissions_of_the_umask(tmp_path, model):
    old = os.umask(0o027)
    try:
        mobilemamba.save_checkpoint(model, tmp_path / "model.pth")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "model.pth").stat().st_mode) == 0o640


def test_fused_networks_are_neither_saved_nor_loaded(tmp_path, model):
    mobilemamba.save_checkpoint(model, tmp_path / "model.pth")
    fused = mobilemamba.fuse(model)
    with pytest.raises(ValueError, match="fuse that after loading"):
        mobilemamba.save_checkpoint(fused, tmp_path / "fused.pth")
    with pytest.raises(ValueError, match="then fuse"):
        mobilemamba.load_checkpoint(fused, tmp_path / "model.pth")
