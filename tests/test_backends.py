"""Which backend runs, and what wrong input gets."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import mobilemamba_kernels
from mobilemamba_kernels import _library, report, use_backend
from mobilemamba_kernels.testing import cases

needs_kernels = pytest.mark.skipif(bool(_library.COMPILED_ERROR), reason="needs the C++ kernels")


def arguments(op: str) -> dict:
    """Of a case with every optional argument, all of them plain tensors."""
    case = max(
        (c for c in cases(op, benchmark=False) if not any(word in c.name for word in ("levels", "maps", "packed"))),
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
PACKED = mobilemamba_kernels.pack_weight(torch.ones(3, 5))
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
    ("feed_forward", {"residual": torch.ones(1, 1, 1, 1)}, ValueError, "residual must have shape"),
    ("feed_forward", {"w1": PACKED, "w2": PACKED}, ValueError, "w2 must be what pack_weight made of 5"),
    ("feed_forward", {"w2": PACKED}, ValueError, "w1 and w2 must both be packed, or neither"),
    ("pointwise_conv2d_act", {"weight": PACKED, "bias": None}, ValueError, "weight is packed, so bias must be given"),
    ("pointwise_conv2d_act", {"weight": PACKED, "bias": torch.ones(99)}, ValueError, "made of 99 outputs"),
    ("pointwise_conv2d_act", {"x": [torch.ones(1, 1, 1, 1)] * 4}, ValueError, "x must be one to three maps; got 4"),
    (
        "pointwise_conv2d_act",
        {"x": [torch.ones(1, 3, 2, 2), torch.ones(1, 2, 2, 2, dtype=torch.bfloat16)]},
        TypeError,
        r"x\[1\] must have the dtype of x\[0\]",
    ),
    (
        "pointwise_conv2d_act",
        {"x": [torch.ones(1, 3, 2, 2), torch.ones(1, 2, 2, 3)]},
        ValueError,
        r"x\[1\] must have shape",
    ),
    (
        "pointwise_conv2d_act",
        {"x": torch.ones(1, 5, 2, 2), "weight": PACKED.bfloat16(), "bias": torch.ones(3), "residual": None},
        TypeError,
        "was packed as torch.float32 and is now torch.bfloat16",
    ),
    ("squeeze_excite", {"w2": torch.ones(3, 3)}, ValueError, "w2 must have shape"),
    ("squeeze_excite", {"x": torch.ones(1, 37, 0, 2)}, ValueError, "must have positions"),
]


@pytest.mark.parametrize("shape", [(0, 0, 2, 2), (4, 0, 3, 3), (0, 3, 3, 3), (5, 3, 3, 3), (5, 2, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_filter_keeps_its_size(shape, dtype):
    x, weight, bias = torch.ones(2, shape[1], 7, 6), torch.ones(shape), torch.zeros(shape[0])
    packed = mobilemamba_kernels.pack_weight(weight, dtype)
    wanted = mobilemamba_kernels.conv2d_act(x, weight, bias)
    assert mobilemamba_kernels.conv2d_act(x, packed, bias).shape == wanted.shape


def test_pack_weight_refuses_in_a_sentence():
    pack = mobilemamba_kernels.pack_weight
    with pytest.raises(TypeError, match=r"pack_weight: dtype must be float32 or bfloat16; got torch.float16"):
        pack(torch.ones(2, 2), torch.float16)
    with pytest.raises(ValueError, match=r"pack_weight: filters must be square"):
        pack(torch.ones(4, 8, 1, 9))
    with pytest.raises(ValueError, match=r"pack_weight: weight must have shape"):
        pack(torch.ones(2))
    with pytest.raises(TypeError, match=r"pack_weight: weight must be"):
        pack(torch.ones(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_and_stride_beyond_memory(dtype):
    """Four rows of that padding, at that stride, would be 2³² · 2³² elements, which is 0 in 64 bits."""
    x, weight = torch.full((8, 1, 2, 2), 2.0, dtype=dtype), torch.full((1, 1, 1, 1), 3.0)
    stride, padding = (2**32 - 1) // 3, 2**31 - 1
    y = mobilemamba_kernels.conv2d_act(x, weight, torch.ones(1), stride, padding, "relu")
    with use_backend("reference"):
        assert torch.equal(y, mobilemamba_kernels.conv2d_act(x, weight, torch.ones(1), stride, padding, "relu"))


@pytest.mark.parametrize("op", ["conv2d_act", "depthwise_conv2d_act"])
@pytest.mark.parametrize(("stride", "padding"), [(2**62, 2**62 - 1), (1, 2**63 - 1), (2**31, 0)])
def test_stride_and_padding_below_the_public_function(op, stride, padding):
    forward = getattr(torch.ops.mobilemamba, f"{op}_fwd")
    rest = () if op == "conv2d_act" else (None, None, None)
    with pytest.raises(RuntimeError, match="does not fit into the padded image"):
        forward(torch.ones(1, 1, 10, 10), torch.ones(1, 1, 1, 1), None, stride, padding, "none", *rest)


@needs_kernels
@pytest.mark.parametrize("wrong", ["b1", "b2", "bias"])
def test_bias_of_another_size_below_the_public_function(wrong, instruction_set):
    x, wide, narrow = torch.ones(2, 8, 3, 3, dtype=torch.bfloat16), torch.ones(16, 8), torch.ones(8, 16)
    b1, b2 = torch.ones(3 if wrong == "b1" else 16), torch.ones(3 if wrong == "b2" else 8)
    call = partial(torch.ops.mobilemamba.feed_forward_fwd, x, wide, b1, narrow, b2, "relu", None)
    if wrong == "bias":
        call = partial(
            torch.ops.mobilemamba.pointwise_conv2d_act_fwd, x, wide, b2[:3], "relu", None, "none", None, None
        )
    with pytest.raises(RuntimeError, match="does not match the other arguments'"):
        call()


@pytest.mark.parametrize(("height", "width"), [(3, (5 + 2**64) // 3), (-1, -5), (5, 0), (0, 0)])
def test_rows_that_are_not_the_positions_are_refused(height, width):
    """Also where their product, modulo 2⁶⁴, is that of the positions."""
    with pytest.raises(RuntimeError, match="5 positions are not"):
        torch.ops.mobilemamba.cross_merge_fwd(torch.randn(1, 4, 1, 5), height, width, 0, False, False)


def test_too_little_memory_gets_a_sentence():
    """In a process that may not grow by the half gigabyte that a row of this padding takes."""
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").exists():
        pytest.skip("a process cannot tell its size here")
    code = f"""
import torch, resource, mobilemamba_kernels as mk
torch.set_num_threads(1)
x, weight = torch.ones(1, 4096, 2, 2), torch.ones(1, 4096, 1, 1)
mk.conv2d_act(x, weight)
size = int(open("/proc/self/statm").read().split()[0]) * {resource.getpagesize()} + 2**27
resource.setrlimit(resource.RLIMIT_AS, (size, size))
mk.conv2d_act(x, weight, stride=2**15, padding=2**14)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "there is no memory for" in done.stderr, done.stderr


@pytest.mark.parametrize(("op", "change", "error", "sentence"), WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_wrong_input_gets_one_sentence(op, change, error, sentence):
    case = {"selective_scan_fn": cases(op)[1], "wavelet_depthwise_conv2d": cases(op)[3]}.get(op)
    given = (case.make() if case else arguments(op)) | change
    with pytest.raises(error, match=sentence) as caught:
        getattr(mobilemamba_kernels, op)(**given)
    assert str(caught.value).startswith(f"{op}: ")
    assert "\n" not in str(caught.value)


def test_forward_mode_is_the_references_alone():
    """PyTorch would drop the tangents."""
    x, weight, direction = torch.randn(1, 3, 5), torch.randn(3, 4), torch.randn(1, 3, 5)
    state = torch.zeros(1, 3, 4)

    def step(x):
        return mobilemamba_kernels.causal_conv1d_update(x, state.clone(), weight)

    for function in (lambda x: mobilemamba_kernels.causal_conv1d_fn(x, weight), step):
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives; use_backend"):
            torch.func.jvp(function, (x,), (direction,))
        with use_backend("reference"):
            _, found = torch.func.jvp(function, (x,), (direction,))
        torch.testing.assert_close(found, function(direction))  # both are linear
