"""The fused S6: on the kernels and on plain PyTorch."""

import pytest
import torch

from mobilemamba import bench


@pytest.mark.parametrize("runs", ["kernels", "plain"])
@pytest.mark.parametrize("batch", bench.BATCHES)
def test_network(benchmark, batch, runs):
    benchmark.group = f"mobilemamba_s6, batch {batch}"
    benchmark(bench.prepare_network("mobilemamba_s6", batch, torch.float32, plain=runs == "plain"))
