"""Which backend runs, and what wrong input gets."""

import os
import subprocess
import sys

import pytest
import torch

import mobilemamba_kernels
from mobilemamba_kernels import _library, report, use_backend
from mobilemamba_kernels.testing import cases

needs_kernels = pytest.mark.skipif(bool(_library.COMPILED_ERROR), reason="needs the C++ kernels")


def arguments(op: str) -> dict:
    """Of a case with every optional argument."""
    case = max(
        (c for c in cases(op, benchmark=False) if "levels" not in c.name),
        key=lambda c: (len(c.arguments), min(c.arguments[next(iter(c.arguments))].shape)),  # type: ignore[union-attr]
    )
    return case.make()


def test_report_tells_what_runs():
    rows = report()
    assert {row.op for row in rows} == set(_library.KERNELS)
    for row in rows:
        if row.device == "cpu" and row.backend == "reference":
            assert row.why
            assert row.why in str(rows)
        if row.backend == "cpu":
            assert _library.cpu_capability() in row.detail
    with use_backend("reference"):
        assert all(row.backend == "reference" and "forced" in row.why for row in report())
    with use_backend("cuda"):
        assert {row.backend for row in report() if row.device == "cpu"} == {"none"}


def test_forced_backend_that_cannot_run_is_an_error():
    x = torch.ones(1, 1, 2, 2)
    for name in ("cuda", "triton"):
        with use_backend(name), pytest.raises(RuntimeError, match=f'haar_dwt2d: backend "{name}" is forced but cannot'):
            mobilemamba_kernels.haar_dwt2d(x)
    with use_backend("cpu"), pytest.raises(RuntimeError, match="forced but cannot"):
        mobilemamba_kernels.haar_dwt2d(x.double())
    with (
        pytest.raises(ValueError, match="must be one of reference, cpu, cuda, triton; got 'fast'"),
        use_backend("fast"),
    ):
        pass
    mobilemamba_kernels.haar_dwt2d(x)  # nothing is forced any more


@needs_kernels
def test_forcing_changes_what_runs():
    case = cases("bidirectional_selective_scan")[3]
    called = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    for name, runs in (("cpu", True), ("reference", False)):
        called.clear()
        with use_backend(name), Recorder():
            case.run(case.make())
        assert ("mobilemamba::bidirectional_selective_scan_fwd" in called) == runs


@pytest.mark.parametrize(
    ("value", "expected"),
    [("reference", "['reference']"), ("", ""), ("fast", "MOBILEMAMBA_BACKEND must be one of reference, cpu")],
)
def test_environment_variable(value, expected):
    code = "import mobilemamba_kernels as k; print(sorted({r.backend for r in k.report()}))"
    environment = os.environ | {"MOBILEMAMBA_BACKEND": value, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert expected in done.stdout + done.stderr
    assert (done.returncode == 0) == (value != "fast")


SCANS = ["selective_scan_fn", "bidirectional_selective_scan"]
WRONG = [
    *[(op, {"u": torch.ones(3)}, ValueError, "u must have shape") for op in SCANS],
    *[(op, {"u": [1.0]}, TypeError, "u must be a tensor; got list") for op in SCANS],
    *[(op, {"A": None}, TypeError, "A must be a tensor; got NoneType") for op in SCANS],
    *[(op, {"D": torch.ones(99)}, ValueError, "D must have shape") for op in SCANS],
    ("selective_scan_fn", {"A": torch.ones(5, 257)}, ValueError, "N must be between 1 and 256; got 257"),
    ("selective_scan_fn", {"A": torch.ones(5, 0)}, ValueError, "N must be between 1 and 256; got 0"),
    ("selective_scan_fn", {"B": torch.ones(2, 3, 1, 7)}, ValueError, "dim must be a multiple of B's groups G"),
    ("selective_scan_fn", {"B": torch.ones(2)}, ValueError, "B must have shape"),
    ("selective_scan_fn", {"delta": torch.ones(2, 5, 8)}, ValueError, "delta must have shape"),
    ("selective_scan_fn", {"u": torch.ones(2, 5, 7, dtype=torch.complex64)}, TypeError, "complex64"),
    ("selective_scan_fn", {"u": torch.ones(2, 5, 7, dtype=torch.int32)}, TypeError, "int32"),
    ("selective_scan_fn", {"z": torch.ones(2, 5, 7, device="meta")}, ValueError, "z is on meta but u is on cpu"),
    ("bidirectional_selective_scan", {"u": torch.ones(2, 3, 5, 7)}, ValueError, "u must have shape"),
    ("bidirectional_selective_scan", {"B": torch.ones(2, 1, 7)}, ValueError, "B must have shape"),
    ("ss2d_bidirectional", {"x": torch.ones(2, 5, 3)}, ValueError, "x must have shape"),
    ("ss2d_bidirectional", {"x_proj_weight": torch.ones(2, 4, 6)}, ValueError, "x_proj_weight must have shape"),
    ("haar_dwt2d", {"x": torch.ones(2, 3, 4)}, ValueError, "x must have shape"),
    ("haar_dwt2d", {"x": torch.ones(1, 1, 2, 2).to_sparse()}, TypeError, "must be a dense tensor"),
    ("haar_idwt2d", {"bands": torch.ones(1, 2, 3, 4, 4)}, ValueError, "bands must have 4 bands"),
    ("haar_idwt2d", {"size": (99, 1)}, ValueError, "size must be"),
    ("wavelet_depthwise_conv2d", {"weight": torch.ones(148, 1, 4, 4)}, ValueError, "k must be odd; got 4"),
    ("wavelet_depthwise_conv2d", {"weight": []}, ValueError, "must have one entry a level"),
    ("wavelet_depthwise_conv2d", {"scale": torch.ones(3)}, ValueError, "scale must have shape"),
    ("wavelet_depthwise_conv2d", {"base": torch.ones(1, 37, 14, 12)}, ValueError, "base must have shape"),
    ("depthwise_conv2d_act", {"weight": torch.ones(5, 1, 3, 2)}, ValueError, "weight must have shape"),
    ("depthwise_conv2d_act", {"stride": 0}, ValueError, "stride must be at least 1"),
    ("depthwise_conv2d_act", {"activation": "gelu"}, ValueError, "must be one of none, relu, silu; got 'gelu'"),
    ("conv2d_act", {"weight": torch.ones(5, 99, 3, 3)}, ValueError, "weight must have shape"),
    ("conv2d_act", {"padding": -1}, ValueError, "padding must be at least 0"),
    ("conv2d_act", {"stride": 1.5}, TypeError, "stride must be an integer"),
    ("pointwise_conv2d_act", {"weight": torch.ones(5, 99)}, ValueError, "weight must have shape"),
    ("pointwise_conv2d_act", {"residual": torch.ones(1, 1, 1, 1)}, ValueError, "residual must have shape"),
    ("feed_forward", {"w2": torch.ones(3, 3)}, ValueError, "w2 must have shape"),
    ("feed_forward", {"x": torch.ones(2, 3)}, ValueError, "x must have shape"),
]


def test_too_little_memory_gets_a_sentence():
    channels = 2**16  # more bytes than a process can address
    x, weight = torch.ones(1, channels, 4, 4), torch.ones(4, channels, 3, 3)
    with pytest.raises(RuntimeError, match=r"no memory for \d+ bytes of scratch"):
        mobilemamba_kernels.conv2d_act(x, weight, stride=2**30, padding=2**30)


@pytest.mark.parametrize(("op", "change", "error", "sentence"), WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_wrong_input_gets_one_sentence(op, change, error, sentence):
    case = {"selective_scan_fn": cases(op)[1], "wavelet_depthwise_conv2d": cases(op)[3]}.get(op)
    given = (case.make() if case else arguments(op)) | change
    with pytest.raises(error, match=sentence) as caught:
        getattr(mobilemamba_kernels, op)(**given)
    assert str(caught.value).startswith(f"{op}: ")
    assert "\n" not in str(caught.value)
