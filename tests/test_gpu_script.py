"""``benchmarks/gpu.sh``, as far as it runs without a GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mobilemamba_kernels.testing import BUILDERS, cases

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu.sh"

pytestmark = pytest.mark.skipif(not SCRIPT.exists() or shutil.which("bash") is None, reason="needs the source tree")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if k not in ("MOBILEMAMBA_BACKEND", "PYTHONPATH")}
    environment = inherited | {"PYTHON": sys.executable, "PYTHONWARNINGS": "ignore"} | environment
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def test_is_correct_bash():
    assert subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True).returncode == 0


def test_help():
    done = run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: benchmarks/gpu.sh")
    assert "set -e" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "name one stage: build, test, sanitize, bench, bench-operators, bench-networks or all"),
        (("build", "test"), "name one stage"),
        (("--fast", "test"), "there is no stage or option --fast"),
        (("build", "--wheel"), "--wheel needs a value"),
        (("build", "--wheel", "/nowhere.whl"), "there is no file /nowhere.whl"),
        (("test", "--seconds", "soon"), "--seconds takes a whole number, not soon"),
    ],
)
def test_wrong_arguments_get_a_sentence(arguments, sentence):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"gpu.sh: {sentence}")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = run("all")
    assert done.returncode == 2
    assert done.stderr.startswith("gpu.sh: PyTorch sees no GPU here")
    assert done.stderr.count("\n") == 1


@pytest.mark.full
def test_dry_run_measures_checked_operators(tmp_path):
    pytest.importorskip("triton")
    done = run("bench-operators", "--dry-run", "--select", "haar_idwt2d", "--seconds", "20", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "operators.jsonl").read_text().splitlines()]
    assert rows[0]["kind"] == "environment"
    assert {"device", "commit", "torch", "triton", "cuda"} <= set(rows[0])
    assert {row["name"] for row in rows if row["kind"] == "ceiling"} >= {"copy", "multiply_add", "products bfloat16"}
    assert all(row["dry_run"] for row in rows)
    measured = [row for row in rows if row["kind"] == "operator"]
    assert {row["engine"] for row in measured} >= {"cuda", "triton", "plain PyTorch"}
    assert {row["direction"] for row in measured} == {"forward", "backward"}
    for row in measured:
        assert (row["check"] == "passed") == (row["seconds"] is not None)
        assert row["check"] == "passed" or row["engine"] == "torch.compile"
    assert {row["what"] for row in rows if row["kind"] == "left_out"} >= {"mamba-ssm", "WTConv fused"}
    if "not installed" not in done.stdout:
        assert (tmp_path / "operators-bfloat16.png").stat().st_size > 10_000


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the measurements' modules importable."""
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.mark.usefixtures("gpu")
def test_a_wrong_result_has_no_time():
    from gpu.operators import _check

    exact = torch.linspace(-1, 1, 64, dtype=torch.float64)
    truth = ({"result 0": exact}, {"result 0": exact.float()})
    for ours in (True, False):
        assert _check({"result 0": exact.float()}, truth, ours, torch.float32) == ""
        assert "result 0: largest error" in _check({"result 0": exact.float() + 0.1}, truth, ours, torch.float32)
        assert _check({"result 0": exact.float() * float("nan")}, truth, ours, torch.float32)


@pytest.mark.usefixtures("gpu")
def test_measured_cases_are_the_networks_shapes_at_a_large_batch():
    from gpu.cases import BATCH, measured, operations

    assert {case.op for case in measured()} == set(BUILDERS)
    for case in measured():
        shape = next(a[0] if isinstance(a, list) else a for a in case.arguments.values()).shape
        assert shape[0] == BATCH or shape[-1] >= 4096
        assert operations(case, "backward")["operations"] >= operations(case, "forward")["operations"]


@pytest.mark.usefixtures("gpu")
def test_operations_of_a_filter_are_those_within_the_map():
    from gpu.cases import operations

    case = next(c for c in cases("depthwise_conv2d_act") if c.name.startswith("16x32x14x14-k7"))
    taps = operations(case, "forward")["operations"] / (2 * 16 * 32 * 14 * 14)
    assert taps == pytest.approx(37.7, abs=0.05)
