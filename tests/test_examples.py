"""Every script in examples/ runs."""

import runpy
import sys
from pathlib import Path

import pytest

from mobilemamba_kernels import unpatch

ARGUMENTS = {"sample_images": ["images", "--size", "8", "--shards", "--parquet"]}
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
if not EXAMPLES:
    pytest.skip("needs the source tree", allow_module_level=True)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, capsys, tmp_path, monkeypatch):
    for name, package in (("transformers", "transformers"), ("sample_images", "lightning")):
        if name in path.stem:
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), *ARGUMENTS.get(path.stem, [])])
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        unpatch()
    assert capsys.readouterr().out
