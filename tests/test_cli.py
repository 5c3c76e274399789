"""The command line: what it prints, and what it says of wrong input."""

import csv
import io
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import mobilemamba
from mobilemamba import predict as prediction
from mobilemamba.cli import main

LABELS = ["temple", "dahlia", "neither"]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder with two photographs, one of them below it, and a text."""
    datasets = pytest.importorskip("sklearn.datasets")
    folder = tmp_path_factory.mktemp("photos [1]")  # a name that a pattern or a markup could trip over
    (folder / "below").mkdir()
    china, flower = datasets.load_sample_images().images
    Image.fromarray(china).save(folder / "china.jpg")
    Image.fromarray(flower).save(folder / "below" / "flower.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Of a small network with three named classes."""
    torch.manual_seed(0)
    options = {"widths": (48, 64, 80), "depths": (1, 1, 1)}
    model = mobilemamba.create_model("mobilemamba_t2", num_classes=3, **options)
    for p in model.parameters():  # weights that tell images apart: the recipe's start is almost the same for all
        if p.requires_grad and p.ndim == 1:
            p.data.normal_(0.5, 0.5)
    model.default_cfg["label_names"] = LABELS
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    mobilemamba.save_checkpoint(model, path)
    return path


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def predicted(*arguments):
    result = run("predict", *arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    return {document["image"]: document["predictions"] for document in json.loads(result.stdout)}


def test_help_of_every_command():
    commands = ["", "info", "predict", "validate", "train", "erf", "ablate", "bench", "bench ops", "bench network"]
    for command in [*map(str.split, commands), ["bench", "dropins"], ["demo"]]:
        result = run(*command, "--help")
        assert result.exit_code == 0
        assert "Usage:" in result.output
    assert mobilemamba.list_models()[0] in run("predict", "--help").output
    assert run("--version").output.strip().endswith(mobilemamba.cli.__version__)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--profile", "--engine", "plain"], "leave out --engine and --chart"),
        (["--profile", "--chart", "x.png"], "leave out --engine and --chart"),
        (["--dtype", "bfloat16"], "--dtype is for --profile"),
    ],
)
def test_options_of_the_network_benchmark_that_do_nothing_are_refused(arguments, sentence):
    result = run("bench", "network", *arguments)
    assert result.exit_code == 2
    assert sentence in " ".join(result.stderr.replace("│", " ").split())


def test_runs_as_a_module():
    command = [sys.executable, "-m", "mobilemamba", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == run("--version").output


def test_info_has_every_variant():
    result = run("info")
    for name, figures in {"mobilemamba_t2": ("8.84 M", "251.7 M"), "mobilemamba_b4": ("17.12 M", "4274.0 M")}.items():
        (row,) = [line for line in result.output.splitlines() if name in line]
        assert all(figure in row for figure in figures)
    assert result.output.count("mobilemamba_") == len(mobilemamba.list_models())


def test_predict_agrees_with_the_network(photos, checkpoint):
    model = mobilemamba.model_from_checkpoint(checkpoint)
    found = predicted(photos, "--checkpoint", checkpoint)
    assert list(found) == [str(photos / "below" / "flower.png"), str(photos / "china.jpg")]
    for path, rows in found.items():
        pixels = prediction.prepare_image(Image.open(path).convert("RGB"), model.default_cfg)
        with torch.inference_mode():
            expected = model(torch.from_numpy(pixels)[None]).softmax(1)[0]
        assert [row["label"] for row in rows] == [LABELS[i] for i in expected.argsort(descending=True)]
        assert [row["rank"] for row in rows] == [1, 2, 3]
        for row in rows:
            assert row["confidence"] == pytest.approx(expected[row["class"]].item(), abs=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_predict_in_sixteen_bits(photos, checkpoint, dtype):
    exact = predicted(photos, "--checkpoint", checkpoint)
    rough = predicted(photos, "--checkpoint", checkpoint, "--dtype", dtype)
    for path, rows in exact.items():
        expected = {row["label"]: row["confidence"] for row in rows}
        assert {row["label"]: row["confidence"] for row in rough[path]} == pytest.approx(expected, abs=0.1)


def test_predict_files_folders_and_patterns(photos, checkpoint, monkeypatch):
    given = ("--checkpoint", checkpoint, "--top-k", 1, "--batch-size", 1)
    assert len(predicted(photos / "china.jpg", photos, *given)) == 2  # each once
    monkeypatch.chdir(photos)
    assert list(predicted("*.jpg", *given)) == ["china.jpg"]
    assert set(predicted("**/*.[jp][pn]g", *given)) == {"china.jpg", "below/flower.png"}
    assert set(predicted("b*", *given)) == {"below/flower.png"}


def test_predict_formats(photos, checkpoint):
    given = ("predict", photos, "--checkpoint", checkpoint, "--top-k", 2)
    table = run(*given).stdout
    assert "china.jpg" in table
    assert " %" in table
    assert any(label in table for label in LABELS)
    rows = list(csv.DictReader(io.StringIO(run(*given, "--format", "csv").stdout)))
    assert list(rows[0]) == ["image", "rank", "class", "label", "confidence"]
    assert len(rows) == 4


def test_classes_from_a_file(photos, checkpoint, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("eins\nzwei\ndrei\n", encoding="utf-8")
    (rows,) = predicted(photos / "china.jpg", "--checkpoint", checkpoint, "--classes", names).values()
    assert {row["label"] for row in rows} == {"eins", "zwei", "drei"}
    names.write_text("eins\nzwei\n")
    result = run("predict", photos, "--checkpoint", checkpoint, "--classes", names)
    assert result.exit_code == 1
    assert f"{names} names 2 classes, and the network has 3" in result.stderr


def test_bare_checkpoint_needs_the_model(photos, tmp_path):
    bare = tmp_path / "bare.pth"
    torch.save({"net": mobilemamba.create_model("mobilemamba_t2").state_dict()}, bare)
    assert predicted(photos / "china.jpg", "--checkpoint", bare, "--model", "mobilemamba_t2", "--top-k", 1)
    result = run("predict", photos, "--checkpoint", bare)
    assert result.exit_code == 1
    assert "does not say what network it holds" in result.stderr


def test_random_weights_are_announced(photos):
    result = run("predict", photos / "china.jpg", "--model", "mobilemamba_t2", "--top-k", 1)
    assert result.exit_code == 0
    assert "weights are random" in result.stderr
    assert "random" not in result.stdout


def test_unreadable_images_are_skipped(photos, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600_000)
    (tmp_path / "truncated.jpg").write_bytes((photos / "china.jpg").read_bytes()[:20_000])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    Image.new("1", (1200, 900)).save(tmp_path / "large.png")  # PIL would warn
    Image.new("1", (2000, 900)).save(tmp_path / "bomb.png")  # PIL refuses
    Image.new("RGB", (40, 30), "red").save(tmp_path / "good.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "broken.png")
    data = bytearray((tmp_path / "broken.png").read_bytes())
    data[45:60] = bytes(15)
    (tmp_path / "broken.png").write_bytes(data)
    missing = tmp_path / "missing.png"
    result = run("predict", tmp_path, missing, "--checkpoint", checkpoint, "--format", "json", "--batch-size", 2)
    assert result.exit_code == 1
    assert [document["image"] for document in json.loads(result.stdout)] == [str(tmp_path / "good.png")]
    said = [line for line in result.stderr.splitlines() if line.startswith("skipped ")]
    bad = ("truncated.jpg", "text.png", "empty.png", "large.png", "bomb.png", "broken.png", "missing.png")
    assert len(said) == len(bad)
    for name in bad:
        assert sum(f"{name}: " in line for line in said) == 1
    assert any("1200×900 pixels are more than 600000" in line for line in said)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_image_without_permission_is_skipped(photos, checkpoint, tmp_path):
    locked = tmp_path / "locked.jpg"
    locked.write_bytes((photos / "china.jpg").read_bytes())
    locked.chmod(0)
    result = run("predict", locked, "--checkpoint", checkpoint)
    assert result.exit_code == 1
    assert f"skipped {locked}: Permission denied" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{empty}"], "no images in {empty}"),
        (["{empty}/*.jpg"], "no images match {empty}/*.jpg"),
        (["{photo}", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["{photo}", "--device", "toaster"], "device 'toaster' cannot be used"),
        (["{photo}", "--checkpoint", "{text}"], "is not a checkpoint that can be read safely"),
        (["{photo}", "--classes", "{photo}"], "codec can't decode"),
    ],
)
def test_wrong_input_gets_one_sentence(photos, tmp_path, arguments, sentence):
    places = {"empty": tmp_path, "photo": photos / "china.jpg", "text": photos / "notes.txt"}
    result = run("predict", *(a.format(**places) for a in arguments))
    assert result.exit_code == 1
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert sentence.format(**places) in error
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments", [[], ["x.jpg", "--top-k", "0"], ["x.jpg", "--batch-size", "-1"], ["x.jpg", "--model", "resnet50"]]
)
def test_wrong_options_are_usage_errors(arguments):
    assert run("predict", *arguments).exit_code == 2


def test_kinds_of_images(tmp_path):
    """Each is the same grey or red whatever it is stored as."""
    grey, red = 200, (200, 30, 40)
    rgb = Image.new("RGB", (8, 6), red)
    images = {
        "palette.png": rgb.convert("P", palette=Image.Palette.ADAPTIVE),
        "alpha.png": Image.new("RGBA", (8, 6), (*red, 255)),
        "cmyk.tif": rgb.convert("CMYK"),
        "sixteen.png": Image.fromarray(np.full((6, 8), grey * 257, np.uint16)),
        "grey.png": Image.new("L", (8, 6), grey),
        "clear.png": Image.new("RGBA", (8, 6), (*red, 0)),
    }
    expected = dict.fromkeys(images, red) | dict.fromkeys(["sixteen.png", "grey.png"], (grey,) * 3)
    expected["clear.png"] = (255, 255, 255)
    for name, image in images.items():
        image.save(tmp_path / name)
        read = prediction.read_image(tmp_path / name, 3)
        assert read.mode == "RGB"
        assert read.getpixel((3, 3)) == pytest.approx(expected[name], abs=2), name
        assert prediction.read_image(tmp_path / name, 1).mode == "L"
    with pytest.raises(ValueError, match="the network takes 4"):
        prediction.read_image(tmp_path / "grey.png", 4)


def test_rotation_of_the_camera_is_undone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90° to see it upright
    Image.new("RGB", (8, 6)).save(tmp_path / "turned.jpg", exif=exif)
    assert prediction.read_image(tmp_path / "turned.jpg", 3).size == (6, 8)


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (100, 100), (1, 900), (257, 256)])
def test_transform_is_the_recipes(size):
    """Short side to 256, bicubic; the middle 224×224; normalized. Sizes as torchvision rounds them."""
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(values)
    cfg = mobilemamba.create_model("mobilemamba_s6").default_cfg
    short, long = min(size), max(size)
    scaled = tuple(256 if side == short else int(256 * long / short) for side in size)
    left, top = (round((side - 224) / 2.0) for side in scaled)
    crop = image.resize(scaled, Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
    expected = (np.asarray(crop) / 255 - np.array(cfg["mean"])) / np.array(cfg["std"])
    found = prediction.prepare_image(image, cfg)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize("size", [(1, 100_000), (100_001, 2)])
def test_long_strips_take_little_memory(size):
    image = Image.new("RGB", size, "red")
    cfg = mobilemamba.create_model("mobilemamba_s6").default_cfg
    red = ((1, 0, 0) - np.array(cfg["mean"])) / np.array(cfg["std"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = prediction.prepare_image(image, cfg)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB; whole it would be 19 GB
    np.testing.assert_allclose(found, np.broadcast_to(red[:, None, None], found.shape), atol=1e-5)


def test_batches_and_order_do_not_matter(photos, checkpoint):
    model = mobilemamba.fuse(mobilemamba.model_from_checkpoint(checkpoint))
    files = prediction.find_images([str(photos)]) * 4
    one, three = (list(prediction.predict(model, files, batch_size=n)) for n in (1, 3))
    assert [p.image for p in one] == [p.image for p in three] == files
    for a, b in zip(one, three, strict=True):
        assert a.classes == b.classes
        assert a.confidences == pytest.approx(b.confidences, abs=1e-5)
    with pytest.raises(FileNotFoundError):
        list(prediction.predict(model, [photos / "missing.jpg"]))


def test_as_a_program(photos, checkpoint):
    """A pipe gets the result alone: no colours, no progress."""
    command = [sys.executable, "-c", "from mobilemamba.cli import main; main()"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command += ["predict", str(photos), "--checkpoint", str(checkpoint), "--top-k", "1"]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout + done.stderr
    assert str(photos / "below" / "flower.png").encode() in done.stdout
