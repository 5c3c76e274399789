"""The demo, in small: every part, without the accuracy."""

import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from mobilemamba import bench
from mobilemamba.cli import main

pytest.importorskip("lightning")
pytest.importorskip("torchvision")

from mobilemamba import demo
from mobilemamba.training.module import build_network
from mobilemamba.training.sources import Subset, digits


@pytest.fixture
def few(monkeypatch):
    train_images, test_images = digits()
    monkeypatch.setattr(demo, "digits", lambda: (Subset(train_images, np.arange(80)), test_images))


def test_network_has_every_branch_at_every_stage():
    model = build_network(demo.recipe(1), list("0123456789"))
    assert all(min(model.options.split(stage)) > 0 for stage in range(3))
    assert model.options.scan_directions == 2
    x = demo.prepare(demo.load(digits()).test_images[:2], model)
    (first,) = model.eval().forward_intermediates(x, [0], stop_early=True, intermediates_only=True)
    assert first.shape[2] * first.shape[3] >= 64


def test_split_is_fixed_and_balanced():
    one, two = demo.load(digits()), demo.load(digits())
    assert torch.equal(one.test_labels, two.test_labels)
    assert (one.test_images == two.test_images).all()
    assert len(one.train_labels) + len(one.test_labels) == 1797
    assert one.test_labels.bincount().min() >= 40


def test_quick_run(few, tmp_path, monkeypatch):
    timing = bench.Timing(0.001, 0.0009, 0.0012, 7), bench.Timing(0.004, 0.003, 0.005, 7)
    monkeypatch.setattr(demo, "measure_speeds", lambda budget_s: {"scan": timing, "network": timing})
    monkeypatch.setattr(bench, "refuse_fallback", lambda: None)
    result = CliRunner().invoke(main, ["demo", "--quick", "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    for word in ("MobileMamba", "logistic regression", "Saved to", "4.0×", "predictions.png", "speeds.png"):
        assert word in result.output
    for picture in ("predictions.png", "speeds.png", "curves.png"):
        with Image.open(tmp_path / "out" / picture) as image:
            assert image.width > 800
    done = CliRunner().invoke(
        main, ["predict", str(tmp_path / "out" / "digits"), "--checkpoint", str(tmp_path / "out" / "digits.pth")]
    )
    assert done.exit_code == 0, done.output
    assert "00-is-" in done.output


def test_too_little_learnt_is_a_failure(few, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "EPOCHS", 1)

    def refuse():
        raise RuntimeError("there is nothing to time")

    monkeypatch.setattr(bench, "refuse_fallback", refuse)
    result = CliRunner().invoke(main, ["demo", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "No speeds: there is nothing to time." in result.output
    assert "the network learnt too little" in result.stderr


@pytest.mark.parametrize("missing", ["sklearn", "lightning"])
def test_missing_package_is_named(missing, tmp_path, monkeypatch):
    for module in [m for m in sys.modules if m.startswith(("mobilemamba.demo", "mobilemamba.training", missing))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr("mobilemamba.demo")
    monkeypatch.delattr("mobilemamba.training")
    monkeypatch.setitem(sys.modules, missing, None)
    result = CliRunner().invoke(main, ["demo", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "pip install mobilemamba[train]" in result.stderr
    assert missing in result.stderr
