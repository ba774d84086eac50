"""The bench's last words, for reasons that the verdict's own code gives."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from rows import make_rows

import tritonmark
from loadgen.core.metrics import summarise
from loadgen.core.scenario import Limits
from loadgen.core.verdict import Audit, WorkerAudit, judge
from loadgen.edge import bench_end
from loadgen.edge.bench_end import OPTION, last_lines

MS, S = 1_000_000, 1_000_000_000
OPTIONS = [name for parameter in tritonmark.bench.params for name in parameter.opts]
PAGE = Path("results/report.html")
WORKER = {"worker": 0, "requests": 10, "lateness_p50_ns": 0, "lateness_p99_ns": 0, "lateness_max_ns": 0,
          "loop_lag_p50_ns": 0, "loop_lag_p99_ns": 0, "loop_lag_max_ns": 0, "cpu_share": 0.1, "max_rss_bytes": 1}  # fmt: skip


def judged(scenario, rows, limits=None, **changes):
    """What a sealed run says of itself, as the bench reads it."""
    resolved = scenario(limits=limits or Limits())
    summary, measured = summarise([make_rows(rows)], resolved)
    audit = Audit((WorkerAudit(**WORKER | changes),), 1, len(rows), len(rows), 10.0)
    verdict = judge(summary, measured, resolved, audit)
    return SimpleNamespace(valid=verdict.valid, scenario=resolved, document={"verdict": verdict.to_json()})


def ok(count=10):
    return [{"due": i * S, "chunks": [i * S + 10 * MS, i * S + 20 * MS], "tokens": [1, 1]} for i in range(count)]


CASES = {
    "client_lag": ({"loop_lag_p99_ns": 37 * MS}, ok(), None),
    "client_late": ({"lateness_p99_ns": 900 * MS}, ok(), None),
    "client_cpu": ({"cpu_share": 0.97}, ok(), None),
    "ttft_limit": ({}, ok(), Limits(ttft_ns=1)),
    "shed": ({}, [*ok(), {"due": 0, "outcome": "shed"}], None),
    "unfinished": ({}, [*ok(), {"due": 0, "outcome": "cut"}], None),
}


@pytest.mark.parametrize("code", CASES)
@pytest.mark.parametrize("others", (None, 0.0, 0.9))
def test_an_invalid_run_is_explained_and_mended_in_what_bench_has(scenario, code, others):
    changes, rows, limits = CASES[code]
    run = judged(scenario, rows, limits, **changes)
    lines = last_lines([run], PAGE, OPTIONS, others)
    assert lines[0] == "1 of 1 runs INVALID:"
    assert any(f"[{code}]" in line and len(line.split()) > 5 for line in lines)
    advice = [line for line in lines if line.startswith("  → ")]
    assert advice and "client is the bottleneck" not in "\n".join(lines)
    for line in advice:
        assert " run" in line or set(OPTION.findall(line)) <= set(OPTIONS), line
    assert ("other programs used 90 %" in "\n".join(lines).replace("90%", "90 %")) == (
        code.startswith("client") and others == 0.9
    )
    assert any(line.startswith("Exit code 3 (make says 'Error 3')") for line in lines)
    assert str(PAGE) in lines[-1]


def test_the_same_advice_is_given_once(scenario):
    run = judged(scenario, ok(), loop_lag_p99_ns=37 * MS, cpu_share=0.97)
    lines = last_lines([run, run, run], PAGE, OPTIONS, 0.9)
    assert len([line for line in lines if line.startswith("  → ")]) == 1
    assert len([line for line in lines if "[client_" in line]) == 6


def test_valid_runs_have_nothing_to_explain(scenario):
    assert len(last_lines([judged(scenario, ok())], PAGE, OPTIONS, 0.9)) == 1


def test_the_command_is_one_that_can_be_typed(monkeypatch, tmp_path):
    """After `make`, no shell finds `tritonmark`."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    monkeypatch.setattr(bench_end.sys, "executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    assert bench_end.command().endswith("python -m tritonmark")
    (tmp_path / ".venv/bin/tritonmark").touch(mode=0o755)
    assert bench_end.command() == ".venv/bin/tritonmark"
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert bench_end.command() == str(tmp_path / ".venv/bin/tritonmark")
    monkeypatch.setenv("PATH", str(tmp_path / ".venv/bin"))
    assert shutil.which("tritonmark") and bench_end.command() == "tritonmark"


def test_the_exit_codes_are_in_the_help():
    assert re.search(r"Exit code:\s+0.*3 at least one is INVALID", " ".join(tritonmark.bench.help.split()))
