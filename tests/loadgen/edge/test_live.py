"""Live metrics: what is counted equals the sealed summary, what is served is what was counted, and nobody waits."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from rows import make_rows

from loadgen.core.metrics import METRICS, select, summarise
from loadgen.core.scenario import Limits
from loadgen.edge import live_names as names
from loadgen.edge import scenarios
from loadgen.edge.discovery import TARGETS
from loadgen.edge.errors import UserError
from loadgen.edge.live import Endpoint, Live
from loadgen.edge.live_fold import Histogram, RunFigures
from loadgen.edge.live_server import HISTORY_PORT, bound

LABELS = ("server", "m", "b", "p", "h", "r")
ROOT = Path(__file__).parents[3]


def row(due, first, gaps=(10**6,), sent=0, outcome="ok"):
    """A row for `make_rows`: `first` and `sent` count from due, `gaps` lie between its responses."""
    chunks = np.cumsum([due + first, *gaps]).tolist()
    return dict(due=due, sent=due + sent, chunks=chunks, tokens=[1] * len(chunks), outcome=outcome)


def scenario(**changes):
    resolved = scenarios.resolve("server", "phi-2-tiny", "smoke", {"target_qps": 1.0})
    return replace(resolved, limits=Limits(**changes["limits"])) if changes else resolved


def read(address):
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
        page = answer.read().decode()
    return page, {
        (s.name, *sorted(s.labels.items())): s.value for f in text_string_to_metric_families(page) for s in f.samples
    }


@pytest.fixture
def endpoint():
    made = Endpoint(19464, "127.0.0.1", fixed=True)
    yield made
    made.close()


def everything():
    """Every family there can be, each with one sample."""
    out = []
    for family in names.all_families():
        values = [f"{label}0" for label in family.labels]
        counts = [1] * (len(family.buckets) + 1)
        out.append(
            family.with_samples([[values, counts, 1.5] if family.kind == "histogram" else [values, 1.0]], LABELS)
        )
    return out


def settle(endpoint, part, families):
    """Publishes, and waits until the endpoint's process shows it."""
    endpoint.publish(part, families)
    time.sleep(0.3)


def test_a_histogram_counts_like_prometheus():
    h = Histogram((0.001, 0.01))
    h.add(np.array([1, 1_000_000, 1_000_001, 10_000_000, 10_000_001]), failed=2)
    assert h.counts.tolist() == [2, 2, 3]  # an edge belongs to the bucket below it
    assert h.sum_ns == 22_000_003


def test_figures_in_batches_equal_the_summary_of_all():
    rng = np.random.default_rng(5)
    rows = make_rows([
        row(i * 10**6, first=int(rng.integers(1e6, 9e8)), sent=int(rng.integers(1e5)),
            gaps=[int(g) for g in rng.integers(1e5, 4e7, size=int(rng.integers(0, 6)))],
            outcome="error" if i % 17 == 3 else "ok")
        for i in range(300)
    ])  # fmt: skip
    plan = scenario()
    figures = RunFigures(plan)
    for start in range(0, 300, 37):
        part = np.zeros(300, dtype=bool)
        part[start : start + 37] = True
        figures.add(select(rows, part))
    summary, _ = summarise([rows], plan)
    shown = {f["name"]: f["samples"] for f in figures.families(LABELS)}
    outcomes = {s[0][-1]: s[1] for s in shown["tritonmark_client_requests_total"]}
    assert outcomes == summary["outcomes"]
    for name in ("tokens_in", "tokens_out"):
        assert shown[f"tritonmark_client_{name}_total"][0][1] == summary[name]
    edges = np.array(names.LATENCY_BUCKETS_S)
    for metric, family, histogram in figures.histograms:
        for p, at in (("p50", 0.5), ("p99", 0.99)):
            want, n = summary[metric.name][p], int(histogram.counts.sum())
            bucket = int(np.searchsorted(np.cumsum(histogram.counts), int(n * at) + 1))
            if want is None:
                assert bucket == len(edges), (metric.name, p)  # among the failed ones
            else:
                low = edges[bucket - 1] if bucket else 0
                assert low * 1e9 < want * 1.001 and want <= edges[bucket] * 1e9 * 1.001, (family.name, p)


def test_one_late_request_is_fine_until_the_percentile_is_over():
    plan = scenario(limits={"ttft_ns": 100_000_000})
    good = make_rows([row(i, first=10**6) for i in range(199)])
    late = make_rows([row(0, first=10**9)])
    figures = RunFigures(plan)
    figures.add(good)
    assert figures.fine
    figures.add(late)
    assert figures.fine  # p99 of 200 allows one
    for n in range(2):
        figures.add(late)
        summary, _ = summarise([good, *[late] * (n + 2)], plan)
        assert figures.fine == (summary["ttft_ns"]["p99"] <= 100_000_000)
    assert not figures.fine


def test_a_failure_is_never_fine():
    figures = RunFigures(scenario())
    figures.add(make_rows([row(0, first=1, outcome="shed")]))
    assert not figures.fine


def test_every_family_has_one_name_help_and_base_unit():
    families = names.all_families()
    assert len({f.name for f in families}) == len(families)
    for family in families:
        assert family.help and family.name.startswith("tritonmark_")
        assert family.name.endswith("_total") == (family.kind == "counter"), family.name
    assert {m.live for m in METRICS} == {"", "histogram", "counter"}
    allowed = {"outcome", "metric", "percentile", "phase", "worker", "gpu", "reason", "weights", "preset", "report",
               "of"}  # fmt: skip
    assert {label for f in families for label in f.labels} <= allowed


def test_labels_are_bounded():
    labels = names.run_labels({"model": "x" * 500, "hardware": {"label": "h"}, "run_id": "r"}, "server")
    assert labels == ("server", "x" * names.LABEL_CHARS, "unknown", "unknown", "h", "r")


def test_what_is_published_is_what_is_scraped(endpoint):
    settle(endpoint, "a", everything())
    page, values = read(endpoint.address)
    base = sorted(zip(names.RUN_LABELS, LABELS, strict=True))
    assert values[("tritonmark_client_tokens_out_total", *base)] == 1.0
    buckets = len(names.LATENCY_BUCKETS_S)
    assert values[("tritonmark_client_ttft_seconds_count", *base)] == buckets + 1
    assert values[("tritonmark_client_ttft_seconds_bucket", *sorted([*base, ("le", "0.002")]))] == 3
    settle(endpoint, "b", [names.WORKERS.with_samples([[[], 7.0]], LABELS)])
    assert read(endpoint.address)[1][("tritonmark_client_tokens_out_total", *base)] == 1.0  # parts don't replace others
    assert "# TYPE tritonmark_client_ttft_seconds histogram" in page


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool comes with Prometheus")
def test_promtool_finds_nothing_to_say(endpoint):
    settle(endpoint, "a", everything())
    page, _ = read(endpoint.address)
    checked = subprocess.run(["promtool", "check", "metrics"], input=page, text=True, capture_output=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_a_hung_scraper_keeps_nobody_waiting(endpoint):
    settle(endpoint, "a", everything())
    hung = [socket.create_connection(("127.0.0.1", endpoint.port)) for _ in range(20)]
    for half in hung[:10]:
        half.sendall(b"GET /metrics HTT")
    started = time.perf_counter()
    for _ in range(50):
        endpoint.publish("a", everything())
    assert time.perf_counter() - started < 1.0
    assert read(endpoint.address)[1]
    for one in hung:
        one.close()


def test_a_dead_endpoint_keeps_nobody_waiting(endpoint):
    endpoint._process.kill()
    endpoint._process.wait()
    started = time.perf_counter()
    for _ in range(200):
        endpoint.publish("a", everything())
    endpoint.linger()
    assert time.perf_counter() - started < 4.0


def test_a_stopped_endpoint_keeps_nobody_waiting(endpoint):
    """Its socket fills up: what does not fit is dropped."""
    endpoint._process.send_signal(19)
    started = time.perf_counter()
    for _ in range(200):
        endpoint.publish("a", everything())
    assert time.perf_counter() - started < 4.0
    endpoint._process.send_signal(18)
    settle(endpoint, "a", everything())
    assert read(endpoint.address)[1]


def test_linger_waits_for_the_last_scrape_and_only_for_a_scraper(endpoint):
    settle(endpoint, "a", everything())
    started = time.perf_counter()
    endpoint.linger()
    assert time.perf_counter() - started < 0.1  # nobody scrapes
    read(endpoint.address)
    time.sleep(0.3)
    read(endpoint.address)
    time.sleep(0.2)
    endpoint.publish("a", everything())
    poll = f"import time, urllib.request; time.sleep(0.6); urllib.request.urlopen('http://{endpoint.address}/metrics').read()"
    scraper = subprocess.Popen([sys.executable, "-c", poll])
    endpoint.linger()
    assert endpoint._scraped == endpoint._generation
    assert scraper.wait(timeout=10) == 0


def test_the_endpoint_ends_with_its_process(tmp_path):
    code = ("from loadgen.edge.live import Endpoint; import os, sys; e = Endpoint(19600, '127.0.0.1', True);"
            "print(e._process.pid, flush=True); os.kill(os.getpid(), 9)")  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    child = Path("/proc", out.stdout.strip())
    for _ in range(50):
        if not child.exists():
            return
        time.sleep(0.1)
    pytest.fail("the endpoint outlived the load process")


def test_two_processes_take_two_ports(endpoint):
    other = Endpoint(19464, "127.0.0.1", fixed=True)
    try:
        assert other.port > endpoint.port
    finally:
        other.close()


def test_a_search_for_a_port_leaves_that_of_history_alone():
    first = bound(None, HISTORY_PORT - 1, "127.0.0.1")
    try:
        second = bound(None, HISTORY_PORT - 1, "127.0.0.1")
        try:
            assert first.server_port < HISTORY_PORT < second.server_port
            bound(None, HISTORY_PORT, "127.0.0.1", tries=1).server_close()
        finally:
            second.server_close()
    finally:
        first.server_close()


def test_targets_are_listed_while_the_process_lives_and_dead_ones_are_cleared(tmp_path):
    live = Live("19700", "127.0.0.1", tmp_path, "master")
    stale = tmp_path / TARGETS / f"{os.uname().nodename}-4194999.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("[]")
    live.open()
    try:
        (file,) = (tmp_path / TARGETS).glob("*.json")
        assert live.worker_ready(0, "127.0.0.1:1234") and not live.worker_ready(0, "127.0.0.1:1234")
        groups = json.loads(file.read_text())
        assert groups == [
            {"targets": [live.address], "labels": {"job": "tritonmark", "role": "master"}},
            {"targets": ["127.0.0.1:1234"], "labels": {"job": "tritonmark", "role": "worker"}},
        ]
    finally:
        live.close()
    assert not list((tmp_path / TARGETS).iterdir())


@pytest.mark.parametrize(("port", "bind", "word"), [("often", "127.0.0.1", "--metrics-port"),
                                                    ("19800", "203.0.113.7", "--metrics-bind")])  # fmt: skip
def test_bad_options_are_one_clear_line(tmp_path, port, bind, word):
    with pytest.raises(UserError, match=word) as raised:
        Live(port, bind, tmp_path, "local").open()
    assert "\n" not in str(raised.value)


def test_off_is_off(tmp_path):
    live = Live("off", "127.0.0.1", tmp_path, "local")
    live.open()
    live.publish("x", everything())
    live.linger()
    live.close()
    assert live.address is None and not list(tmp_path.iterdir())
