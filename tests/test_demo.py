"""The demo, in small: every part, without the accuracy."""

import sys

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from mobilemamba import bench
from mobilemamba.cli import main

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from mobilemamba import demo


def test_network_has_every_branch_at_every_stage():
    model = demo.build(demo.load())
    assert all(min(model.options.split(stage)) > 0 for stage in range(3))
    assert model.options.scan_directions == 2
    x = demo.prepare(demo.load().test_images[:2], model)
    (first,) = model.eval().forward_intermediates(x, [0], stop_early=True, intermediates_only=True)
    assert first.shape[2] * first.shape[3] >= 64


def test_split_is_fixed_and_balanced():
    one, two = demo.load(), demo.load()
    assert torch.equal(one.test_labels, two.test_labels)
    assert (one.test_images == two.test_images).all()
    assert len(one.train_labels) + len(one.test_labels) == 1797
    assert one.test_labels.bincount().min() >= 40


def test_quick_run(tmp_path, monkeypatch):
    digits = demo.load()
    few = demo.Digits(digits.train_images[:64], digits.train_labels[:64], digits.test_images, digits.test_labels)
    monkeypatch.setattr(demo, "load", lambda: few)
    timing = bench.Timing(0.001, 0.0009, 0.0012, 7), bench.Timing(0.004, 0.003, 0.005, 7)
    monkeypatch.setattr(demo, "measure_speeds", lambda budget_s: {"scan": timing, "network": timing})
    monkeypatch.setattr(bench, "refuse_fallback", lambda: None)
    result = CliRunner().invoke(main, ["demo", "--quick", "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    for word in ("MobileMamba", "logistic regression", "Saved to", "4.0×", "predictions.png", "speeds.png"):
        assert word in result.output
    for picture in ("predictions.png", "speeds.png"):
        with Image.open(tmp_path / "out" / picture) as image:
            assert image.width > 800
    done = CliRunner().invoke(
        main, ["predict", str(tmp_path / "out" / "digits"), "--checkpoint", str(tmp_path / "out" / "digits.pth")]
    )
    assert done.exit_code == 0, done.output
    assert "00-is-" in done.output


def test_too_little_learnt_is_a_failure(tmp_path, monkeypatch):
    digits = demo.load()
    few = demo.Digits(digits.train_images[:64], digits.train_labels[:64], digits.test_images, digits.test_labels)
    monkeypatch.setattr(demo, "load", lambda: few)
    monkeypatch.setattr(demo, "EPOCHS", 1)

    def refuse():
        raise RuntimeError("there is nothing to time")

    monkeypatch.setattr(bench, "refuse_fallback", refuse)
    result = CliRunner().invoke(main, ["demo", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "No speeds: there is nothing to time." in result.output
    assert "the network learnt too little" in result.stderr


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_missing_package_is_named(missing, tmp_path, monkeypatch):
    for module in [m for m in sys.modules if m == "mobilemamba.demo" or m.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr("mobilemamba.demo")
    monkeypatch.setitem(sys.modules, missing, None)
    result = CliRunner().invoke(main, ["demo", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "pip install mobilemamba[demo]" in result.stderr
    assert missing in result.stderr
