"""Searches through journal, options and probes: first with a made-up launcher, then the real Locust."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from rich.console import Console
from rows import make_rows

from loadgen.core.metrics import summarise
from loadgen.core.verdict import Audit, judge
from loadgen.edge import launch as launching
from loadgen.edge import scenarios, search_cli
from loadgen.edge import search as searching
from loadgen.edge.errors import UserError
from loadgen.edge.journal import Journal
from loadgen.edge.search import Interrupted, Prober, clock, cut_after

MS = 1_000_000


class Launcher:
    """Stands in for `launch`: a server that answers in 20 ms up to `capacity`/s, and far too late above it."""

    def __init__(self, capacity, interrupt_at=None):
        self.capacity, self.interrupt_at, self.calls = capacity, interrupt_at, []

    def __call__(self, words, console):
        given = dict(zip(words[::2], words[1::2], strict=True))
        self.calls.append(given)
        over = {"target_qps": given.get("--target-qps"), "concurrency": given.get("--concurrency"),
                "ttft_ms": given.get("--ttft-ms"), "min_queries": given.get("--min-queries")}  # fmt: skip
        scenario = scenarios.resolve(given["--scenario"], "fake", "smoke", over)
        load = scenario.target_qps or float(scenario.concurrency)
        n = max(200, round(load * 10))
        late = 5000 * MS if load > self.capacity else 20 * MS
        specs = [{"due": i * 10_100 * MS // n, "chunks": [i * 10_100 * MS // n + late] * 2, "tokens": [1, 1]}
                 for i in range(n)]  # fmt: skip
        summary, rows = summarise([make_rows(specs)], scenario)
        ended = "stopped by the user" if len(self.calls) == self.interrupt_at else None
        verdict = judge(summary, rows, scenario, Audit((), 1, n, n, 10.0, ended=ended))
        document = {"audit": {"ended": ended}, "verdict": verdict.to_json()}
        run = SimpleNamespace(document=document, summary=summary, scenario=scenario, valid=verdict.valid,
                              rows=lambda: [rows], folder=f"run-{len(self.calls)}")  # fmt: skip
        return SimpleNamespace(run=run)


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    monkeypatch.setattr(searching, "remaining", lambda plan, history: (1.0, 2.0))  # tested in the core; takes its time

    def invoke(launcher, command, *words):
        monkeypatch.setattr(search_cli, "Prober", lambda o, e, c: Prober(o, e, c, launch=launcher))
        arguments = [*words, "--model", "fake", "--results", str(tmp_path)]
        return CliRunner().invoke(command, arguments)

    return invoke


def test_a_search_finds_the_rate_and_names_its_run(invoke, tmp_path):
    launcher = Launcher(30)
    result = invoke(launcher, search_cli.search, "server", "--target-qps", "4", "--ttft-ms", "100", "--format", "json")
    answer = json.loads(result.stdout)
    assert result.exit_code == 0 and answer["code"] == "found"
    assert 0.97 * 30 <= answer["rate"] <= 30 < answer["failed"]
    confirmed = launcher.calls[int(answer["run"].removeprefix("run-")) - 1]
    assert float(confirmed["--target-qps"]) == answer["rate"] and "--run-time" not in confirmed
    journal = json.loads(next(tmp_path.glob("search-*.json")).read_text())
    assert len(journal["entries"]) == len(launcher.calls) == answer["probes"]


def test_an_interrupted_search_goes_on_to_the_same_answer(invoke):
    words = ("server", "--target-qps", "4", "--ttft-ms", "100", "--format", "json")
    cut = Launcher(30, interrupt_at=6)
    first = invoke(cut, search_cli.search, *words)
    assert first.exit_code == 3 and "run the same command again" in first.output
    rest = Launcher(30)
    resumed = invoke(rest, search_cli.search, *words)
    whole = Launcher(30)
    anew = invoke(whole, search_cli.search, *words, "--restart")
    assert json.loads(resumed.stdout)["rate"] == json.loads(anew.stdout)["rate"]
    assert cut.calls[:5] + rest.calls == whole.calls
    again = Launcher(30)
    assert invoke(again, search_cli.search, *words).exit_code == 0 and again.calls == []


def test_concurrency_and_calibration(invoke):
    launcher = Launcher(11)
    result = invoke(launcher, search_cli.search, "concurrency", "--ttft-ms", "100", "--format", "json")
    assert json.loads(result.stdout)["rate"] == 11
    launcher = Launcher(1000)
    invoke(launcher, search_cli.search, "server", "--ttft-ms", "100", "--max-qps", "40")
    assert launcher.calls[0]["--scenario"] == "concurrency" and "--target-qps" not in launcher.calls[0]


def test_nothing_found_is_exit_code_3(invoke):
    result = invoke(Launcher(0), search_cli.search, "server", "--target-qps", "1", "--ttft-ms", "100")
    assert result.exit_code == 3 and "no rate was found" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("offline",), "nothing to search"),
        (("concurrency",), "no latency limit"),
        (("server", "--budget", "5s"), "no room"),
        (("server", "--budget", "soon"), "--budget is 'soon'"),
        (("server", "--goodput", "99"), "share between"),
        (("server", "--max-concurrency", "4"), "--max-concurrency"),
    ],
)
def test_bad_input_is_said_before_any_probe(invoke, words, message):
    launcher = Launcher(1)
    result = invoke(launcher, search_cli.search, *words)
    assert isinstance(result.exception, UserError) and message in str(result.exception)
    assert launcher.calls == []


def test_a_sweep_gives_its_table_and_resumes(invoke):
    words = ("server", "--rates", "4,16,64", "--ttft-ms", "100", "--repeats", "2")
    cut = Launcher(30, interrupt_at=3)
    assert invoke(cut, search_cli.sweep, *words).exit_code == 3
    rest = Launcher(30)
    result = invoke(rest, search_cli.sweep, *words, "--format", "json")
    points = json.loads(result.stdout)["points"]
    assert [(p["value"], p["valid"], p["repeats"]) for p in points] == [(4, 2, 2), (16, 2, 2), (64, 0, 2)]
    assert len(rest.calls) == 4 and result.exit_code == 3
    table = invoke(Launcher(30), search_cli.sweep, *words, "--format", "markdown").stdout
    assert table.count("\n") == 5 and "ttft_limit" in table
    order = [float(c["--target-qps"]) for c in cut.calls[:2] + rest.calls]
    assert order != [4, 16, 64] * 2 and sorted(order) == [4, 4, 16, 16, 64, 64]


def test_a_damaged_journal_is_a_user_error(tmp_path):
    journal = Journal.open("search", tmp_path, {"a": 1})
    journal.append({"x": 1})
    assert Journal.open("search", tmp_path, {"a": 1}).entries == [{"x": 1}]
    assert Journal.open("search", tmp_path, {"a": 2}).entries == []
    journal.path.write_text("{")
    with pytest.raises(UserError, match="--restart"):
        Journal.open("search", tmp_path, {"a": 1})
    assert Journal.open("search", tmp_path, {"a": 1}, restart=True).entries == []
    assert len(list(tmp_path.glob("*.old"))) == 1


def test_the_end_of_the_budget_cuts_a_run_and_is_no_interruption():
    def slow(words, console):
        heard = []
        before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))  # as `launch` does
        while not heard:
            time.sleep(0.01)
        signal.signal(signal.SIGTERM, before)
        return SimpleNamespace(run=SimpleNamespace(document={"audit": {"ended": "stopped by the user (x)"}}))

    prober = Prober({}, (), Console(), launch=slow)
    assert prober.run({}, limit_s=0.1)[2] is True
    stopped = SimpleNamespace(run=SimpleNamespace(document={"audit": {"ended": searching.STOPPED}}))
    with pytest.raises(Interrupted):
        Prober({}, (), Console(), launch=lambda *_: stopped).run({}, limit_s=60)
    with cut_after(None) as late:
        assert not late.is_set()


def test_clock():
    assert [clock(s) for s in (5, 75, 4000)] == ["0:05", "1:15", "1:06:40"]


@pytest.mark.slow
def test_the_real_locust_finds_what_the_fake_server_carries(fake_triton, tmp_path):
    """2 decode slots of some 160 ms each: a little under 13 requests/s."""
    fake_triton.plan({"server": {"capacity": 2}, "ttft_ms": 50, "itl_ms": 25})
    started = time.monotonic()
    words = ["server", "--host", fake_triton.url, "--model", "fake", "--output-tokens", "5", "--ttft-ms", "1000",
             "--target-qps", "9", "--run-time", "3s", "--probe-time", "1s", "--budget", "45s", "--warmup", "2",
             "--results", str(tmp_path), "--format", "json"]  # fmt: skip
    result = CliRunner().invoke(search_cli.search, words)
    assert time.monotonic() - started < 55
    answer = json.loads(result.stdout)
    if answer["code"] == "client":
        pytest.skip("the load generator was late on this machine: no evidence about the server")
    assert answer["spent_s"] <= 47 and answer["rate"] is not None, answer
    assert 4 <= answer["rate"] <= 18  # 3 s runs let a queue of 1 s grow: some way above is VALID
    assert json.loads((tmp_path / answer["run"] / "run.json").read_text())["verdict"]["valid"] is True


def test_ctrl_c_while_the_limit_of_a_run_starts_leaves_no_timer(monkeypatch):
    """A timer left running held the process for the rest of the search's budget."""
    start = threading.Timer.start

    def interrupted(timer):
        start(timer)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Timer, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), cut_after(60):
        pass
    until(lambda: not any(isinstance(thread, threading.Timer) for thread in threading.enumerate()), 5)


def test_ctrl_c_while_the_load_process_starts_ends_it(monkeypatch, tmp_path):
    """It has a session of its own: one that nobody told would go on loading the server."""
    born = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            born.append(self)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    words = ["--host", "http://127.0.0.1:1", "--model", "fake", "--results", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        launching.launch(words, Console(quiet=True))
    (process,) = born
    assert process.returncode not in (0, None)


def test_a_journal_belongs_to_one_process(tmp_path):
    with Journal.held("search", tmp_path, {"a": 1}) as journal:
        same = Journal.held("search", tmp_path, {"a": 1})
        with pytest.raises(UserError, match="another search with these options is going on"), same:
            pass
        with Journal.held("sweep", tmp_path, {"a": 1}), Journal.held("search", tmp_path, {"a": 2}):
            journal.append({"x": 1})
    with Journal.held("search", tmp_path, {"a": 1}) as again:
        assert again.entries == [{"x": 1}]
    assert not list(tmp_path.glob("*.lock"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --results"), Journal.held("search", tmp_path / "file", {}):
        pass


class Searching:
    """`tritonmark search` in a process of its own, against the fake server."""

    def __init__(self, url, results):
        self.words = [sys.executable, "-m", "tritonmark", "search", "server", "--host", url, "--model", "fake",
                      "--ttft-ms", "1000", "--output-tokens", "5", "--target-qps", "5", "--run-time", "8s",
                      "--probe-time", "4s", "--budget", "2m", "--warmup", "2", "--results", str(results)]  # fmt: skip

    def start(self):
        return subprocess.Popen(self.words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, start_new_session=True)  # fmt: skip


def probes(results):
    return [e for path in results.glob("search-*.json") for e in json.loads(path.read_text())["entries"]]


def until(condition, seconds=40):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["starting", "measuring"])
def test_ctrl_c_ends_a_real_search_and_the_same_command_goes_on(fake_triton, tmp_path, moment):
    """Ctrl-C in the second probe: while its load process starts, and while it measures."""
    fake_triton.plan({"server": {"capacity": 2}, "ttft_ms": 50, "itl_ms": 25})
    searching_for = Searching(fake_triton.url, tmp_path)
    process = searching_for.start()
    try:
        until(lambda: len(probes(tmp_path)) == 1)
        if moment == "measuring":
            until(lambda: list(tmp_path.rglob("start.json")))
            second = subprocess.run(searching_for.words, capture_output=True, text=True, timeout=20)
            assert second.returncode == 2, second.stdout + second.stderr
            (line,) = second.stderr.strip().splitlines()
            assert line.startswith("error: another search with these options is going on")
        else:
            time.sleep(0.6)  # Locust takes longer than that to begin
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert time.monotonic() - asked < 15
    finally:
        process.kill()
    assert process.returncode == 3 and "run the same command again to go on" in output, output
    assert "Traceback" not in output and not list(tmp_path.rglob("start.json")) and not list(tmp_path.glob("*.lock"))
    before = probes(tmp_path)
    assert len(before) == 1
    process = searching_for.start()
    try:
        until(lambda: len(probes(tmp_path)) > 1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert "going on with 1 probes" in output and probes(tmp_path)[:1] == before
