"""benchmarks/gpu/steady_decode.py: planted times, and the figures that docs/compile.md states."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "benchmarks" / "gpu" / "steady_decode.py"
RUNS = (
    ROOT / "benchmarks" / "gpu" / "runs" / "1x-nvidia-h100-80gb-hbm3" / "phi-2" / "torch-compile-bf16" / "concurrency"
)


@pytest.fixture(scope="module")
def steady_decode():
    spec = importlib.util.spec_from_file_location(FILE.stem, FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_times_in_which_every_stream_decodes_count(steady_decode):
    ms = 1_000_000
    first = np.array([10, 20, 1010, 1400]) * ms  # two streams, and the next two requests on them
    last = np.array([1000, 990, 1900, 1500]) * ms
    assert steady_decode.spans(first, last, 2) == [(20 * ms, 990 * ms)]  # 1400 to 1500 is too short
    assert steady_decode.spans(first, last, 3) == []


def test_the_documented_figures_are_those_of_the_kept_runs(steady_decode):
    rates = [steady_decode.steady(folder)[0] for folder in sorted(RUNS.glob("*"))]
    text = (ROOT / "docs" / "compile.md").read_text(encoding="utf-8")
    assert all(f"{rate:,.0f}" in text for rate in rates if rate > 20_000) and max(rates) > 20_000
