"""The paper's ablations: their rows, and the command that measures and trains them."""

import json
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import mobilemamba
from mobilemamba import ablations
from mobilemamba.ablations import STUDIES, Row, accuracy, measure, published, recipe, rows
from mobilemamba.bench import Timing, time_in_turn
from mobilemamba.cli import main

ALL = [row for study in STUDIES for row in rows(study)]
TINY = {"widths": (32, 40, 48), "depths": (1, 1, 1)}


def run(*arguments):
    return CliRunner().invoke(main, ["ablate", *map(str, arguments)])


@pytest.fixture
def uncounted(monkeypatch):
    """Counting takes a second a network."""
    monkeypatch.setattr(ablations, "_counted", lambda options, size: (15_040_000, 646_700_000))


@pytest.fixture
def trainer(monkeypatch):
    """A trainer that notes what it was asked for, in place of one that trains."""
    pytest.importorskip("lightning")
    calls = []

    def train(data, recipe, output, resume):
        assert resume
        calls.append((data, recipe, output))
        return SimpleNamespace(top1=70.0 + len(calls), top5=90.0)

    monkeypatch.setattr("mobilemamba.training.train", train)
    return calls


def test_rows_have_the_published_parameters():
    figures = {replace(row.made_of(), drop_path_rate=0): published(row).parameters for row in ALL}
    for made, parameters in figures.items():
        with torch.device("meta"):
            count = mobilemamba.count_parameters(mobilemamba.MobileMamba(made))
        assert parameters in (None, round(count / 1e6, 1))


def test_rows_have_the_published_multiply_adds():
    networks = {(replace(row.made_of(), drop_path_rate=0), row.image_size): published(row).macs for row in ALL}
    known = {macs: network for network, macs in networks.items() if macs}
    assert set(known) == {variant.macs for variant in mobilemamba.VARIANTS.values()}
    for macs, (made, size) in known.items():  # the paper's count the scan and the normalizations too
        assert 0.98 * macs < ablations._counted(made, size)[1] / 1e6 < macs


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_is_possible_with_every_variant(study):
    for model in mobilemamba.list_models():
        chosen = rows(study, model)
        assert all(row.model == model and row.made_of() for row in chosen)
        assert len({row.label for row in chosen}) == len(chosen)


def test_a_folder_belongs_to_one_training():
    trainings = {row.folder(): set() for row in ALL}
    for row in ALL:
        trainings[row.folder()].add((row.model, row.made_of(), row.image_size, row.distillation, row.epochs))
    assert {len(found) for found in trainings.values()} == {1}
    assert len(set.union(*trainings.values())) == len(trainings)


def test_figures_of_the_paper():
    plain, distilled, longer, fused = map(published, rows("strategies"))
    assert (plain.top1, distilled.top1, longer.top1, fused.top1) == (78.0, None, 80.7, 80.7)
    assert (plain.images_per_s, fused.images_per_s) == (None, 11000)
    by_size = {row.image_size: published(row) for row in rows("resolution")}
    assert {size: figures.top1 for size, figures in by_size.items() if figures.top1} == {
        256: 79.9,
        384: 81.6,
        512: 82.5,
    }
    assert by_size[320] == ablations.Published(parameters=17.1)
    by_rate = {row.label: published(row) for row in rows("drop-path")}
    assert (by_rate["0.03"].top1, by_rate["0.1"].top1, by_rate["0.1"].macs) == (79.9, None, 1080)
    assert published(rows("scan")[0]) == ablations.Published()


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_is_printed(study, uncounted):
    result = run(study, "--no-speed")
    assert result.exit_code == 0, result.output
    for row in rows(study):
        assert row.label in result.output
    assert "646.7 M" in result.output
    assert "17.1 M" in result.output or "15.0 M" in result.output or "14.2 M" in result.output
    assert "images/s" not in result.output
    assert "–: the paper's figure is not reproduced here" in " ".join(result.output.split())


def tiny(label, form, size=32):
    return Row(label, TINY, size, form=form, model="mobilemamba_t2")


def test_measured(monkeypatch):
    monkeypatch.setattr(ablations, "time_in_turn", partial(time_in_turn, budget_s=0.01))
    threads = torch.get_num_threads()
    measured = measure([tiny(form, form) for form in ("plain", "fused", "optimized")], batch_size=2, threads=1)
    assert torch.get_num_threads() == threads
    network = mobilemamba.create_model("mobilemamba_t2", **TINY)
    for m in measured:
        assert m.parameters == mobilemamba.count_parameters(network)
        assert m.macs == mobilemamba.count_macs(network, 32)
        assert m.images_per_s == 2 / m.timing.median > 0


def test_speeds_are_printed(monkeypatch, uncounted):
    monkeypatch.setattr(ablations, "time_in_turn", lambda calls: [Timing(0.5, 0.25, 0.75, 7) for _ in calls])
    monkeypatch.setattr(ablations, "rows", lambda study, model: [tiny("a", "plain"), tiny("b", "optimized", 64)])
    monkeypatch.setattr("mobilemamba.bench.refuse_fallback", lambda: None)
    result = run("scan", "--batch-size", 3, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert result.output.count("4.0–12.0") == 2
    assert "threads: 1" in result.output
    assert "batch 3" in " ".join(result.output.split())
    found = json.loads(run("scan", "--json").stdout)
    assert [(r["row"]["label"], r["images_per_s"]) for r in found["results"]] == [("a", 32.0), ("b", 32.0)]
    assert found["results"][0]["paper"]["top1"] is None
    assert found["environment"]["torch"] == torch.__version__


def test_rows_are_trained_once(trainer, uncounted, tmp_path):
    command = ("drop-path", "--data", "digits", "--epochs", 3, "--seed", 5, "--output", tmp_path, "--no-speed")
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "71.00 %" in result.output
    assert "79.9 %" in result.output
    assert len(trainer) == 5
    data, first, output = trainer[0]
    assert (data, output) == ("digits", tmp_path / "b1-256-drop_path_rate=0.0")
    assert (first.options, first.epochs, first.seed, first.image_size) == ({"drop_path_rate": 0.0}, 3, 5, 256)
    (tmp_path / "b1-256" / "result.json").unlink()
    again = json.loads(run(*command, "--json").stdout)
    assert len(trainer) == 6
    assert [r["result"]["top1"] for r in again["results"]] == [71.0, 76.0, 73.0, 74.0, 75.0]


def test_strategies_are_trained_as_they_say(trainer, uncounted, tmp_path):
    teacher = ("--teacher", "tresnet_l", "--teacher-checkpoint", "l.pth")
    options = ("--no-speed", "--epochs", 30, "--output", tmp_path, "--batch-size", 8)
    result = run("strategies", "--data", "digits", *teacher, *options)
    assert result.exit_code == 0, result.output
    assert [(r.teacher, r.teacher_checkpoint, r.epochs, r.batch_size) for _, r, _ in trainer] == [
        ("", "", 30, 8),
        ("tresnet_l", "l.pth", 30, 8),
        ("tresnet_l", "l.pth", 100, 8),
    ]
    assert result.output.count("73.00 %") == 2  # fusion changes no accuracy


def test_a_result_of_something_else_is_refused(trainer, tmp_path):
    row = rows("wavelet")[1]
    accuracy(row, "digits", recipe(row, 1), tmp_path)
    assert accuracy(row, "digits", recipe(row, 1), tmp_path) == {"top1": 71.0, "top5": 90.0}
    for data, changed in (("digits", recipe(row, 2)), ("digits", recipe(row, 1, seed=1)), ("other", recipe(row, 1))):
        with pytest.raises(ValueError, match="of other data or another recipe: choose another folder, or remove"):
            accuracy(row, data, changed, tmp_path)
    path = tmp_path / row.folder() / "result.json"
    for text in ("", "[]", '{"result": {"top1": 1, "top5": "x"}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"result\.json is no result of an ablation: remove it"):
            accuracy(row, "digits", recipe(row, 1), tmp_path)
    assert len(trainer) == 1


def test_an_interrupted_training_leaves_no_result(trainer, tmp_path, monkeypatch):
    row = rows("wavelet")[0]

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mobilemamba.training.train", stop)
    with pytest.raises(KeyboardInterrupt):
        accuracy(row, "digits", recipe(row, 1), tmp_path)
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["nothing"], 2, "is not one of 'scan', 'wavelet'"),
        (["scan", "--epochs", "3"], 2, "are for training: give --data as well"),
        (["scan", "--seed", "0"], 2, "are for training: give --data as well"),
        (["scan", "--no-speed", "--threads", "1"], 2, "leave out --no-speed"),
        (["scan", "--device", "nowhere"], 1, "device 'nowhere' cannot be used"),
        (["strategies", "--no-speed", "--data", "digits"], 1, "learns from a teacher, but none is given"),
        (["wavelet", "--no-speed", "--data", "no such folder"], 1, "no such folder"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, code, sentence, uncounted, tmp_path, monkeypatch):
    if "--data" in arguments:
        pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == code
    assert sentence in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_unknown_study_and_variant():
    with pytest.raises(ValueError, match="there is no study 'nothing'; the studies are scan, wavelet"):
        rows("nothing")
    with pytest.raises(ValueError, match="there is no model 'nothing'"):
        rows("scan", "nothing")


def test_training_without_its_packages(monkeypatch, uncounted):
    for name in [name for name in sys.modules if name.startswith("mobilemamba.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    result = run("scan", "--no-speed", "--data", "digits")
    assert result.exit_code == 1
    assert "this needs lightning: pip install mobilemamba[train]" in result.output
