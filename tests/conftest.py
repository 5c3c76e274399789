"""Options and fixtures of every test."""

import importlib
import os
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

from mobilemamba_kernels import _library
from mobilemamba_kernels.backends import INTERPRETED, forced_backend

hypothesis.settings.register_profile(
    "mobilemamba",
    max_examples=int(os.environ.get("MOBILEMAMBA_FUZZ_EXAMPLES", "50")),
    deadline=None,  # shared machines pause
    suppress_health_check=list(hypothesis.HealthCheck),
    derandomize=True,
    print_blob=True,
)
hypothesis.settings.load_profile("mobilemamba")

HAS_INSTRUCTION_SETS = not _library.COMPILED_ERROR and forced_backend() in (None, "cpu")
INSTRUCTION_SETS = _library._C.cpu_capabilities() if HAS_INSTRUCTION_SETS else ["none"]
"""Those that can be used here; "none" where the references or Triton's interpreter run."""

BEST = _library.cpu_capability() if HAS_INSTRUCTION_SETS else "none"
"""The one that the processor gets."""


def _scan_slices(self, input):
    """What triton.runtime.interpreter.ScanOps.generic_scan computes, a whole slice of the axis at a time.

    The original calls the function once an element, in Python: minutes for a tile. The function is elementwise, so that
    slices do as well.
    """
    arrays = [np.moveaxis(t.handle.data, self.axis, 0) for t in input]
    results = [array.copy() for array in arrays]
    for i in range(1, len(arrays[0])):
        slices = [
            self.to_tensor(array[j], t.dtype)
            for found, j in ((results, i - 1), (arrays, i))
            for array, t in zip(found, input, strict=True)
        ]
        combined = self.combine_fn.fn(*slices)
        for result, value in zip(results, combined if isinstance(combined, tuple) else (combined,), strict=True):
            result[i] = value.handle.data
    return [
        self.to_tensor(np.ascontiguousarray(np.moveaxis(result, 0, self.axis)), t.dtype)
        for result, t in zip(results, input, strict=True)
    ]


def _correct_interpreter() -> None:
    interpreter = importlib.import_module("triton.runtime.interpreter")
    interpreter.ScanOps.generic_scan = _scan_slices
    original = interpreter.InterpreterBuilder.cast_impl

    def cast(self, src, dst_type):
        """The original cuts float32 off where bfloat16 ends; processors round."""
        if (str(src.dtype.scalar), str(dst_type.scalar)) != ("fp32", "bf16"):
            return original(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16)
        return interpreter.TensorHandle(rounded.numpy().view(np.uint16), dst_type.scalar)

    interpreter.InterpreterBuilder.cast_impl = cast


if INTERPRETED:
    _correct_interpreter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the exhaustive cases too (marked `full`)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    exhaustive = [item for item in items if item.get_closest_marker("full")]
    items[:] = [item for item in items if not item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=exhaustive)


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test's other parameters change less often than the instruction set, for which the truth is the same."""
    if "instruction_set" in metafunc.fixturenames:
        metafunc.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)


@pytest.fixture
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set that the C++ kernels use in the test, one of those that they have here."""
    if request.param == "none":
        yield request.param
        return
    before = _library._C.cpu_capability()
    _library._C.set_cpu_capability(request.param)
    yield request.param
    _library._C.set_cpu_capability(before)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Gives PyTorch its number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
