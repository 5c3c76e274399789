"""Every script in examples/ runs."""

import runpy
from pathlib import Path

import pytest

from mobilemamba_kernels import unpatch

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
if not EXAMPLES:
    pytest.skip("needs the source tree", allow_module_level=True)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, capsys):
    if "transformers" in path.stem:
        pytest.importorskip("transformers")
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        unpatch()
    assert capsys.readouterr().out
