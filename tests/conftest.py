"""Options and fixtures of every test."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from mobilemamba_kernels import _library

hypothesis.settings.register_profile(
    "mobilemamba",
    max_examples=int(os.environ.get("MOBILEMAMBA_FUZZ_EXAMPLES", "50")),
    deadline=None,  # shared machines pause
    suppress_health_check=list(hypothesis.HealthCheck),
    derandomize=True,
    print_blob=True,
)
hypothesis.settings.load_profile("mobilemamba")

INSTRUCTION_SETS = ["none"] if _library.COMPILED_ERROR else _library._C.cpu_capabilities()
"""Those that can be used here; "none" where the references run."""

BEST = INSTRUCTION_SETS[0] if _library.COMPILED_ERROR else _library.cpu_capability()
"""The one that the processor gets."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the exhaustive cases too (marked `full`)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    exhaustive = [item for item in items if item.get_closest_marker("full")]
    items[:] = [item for item in items if not item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=exhaustive)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for each instruction set that the C++ kernels have here."""
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
