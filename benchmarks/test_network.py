"""S6 optimized, and on plain PyTorch."""

import pytest

from mobilemamba.bench_network import BATCHES, ENGINES, Setting


@pytest.mark.parametrize("engine", ["float32", "bfloat16", "plain"])
@pytest.mark.parametrize("batch", BATCHES)
def test_network(benchmark, batch, engine):
    benchmark.group = f"mobilemamba_s6, batch {batch}"
    benchmark(ENGINES[engine].build(Setting("mobilemamba_s6", batch)))
