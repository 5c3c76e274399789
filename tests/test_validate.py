"""Validation: its numbers against a count by hand, its classes, its pictures, and what it says of wrong input."""

import json
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

pytest.importorskip("lightning", reason="needs the extra train")
pytest.importorskip("torchmetrics", reason="needs the extra train")

import mobilemamba
from mobilemamba.cli import main
from mobilemamba.predict import prepare_image
from mobilemamba.training.data import validation_loader
from mobilemamba.training.pictures import draw_confusion
from mobilemamba.training.sources import Arrays, numbers, open_images
from mobilemamba.training.validation import match_classes, validate

NAMES = ["owl", "cat", "dog", "eel", "ant", "fox", "pig"]  # in another order than folders'
IMAGES = 6  # of each class


def build(names=None, classes=7):
    """A small network with random weights."""
    torch.manual_seed(0)
    network = mobilemamba.create_model("mobilemamba_t2", classes, widths=(16, 32, 32), depths=(1, 1, 1))
    network.default_cfg |= {"input_size": (3, 32, 32), "label_names": names}
    return network.eval()


def write_images(folder, names, count=IMAGES):
    random = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            coarse = random.integers(0, 256, (3, 3, 3), np.uint8)
            Image.fromarray(coarse).resize((40, 36), Image.Resampling.BICUBIC).save(folder / name / f"{number}.png")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On busy processors two wait for each other longer than such networks compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images [1]")
    write_images(folder, NAMES)
    return folder


@pytest.fixture(scope="module")
def network(folder):
    """One that tells the images apart: its batch norms have their statistics."""
    network = build(NAMES).train()
    for module in network.modules():
        module.momentum = 1.0
    (batch,) = validation_loader(open_images(folder), network.default_cfg, 100, 0)
    with torch.no_grad():
        for p in network.parameters():  # the recipe's start is almost the same for all images
            if p.ndim == 1:
                p.normal_(0.5, 0.5)
        for bias in (network.head.bn.bias, network.head.l.bias):  # no class comes first for all
            bias.zero_()
        network(batch.images)
    return network.eval()


@pytest.fixture(scope="module")
def checkpoint(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    mobilemamba.save_checkpoint(network, path)
    return path


@pytest.fixture(scope="module")
def optimized(network):
    return mobilemamba.optimize_for_inference(network)


@pytest.fixture(scope="module")
def by_hand(network, folder):
    """Each image's class, and the network's classes for it, best first."""
    paths = [path for name in NAMES for path in sorted((folder / name).iterdir())]
    pixels = [prepare_image(Image.open(path).convert("RGB"), network.default_cfg) for path in paths]
    with torch.inference_mode():
        logits = network(torch.from_numpy(np.stack(pixels)))
    orders = logits.argsort(descending=True).tolist()
    return [(NAMES.index(path.parent.name), order) for path, order in zip(paths, orders, strict=True)]


def run(*arguments):
    return CliRunner().invoke(main, ["validate", *(str(argument) for argument in arguments)])


def as_json(*arguments):
    result = run(*arguments, "--json", "--workers", 0)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def error(result):
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return line


@pytest.mark.parametrize(("batch_size", "workers"), [(16, 0), (5, 2)])
def test_numbers_are_those_of_a_count_by_hand(optimized, folder, by_hand, batch_size, workers):
    done = []
    found = validate(
        open_images(folder),
        optimized,
        batch_size=batch_size,
        workers=workers,
        progress=lambda n, why: done.append((n, why)),
    )
    expected = np.zeros((7, 7), int)
    for label, order in by_hand:
        expected[label, order[0]] += 1
    assert len(np.unique(expected.nonzero()[1])) > 2  # there is something to count
    assert 0 < expected.trace() < len(by_hand)
    assert found.confusion.tolist() == expected.tolist()
    assert found.top1 == pytest.approx(100 * expected.trace() / len(by_hand))
    assert found.top5 == pytest.approx(100 * sum(label in order[:5] for label, order in by_hand) / len(by_hand))
    assert found.top1 < found.top5 < 100
    assert found.counts.tolist() == [IMAGES] * 7
    assert found.accuracy == pytest.approx(100 * expected.diagonal() / IMAGES)
    assert found.classes == NAMES
    assert 0 < found.images_per_s < found.network_images_per_s
    assert found.unreadable == []
    assert sum(n for n, _ in done) == len(by_hand)
    assert len(done) == -(-len(by_hand) // batch_size)


def test_few_classes_are_all_among_the_first_five(folder, tmp_path):
    write_images(tmp_path, ["a", "b", "c"], 2)
    found = validate(open_images(tmp_path), build(classes=3), workers=0)
    assert found.top5 == 100
    assert found.classes == ["a", "b", "c"]


def test_optimized_and_fused_agree(folder, checkpoint, tmp_path):
    given = (folder, "--checkpoint", checkpoint, "--output", tmp_path / "c.png")
    optimized, fused = as_json(*given, "--optimized"), as_json(*given, "--fused")
    assert as_json(*given)["environment"]["optimized"] is True
    assert (optimized["environment"]["optimized"], fused["environment"]["optimized"]) == (True, False)
    for name in ("images", "top1", "top5", "classes", "confused"):
        assert optimized[name] == fused[name]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(folder, checkpoint, by_hand, tmp_path, dtype):
    found = as_json(folder, "--checkpoint", checkpoint, "--output", tmp_path / "c.png", "--dtype", dtype)
    assert found["environment"]["optimized"] is (dtype == "bfloat16")
    exact = 100 * sum(label == order[0] for label, order in by_hand) / len(by_hand)
    assert found["top1"] == pytest.approx(exact, abs=10)


# --- classes ---------------------------------------------------------------------------------------------------------


def source(names, labels=None):
    labels = np.arange(len(names)) if labels is None else np.array(labels)
    return Arrays(np.zeros((len(labels), 8, 8), np.uint8), labels, list(names))


def test_classes_are_matched_by_name(optimized, folder, tmp_path, by_hand):
    for name in ("pig", "ant", "owl"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "unknown, but empty").mkdir()
    found = validate(open_images(tmp_path), optimized, workers=0)
    expected = [(label, order[0]) for label, order in by_hand if NAMES[label] in ("pig", "ant", "owl")]
    assert found.top1 == pytest.approx(100 * sum(a == b for a, b in expected) / len(expected))
    assert found.counts.tolist() == [IMAGES * (name in ("pig", "ant", "owl")) for name in NAMES]
    assert sorted(expected) == [
        (int(i), int(j)) for i, j in np.argwhere(found.confusion) for _ in range(found.confusion[i, j])
    ]


@pytest.mark.parametrize(
    ("known", "names", "expected"),
    [
        (["b", "a", "c"], ["a", "c"], [1, 2]),
        (["1", "0", "2"], ["0", "1", "2"], [1, 0, 2]),
        (["b", "a", "c"], ["0", "1"], [0, 1]),  # shards without classes.txt
        (["a", "a", "c"], ["a", "a", "c"], [0, 1, 2]),
        (["a", "a", "c"], ["c"], [2]),
        (None, ["x", "y", "z"], [0, 1, 2]),
        (None, ["0", "1"], [0, 1]),
    ],
)
def test_match(known, names, expected):
    assert match_classes(source(names), build(known, 3)).tolist() == expected


@pytest.mark.parametrize(
    ("known", "names", "sentence"),
    [
        (["b", "a", "c"], ["a", "yak"], "must know one class 'yak', as the images do, but 0 of its 3 have that name"),
        (["a", "a", "c"], ["a", "c"], "but 2 of its 3 have that name"),
        (None, ["x", "y"], "the images have 2 classes and the network 3, without names to match them by"),
        (None, ["0", "1", "2", "3"], "the images have 4 classes and the network 3"),
    ],
)
def test_classes_that_do_not_match(known, names, sentence):
    with pytest.raises(ValueError, match=sentence):
        match_classes(source(names), build(known, 3))


def test_class_without_images_is_not_asked_for(network):
    assert match_classes(source(["dog", "yak"], [0, 0]), network).tolist() == [2, -1]


def test_networks_that_cannot_be_validated(network, folder):
    with pytest.raises(ValueError, match="must tell two classes or more apart, but has 1"):
        match_classes(source(["a"]), build(classes=1))
    broken = build(NAMES)
    broken.head.l.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"results are not finite in torch.float32"):
        validate(open_images(folder), broken, workers=0)
    with pytest.raises(ValueError, match=r"must be in eval mode: call network.eval\(\)"):
        validate(open_images(folder), broken.train(), workers=0)


# --- the command -----------------------------------------------------------------------------------------------------


def test_help():
    assert "--max-unreadable" in run("--help").stdout


def test_command(folder, checkpoint, by_hand, tmp_path):
    picture = tmp_path / "picture.png"
    result = run(folder, "--checkpoint", checkpoint, "--output", picture, "--batch-size", 8, "--workers", 0)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    right = sum(label == order[0] for label, order in by_hand)
    among = sum(label in order[:5] for label, order in by_hand)
    lines = result.stdout.splitlines()
    assert f"Top-1 {100 * right / 42:.2f} %, top-5 {100 * among / 42:.2f} % of 42 images" in lines
    assert f"Picture: {picture}" in lines
    assert "images/s, reading them included; the network alone" in result.stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert sorted(name for name, *_ in rows) == sorted(NAMES)
    shares = [float(share.removesuffix(" %")) for _, _, share, _ in rows]
    assert shares == sorted(shares)
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width > 500


def test_command_in_json(folder, checkpoint, optimized, tmp_path):
    found = as_json(folder, "--checkpoint", checkpoint, "--output", tmp_path / "c.png")
    expected = validate(open_images(folder), optimized, workers=0)
    assert found["environment"]["picture"] == str(tmp_path / "c.png")
    assert (found["images"], found["top1"], found["top5"]) == (42, expected.top1, expected.top5)
    assert [row["class"] for row in found["classes"]] == NAMES
    assert [row["accuracy"] for row in found["classes"]] == pytest.approx(expected.accuracy)
    wrong = sum(row["images"] for row in found["confused"])
    assert wrong == expected.confusion.sum() - expected.confusion.trace()
    assert all(row["class"] != row["taken_for"] for row in found["confused"])


def test_checkpoint_that_does_not_say_what_it_is(folder, tmp_path):
    bare = tmp_path / "bare.pth"
    torch.save(mobilemamba.create_model("mobilemamba_t2", len(NAMES)).state_dict(), bare)
    given = (folder, "--checkpoint", bare, "--output", tmp_path / "c.png", "--workers", 0)
    assert run(*given, "--model", "mobilemamba_t2").exit_code == 0
    assert "does not say what network it holds" in error(run(*given))
    assert "does not fit the model" in error(run(*given, "--model", "mobilemamba_s6"))


def test_of_many_classes_the_worst_are_listed(tmp_path):
    names = numbers(100, 160)
    write_images(tmp_path / "images", names, 1)
    mobilemamba.save_checkpoint(build(names, 60), tmp_path / "many.pth")
    result = run(
        tmp_path / "images", "--checkpoint", tmp_path / "many.pth", "--output", tmp_path / "c.png", "--workers", 0
    )
    assert result.exit_code == 0, result.output
    assert "The 50 worst of 60 classes." in result.stdout
    assert sum(line.startswith("│") for line in result.stdout.splitlines()) == 50


def test_unreadable_images_are_named_and_counted(folder, checkpoint, tmp_path):
    data = tmp_path / "data"
    write_images(data, ["cat", "dog"], 3)
    whole = (data / "cat" / "0.png").read_bytes()
    (data / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (data / "dog" / "text.png").write_text("no image")
    given = (data, "--checkpoint", checkpoint, "--output", tmp_path / "c.png")
    for workers in (0, 2):
        result = run(*given, "--workers", workers, "--batch-size", 1)
        assert result.exit_code == 1
        assert "of 6 images; 2 could not be read" in result.stdout
        said = [line for line in result.stderr.splitlines() if line.startswith("skipped ")]
        assert said[0].startswith(f"skipped {data / 'cat' / 'cut.png'}: ")
        assert said[1:] == [f"skipped {data / 'dog' / 'text.png'}: it is no image"]
        result = run(*given, "--workers", workers, "--max-unreadable", 1)
        assert "2 images cannot be read, more than the 1 allowed: repair them, or allow more" in error(result)
    result = run(*given, "--workers", 0, "--json")
    assert result.exit_code == 1
    assert len(json.loads(result.stdout)["unreadable"]) == 2
    for path in data.glob("*/?.png"):
        path.write_text("no image")
    assert "none of the 8 images can be read, the first one " in error(run(*given, "--workers", 0))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{folder}/missing"], "must be a folder or 'digits', but {folder}/missing is neither"),
        (["{folder}/cat"], "{folder}/cat holds no labelled images"),
        (["digits"], "the images have 10 classes and the network 7, without names to match them by"),
        (["{folder}", "--output", "{folder}/missing/c.png"], "there is no folder {folder}/missing for the picture"),
        (["{folder}", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["{folder}", "--dtype", "float16", "--optimized"], "dtype must be torch.float32 or torch.bfloat16"),
    ],
)
def test_wrong_input_gets_one_sentence(folder, checkpoint, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    result = run(*(argument.format(folder=folder) for argument in arguments), "--checkpoint", checkpoint)
    assert sentence.format(folder=folder) in error(result)
    assert result.stdout == ""
    assert not (tmp_path / "confusion.png").exists()


@pytest.mark.parametrize("arguments", [[], ["x"], ["x", "--checkpoint", "missing.pth"], ["x", "--batch-size", "0"]])
def test_wrong_options_are_usage_errors(arguments):
    assert run(*arguments).exit_code == 2


def test_missing_package_is_named(folder, checkpoint, monkeypatch):
    for module in [m for m in sys.modules if m.startswith(("mobilemamba.training.", "torchmetrics"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.delitem(sys.modules, "mobilemamba.training")
    result = run(folder, "--checkpoint", checkpoint)
    assert error(result) == "Error: this needs torchmetrics: pip install mobilemamba[train]"


# --- the picture -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize(
    "names", [["$x", "y_{", "虎"], numbers(0, 10), [f"a class {i} of a long name" for i in range(60)]]
)
def test_picture(names, tmp_path):
    counts = np.diag(np.arange(len(names))) + np.eye(len(names), k=1, dtype=int)
    path = draw_confusion(counts, ["\udce9 of no Unicode", *names[1:]], tmp_path / "c.png")
    with Image.open(path) as image:
        image.load()
        assert image.width > 500
    assert [file.name for file in tmp_path.iterdir()] == ["c.png"]
