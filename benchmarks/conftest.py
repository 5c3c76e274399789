"""Notes the machine in the results, and refuses to time the fallback."""

from typing import Any

import pytest

from mobilemamba import bench


def pytest_collection_modifyitems() -> None:
    try:
        bench.refuse_fallback()
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["mobilemamba"] = bench.environment()
