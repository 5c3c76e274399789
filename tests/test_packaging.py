"""What an installed package promises, whichever way it was installed."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import mobilemamba
import mobilemamba_kernels


def run_python(program: str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *options, "-c", program], capture_output=True, text=True, timeout=300)


def test_import_needs_torch_numpy_and_einops_alone():
    optional = ["click", "rich", "PIL", "timm", "torchvision", "sklearn", "matplotlib", "safetensors", "triton"]
    optional.append("torch._dynamo")  # torch.compile's own import takes seconds, and brings triton
    done = run_python(
        f"import sys, torch; before = set(sys.modules); import mobilemamba; "
        f"print(sorted(set({optional}) & (set(sys.modules) - before)))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_works_without_triton():
    done = run_python(
        "import sys; sys.modules['triton'] = None; import mobilemamba; mobilemamba.create_model('mobilemamba_t2')"
    )
    assert done.returncode == 0, done.stderr


def test_without_the_compiled_part_it_warns_once_and_reports_why():
    done = run_python(
        "import sys; sys.modules['mobilemamba_kernels._C'] = None; "
        "import mobilemamba, mobilemamba_kernels; print(mobilemamba_kernels.report())"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "plain PyTorch" in done.stderr
    assert "C++17 compiler" in done.stderr
    header, *rows = done.stdout.splitlines()
    assert "why" in header
    assert rows
    assert all("the C++ kernels are not loaded" in row for row in rows if " cpu " in row)


@pytest.mark.parametrize("package", [mobilemamba, mobilemamba_kernels])
def test_is_typed(package):
    assert (Path(package.__file__).parent / "py.typed").exists()


def test_metadata():
    metadata = importlib.metadata.metadata("mobilemamba")
    assert metadata["Version"] == mobilemamba_kernels.__version__
    assert metadata["License-Expression"] == "MIT"
    required = [line for line in importlib.metadata.requires("mobilemamba") or [] if "extra ==" not in line]
    assert sorted(required) == ["click", "einops", "numpy", "pillow>=10.1", "rich", "torch>=2.11"]
    scripts = importlib.metadata.entry_points(group="console_scripts", name="mobilemamba")
    assert [script.value for script in scripts] == ["mobilemamba.cli:main"]
