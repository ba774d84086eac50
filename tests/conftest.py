"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from loadgen.core.scenario import Kind, Limits, Minimums, Scenario, Seeds

HERE = Path(__file__).parent
ALONE = (HERE / "loadgen" / "edge", HERE / "fakes", HERE / "test_main_job.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(item.path.is_relative_to(place) for place in ALONE):
            item.add_marker("alone")


def _load(path: Path) -> ModuleType:
    """Import a test double by path: there are no packages under tests/, or they would shadow the real ones."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def _fake_triton_process() -> Iterator[object]:
    server = _load(HERE / "fakes" / "triton_server.py").start()
    yield server
    server.stop()


@pytest.fixture
def fake_triton(_fake_triton_process):  # type: ignore[no-untyped-def]
    """A fake Triton in its own process, with an empty plan and log. See tests/fakes/triton_server.py."""
    _fake_triton_process.plan({})
    return _fake_triton_process


@pytest.fixture
def scenario():
    """Makes a scenario without limits and minimums, but for what a test sets."""

    def make(**changes: Any) -> Scenario:
        base: dict[str, Any] = {
            "name": "test", "kind": Kind.SERVER, "preset": "smoke", "rules": "v6.1", "benchmark": "llama3.1-8b",
            "percentile": 0.99, "limits": Limits(), "minimums": Minimums(), "mlperf": Minimums(), "seeds": Seeds(1, 2, 3),
        }  # fmt: skip
        return Scenario(**{**base, **changes})

    return make
