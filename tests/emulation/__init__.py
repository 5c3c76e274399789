"""Builds and loads the CUDA kernels for the CPU, from the files that nvcc compiles.

``load()`` puts them in the place of ``mobilemamba_kernels._C``, so that every test of the operators runs on them.
"""

import fcntl
import importlib.machinery
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030a0000"]


def compile_all(folder: Path, output: Path, sources: list[Path], flags: list[str], link: list[str]) -> Path:
    """Compile the sources, CUDA ones too, with the C++ compiler and the emulation's headers, and link ``output``."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    folder.mkdir(parents=True, exist_ok=True)
    common = ["-std=c++20", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-pthread"]
    common += ["-Wno-maybe-uninitialized", "-ffp-contract=fast", "-fno-strict-aliasing"]  # the first as in setup.py
    common += [f"-I{HERE}", f"-I{ROOT / 'csrc'}", *flags]
    lines = [
        "rule compile",
        f"  command = {shlex.join([*compiler, *common])} -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shlex.join([*compiler, *common])} $in {shlex.join(link)} -o $out",
    ]
    objects = [f"{source.stem}.o" for source in sources]
    lines += [f"build {obj}: compile {source}" for obj, source in zip(objects, sources, strict=True)]
    lines += [f"build {output}: link {' '.join(objects)}", ""]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitizer
    with open(folder / "lock", "w") as lock:  # pytest's processes build once
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(lines))
        subprocess.run([sys.executable, "-m", "ninja", "--quiet", "-C", str(folder)], check=True, env=environment)
    return output


def build(sanitizer: str = "") -> Path:
    """Build the library; ``sanitizer`` is "", "address,undefined" or "thread"."""
    folder = ROOT / "build" / ("emulation-" + sanitizer.replace(",", "-")).rstrip("-")
    headers = [*include_paths(), sysconfig.get_path("include")]
    flags = [*STABLE_ABI, "-DMOBILEMAMBA_DEVICE=CPU", *(f"-isystem{path}" for path in headers)]
    flags += [f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer"] if sanitizer else []
    link = [f"-fsanitize={sanitizer}"] if sanitizer else []
    flags += ["-fno-sanitize-recover=all"] if "undefined" in sanitizer else []
    bindings = [path for path in (ROOT / "csrc" / "bindings").glob("*.cpp") if not path.stem.endswith("_cpu")]
    sources = [path for path in bindings if path.stem != "module_cuda"]
    sources += [*(ROOT / "csrc" / "cuda").glob("*_kernel.cu"), HERE / "module.cpp"]
    link += ["-shared", *(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-ltorch"]
    return compile_all(folder, folder / "_C.abi3.so", sorted(sources), flags, link)


def load(path: Path) -> None:
    """Import the library as ``mobilemamba_kernels._C``; to be called before that package is imported."""
    name = "mobilemamba_kernels._C"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    loader.exec_module(sys.modules[name])
