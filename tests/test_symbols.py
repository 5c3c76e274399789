"""Kernel objects share no code: a function merged by the linker between instruction sets could run where it cannot."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OBJECTS = sorted((ROOT / "build" / "ninja").glob("*.*.o"))


def defined_symbols(path):
    """(type, demangled name) of each external symbol that an object or a library defines."""
    printed = subprocess.run(
        ["nm", "--extern-only", "--defined-only", "--demangle", path], check=True, capture_output=True, text=True
    )
    return [line.split(maxsplit=2)[1:] for line in printed.stdout.splitlines()]


@pytest.fixture(scope="module", autouse=True)
def built():
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    if not list((ROOT / "mobilemamba_kernels").glob("_C*")):
        pytest.skip("the compiled part is not built in this tree")
    assert OBJECTS, "the compiled part is in the tree but its objects are not: run python setup.py build_ext --inplace"


def test_every_kernel_is_there():
    sources = {path.name.removesuffix(".cpp") for path in (ROOT / "csrc" / "cpu").glob("*_kernel.cpp")}
    assert {path.name.split(".")[0] for path in OBJECTS} >= sources


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_only_entries_are_external(path):
    capability = path.name.split(".")[1]
    entry = re.compile(rf"mobilemamba::cpu_{capability}::\w+\(mobilemamba::\w+ const&, long, long\)")
    symbols = defined_symbols(path)
    assert symbols
    for kind, name in symbols:
        assert kind == "T", f"{name} is a symbol of type {kind}, which the linker may merge with another's"
        assert entry.fullmatch(name), f"{name} is external but no kernel"
