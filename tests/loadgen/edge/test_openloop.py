"""The real Locust, in its own process, against the fake server: slots, rows, faults, exit codes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from loadgen.core.record import Outcome
from loadgen.core.schedule import loadgen_poisson
from loadgen.edge import scenarios, store
from loadgen.edge.launch import own_port
from loadgen.edge.samples import PromptLibrary, sample_indices

LLM = str(Path(__file__).parents[3] / "loadgen" / "llm.py")
FAST = {"ttft_ms": 5, "itl_ms": 2}


class Load:
    """Locust runs of one test, all sealed below one folder."""

    def __init__(self, url: str, results: Path) -> None:
        self.url, self.results = url, results

    def start(self, *arguments: str, headless: bool = True) -> subprocess.Popen:
        command = [sys.executable, "-m", "locust", "-f", LLM, "--host", self.url, "--model", "fake", "--only-summary",
                   "--results", str(self.results), *(["--headless"] if headless else []), *arguments, *own_port(list(arguments))]  # fmt: skip
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, start_new_session=True)  # fmt: skip

    def __call__(self, *arguments: str) -> tuple[int, str]:
        process = self.start("--output-tokens", "4", "--warmup", "2", *arguments)
        try:
            output, _ = process.communicate(timeout=90)
        finally:
            process.kill()
        return process.returncode, output

    @property
    def run(self) -> store.Run:
        (folder,) = {p.parent for p in self.results.rglob("*.json") if p.name in ("run.json", "start.json")}
        return store.load(folder)

    def rows(self, run: store.Run | None = None):
        (rows,) = (run or self.run).rows()
        return rows

    def wait_for_rows(self, count: int = 1) -> Path:
        """Until the run in progress has written some rows; its folder."""
        for _ in range(300):
            for stream in self.results.rglob("records.arrows"):
                if sum(t.num_rows for t in store.stream_tables(stream)) >= count:
                    return stream.parent
            time.sleep(0.1)
        raise AssertionError("no rows were written")


@pytest.fixture
def load(fake_triton, tmp_path) -> Load:
    fake_triton.plan(FAST)
    return Load(fake_triton.url, tmp_path)


def reasons(run: store.Run) -> list[str]:
    """Reason codes but those about the client: on a busy test machine the load generator may well be late."""
    return [r["code"] for r in run.document["verdict"]["reasons"] if not r["code"].startswith("client_")]


def agrees(code: int, run: store.Run) -> bool:
    return code == (0 if run.valid else 3)


def test_server_sends_loadgens_slots_on_time_and_records_each(load, fake_triton):
    code, output = load("--scenario", "server", "--target-qps", "40", "--run-time", "3s")
    run, rows = load.run, load.rows()
    assert reasons(run) == [] and agrees(code, run), output
    assert str(run.folder) in output
    order = np.argsort(rows.seq)
    scenario = run.scenario
    assert rows.due_ns[order].tolist() == loadgen_poisson(40, len(rows), scenario.seeds.schedule).tolist()
    library = PromptLibrary("builtin", scenario)
    assert rows.sample[order].tolist() == sample_indices(scenario, len(library), len(rows)).tolist()
    assert set(rows.tokens_out.tolist()) == {4}
    assert run.document["audit"]["achieved_qps"] == pytest.approx(run.document["audit"]["scheduled_qps"], rel=0.02)
    sent = {r["id"]: r for r in fake_triton.log()}
    ids = [f"{run.folder.name}-{seq}" for seq in rows.seq[order]]
    assert len(sent) == len(rows) + 2  # two warm-ups
    assert all(sum(e[2] for e in sent[i]["events"]) == 4 for i in ids)
    arrived = np.array([sent[i]["arrived_ns"] for i in ids])
    late = (arrived - arrived[0]) - (rows.due_ns[order] - rows.due_ns[order][0])
    assert np.median(np.abs(late)) < 20e6  # requests reached the server when they were due


def test_recorded_arrivals_are_the_servers_own(load, fake_triton):
    """Golden timing, with bounds for a busy machine; `benchmarks/golden_timing.py` has the figures of a quiet one."""
    fake_triton.plan({"ttft_ms": 40, "itl_ms": 20, "server": {"models": ["fake"]}})
    load("--scenario", "concurrency", "--concurrency", "16", "--run-time", "2s", "--output-tokens", "20")
    run, rows = load.run, load.rows()
    sent = {r["id"]: [e[1] for e in r["events"] if e[2]] for r in fake_triton.log()}
    truth = [sent[f"{run.folder.name}-{seq}"] for seq in rows.seq]
    recorded = np.split(rows.chunk_ns, rows.chunk_offsets[1:-1])
    assert [len(t) for t in truth] == [len(r) for r in recorded] == [20] * len(rows)
    assert all((np.diff(r) >= 0).all() for r in recorded)
    error = np.concatenate([np.diff(r) - np.diff(t) for r, t in zip(recorded, truth, strict=True)])
    assert np.median(np.abs(error)) < 2e6
    first = np.array([r[0] - t[0] for r, t in zip(recorded, truth, strict=True)])
    assert np.median(np.abs(first - np.median(first))) < 2e6  # one constant: the server's clock at T0


@pytest.mark.slow
def test_a_slow_server_cannot_throttle_arrivals(load, fake_triton):
    fake_triton.plan({"ttft_ms": 100, "itl_ms": 50, "server": {"models": ["fake"], "capacity": 2}})
    code, _ = load("--scenario", "server", "--target-qps", "30", "--run-time", "2s", "--ttft-ms", "300")
    run, rows = load.run, load.rows()
    assert code == 3
    assert "ttft_limit" in reasons(run)
    assert np.median(rows.sent_ns - rows.due_ns) < 20e6
    assert run.summary["peak_in_flight"] > 20
    assert rows.done_ns.max() > 4 * 10**9  # it went on long after the last arrival, and was waited for


def test_a_stall_shows_in_due_time_latency(load, fake_triton):
    fake_triton.plan({**FAST, "server": {"models": ["fake"], "stalls": [[1.5, 2.0]]}})
    load("--scenario", "server", "--target-qps", "40", "--run-time", "4s", "--warmup", "1")
    rows = load.rows()
    latency = (rows.done_ns - rows.due_ns) / 1e9
    # Every arrival during the stall waits for its end: latency falls from 2 s to 0 along the arrivals, which a closed
    # loop, having sent nothing meanwhile, would never have seen.
    assert latency.max() == pytest.approx(2.0, abs=0.25)
    assert 50 <= (latency > 0.2).sum() <= 90  # 40/s during 1.8 s: 72 expected
    assert np.percentile(latency, 99) > 1.7


def test_single_stream_sends_one_at_a_time(load, fake_triton):
    code, _ = load("--scenario", "single_stream", "--run-time", "1s")
    rows = load.rows()
    assert reasons(load.run) == [] and agrees(code, load.run)
    assert rows.seq.tolist() == list(range(len(rows)))
    assert (rows.due_ns[1:] >= rows.done_ns[:-1]).all()
    assert rows.due_ns[-1] >= 10**9 > rows.due_ns[-2]
    assert load.run.summary["peak_in_flight"] == 1


def test_multi_stream_sends_queries_of_eight(load):
    code, _ = load("--scenario", "multi_stream", "--run-time", "1s")
    run, rows = load.run, load.rows()
    assert reasons(run) == [] and agrees(code, run)
    assert len(rows) == 8 * run.summary["queries"]
    assert all(len(set(rows.due_ns[rows.query == q])) == 1 for q in set(rows.query.tolist()))
    assert run.summary["peak_in_flight"] == 8


def test_offline_is_all_due_at_once_through_a_window(load):
    code, _ = load("--scenario", "offline", "--target-qps", "300", "--run-time", "1s", "--max-in-flight", "16")
    run, rows = load.run, load.rows()
    assert len(rows) == 330
    assert set(rows.due_ns.tolist()) == {0}
    assert run.summary["peak_in_flight"] == 16
    assert set(reasons(run)) <= {"min_duration"} and agrees(code, run)


@pytest.mark.slow
def test_concurrency_is_kept_and_divided_over_workers(load):
    code, _ = load("--scenario", "concurrency", "--concurrency", "5", "--run-time", "2s", "--processes", "2")
    run, rows = load.run, load.rows()
    assert reasons(run) == [] and agrees(code, run)
    assert run.summary["peak_in_flight"] == 5
    assert len(set(rows.seq.tolist())) == len(rows)


@pytest.mark.slow
def test_a_worker_without_a_stream_is_not_busy(load):
    load("--scenario", "single_stream", "--run-time", "1s", "--processes", "2")
    sent = {w["worker"]: (w["requests"], w["cpu_share"]) for w in load.run.document["audit"]["workers"]}
    assert sent[0][0] > 0 and sent[1] == (0, 0.0), sent


@pytest.mark.parametrize("workers", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_any_number_of_workers_sends_the_slots_of_one(load, tmp_path, workers):
    arguments = ("--scenario", "server", "--target-qps", "40", "--run-time", "2s")
    one, many = Load(load.url, tmp_path / "one"), Load(load.url, tmp_path / "many")
    one(*arguments)
    code, output = many(*arguments, "--processes", str(workers))
    assert reasons(many.run) == [] and agrees(code, many.run), output
    for name in ("seq", "due_ns", "sample"):
        columns = [getattr(load_.rows(), name)[np.argsort(load_.rows().seq)].tolist() for load_ in (one, many)]
        assert columns[0] == columns[1]
    rows = many.rows()
    assert (rows.worker == rows.seq % workers).all()
    assert [w["worker"] for w in many.run.document["audit"]["workers"]] == list(range(workers))


def test_the_cap_sheds_counts_and_invalidates(load, fake_triton):
    fake_triton.plan({"ttft_ms": 1000, "server": {"models": ["fake"]}})
    code, _ = load("--scenario", "server", "--target-qps", "20", "--run-time", "2s", "--max-in-flight", "4")
    run, rows = load.run, load.rows()
    assert code == 3
    assert "shed" in reasons(run)
    assert run.summary["outcomes"]["shed"] == rows.ended(Outcome.SHED).sum() > 0
    assert len(rows) == len(set(rows.seq.tolist())) == run.document["audit"]["scheduled"]


def test_errors_are_rows_and_the_reason(load, fake_triton):
    fake_triton.plan({**FAST, "error_at": 2})
    code, _ = load("--scenario", "server", "--target-qps", "20", "--run-time", "1s")
    run = load.run
    assert code == 3
    assert "failed_error" in reasons(run)
    assert run.summary["completed"] == 0
    errors = [e for t in run.tables() for e in t["error"].to_pylist()]
    assert all("planned error" in e for e in errors)


def test_a_token_mismatch_is_a_reason(load, fake_triton):
    fake_triton.plan({**FAST, "usage_error": 1})
    code, _ = load("--scenario", "single_stream", "--run-time", "1s")
    assert (code, reasons(load.run)) == (3, ["token_mismatch"])


def test_a_server_killed_in_mid_run_is_a_sealed_invalid_run(load, tmp_path):
    from triton_server import start

    server = start({**FAST, "server": {"models": ["fake"]}})
    other = Load(server.url, tmp_path / "killed")
    process = other.start("--scenario", "server", "--target-qps", "30", "--run-time", "4s", "--output-tokens", "4")
    other.wait_for_rows(20)
    server.process.kill()
    output, _ = process.communicate(timeout=60)
    server.stop()
    run = other.run
    assert process.returncode == 3, output
    assert "failed_error" in reasons(run)
    assert run.summary["completed"] >= 10
    assert run.summary["scheduled"] == run.document["audit"]["scheduled"]


@pytest.mark.slow
def test_a_dead_server_ends_a_closed_loop(load, tmp_path):
    from triton_server import start

    server = start({**FAST, "server": {"models": ["fake"]}})
    other = Load(server.url, tmp_path / "killed")
    process = other.start("--scenario", "single_stream", "--run-time", "60s", "--output-tokens", "4")
    other.wait_for_rows(5)
    server.process.kill()
    assert process.wait(timeout=40) == 3
    server.stop()
    assert {"cut_off", "failed_error"} <= set(reasons(other.run))
    assert "50 requests in a row failed" in other.run.document["verdict"]["reasons"][0]["seen"]


@pytest.mark.parametrize("workers", [[], ["--processes", "2"]])
def test_ctrl_c_seals_what_there_is(load, workers):
    process = load.start("--scenario", "server", "--target-qps", "30", "--run-time", "60s", *workers)
    load.wait_for_rows(20)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=40)
    assert process.returncode == 3, output
    assert reasons(load.run)[0] == "cut_off"
    assert load.run.summary["completed"] >= 10


def test_a_killed_load_process_costs_less_than_a_second_of_rows(load, fake_triton):
    process = load.start("--scenario", "server", "--target-qps", "50", "--run-time", "60s", "--output-tokens", "4")
    folder = load.wait_for_rows(50)
    process.kill()
    process.wait()
    run = store.load(folder)
    finished = sum(1 for r in fake_triton.log() if r["ended"] == "complete") if fake_triton.log() else 0
    assert reasons(run)[0] == "cut_off"
    assert run.document["records"]["rows"] >= max(50, finished - 60)  # at most about a second's worth is missing


@pytest.mark.slow
def test_a_worker_that_is_told_to_end_is_named_and_owes_its_slots(load):
    """As when its host shuts down: it says good-bye. One that is killed: test_hosts_apart.py."""
    process = load.start("--scenario", "server", "--target-qps", "40", "--run-time", "6s", "--processes", "2",
                         "--output-tokens", "4")  # fmt: skip
    load.wait_for_rows(20)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    run, rows = load.run, load.rows()
    assert process.returncode == 3, output
    found = {r["code"]: r["seen"] for r in run.document["verdict"]["reasons"]}
    left = int((rows.worker == 1).sum() < (rows.worker == 0).sum())
    assert found["worker_left"] == f"worker {left} of 2 ended before the run did"
    scheduled = run.document["audit"]["scheduled"]
    assert (
        f"{scheduled - len(rows)} of {scheduled} slots have no row" in found["missing_rows"] and len(rows) < scheduled
    )
    assert np.array_equal(np.sort(rows.seq[rows.worker != left]), np.arange(1 - left, scheduled, 2))


BAD = [
    (["--scenario", "server", "--target-qps", "0"], "--target-qps is 0.0; it must be a number above 0"),
    (["--scenario", "server", "--target-qps", "-2"], "--target-qps is -2.0"),
    (["--scenario", "server", "--target-qps", "nan"], "--target-qps is nan"),
    (["--scenario", "server"], "needs --target-qps"),
    (["--scenario", "single_stream", "--model", "nope"], "nope"),
    (["--scenario", "single_stream", "--prompts", "/nowhere.jsonl"], "cannot read prompts from /nowhere.jsonl"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(load, arguments, message):
    code, output = load(*arguments)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2, output
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in output
    assert not list(load.results.rglob("*.json"))


def test_nobody_listening_is_one_line_and_exit_code_2(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        code, output = Load(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path)("--scenario", "single_stream")
    assert code == 2
    assert re.search(r"^error: nothing listens at", output, re.M), output


@pytest.mark.slow
def test_unwritable_results_are_one_line_and_exit_code_2(load, tmp_path):
    (tmp_path / "file").write_text("")
    load.results = tmp_path / "file"
    code, output = load("--scenario", "single_stream", "--run-time", "1s")
    assert code == 2
    assert "choose another --results" in output


def test_the_web_ui_has_the_options_and_starts_a_run(load):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = load.start("--web-host", "127.0.0.1", "--web-port", str(port), headless=False)
    base = f"http://127.0.0.1:{port}"
    try:
        page = ""
        for _ in range(100):
            try:
                page = urllib.request.urlopen(base, timeout=5).read().decode()
                break
            except OSError:
                time.sleep(0.1)
        for option in ("target_qps", "scenario", "max_in_flight", "preset"):
            assert option in page
        assert set(scenarios.names()) <= set(re.findall(r"[a-z_]+", page))
        form = {"user_count": "1", "spawn_rate": "1", "host": load.url, "run_time": "2s", "scenario": "server",
                "target_qps": "20", "model": "fake", "output_tokens": "4"}  # fmt: skip
        answer = urllib.request.urlopen(f"{base}/swarm", urllib.parse.urlencode(form).encode(), timeout=10)
        assert json.loads(answer.read())["success"]
        for _ in range(150):
            if list(load.results.rglob("run.json")):
                break
            time.sleep(0.1)
        assert reasons(load.run) == []
        assert load.run.scenario.target_qps == 20
        state = ""
        for _ in range(50):
            state = json.loads(urllib.request.urlopen(f"{base}/stats/requests", timeout=5).read())["state"]
            if state == "stopped":
                break
            time.sleep(0.1)
        assert state == "stopped"
    finally:
        process.terminate()
        process.wait(10)
