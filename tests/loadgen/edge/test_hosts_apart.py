"""Master, three workers and servers on hosts of their own (network namespaces): what a fault of one comes to.

The servers are fakes that write down what they really did; Locust, its channel and the kernel's TCP are real.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import network
import numpy as np
import pytest

from loadgen.core.metrics import join
from loadgen.core.schedule import loadgen_poisson
from loadgen.edge import store
from loadgen.edge.worker import due_times

LLM = str(Path(__file__).parents[3] / "loadgen" / "llm.py")
FAKE = str(Path(__file__).parents[2] / "fakes" / "triton_server.py")
PLAN = {"ttft_ms": 5, "itl_ms": 2}
CLIENT = {"client_late", "client_lag", "client_cpu"}  # of a busy machine, and then no fault of the network
QPS = 60

pytestmark = pytest.mark.slow


class Site:
    """The hosts, and one run on them."""

    def __init__(self, lan, tmp_path):
        self.lan, self.results = lan, tmp_path / "results"
        self.master_host, *self.worker_hosts = (lan.host() for _ in range(4))
        self.logs, self.urls = [], []
        for n, host in enumerate(lan.host() for _ in range(2)):
            self.logs.append(tmp_path / f"server{n}.jsonl")
            server = host.start(sys.executable, FAKE, "--host", host.address, "--port", "8000", "--plan",
                                json.dumps(PLAN), "--log", str(self.logs[-1]), stdout=subprocess.PIPE)  # fmt: skip
            assert server.stdout.readline().strip() == "8000"
            self.urls.append(f"http://{host.address}:8000")

    def master(self, run_time):
        words = ["--master", "--headless", "--expect-workers", "3", "--host", ",".join(self.urls), "--model", "fake",
                 "--scenario", "server", "--target-qps", str(QPS), "--run-time", run_time, "--output-tokens", "4",
                 "--warmup", "2", "--results", str(self.results), "--only-summary", "--telemetry", "off"]  # fmt: skip
        self.process = self.master_host.start(sys.executable, "-m", "locust", "-f", LLM, *words,
                                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        return self.process

    def worker(self, n, master=None, **options):
        """Worker n, on its own host; `master` is where it looks for the master."""
        words = ["--worker", "--master-host", (master or self.master_host).address]
        return self.worker_hosts[n].start(sys.executable, "-m", "locust", "-f", LLM, *words,
                                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)  # fmt: skip

    def measuring(self):
        """Waits for the first rows of the run; its folder."""
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline:
            for stream in self.results.rglob("records.arrows"):
                if sum(t.num_rows for t in store.stream_tables(stream)) > 20:
                    return stream.parent
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.05)
        raise AssertionError("no rows")

    def served(self):
        """What the servers wrote down, a row a request that has ended."""
        return [json.loads(line) for log in self.logs for line in log.read_text().splitlines()]

    def end(self, limit_s):
        """The run, which the master seals within `limit_s`."""
        output, _ = self.process.communicate(timeout=limit_s)
        (path,) = self.results.rglob("run.json")
        run = store.load(path.parent)
        assert self.process.returncode == (0 if run.valid else 3), output
        rows = join(run.rows())
        return run, rows


@pytest.fixture
def site(tmp_path):
    if reason := network.available():
        pytest.skip(reason)
    with network.Lan() as lan:
        yield Site(lan, tmp_path)


def codes(run, part="reasons"):
    return {r["code"] for r in run.document["verdict"][part]}


def workers(run):
    return {w["worker"]: w for w in run.document["audit"]["workers"]}


def test_a_far_worker_with_another_clock_sends_its_slots_when_they_are_due(site):
    """One worker is 50 ms away, and its clock 5,000 s ahead: the arrivals are still LoadGen's, and one process's."""
    if not network.clocks_can_differ():
        pytest.skip("this kernel has no time namespaces")
    relay = site.lan.host()
    site.lan.relay(relay, 5557, site.master_host, 50.0)
    site.master("4s")
    for n in range(2):
        site.worker(n)
    site.worker(2, master=relay, shift_s=5000)
    run, rows = site.end(60)
    assert codes(run) <= CLIENT, run.document["verdict"]
    due = loadgen_poisson(QPS, len(rows), run.scenario.seeds.schedule)
    assert np.array_equal(rows.due_ns, due) and len(rows) == run.document["audit"]["scheduled"]
    errors = {n: w["clock_error_ns"] for n, w in workers(run).items()}
    (far,) = [n for n, error in errors.items() if error]
    assert 45e6 < errors[far] < 80e6 and set(errors.values()) == {0, errors[far]}
    assert "clock_error" in codes(run, "cautions")
    arrived = {r["id"]: r["arrived_ns"] for r in site.served()}
    moved = np.array([arrived[f"{run.folder.name}-{seq}"] for seq in rows.seq]) - rows.due_ns  # T0, and the way there
    there = rows.seq % 3 == far
    shift = np.median(moved[there]) - np.median(moved[~there])
    assert abs(shift) < 20e6, f"arrivals of the far worker are off by {shift / 1e6:.1f} ms"


def test_a_killed_worker_and_one_cut_off_for_good_are_named_and_a_new_one_changes_nothing(site):
    site.master("5s")
    processes = [site.worker(n) for n in range(3)]
    site.measuring()
    processes[1].kill()
    site.worker_hosts[2].cut()
    killed = time.monotonic()
    site.worker(1)  # it joins a run that does not know it
    run, rows = site.end(40)
    assert time.monotonic() - killed < 25, "the master waits for nobody who is out of reach"
    assert codes(run) - CLIENT - {"min_duration"} == {"missing_rows"}  # the last slot may have been its own
    (reason,) = [r for r in run.document["verdict"]["reasons"] if r["code"] == "missing_rows"]
    (whole,) = workers(run)
    lost = sorted({0, 1, 2} - {whole})
    scheduled = run.document["audit"]["scheduled"]
    assert scheduled == len(due_times(run.scenario)) > len(rows)
    assert f"2 of 3 workers lost: {lost[0]}, {lost[1]}" in reason["seen"]
    assert f"{scheduled - len(rows)} of {scheduled} slots have no row" in reason["seen"]
    assert np.array_equal(rows.seq[rows.seq % 3 == whole], np.arange(whole, scheduled, 3)), "the third is complete"
    for n in lost:
        own, slots = rows.seq[rows.seq % 3 == n], np.arange(n, scheduled, 3)
        assert 0 < len(own) < len(slots) and np.array_equal(own, slots[: len(own)]), "its rows are those until then"


def test_the_masters_link_is_cut_for_5_s(site):
    """No worker can be reached for a while: Locust would give up, the run does not."""
    site.master("7s")
    for n in range(3):
        site.worker(n)
    site.measuring()
    site.master_host.cut()
    time.sleep(5)
    site.master_host.join()
    run, rows = site.end(60)
    assert np.array_equal(rows.seq, np.arange(len(rows))) and len(rows) == run.document["audit"]["scheduled"]
    assert codes(run) <= CLIENT, run.document["verdict"]
    assert all(4 < w["silent_s"] < 14 for w in workers(run).values()) and len(workers(run)) == 3


def test_a_link_that_is_cut_for_5_s_loses_no_row_and_its_waits_count(site):
    site.master("9s")
    for n in range(3):
        site.worker(n)
    site.measuring()
    site.worker_hosts[1].cut()
    time.sleep(5)
    site.worker_hosts[1].join()
    run, rows = site.end(60)
    assert len(rows) == run.document["audit"]["scheduled"] and set(workers(run)) == {0, 1, 2}
    assert np.array_equal(rows.seq, np.arange(len(rows)))
    silent = {n: w["silent_s"] for n, w in workers(run).items() if w["silent_s"]}
    assert len(silent) == 1 and 4 < next(iter(silent.values())) < 14
    assert "worker_silent" in codes(run, "cautions")
    (cut,) = silent
    slow = (rows.done_ns - rows.due_ns > 2e9) | ~rows.ok
    assert slow[rows.worker == cut].sum() > 30 and not slow[rows.worker != cut].any()
    assert not run.valid and codes(run) & {"ttft_limit", "failed_error"}


def test_a_killed_master_costs_less_than_a_second_of_rows_and_its_workers_end(site):
    site.master("30s")
    processes = [site.worker(n) for n in range(3)]
    folder = site.measuring()
    time.sleep(1.5)
    site.process.kill()
    killed = time.monotonic_ns()
    for process in processes:
        process.wait(40)
    assert time.monotonic_ns() - killed < 20e9
    report = subprocess.run([sys.executable, "-c", "import tritonmark; tritonmark.main()", "report", str(folder)],
                            capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert report.returncode == 3 and "INVALID" in report.stdout, report.stdout + report.stderr
    run = store.load(folder)
    assert "cut_off" in codes(run) and not run.valid
    before = sum(1 for r in site.served() if (r["ended_ns"] or killed) < killed - 10**9)
    rows = join(run.rows())
    assert len(rows) >= before - 3, "warm-up requests are no measured rows"
