"""Builds mobilemamba_kernels._C and, where there is a CUDA compiler, mobilemamba_kernels._C_cuda, with ninja.

_C: every file of csrc/cpu once per instruction set, and the bindings. _C_cuda: csrc/cuda by nvcc for every
architecture, and the bindings again. A binding whose name ends in _cpu or _cuda belongs to that library alone.
"""

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
KERNELS = sorted(Path("csrc/cpu").glob("*_kernel.cpp"))
CUDA_KERNELS = sorted(Path("csrc/cuda").glob("*_kernel.cu"))
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"  # unless TORCH_CUDA_ARCH_LIST names others
X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = {"default": []}
if X86:
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]
    INSTRUCTION_SETS |= {"avx2": avx2, "avx512": [*avx2, *avx512, "-mprefer-vector-width=512"]}
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030a0000"]  # torch 2.11, Python 3.10
WHEEL_TAG = "cp310"


def bindings(device):
    """The bindings of the library for a device, "cpu" or "cuda"."""
    other = {"cpu": "_cuda", "cuda": "_cpu"}[device]
    return sorted(path for path in Path("csrc/bindings").glob("*.cpp") if not path.stem.endswith(other))


def find_cuda():
    """Return the folder of the CUDA toolkit, or None where there is none or MOBILEMAMBA_CUDA=0."""
    wanted = os.environ.get("MOBILEMAMBA_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"mobilemamba: MOBILEMAMBA_CUDA must be 0, 1 or unset, but is {wanted!r}")
    if wanted == "0":
        return None
    home, nvcc = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    places = [home] if home else [nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    parts = ("bin/nvcc", "include/cuda_runtime.h")
    found = next((Path(place) for place in places if place and all((Path(place) / p).exists() for p in parts)), None)
    if found is None and wanted == "1":
        sys.exit(
            "mobilemamba: MOBILEMAMBA_CUDA=1 asks for the CUDA kernels, but no nvcc was found; install the CUDA "
            "toolkit or set CUDA_HOME to it, or unset MOBILEMAMBA_CUDA to install without them"
        )
    return found


def gencode(nvcc):
    """Return nvcc's options for the architectures in TORCH_CUDA_ARCH_LIST, or for those of ours that it knows."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    options = []
    for name in filter(None, (asked or CUDA_ARCHITECTURES).split(";")):
        number = name.removesuffix("+PTX").replace(".", "")
        if not asked and f"compute_{number}" not in known:
            continue
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def find_compiler():
    """Return the C++ compiler: $CXX, else the first usual one; None where there is none."""
    if os.environ.get("CXX"):
        compiler = shlex.split(os.environ["CXX"])
        if shutil.which(compiler[0]) is None:
            sys.exit(f"mobilemamba: CXX={os.environ['CXX']!r} names no program that can be run; correct or unset it")
        return compiler
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found and os.name == "posix" else None


def find_ninja():
    """Return the command that runs ninja: the Python package, which need not be on the PATH, or the program."""
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    if shutil.which("ninja"):
        return ["ninja"]
    sys.exit("mobilemamba: the C++ kernels are compiled with ninja, which is not installed; run `pip install ninja`")


class BuildKernels(build_ext):
    """Drives ninja, so that a file is compiled again only when it, a header of it or its flags change."""

    def build_extension(self, ext):
        from torch.utils.cpp_extension import include_paths, library_paths

        cuda = find_cuda() if ext.name.endswith("_cuda") else None
        sanitizers = os.environ.get("MOBILEMAMBA_SANITIZE", "")
        folder = "ninja" + ("-cuda" if cuda else "") + ("-" + sanitizers.replace(",", "-") if sanitizers else "")
        folder = ROOT / "build" / folder
        folder.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)

        csrc = f"-I{ROOT.resolve() / 'csrc'}"
        common = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        common += ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # g++ 12: of vectors, its intrinsics
        common += [
            "-Wno-missing-field-initializers",
            "-ffp-contract=fast",
            "-fno-math-errno",
            "-fno-trapping-math",
            csrc,
        ]
        link = ["-shared", *(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-ltorch"]
        if sys.platform == "darwin":
            link += ["-undefined", "dynamic_lookup"]
        if sanitizers:
            common += [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-g", "-O1"]
            link += [f"-fsanitize={sanitizers}"]
        headers = [*include_paths(), sysconfig.get_path("include")]
        # Error messages name csrc/…, not this machine's folders, and every folder gives the same library.
        common += [f"-ffile-prefix-map={path}/=" for path in (ROOT.resolve(), *headers)]
        torch_flags = [*STABLE_ABI, *(f"-isystem{path}" for path in headers)]
        rules = [("compile", [*self.compiler_command, *common])]
        edges = []
        if cuda:
            torch_flags += ["-DMOBILEMAMBA_DEVICE=CUDA", "-DMOBILEMAMBA_CUDA", f"-isystem{cuda / 'include'}"]
            nvcc = str(cuda / "bin" / "nvcc")
            rules.append(("nvcc", [nvcc, "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", csrc]))
            edges += [("nvcc", source, f"{source.stem}.o", gencode(nvcc)) for source in CUDA_KERNELS]
            link += [f"-L{cuda_stub(self.compiler_command, folder)}", "-Wl,--no-as-needed", "-ltorch_cuda"]
            link += [f"-L{cuda / 'lib64'}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
        else:
            torch_flags += ["-DMOBILEMAMBA_DEVICE=CPU"]
            if X86:
                torch_flags.append("-DMOBILEMAMBA_X86")
            for source in KERNELS:
                for name, flags in INSTRUCTION_SETS.items():
                    edges.append(("compile", source, f"{source.stem}.{name}.o", [f"-DCPU_CAPABILITY={name}", *flags]))
        for source in bindings("cuda" if cuda else "cpu"):
            edges.append(("compile", source, f"{source.stem}.o", torch_flags))
        lines = []
        for name, command in rules:
            lines += [f"rule {name}", f"  command = {join(*command)} $flags -MMD -MF $out.d -c $in -o $out"]
            lines += ["  depfile = $out.d", "  deps = gcc"]
        lines += ["rule link", f"  command = {join(*self.compiler_command)} $in {join(*link)} -o $out"]
        for rule, source, obj, flags in edges:
            lines += [f"build {obj}: {rule} {escape(ROOT.resolve() / source)}", f"  flags = {join(*flags)}"]
        lines += [f"build {escape(output)}: link {' '.join(obj for _, _, obj, _ in edges)}", ""]
        (folder / "build.ninja").write_text("\n".join(lines))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([*find_ninja(), "--quiet", "-C", str(folder), *jobs], check=True)

    def run(self):
        self.compiler_command = find_compiler()
        super().run()


def cuda_stub(compiler, folder):
    """Build an empty libtorch_cuda to link against, which a CPU build of torch lacks; return its folder.

    Where the library is loaded, torch has loaded the true one.
    """
    stub = folder / "stub"
    stub.mkdir(exist_ok=True)
    (stub / "stub.cpp").write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n')
    options = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-o", str(stub / "libtorch_cuda.so")]
    subprocess.run([*compiler, str(stub / "stub.cpp"), *options], check=True)
    return stub


def join(*arguments):
    """Quote for the shell and for ninja."""
    return shlex.join(map(str, arguments)).replace("$", "$$")


def escape(path):
    """Quote a path for ninja."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


if find_compiler() is None:
    print("mobilemamba: no C++ compiler found, so the operators are installed as plain PyTorch only", file=sys.stderr)
    setup()
else:
    libraries = {"_C": [*bindings("cpu"), *KERNELS]}
    if find_cuda():
        libraries["_C_cuda"] = [*bindings("cuda"), *CUDA_KERNELS]
    setup(
        ext_modules=[
            Extension(f"mobilemamba_kernels.{name}", [str(path) for path in sources], py_limited_api=True)
            for name, sources in libraries.items()
        ],
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": WHEEL_TAG}},
    )
