"""Building from the source tree: what is compiled when, and what goes into the archives."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def setup_py(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run ``setup.py`` of ``folder``."""
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source tree with one small kernel for the many of csrc, on a CPU and on a GPU."""
    tree = tmp_path / "tree"
    without = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("mobilemamba", "mobilemamba_kernels", "csrc/include"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=without)
    for file in (
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "csrc/bindings/module_cpu.cpp",
        "csrc/bindings/module_cuda.cpp",
    ):
        (tree / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tree / file)
    (tree / "csrc/cpu").mkdir()
    (tree / "csrc/cpu/small_kernel.cpp").write_text('#include "include/small.h"\n')
    (tree / "csrc/include/small.h").write_text("")
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/small_kernel.cu").write_text("__global__ void small_kernel() {}\n")
    return tree


def test_compiles_again_only_what_changed(tree):
    def build() -> dict[str, int]:
        done = setup_py(tree, "build_ext", "--inplace")
        assert done.returncode == 0, done.stderr
        return {path.name: path.stat().st_mtime_ns for path in (tree / "build/ninja").glob("*.o")}

    first = build()
    assert "module_cpu.o" in first
    assert "small_kernel.default.o" in first
    assert build() == first
    (tree / "csrc/include/small.h").write_text("// changed\n")
    changed = {name for name, time in build().items() if time != first[name]}
    assert changed == {name for name in first if name.startswith("small_kernel.")}


def test_wheel_serves_every_python(tree):
    done = setup_py(tree, "bdist_wheel")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "mobilemamba_kernels/_C.abi3.so" in names
    assert {"mobilemamba/py.typed", "mobilemamba_kernels/py.typed"} <= set(names)


def test_no_compiler_makes_a_python_wheel_and_says_so(tree, tmp_path):
    done = setup_py(tree, "bdist_wheel", PATH=str(tmp_path), CXX="")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler found, so the operators are installed as plain PyTorch only" in done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")


def test_a_compiler_that_does_not_exist_is_named(tree):
    done = setup_py(tree, "bdist_wheel", CXX="no-such-compiler -O2")
    assert done.returncode != 0
    assert "mobilemamba: CXX='no-such-compiler -O2' names no program that can be run" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_kernels_are_in_the_same_wheel(tree):
    """Built without a GPU, and importable beside a torch without CUDA's libraries or with them."""
    done = setup_py(tree, "bdist_wheel", TORCH_CUDA_ARCH_LIST="9.0")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    assert "mobilemamba_kernels/_C_cuda.abi3.so" in zipfile.ZipFile(wheel).namelist()


def test_cuda_can_be_left_out(tree):
    done = setup_py(tree, "bdist_wheel", MOBILEMAMBA_CUDA="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    assert not any("_C_cuda" in name for name in zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"MOBILEMAMBA_CUDA": "1", "CUDA_HOME": "/nowhere"}, "asks for the CUDA kernels, but no nvcc was found"),
        ({"MOBILEMAMBA_CUDA": "yes"}, "MOBILEMAMBA_CUDA must be 0, 1 or unset, but is 'yes'"),
    ],
)
def test_cuda_that_cannot_be_is_refused_in_a_sentence(tree, environment, sentence):
    done = setup_py(tree, "bdist_wheel", **environment)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git's list of files is what the archive is compared with")
def test_source_distribution_is_complete(tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in filter(lambda name: (ROOT / name).exists(), tracked):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    done = setup_py(tmp_path / "tree", "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "tree/dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        packed = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    assert set(tracked) <= packed, f"not in the archive: {sorted(set(tracked) - packed)}; name them in MANIFEST.in"
