"""Training: the recipe's parts against what they mean, and runs that are stopped, divided and resumed."""

import csv
import errno
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image

pytest.importorskip("lightning")
pytest.importorskip("torchvision")

import timm
from training_run import BATCH, EPOCHS, IMAGES, OPTIONS, Watch, recipe, sources

from mobilemamba import cli, create_model, model_from_checkpoint, save_checkpoint
from mobilemamba.training import Recipe, Teacher, load_recipe, train
from mobilemamba.training.data import Batch, seed_all, training_loader
from mobilemamba.training.module import Classifier, build_network
from mobilemamba.training.sources import Arrays, Subset

SCRIPT = Path(__file__).with_name("training_run.py")
QUIET = {"accelerator": "cpu", "workers": 0, "show": lambda line: None}


@pytest.fixture(autouse=True)
def one_thread():
    """The readers and the processes share the processors; threads that wait for each other would take them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(output, *options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(output), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def losses(output):
    """Batch's number → loss, of all times that it was taken."""
    found = {}
    for line in (Path(output) / "losses.txt").read_text().splitlines():
        number, loss = line.split()
        assert found.setdefault(int(number), loss) == loss, f"batch {number} had another loss the second time"
    return found


def state(output):
    return torch.load(Path(output) / "last.ckpt", weights_only=False)


def rows(output):
    with open(Path(output) / "history.csv") as file:
        return [{k: v for k, v in row.items() if k != "images_per_s"} for row in csv.DictReader(file)]


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stops."""
    output = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    result = train(sources(), recipe(), output, save_every=5, callbacks=[Watch(output, None)], **QUIET)
    return output, result


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(whole, tmp_path):
    stops = [
        ("batch", "8", "SIGKILL"),  # behind a saved state
        ("batch", "4", "SIGTERM"),
        ("batch", "2", "SIGINT"),
        ("validation", "1", "SIGKILL"),  # of the first epoch
        ("batch", "6", "SIGKILL"),  # behind the state at the end of the epoch
        ("writing", "3", "SIGKILL"),  # of the state after the second
    ]
    for hook, count, signal in stops:
        stopped = run(tmp_path, "--stop", hook, count, signal)
        assert stopped.returncode == (-9 if signal == "SIGKILL" else 1), stopped.stderr
        assert ("stopped: resume" in stopped.stderr) == (signal != "SIGKILL")
    finished = run(tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert losses(tmp_path) == losses(whole[0])
    assert len(losses(tmp_path)) == EPOCHS * (IMAGES // BATCH)
    assert same_state(state(tmp_path)["state_dict"], state(whole[0])["state_dict"])
    assert rows(tmp_path) == rows(whole[0])
    assert not list(tmp_path.glob(".last*"))


def test_a_full_disk_leaves_the_last_state_whole(whole, tmp_path, monkeypatch):
    written = []

    def full(descriptor):
        written.append(descriptor)
        if len(written) == 4:  # recipe.json, last.ckpt twice; then no more
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            train(sources(), recipe(), tmp_path, save_every=5, callbacks=[Watch(tmp_path, None)], **QUIET)
    train(sources(), recipe(), tmp_path, resume=True, callbacks=[Watch(tmp_path, None)], **QUIET)
    assert losses(tmp_path) == losses(whole[0])
    assert same_state(state(tmp_path)["state_dict"], state(whole[0])["state_dict"])


def test_two_processes_are_one_that_averages_the_gradients_of_two_batches(tmp_path):
    divided, alone = tmp_path / "divided", tmp_path / "alone"
    finished = run(divided, "--devices", "2")
    assert finished.returncode == 0, finished.stderr
    alone.mkdir()
    train(sources(), recipe(accumulate=2), alone, callbacks=[Watch(alone, None)], **QUIET)
    assert losses(divided) == losses(alone)
    weights = [
        {n: value for n, value in state(output)["state_dict"].items() if ".running_" not in n and "num_" not in n}
        for output in (divided, alone)
    ]
    assert same_state(*weights)  # but for the statistics: each process has those of its own batches
    assert rows(divided)[0]["train_loss"] == rows(alone)[0]["train_loss"]
    assert rows(divided)[0]["steps"] == rows(alone)[0]["steps"]
    refused = run(divided)
    assert "holds a run of 2 processes, not 1: resume it with as many" in refused.stderr
    # A state holds no gradients: it is not saved between the batches of a step.
    cut = tmp_path / "cut"
    for count in ("11", "2"):
        assert run(cut, "--accumulate", "2", "--stop", "batch", count, "SIGKILL").returncode == -9
    assert run(cut, "--accumulate", "2").returncode == 0
    assert same_state(state(cut)["state_dict"], state(alone)["state_dict"])
    assert rows(cut) == rows(alone)


def test_processes_end_together(tmp_path):
    failed = run(tmp_path, "--devices", "2", "--stop", "batch", "3", "ERROR")
    assert failed.returncode != 0
    assert "of the second process" in failed.stderr


def test_what_a_run_leaves_behind(whole):
    output, result = whole
    files = {path.name for path in output.iterdir()}
    assert files >= {"recipe.json", "last.ckpt", "best.pth", "history.csv", "curves.png", "tensorboard"}
    assert load_recipe(output) == recipe()
    model = model_from_checkpoint(output / "best.pth")
    assert model.default_cfg["label_names"] == [str(digit) for digit in range(10)]
    assert model.default_cfg["input_size"] == (3, 32, 32)
    assert len(rows(output)) == EPOCHS
    best = max(float(row[f"top1_{name}"]) for row in rows(output) for name in ("raw", "averaged"))
    assert result.top1 == pytest.approx(best, abs=1e-3)
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = events.EventAccumulator(str(output / "tensorboard"))
    log.Reload()
    assert {"train/loss", "val/top1_raw", "val/top1_averaged", "val/loss_raw"} <= set(log.Tags()["scalars"])


def test_a_folder_with_a_run_is_not_overwritten(whole):
    output, _ = whole
    with pytest.raises(ValueError, match="holds a run"):
        train(sources(), recipe(), output, **QUIET)
    with pytest.raises(ValueError, match=r"with seed 0, not 1"):
        train(sources(), recipe(seed=1), output, resume=True, **QUIET)
    others = Subset(sources()[0], np.arange(50))
    with pytest.raises(ValueError, match="the data are others now"):
        train((others, sources()[1]), recipe(), output, resume=True, **QUIET)


def module_for(changed=None, steps=1000, images_per_step=1024, teacher=None, **changes):
    chosen = changed or Recipe.paper("mobilemamba_t2", options=OPTIONS, image_size=32, **changes)
    return Classifier(build_network(chosen, [str(i) for i in range(10)]), chosen, steps, images_per_step, teacher)


def test_the_learning_rate_is_the_papers():
    module = module_for(epochs=300)
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    rates = []
    for step in range(1000):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step_update(step + 1)
    warmup = round(1000 * 20 / 300)
    assert rates[0] == pytest.approx(1.5e-6)
    assert rates[warmup] == pytest.approx(1.5e-3)
    assert np.all(np.diff(rates[: warmup + 1]) > 0)
    assert np.all(np.diff(rates[warmup:]) < 0)
    middle = warmup + (1000 - warmup) // 2
    assert rates[middle] == pytest.approx((1.5e-3 + 1.5e-5) / 2, rel=1e-2)
    assert rates[-1] == pytest.approx(1.5e-5, rel=2e-2)
    assert module_for(epochs=300, images_per_step=256).learning_rate == pytest.approx(1.5e-3 / 4)


def test_weight_decay_spares_vectors_and_biases():
    module = module_for()
    names = {id(parameter): name for name, parameter in module.network.named_parameters()}
    for group in module.configure_optimizers()["optimizer"].param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            spared = parameter.ndim <= 1 or name.endswith(".bias")
            assert group["weight_decay"] == (0 if spared else 0.05), name
    left = [name for name in names.values() if not name.endswith("wt_filter")]
    assert not left
    assert any(name.endswith("A_logs") for name, p in module.network.named_parameters() if p.ndim > 1)


def test_fine_tuning_slows_lower_layers(tmp_path):
    source = create_model("mobilemamba_t2", 7, **OPTIONS)
    save_checkpoint(source, tmp_path / "source.pth")
    chosen = Recipe.finetune("mobilemamba_t2", str(tmp_path / "source.pth"), options=OPTIONS, image_size=32)
    module = module_for(chosen)
    own, given = module.network.state_dict(), source.state_dict()
    assert all(torch.equal(own[name], given[name]) for name in own if not name.startswith("head.l"))
    assert own["head.l.weight"].shape == (10, 32)
    scale = {}
    for group in module.configure_optimizers()["optimizer"].param_groups:
        for parameter in group["params"]:
            scale[id(parameter)] = group["lr_scale"]
    of = {name: scale[id(p)] for name, p in module.network.named_parameters() if id(p) in scale}
    order = ["patch_embed.0", "blocks1.0.dw0.m", "blocks2.0.0.m", "blocks2.3.dw0.m", "blocks3.3.dw0.m"]
    scales = [of[f"{name}.c.weight"] for name in order] + [of["head.l.weight"]]
    assert scales == sorted(scales)
    assert len(set(scales)) == len(scales)
    assert scales[-1] == 1


def test_the_average_follows_the_weights():
    module = module_for(ema_decay=0.9, ema_warmup=False)
    name = "head.l.weight"
    expected = None
    for step in range(1, 5):
        with torch.no_grad():
            module.network.head.l.weight.add_(1)
        module.average.update(module.network, step)
        weight = module.network.state_dict()[name]
        expected = weight.clone() if expected is None else 0.9 * expected + 0.1 * weight
    torch.testing.assert_close(module.average.module.state_dict()[name], expected)


def step(module, batch):
    """The loss of one step, outside of a run."""

    class Trainer:
        train_dataloader = type("Loader", (), {"position": 0})()
        global_step = 0

    module._trainer = Trainer()
    module.log = lambda *args, **kwargs: None
    Classifier.global_step, kept = property(lambda self: 0), Classifier.global_step
    try:
        return module.training_step(batch, 0)
    finally:
        Classifier.global_step = kept


def batch_of(count=4, size=32):
    torch.manual_seed(1)
    return Batch(torch.randn(count, 3, size, size), torch.arange(count), 3, [])


@pytest.mark.parametrize("two_heads", [False, True])
def test_the_loss_is_that_of_the_labels_and_of_the_teacher(two_heads):
    fed = []

    def teacher(images):
        fed.append(images)
        return images.mean((2, 3)) @ torch.linspace(-3, 3, 30).view(3, 10)

    changes = {"mixup": 0.0, "cutmix": 0.0, "distill_temperature": 2.0, "two_heads": two_heads}
    module = module_for(teacher=Teacher(teacher), **changes)
    with torch.no_grad():
        module.network.head.l.weight.mul_(30)
    batch = batch_of()
    loss = step(module, batch)
    seed_all(0, batch.number)
    outputs = module.network(batch.images)
    logits, taught = outputs if two_heads else (outputs, outputs)
    wanted = (teacher(batch.images) / 2).softmax(1)
    distance = (wanted * (wanted.log() - (taught / 2).log_softmax(1))).sum(1).mean()
    expected = F.cross_entropy(logits, batch.labels, label_smoothing=0.1) + 5 * 4 * distance
    torch.testing.assert_close(loss, expected)
    assert torch.equal(fed[0], batch.images)


def test_a_teacher_gets_images_as_it_knows_them():
    fed = []
    cfg = {"input_size": (3, 24, 24), "mean": (0, 0, 0), "std": (1, 1, 1)}
    teacher = Teacher(lambda x: fed.append(x) or x.mean((2, 3)), cfg)
    student = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    image = torch.rand(1, 3, 1, 1).expand(1, 3, 48, 48)
    column = [torch.tensor(student[name]).view(3, 1, 1) for name in ("mean", "std")]
    teacher((image - column[0]) / column[1], student)
    torch.testing.assert_close(fed[0], image[..., :24, :24], atol=1e-5, rtol=0)


def test_timms_networks_teach(tmp_path, monkeypatch):
    network = timm.create_model("mobilenetv3_small_050", num_classes=10)
    torch.save(network.state_dict(), tmp_path / "teacher.pth")
    teacher = Teacher.from_timm("mobilenetv3_small_050", 10, str(tmp_path / "teacher.pth"))
    assert same_state(teacher.network.state_dict(), network.state_dict())
    assert teacher(torch.zeros(2, 3, 32, 32), {"mean": (0, 0, 0), "std": (1, 1, 1)}).shape == (2, 10)
    with pytest.raises(ValueError, match="teacher no_such_network cannot be made"):
        Teacher.from_timm("no_such_network", 10)
    made = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: made(name))
    with pytest.raises(ValueError, match="knows 1000 classes, and the data have 10: give weights"):
        Teacher.from_timm("mobilenetv3_small_050", 10)


def test_mixing_and_stochastic_depth_depend_on_the_batch_alone():
    module = module_for()
    first = step(module, batch_of())
    torch.rand(7), np.random.rand(3)
    assert torch.equal(first, step(module, batch_of()))
    assert not torch.equal(first, step(module, replace(batch_of(), number=4)))


def test_a_loss_that_is_no_number_stops_the_run():
    batch = batch_of()
    batch.images[0, 0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        step(module_for(), batch)


def test_unreadable_images_are_counted_and_stop_the_run_over_the_limit(tmp_path):
    class Torn(Arrays):
        def open(self, index):
            if index % 4 == 1:
                raise OSError("truncated")
            return super().open(index)

    images = np.random.default_rng(0).integers(0, 255, (32, 8, 8), np.uint8)
    torn = Torn(images, np.arange(32) % 4, list("abcd")), Arrays(images[:8], np.arange(8) % 4, list("abcd"))
    chosen = recipe(epochs=1)
    result = train(torn, chosen, tmp_path / "some", max_unreadable=8, **QUIET)
    assert result.unreadable == 8
    with pytest.raises(RuntimeError, match="more than the 3 allowed"):
        train(torn, chosen, tmp_path / "few", max_unreadable=3, **QUIET)
    nothing = Torn(images[:1], np.array([1]), list("abcd"))
    nothing.open = lambda index: Torn.open(nothing, 1)
    with pytest.raises(RuntimeError, match="no validation image can be read, such as image 0: truncated"):
        train((torn[0], nothing), chosen, tmp_path / "none", **QUIET)


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (lambda images: images.mean((1, 2, 3))[:, None], r"shape \(8, 10\), but gives \(8, 1\)"),
        (lambda images: (images,), "but gives tuple"),
        (lambda images: torch.full((8, 10), torch.nan), "the teacher's logits are not finite"),
    ],
)
def test_teachers_that_cannot_be_are_refused(teacher, words, tmp_path):
    with pytest.raises((ValueError, FloatingPointError), match=words):
        train(sources(), recipe(epochs=1), tmp_path, teacher=teacher, **QUIET)


def test_runs_that_cannot_be_are_refused(whole, tmp_path):
    for options, changes, words in [
        ({"devices": 0}, {}, "these devices cannot be used"),
        ({}, {"two_heads": True}, "two_heads needs a teacher"),
        ({}, {"auto_augment": "nonsense"}, "auto_augment must be a name that timm knows"),
        ({"devices": 2}, {"batch_size": 60}, "100 training images are fewer than a step's 60 × 2"),
    ]:
        with pytest.raises(ValueError, match=words):
            train(sources(), recipe(epochs=1, **changes), tmp_path, **(QUIET | options))
    for name in ("recipe.json", "last.ckpt"):
        shutil.copy(whole[0] / name, tmp_path / name)
    (tmp_path / "last.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged: remove it to begin the run anew"):
        train(sources(), recipe(), tmp_path, resume=True, **QUIET)


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_lower_precision(precision, tmp_path):
    result = train(sources(), recipe(epochs=1, precision=precision), tmp_path, **QUIET)
    assert np.isfinite(float(rows(tmp_path)[0]["train_loss"]))
    assert result.epoch == 1


def test_recipes():
    paper = Recipe.paper()
    assert (paper.epochs, paper.warmup_epochs, paper.image_size, paper.learning_rate) == (300, 20, 224, 1.5e-3)
    assert Recipe.paper(teacher="tresnet_l").epochs == 1000
    assert Recipe.paper(epochs=30).warmup_epochs == pytest.approx(2)
    assert Recipe.paper("mobilemamba_b2").image_size == 384
    for changes, error, words in [
        ({"epochs": 0}, ValueError, "epochs must be from 1"),
        ({"epochs": "many"}, TypeError, "epochs must be like 300"),
        ({"model": "mobilemamba_x"}, ValueError, "there is no model"),
        ({"momentum": 1}, TypeError, "a recipe has no 'momentum'; it has model"),
        ({"warmup_epochs": 400.0}, ValueError, "warmup_epochs must be at most the 300 epochs"),
        ({"precision": "8"}, ValueError, "precision must be 32-true, bf16-mixed, 16-mixed"),
        ({"crop_scale": (0.5,)}, TypeError, "crop_scale must be like"),
        ({"betas": (0.9, 1)}, ValueError, "betas must be from 0 to 0.999999"),
        ({"options": [1]}, TypeError, r"options must be like \{\}"),
        ({"in_chans": 2}, ValueError, "in_chans must be 1"),
        ({"crop_scale": (1, 0.5)}, ValueError, "crop_scale must be two areas, the smaller first"),
        ({"batch_size": 7}, ValueError, "batch_size must be even where images are mixed, but is 7"),
        ({"teacher_checkpoint": "t.pth"}, ValueError, "teacher_checkpoint t.pth needs a teacher"),
        ({"compile": 1}, TypeError, "compile must be like False"),
    ]:
        with pytest.raises(error, match=words):
            Recipe.paper(**changes)


def mobilemamba(*arguments):
    return CliRunner().invoke(cli.main, ["train", *map(str, arguments)])


def test_command_line(tmp_path):
    options = ["--model", "mobilemamba_t2", "--image-size", 32, "--epochs", 1, "--batch-size", 128, "--workers", 0]
    options += ["--set", 'options={"widths": [16, 32, 32], "depths": [1, 1, 1]}', "--set", "mixup=0", "--profile"]
    output = tmp_path / "run"
    done = mobilemamba("digits", "--output", output, *options)
    assert done.exit_code == 0, done.output
    assert "1347 images to train on, 450 to validate on, 10 classes" in done.output
    assert "waiting for images" in done.output
    assert f"weights in {output / 'best.pth'}" in done.output
    assert load_recipe(output).mixup == 0
    again = mobilemamba("digits", "--output", output, "--resume")
    assert again.exit_code == 0, again.output
    for arguments, words in [
        (["digits", "--output", output], "holds a run: resume it"),
        (["digits", "--output", output, "--resume", "--seed", 3], "leave out what changes it"),
        (["nowhere", "--output", tmp_path / "b"], "DATA must be a folder or 'digits'"),
        (["digits", "--output", tmp_path / "b", "--set", "mixup"], "--set takes FIELD=VALUE"),
        (["digits", "--output", tmp_path / "b", "--set", "speed=3"], "a recipe has no 'speed'"),
        (["digits", "--output", tmp_path / "b", "--batch-size", 5000], "lower the batch size"),
        (["digits", "--output", tmp_path / "b", "--recipe", tmp_path], "recipe.json"),
    ]:
        refused = mobilemamba(*arguments)
        assert refused.exit_code == 1, refused.output
        assert words in refused.output, refused.output
        assert "Traceback" not in refused.output


def test_batches_are_distorted_as_the_recipe_says():
    train_images, _ = sources()
    cfg = build_network(recipe(), train_images.classes).default_cfg
    plain = recipe(auto_augment="", color_jitter=0.0, random_erasing=0.0, hflip=0.0, crop_scale=(1.0, 1.0))
    first, second = (next(iter(training_loader(train_images, chosen, cfg, 0))) for chosen in (plain, recipe()))
    assert first.labels.equal(second.labels)
    assert not first.images.equal(second.images)
    assert first.images.shape == (BATCH, 3, 32, 32)


def test_the_strongest_posterization_is_black():
    train_images, _ = sources()
    cfg = build_network(recipe(), train_images.classes).default_cfg
    loader = training_loader(train_images, recipe(), cfg, 0)
    augment = next(part for part in loader.dataset.transform.transforms if hasattr(part, "ops"))
    posterize = next(op for op in augment.ops if op.name == "PosterizeIncreasing")
    posterize.prob, posterize.magnitude, posterize.magnitude_std = 1.0, 10, 0
    assert not np.asarray(posterize(Image.new("RGB", (8, 8), "white"))).any()
