"""Load a language model that Triton serves, under an MLPerf scenario.

    locust -f loadgen/llm.py --host http://127.0.0.1:8000 --model phi-2-tiny \
        --scenario server --target-qps 4 --run-time 30s --headless

Add `--processes 2` for two load workers, drop `--headless` for the web UI, or use `--master` and `--worker`.
"""

import sys
from pathlib import Path

if (checkout := str(Path(__file__).resolve().parents[1])) not in sys.path:
    sys.path.append(checkout)  # it need not be installed, and Locust may be started from any folder

from loadgen.edge.openloop import IdleUser


class LLMUser(IdleUser):
    """Keeps Locust's user count above zero; the scenario decides when requests are sent."""
