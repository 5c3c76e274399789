"""Compile every GPU kernel ahead of time, without a GPU, and tell what each takes of a processor.

``python benchmarks/compile_kernels.py cuda|triton`` prints a JSON line a kernel: registers, spilled bytes, shared
memory where it is fixed, and the warps that fit a processor by registers (theoretical occupancy). It exits with 1 where
a kernel spills. ``python benchmarks/compile_kernels.py table FILE…`` makes a table of such lines.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = [
    *("selective_scan", "bidirectional_selective_scan", "ss2d_bidirectional"),
    *("cross_scan", "cross_merge"),
    *("haar_dwt2d", "haar_idwt2d", "wavelet_depthwise_conv2d", "depthwise_conv2d_act"),
    *("conv2d_act", "pointwise_conv2d_act", "feed_forward", "squeeze_excite"),
    *("causal_conv1d", "causal_conv1d_update", "selective_state_update"),
]


def occupancy(registers: int, arch: int) -> int:
    """Warps that a multiprocessor's 65536 registers hold, given out in units of 256 a warp."""
    most = 48 if arch in (86, 89, 120) else 64
    return min(most, 65536 // (-(-registers * 32 // 256) * 256) // 4 * 4)


def resources(report: str) -> Iterator[tuple[str, dict[str, int]]]:
    """(mangled name, registers and spills) of each entry in what ``ptxas -v`` printed."""
    name = ""
    spilled = 0
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            name = found[1]
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(found[1]) + int(found[2])
        elif found := re.search(r"Used (\d+) registers", line):
            yield name, {"registers": int(found[1]), "spilled_bytes": spilled}


def demangle(names: list[str]) -> dict[str, str]:
    """Names as C++ writes them, without namespaces and arguments."""
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    done = [re.sub(r"\(mobilemamba::(\(anonymous namespace\)::)?\w+\)(?=\d)", "", name) for name in done]  # of an enum
    short = [re.sub(r"\(mobilemamba::.*|\(anonymous namespace\)::|mobilemamba::|^void ", "", name) for name in done]
    return dict(zip(names, short, strict=True))


def compile_cuda(archs: list[int], match: str) -> Iterator[dict[str, Any]]:
    """Every kernel of csrc/cuda."""
    for source in sorted((ROOT / "csrc" / "cuda").glob("*_kernel.cu")):
        if match not in source.stem:
            continue
        for arch in archs:
            command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", f"-I{ROOT / 'csrc'}", "-Xptxas=-v"]
            command += ["-c", str(source), "-o", "/dev/null"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{source.name} does not compile for sm_{arch}: {done.stderr[-2000:]}")
            entries = list(resources(done.stderr))
            names = demangle([name for name, _ in entries])
            for name, used in entries:
                row = {"backend": "cuda", "kernel": names[name], "file": source.name, "arch": arch, **used}
                yield row | {"warps": occupancy(used["registers"], arch)}


def compile_triton(archs: list[int], *matches: str) -> Iterator[dict[str, Any]]:
    """Every configuration that the Triton launchers list."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mobilemamba_kernels.triton import _launch

    triton.knobs.compilation.always_compile = True  # what comes from the cache has no log
    triton.knobs.nvidia.dump_ptxas_log = True
    seen = set()
    for arch, operator in itertools.product(archs, OPERATORS):
        _launch.compiled_for = arch
        module = importlib.import_module(f"mobilemamba_kernels.triton.{operator}")
        for name, kernel, signature, constants, multiples, options in module.configurations():
            if not all(match in name for match in matches):
                continue
            key = (kernel.fn.__name__, str(signature), str(constants), str(multiples), str(options), arch)
            if key in seen:
                continue
            seen.add(key)
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=multiples)
            with contextlib.redirect_stdout(io.StringIO()) as log:
                compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            ((_, used),) = resources(log.getvalue())
            warps = options["num_warps"]
            row = {"backend": "triton", "kernel": name, "arch": arch, "num_warps": warps, **used}
            row["shared_bytes"] = compiled.metadata.shared
            yield row | {"warps": occupancy(used["registers"], arch) // warps * warps}


def name_of(row: dict[str, Any]) -> str:
    """A kernel's, without what Triton compiled it for."""
    if row["backend"] == "cuda":
        return f"cuda {row['file'].removesuffix('_kernel.cu')}: {row['kernel']}"
    operator, kernel = row["kernel"].split("-")[0], row["kernel"].rsplit("-", 1)[1].strip("_")
    return f"triton {operator}: {kernel} ({row['num_warps']} warps)"


def cell(rows: list[dict[str, Any]]) -> str:
    """The most of registers, the fewest warps, the most of shared memory and of spills."""
    if not rows:
        return ""
    registers, shared, spilled = (
        max(row.get(k, 0) for row in rows) for k in ("registers", "shared_bytes", "spilled_bytes")
    )
    memory = f", {shared} bytes" if "shared_bytes" in rows[0] else ""
    spills = f", {spilled} bytes spilled" if spilled else ""
    return f"{registers} ({min(row['warps'] for row in rows)}{memory}{spills})"


def table(files: list[Path]) -> str:
    """Markdown of the lines in files: the worst of each kernel on each architecture."""
    compiled = defaultdict(list)
    for file in files:
        for row in map(json.loads, file.read_text().splitlines()):
            compiled[name_of(row), row["arch"]].append(row)
    archs = sorted({arch for _, arch in compiled})
    lines = ["| kernel | compiled | " + " | ".join(f"sm_{arch}" for arch in archs) + " |"]
    lines.append("|---" * (len(archs) + 2) + "|")
    for name in sorted({name for name, _ in compiled}):
        cells = [cell(compiled[name, arch]) for arch in archs]
        lines.append(f"| {name} | {sum(len(compiled[name, arch]) for arch in archs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=("cuda", "triton", "table"))
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--match", default="", help="only kernels with this in their name (Triton) or file's (CUDA)")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    given = parser.parse_args()
    if given.backend == "table":
        print(table(given.files))
        return 0
    spilled = 0
    for row in {"cuda": compile_cuda, "triton": compile_triton}[given.backend](given.arch, given.match):
        line = json.dumps(row)
        print(line, flush=True)
        if given.output:
            with given.output.open("a") as file:
                file.write(line + "\n")
        spilled += row["spilled_bytes"] > 0
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
