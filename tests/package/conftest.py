from typing import Any

import pytest

from loadgen.core.scenario import Kind, Limits, Minimums, Scenario, Seeds


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
