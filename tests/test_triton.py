"""Triton's kernels for large inputs, at sizes that its interpreter bears."""

import pytest
import test_ops
import torch

from mobilemamba_kernels.backends import forced_backend
from mobilemamba_kernels.testing import BUILDERS, Case

pytestmark = pytest.mark.skipif(forced_backend() != "triton", reason="needs MOBILEMAMBA_BACKEND=triton")

LONG = [
    BUILDERS["selective_scan_fn"](1, 6, 19, 2, bc="2", has="Dzbsl"),
    BUILDERS["selective_scan_fn"](2, 3, 17, 1, bc="DN", has="bl"),
    BUILDERS["bidirectional_selective_scan"](1, 5, 19, 2, has="Dzbs"),
    BUILDERS["bidirectional_selective_scan"](2, 5, 17, 1, two_inputs=True, has="b"),
    BUILDERS["ss2d_bidirectional"](1, 7, 4, 5, rank=2, state=2),
]


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of eight positions."""
    from mobilemamba_kernels.triton import _scan

    monkeypatch.setattr(_scan, "_config", lambda *_, **__: (8, 8 // _scan.RUN, 1))


@pytest.mark.parametrize("case", LONG, ids=str)
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.usefixtures("short_chunks")
def test_chunks(case: Case, layout: str) -> None:
    test_ops.check_against_truth(case, torch.float32, layout)


FUSED = [
    BUILDERS["feed_forward"](1, 72, 40, 5, 4, has="br", packed=torch.bfloat16),
    BUILDERS["feed_forward"](2, 8, 64, 9, 8, activation="none", packed=torch.bfloat16),
    BUILDERS["feed_forward"](1, 392, 48, 3, 2, activation="silu", packed=torch.bfloat16),
]


@pytest.mark.parametrize("case", FUSED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", [80, 90])
def test_feed_forward_in_one_kernel(case: Case, dtype: torch.dtype, architecture: int, monkeypatch) -> None:
    from mobilemamba_kernels.triton import _launch, feed_forward

    monkeypatch.setattr(feed_forward, "_FEWEST_PROGRAMS", 0)
    monkeypatch.setattr(_launch, "compiled_for", architecture)
    monkeypatch.setattr(feed_forward, "multiply", None)  # two kernels
    test_ops.check_against_truth(case, dtype, "channels_last")
