"""``python -m gpu``: the parts that ``benchmarks/gpu.sh`` puts together."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gpu import DRY_RUN, stand_in


def main() -> None:
    """Parse the command line and run a part."""
    parser = argparse.ArgumentParser(prog="gpu", description="Measurements on a GPU.")
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("operators", "networks"):
        part = parts.add_parser(name, help=f"time the {name}")
        part.add_argument("--output", type=Path, required=True, help="folder for the JSON lines")
        part.add_argument("--seconds", type=float, default=240, help="for the whole; what does not fit is listed")
        part.add_argument("--dtype", nargs="+", default=_DTYPES[name], help="of the activations, the first one first")
    parts.choices["operators"].add_argument("--only", default="", help="a part of a case's name")
    parts.choices["networks"].add_argument("--model", nargs="+", default=["mobilemamba_s6"])
    parts.choices["networks"].add_argument("--batch", type=int, nargs="+", help="images at once")
    part = parts.add_parser("exercise", help="run every kernel once, for a sanitizer")
    part.add_argument("backend", choices=["cuda", "triton"])
    part.add_argument("--seconds", type=float, default=300)
    part = parts.add_parser("charts", help="draw what was measured")
    part.add_argument("folder", type=Path)
    part = parts.add_parser("kernels", help="list S6's kernels with their times")
    part.add_argument("--output", type=Path, required=True, help="folder for the list")
    part = parts.add_parser("mamba-ssm", help="build mamba-ssm's extension from its source distribution")
    part.add_argument("archive", type=Path)
    part.add_argument("folder", type=Path)
    arguments = parser.parse_args()

    if arguments.part == "charts":
        from gpu.charts import draw

        try:
            print(*draw(arguments.folder), sep="\n")
        except ModuleNotFoundError as error:
            print(f"gpu: no charts here, because {error.name} is not installed; draw them elsewhere: "
                  f"PYTHONPATH=benchmarks python -m gpu charts {arguments.folder}")  # fmt: skip
        return
    stand_in()
    if arguments.part == "exercise":
        from gpu.exercise import exercise

        print(exercise(arguments.backend, arguments.seconds))
    elif arguments.part == "kernels":
        from gpu.kernels import list_kernels

        (arguments.output / "s6-kernels.txt").write_text(list_kernels(), encoding="utf-8")
    elif arguments.part == "mamba-ssm":
        from gpu.engines import build_mamba_ssm

        print(build_mamba_ssm(arguments.archive, arguments.folder))
    else:
        from gpu import networks, operators
        from gpu.device import Results

        results = Results(arguments.output / f"{arguments.part}.jsonl", arguments.seconds)
        if arguments.part == "operators":
            operators.measure(results, arguments.dtype, arguments.only)
        else:
            batches = arguments.batch or ((1, 2) if DRY_RUN else networks.BATCHES)
            networks.measure(results, arguments.dtype, arguments.model, batches)


_DTYPES = {
    "operators": ["bfloat16", "float32", "float16"],
    "networks": ["bfloat16", "float16", "tf32", "float32"],
}

if __name__ == "__main__":
    sys.exit(main())
