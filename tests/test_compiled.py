"""No GPU kernel spills registers, on any architecture and in any configuration that a launcher chooses."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compile_kernels.py"
if not SCRIPT.exists():
    pytest.skip("needs the source tree", allow_module_level=True)

spec = importlib.util.spec_from_file_location("compile_kernels", SCRIPT)
assert spec is not None
assert spec.loader is not None
compile_kernels = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = compile_kernels
spec.loader.exec_module(compile_kernels)

ARCHITECTURES = [80, 90, 100]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def check(rows) -> None:
    rows = list(rows)
    assert rows
    assert not [row for row in rows if row["spilled_bytes"]]


@needs_nvcc
@pytest.mark.parametrize("file", ["haar", "ss2d_normalize", "state_update"])
def test_cuda(file):
    check(compile_kernels.compile_cuda([90], file))


@needs_nvcc
@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_of_cuda(arch):
    check(compile_kernels.compile_cuda([arch], ""))


@pytest.mark.parametrize("operator", ["haar_dwt2d", "bidirectional_selective_scan-196-N1"])
def test_triton(operator):
    pytest.importorskip("triton")
    check(compile_kernels.compile_triton([90], f"{operator}", "bfloat16-channels_last"))


@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_of_triton(arch):
    pytest.importorskip("triton")
    check(compile_kernels.compile_triton([arch], ""))
