"""Builds mobilemamba_kernels._C: every file of csrc/cpu once per instruction set, csrc/bindings once, with ninja."""

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
BINDINGS = sorted(Path("csrc/bindings").glob("*.cpp"))
KERNELS = sorted(Path("csrc/cpu").glob("*_kernel.cpp"))
X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = {"default": []}
if X86:
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]
    INSTRUCTION_SETS |= {"avx2": avx2, "avx512": [*avx2, *avx512, "-mprefer-vector-width=512"]}
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030a0000"]  # torch 2.11, Python 3.10
WHEEL_TAG = "cp310"


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

        sanitizers = os.environ.get("MOBILEMAMBA_SANITIZE", "")
        folder = ROOT / "build" / ("ninja-" + sanitizers.replace(",", "-") if sanitizers else "ninja")
        folder.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)

        common = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        common += ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # g++ 12: of vectors, its intrinsics
        common += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", f"-I{ROOT.resolve() / 'csrc'}"]
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
        if X86:
            torch_flags.append("-DMOBILEMAMBA_X86")

        edges, objects = [], []
        for source in BINDINGS:
            edges.append((source, f"{source.stem}.o", torch_flags))
        for source in KERNELS:
            for name, flags in INSTRUCTION_SETS.items():
                edges.append((source, f"{source.stem}.{name}.o", [f"-DCPU_CAPABILITY={name}", *flags]))
        lines = [
            "rule compile",
            f"  command = {join(*self.compiler_command, *common)} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {join(*self.compiler_command)} $in {join(*link)} -o $out",
        ]
        for source, obj, flags in edges:
            lines += [f"build {obj}: compile {escape(ROOT.resolve() / source)}", f"  flags = {join(*flags)}"]
            objects.append(obj)
        lines += [f"build {escape(output)}: link {' '.join(objects)}", ""]
        (folder / "build.ninja").write_text("\n".join(lines))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([*find_ninja(), "--quiet", "-C", str(folder), *jobs], check=True)

    def run(self):
        self.compiler_command = find_compiler()
        super().run()


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
    sources = [str(path) for path in (*BINDINGS, *KERNELS)]
    setup(
        ext_modules=[Extension("mobilemamba_kernels._C", sources, py_limited_api=True)],
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": WHEEL_TAG}},
    )
