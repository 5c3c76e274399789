"""The emulation that the CUDA kernels are tested by sees what it is there to see."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent

if not (ROOT / "csrc").exists() or shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
    pytest.skip("needs the sources and a C++ compiler", allow_module_level=True)


def run_planted(tmp_path: Path, mistake: str, sanitizer: str) -> subprocess.CompletedProcess:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    options = ["-std=c++20", "-g", "-O1", "-pthread", "-Wno-unknown-pragmas", f"-fsanitize={sanitizer}"]
    options += [f"-I{HERE / 'emulation'}", f"-I{ROOT / 'csrc'}", *([f"-D{mistake}"] if mistake else [])]
    program = tmp_path / "planted"
    subprocess.run([*compiler, *options, "-x", "c++", HERE / "emulation" / "planted.cu", "-o", program], check=True)
    return subprocess.run([program], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_a_right_kernel_is_clean(tmp_path, sanitizer):
    done = run_planted(tmp_path, "", sanitizer)
    assert (done.returncode, done.stdout) == (0, "turned around\n"), done.stderr
    assert not done.stderr


@pytest.mark.parametrize(
    ("mistake", "sanitizer", "report"),
    [
        ("OUT_OF_BOUNDS", "address,undefined", "heap-buffer-overflow"),
        ("OUT_OF_SHARED", "address,undefined", "use-after-poison"),
        ("MISSING_BARRIER", "thread", "data race"),
    ],
)
def test_a_planted_mistake_is_caught(tmp_path, mistake, sanitizer, report):
    done = run_planted(tmp_path, mistake, sanitizer)
    assert done.returncode != 0
    assert report in done.stderr
    assert len(set(re.findall(r"planted\.cu:\d+", done.stderr))) >= (2 if mistake == "MISSING_BARRIER" else 1)


def test_shared_memory_is_dynamic():
    """A static array would be of one thread alone in the emulation."""
    for path in sorted((ROOT / "csrc" / "cuda").iterdir()):
        found = re.findall(r"^(?!\s*//).*__shared__.*$", path.read_text(), re.MULTILINE)
        assert len(found) == (path.name == "device.h"), (path.name, found)
