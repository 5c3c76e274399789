"""The harness. No test looks at a time."""

import json
from importlib.util import find_spec

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import mobilemamba
from mobilemamba import bench, bench_dropins, bench_network, bottlenecks, cli, optimized
from mobilemamba_kernels import _library, use_backend
from mobilemamba_kernels.testing import CASES, Case, cases

needs_kernels = pytest.mark.skipif(bool(_library.COMPILED_ERROR), reason="needs the C++ kernels")


@pytest.fixture
def small(monkeypatch):
    """Small shapes and short runs in place of the benchmark's."""
    chosen = [cases("bidirectional_selective_scan")[1], cases("haar_dwt2d")[1]]
    monkeypatch.setattr(bench, "cases", lambda op, benchmark: [c for c in chosen if op in (None, c.op)])
    monkeypatch.setattr(bench, "time_in_turn", time_briefly(bench.time_in_turn))


def time_briefly(function):
    return lambda functions, budget_s=0.0: function(functions, 0.0)


def test_functions_take_turns():
    calls = []
    timings = bench.time_in_turn([lambda: calls.append("a"), lambda: calls.append("b")], budget_s=0.0)
    assert [t.samples for t in timings] == [7, 7]
    assert all(0 < t.p10 <= t.median <= t.p90 for t in timings)
    measured = "".join(calls).replace("aa", "a").replace("bb", "b")
    assert "ab" in measured
    assert set(calls) == {"a", "b"}


@pytest.mark.parametrize("case", [c for c in CASES if c.benchmark], ids=str)
def test_bytes_of_a_case(case: Case):
    """Inputs and results once each, at four bytes a number."""
    run, moved = bench.prepare(case, "forward", torch.float32, plain=True)
    results = run()
    arguments = case.make()
    numbers = sum(t.numel() for t in (*torch.utils._pytree.tree_leaves(arguments), *results) if hasattr(t, "numel"))
    assert moved == 4 * numbers


@needs_kernels
def test_operators_as_json(small):
    result = CliRunner().invoke(cli.main, ["bench", "ops", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {"cpu", "instruction_set", "threads", "torch", "mobilemamba", "commit"} <= set(report["environment"])
    directions = [(r["op"], r["direction"]) for r in report["results"]]
    assert ("bidirectional_selective_scan", "forward") in directions
    assert ("bidirectional_selective_scan", "backward") in directions
    for row in report["results"]:
        assert row["ratio"] == pytest.approx(row["plain"]["median"] / row["kernel"]["median"])
        assert row["gigabytes_per_s"] > 0


@needs_kernels
def test_operators_as_a_table(small):
    result = CliRunner().invoke(cli.main, ["bench", "ops", "--op", "haar_dwt2d", "--dtype", "bfloat16"])
    assert result.exit_code == 0, result.output
    assert "haar_dwt2d" in result.output
    assert "bidirectional" not in result.output
    assert "torch " in result.output


@needs_kernels
def test_networks_with_peak_memory(small):
    command = ["bench", "network", "--model", "mobilemamba_t2", "--batch", "2", "--threads", "1", "--json"]
    engines = ["float32", "bfloat16", "plain"]
    result = CliRunner().invoke(cli.main, [*command, *(f"--engine={name}" for name in engines)])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["results"]
    assert [row["engine"] for row in rows] == engines
    for row in rows:
        assert (row["model"], row["batch"], row["threads"]) == ("mobilemamba_t2", 2, 1)
        assert row["images_per_s"] == pytest.approx(2 / row["timing"]["median"])
        assert 0 < row["share"] < 1.5
        assert row["peak_mib"] is None or 0 < row["peak_mib"] < 4096


@needs_kernels
def test_dropins(monkeypatch, small):
    """Every comparison at small sizes: both sides agree, and are timed."""
    sizes = bench_dropins.Sizes(2, 32, 50, 4, 12, 20, 1, 40, 16, 9, 16)
    found = list(bench_dropins.comparisons(sizes))
    monkeypatch.setattr(bench_dropins, "time_in_turn", time_briefly(bench.time_in_turn))
    monkeypatch.setattr(bench_dropins, "comparisons", lambda: iter(found))
    result = CliRunner().invoke(cli.main, ["bench", "dropins", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["results"]
    projects = {"mamba-ssm", "causal-conv1d", "VMamba", "Vim", "WTConv"} | (
        {"transformers"} if find_spec("transformers") else set()
    )
    assert {row["project"] for row in rows} == projects
    assert all(row["ratio"] == pytest.approx(row["theirs"]["median"] / row["ours"]["median"]) for row in rows)


@needs_kernels
def test_dropins_as_a_table(monkeypatch, small):
    one = torch.ones(3)
    found = [bench_dropins.Comparison("a project", "a function", "a loop", lambda: one, lambda: one + 1e-6)]
    monkeypatch.setattr(bench_dropins, "time_in_turn", time_briefly(bench.time_in_turn))
    monkeypatch.setattr(bench_dropins, "comparisons", lambda: iter(found))
    result = CliRunner().invoke(cli.main, ["bench", "dropins"])
    assert result.exit_code == 0, result.output
    assert "a function" in result.output


def test_dropins_that_differ_are_not_timed():
    one = torch.ones(3)
    comparison = bench_dropins.Comparison("a project", "a function", "a loop", lambda: one, lambda: one + 1)
    with pytest.raises(RuntimeError, match="a function: the results differ by 1, at a scale of 1"):
        comparison.measure(0.0)


def result_of(engine: str, batch: int, threads: int, milliseconds: float) -> bench_network.NetworkResult:
    label = bench_network.ENGINES[engine].label
    timing = bench.Timing(milliseconds / 1e3, 0.9 * milliseconds / 1e3, 1.1 * milliseconds / 1e3, 7)
    speed = batch / timing.median
    return bench_network.NetworkResult(engine, label, "mobilemamba_s6", batch, threads, timing, speed, None, None)


@needs_kernels
def test_networks_as_a_table_and_a_chart(monkeypatch, tmp_path):
    monkeypatch.setattr(
        bench_network,
        "bench_networks",
        lambda name, batch, threads, engines: [result_of(engine, batch, threads, 500.0) for engine in engines],
    )
    chart = tmp_path / "speeds.png"
    result = CliRunner().invoke(cli.main, ["bench", "network", "--threads", "1", "--chart", str(chart)])
    assert result.exit_code == 0, result.output
    for text in ("S6, ours, bfloat16", "500.000", "450.000–550.000", "32.0", "–"):
        assert text in result.output
    with Image.open(chart) as image:
        assert image.width > 800
    result = CliRunner().invoke(cli.main, ["bench", "network", "--chart", str(tmp_path / "none" / "speeds.png")])
    assert result.exit_code == 1
    assert "there is no folder" in result.stderr


@needs_kernels
def test_an_engine_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(bench_network.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(cli.main, ["bench", "network", "--engine", "efficientvit_m5"])
    assert result.exit_code == 1
    assert "the engine efficientvit_m5 needs timm, which is not installed: pip install timm" in result.stderr
    assert bench_network.available() == ["float32", "bfloat16", "plain", "compile"]


@needs_kernels
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.full), "bfloat16"])
def test_profile(small, dtype):
    command = ["bench", "network", "--profile", "--model", "mobilemamba_t2", "--batch", "1", "--dtype", dtype]
    result = CliRunner().invoke(cli.main, [*command, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    rows, model = report["results"], mobilemamba.create_model("mobilemamba_t2")
    calls = sum(row["calls"] for row in rows)
    leaves = mobilemamba.optimize_for_inference(model).modules()
    assert calls == sum(type(m) in (*bottlenecks.OPERATORS, optimized.Classifier) for m in leaves)
    assert {row["stage"] for row in rows} == {"stem", "stage 1", "stage 2", "stage 3", "head"}
    assert all(row["seconds"] > 0 and row["operations_s"] > 0 and row["bytes_s"] > 0 for row in rows)
    assert report["whole"][0]["seconds"] > 0
    if dtype == "float32":
        assert "whole pass" in CliRunner().invoke(cli.main, command).output


def test_fallback_is_not_timed(monkeypatch):
    with use_backend("reference"):
        result = CliRunner().invoke(cli.main, ["bench", "ops"])
    assert result.exit_code == 1
    assert "there is nothing to time" in result.stderr
    monkeypatch.setattr(_library, "COMPILED_ERROR", "the C++ kernels are not loaded: no such file")
    for command in ("ops", "network"):
        result = CliRunner().invoke(cli.main, ["bench", command])
        assert result.exit_code == 1
        assert "there is nothing to time: the C++ kernels are not loaded" in result.stderr
        assert "install a C++17 compiler" in result.stderr
