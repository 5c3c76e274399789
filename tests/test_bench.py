"""The harness. No test looks at a time."""

import json

import pytest
import torch
from click.testing import CliRunner

from mobilemamba import bench, cli
from mobilemamba_kernels import _library, use_backend
from mobilemamba_kernels.testing import CASES, Case, cases

needs_kernels = pytest.mark.skipif(bool(_library.COMPILED_ERROR), reason="needs the C++ kernels")


@pytest.fixture
def small(monkeypatch):
    """Small shapes and short runs in place of the benchmark's."""
    chosen = [cases("bidirectional_selective_scan")[1], cases("haar_dwt2d")[1]]
    monkeypatch.setattr(bench, "cases", lambda op, benchmark: [c for c in chosen if op in (None, c.op)])
    monkeypatch.setattr(bench, "time_in_turn", time_briefly(bench.time_in_turn))
    monkeypatch.setattr(bench, "BATCHES", (1,))


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
def test_network_with_peak_memory(small):
    result = CliRunner().invoke(cli.main, ["bench", "network", "--model", "mobilemamba_t2", "--json"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["results"]
    assert row["model"] == "mobilemamba_t2"
    assert row["batch"] == 1
    for peak in (row["kernel_peak_mib"], row["plain_peak_mib"]):
        assert peak is None or 0 < peak < 4096


@needs_kernels
def test_network_as_a_table(monkeypatch):
    timing = bench.Timing(0.5, 0.4, 0.6, 7)
    monkeypatch.setattr(
        bench,
        "bench_network",
        lambda name, b, dtype: bench.NetworkResult(name, b, "float32", timing, timing, 1.0, None),
    )
    result = CliRunner().invoke(cli.main, ["bench", "network"])
    assert result.exit_code == 0, result.output
    for text in ("mobilemamba_s6", "500.000", "400.000–600.000", "32.0", "1.00×", "–"):
        assert text in result.output


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
