"""The front door as a user meets it: the main job on real parts, and what it says to bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

import tritonmark
from loadgen.edge import store

COMMAND = [sys.executable, "-m", "tritonmark"]


def call(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=timeout, check=False)


def leftovers(marker: str) -> list[str]:
    """Processes whose command line names `marker`."""
    found = []
    for process in psutil.process_iter(["cmdline", "pid"]):
        line = " ".join(process.info["cmdline"] or [])
        if marker in line and process.pid != os.getpid() and "pytest" not in line:
            found.append(line)
    return found


@pytest.mark.live
def test_bench_ends_with_three_sealed_runs_a_table_and_a_page(tmp_path):
    done = call("bench", "--results", str(tmp_path / "r"), "--run-time", "3s", "--repository", str(tmp_path / "models"))
    assert done.returncode in (0, 3), done.stderr + done.stdout
    runs = [store.load(p.parent) for p in (tmp_path / "r").rglob("run.json")]
    assert sorted(r.scenario.name for r in runs) == ["offline", "server", "single_stream"]
    assert (done.returncode == 0) == all(r.valid for r in runs)
    for run in runs:
        store.verify_all(run)
        assert run.document["backend"] == "torch-eager"
        assert run.document["weights"] == "synthetic"
        assert run.summary["failed"] == 0
        assert run.summary["tokens_out"] == 64 * run.summary["completed"] > 0
        assert "not MLPerf length" in run.document["verdict"]["headline"] or not run.valid
        assert str(run.folder) in done.stdout
        assert "min_duration" not in [reason["code"] for reason in run.document["verdict"]["reasons"]]
    for word in ("TTFT", "TPOT", "E2E", "tokens/s", "synthetic"):
        assert word in done.stdout
    page = (tmp_path / "r" / "report.html").read_text()
    assert all(r.document["run_id"] in page for r in runs)
    assert leftovers(str(tmp_path)) == []


@pytest.mark.live
@pytest.mark.slow
def test_ctrl_c_in_the_bench_leaves_a_sealed_run_and_no_process(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "bench", "--results", str(tmp_path / "r"), "--scenario", "single_stream", "--run-time", "60s",
         "--repository", str(tmp_path / "models")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    for _ in range(600):
        if list((tmp_path / "r").rglob("single-stream/*/records.arrows")):
            break
        time.sleep(0.1)
    time.sleep(3)
    found = [g for p in (tmp_path / "r").glob(".prometheus/targets/*.json") for g in json.loads(p.read_text())]
    (triton,) = (g["targets"][0] for g in found if g["labels"]["job"] == "triton")
    with urllib.request.urlopen(f"http://{triton}/metrics", timeout=5) as page:
        assert b'nv_inference_request_success{model="phi-2-tiny"' in page.read()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    (run,) = [store.load(p.parent) for p in (tmp_path / "r").rglob("run.json")]
    assert process.returncode == 3, output
    assert run.document["verdict"]["reasons"][0]["code"] == "cut_off"
    assert leftovers(str(tmp_path)) == [] and not list((tmp_path / "r").glob(".prometheus/targets/*"))


def test_run_and_report_against_a_server(fake_triton, tmp_path):
    fake_triton.plan({"ttft_ms": 5, "itl_ms": 1, "server": {"models": ["fake"]}})
    done = call("run", "single-stream", "--host", fake_triton.url, "--model", "fake", "--run-time", "1s",
                "--output-tokens", "4", "--results", str(tmp_path))  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    folder = re.search(r"sealed in (.+)", done.stdout)[1]
    assert store.load(Path(folder)).summary["failed"] == 0
    assert "TTFT" in done.stdout
    for kind in ("text", "markdown", "json"):
        assert "TTFT" in call("report", folder, "--format", kind).stdout or kind == "json"
    assert json.loads(call("report", folder, "--format", "json").stdout)


BAD = [
    (["run", "nothing", "--target-qps", "1"], "'nothing'"),
    (["run", "server", "--target-qps", "0", "--host", "HOST", "--model", "fake"], "--target-qps is 0.0; it must be a number above 0"),
    (["run", "server", "--target-qps", "nan", "--host", "HOST", "--model", "fake"], "--target-qps is nan"),
    (["run", "single_stream", "--host", "HOST", "--model", "missing"], "missing"),
    (["run", "single_stream", "--host", "http://127.0.0.1:9", "--model", "fake"], "nothing listens at"),
    (["run", "single_stream", "--host", "nonsense", "--model", "fake"], "http://HOST:PORT"),
    (["export", "gpt-17"], "gpt-17"),
    (["export", "phi-2-tiny", "--weights", "/nowhere"], "/nowhere"),
    (["serve", "--repository", "/nowhere"], "/nowhere"),
    (["report", "/nowhere"], "/nowhere"),
    (["bench", "--scenario", "sserver"], "unknown scenario"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, fake_triton, tmp_path):
    fake_triton.plan({"server": {"models": ["fake"]}})
    where = ["--results", str(tmp_path)] if arguments[0] in ("run", "bench") else []
    where += ["--out", str(tmp_path)] if arguments[0] == "export" else []
    done = call(*[fake_triton.url if a == "HOST" else a for a in arguments], *where)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.json"))


def test_every_command_has_help():
    for name, command in tritonmark.cli.commands.items():
        assert command.help or command.callback.__doc__, name
