"""The benchmark cases of the operators' table: kernel and plain PyTorch beside each other in a group."""

import pytest
import torch

from mobilemamba import bench


@pytest.mark.parametrize("runs", ["kernel", "plain"])
@pytest.mark.parametrize(("case", "direction"), list(bench.measured_cases()), ids=str)
def test_operator(benchmark, case, direction, runs):
    run, moved = bench.prepare(case, direction, torch.float32, plain=runs == "plain")
    benchmark.group = f"{case} {direction}"
    benchmark.extra_info["bytes"] = moved
    benchmark(run)
