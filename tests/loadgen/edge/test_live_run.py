"""Whole runs that are watched: by a scraper, by a real Prometheus, with fake GPUs beside them."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from itertools import pairwise
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loadgen.edge import live_names as names
from loadgen.edge import report_html, store

ROOT = Path(__file__).parents[3]
FAKE_NVML = ROOT / "tests" / "fakes" / "pynvml_fake"


def load(url, model, results, *arguments, gpus=None, headless=True):
    env = os.environ | ({"PYTHONPATH": str(FAKE_NVML), "PYNVML_FAKE_PLAN": json.dumps(gpus)} if gpus else {})
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadgen" / "llm.py"), "--only-summary",
               "--host", url, "--model", model, "--results", str(results),
               *(["--headless"] if headless else []), *arguments]  # fmt: skip
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env=env, start_new_session=True)  # fmt: skip


def targets(results):
    found = [json.loads(p.read_text()) for p in results.glob(".prometheus/targets/*.json")]
    return [(t, g["labels"]["role"]) for groups in found for g in groups for t in g["targets"]]


def until(condition, seconds=30.0):
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError("it did not happen in time")


def scraped(address):
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
            page = answer.read().decode()
    except OSError:
        return {}
    return {s.name: s.value for f in text_string_to_metric_families(page) for s in f.samples}


def test_a_run_on_gpus_has_their_energy_and_shows_them_live(fake_triton, tmp_path):
    fake_triton.plan({"ttft_ms": 5, "itl_ms": 2})
    process = load(fake_triton.url, "fake", tmp_path, "--scenario", "server", "--target-qps", "20", "--run-time", "4s",
                   "--output-tokens", "4", gpus=[{"watts": 300.0}, {"watts": 200.0}])  # fmt: skip
    ((address, role),) = until(lambda: targets(tmp_path))
    seen = until(lambda: (page := scraped(address)).get("tritonmark_client_tokens_out_total") and page)
    output, _ = process.communicate(timeout=90)
    (folder,) = {p.parent for p in tmp_path.rglob("run.json")}
    run = store.load(folder)
    assert role == "local" and f"http://{address}/metrics" in output
    assert seen["tritonmark_gpu_power_watts"] in (300.0, 200.0)
    assert "tritonmark_worker_loop_lag_seconds_count" in seen and "tritonmark_host_cpu_ratio" in seen
    telemetry, seconds = run.document["telemetry"], run.summary["duration_s"]
    assert run.summary["energy_joules"] == pytest.approx(500 * seconds, rel=1e-3)
    assert run.summary["tokens_per_joule"] == pytest.approx(run.summary["tokens_out"] / (500 * seconds), rel=1e-3)
    assert telemetry["power_valid"] and telemetry["coverage"] == pytest.approx(1.0)
    assert "tokens/J" in output and "Energy (GPU)" in output
    page = report_html.html([run])
    assert 'id="power0"' in page and "SM clock, MHz" in page
    assert not targets(tmp_path) and not list(folder.glob("telemetry.jsonl"))
    store.verify_all(run)  # what sealing removes is not counted


def test_a_gpu_that_is_lost_is_a_caution(fake_triton, tmp_path):
    fake_triton.plan({"ttft_ms": 5, "itl_ms": 2})
    lost = [{"watts": 300.0, "lost_at": 4.0}]
    process = load(fake_triton.url, "fake", tmp_path, "--scenario", "server", "--target-qps", "20", "--run-time", "5s",
                   "--output-tokens", "4", "--metrics-port", "off", gpus=lost)  # fmt: skip
    output, _ = process.communicate(timeout=90)
    (folder,) = {p.parent for p in tmp_path.rglob("run.json")}
    run = store.load(folder)
    codes = [c["code"] for c in run.document["verdict"]["cautions"]]
    assert "power_lost" in codes and "GPU is lost" in output
    assert not [r for r in run.document["verdict"]["reasons"] if not r["code"].startswith("client_")]
    assert "energy_joules" not in run.summary and not list(tmp_path.glob(".prometheus/**/*.json"))


@pytest.mark.slow
def test_master_and_workers_have_an_endpoint_each(fake_triton, tmp_path):
    fake_triton.plan({"ttft_ms": 5, "itl_ms": 2})
    process = load(fake_triton.url, "fake", tmp_path, "--scenario", "server", "--target-qps", "20", "--run-time", "5s",
                   "--output-tokens", "4", "--processes", "2")  # fmt: skip
    found = until(lambda: (t := targets(tmp_path)) and len(t) == 3 and t)
    mark = {"master": "tritonmark_client_phase", "worker": "tritonmark_worker_in_flight"}
    pages = {a: until(lambda a=a, r=r: mark[r] in (page := scraped(a)) and page) for a, r in found}
    process.communicate(timeout=90)
    assert sorted(role for _, role in found) == ["master", "worker", "worker"]
    for address, role in found:
        assert ("tritonmark_client_phase" in pages[address]) == (role == "master")
        assert ("tritonmark_worker_in_flight" in pages[address]) == (role == "worker")


@pytest.mark.slow
def test_the_web_uis_port_has_the_metrics_too(fake_triton, tmp_path):
    fake_triton.plan({"ttft_ms": 5, "itl_ms": 2})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    process = load(fake_triton.url, "fake", tmp_path, "--output-tokens", "4", "--web-host", "127.0.0.1", "--web-port",
                   address.split(":")[1], headless=False)  # fmt: skip
    try:
        until(lambda: targets(tmp_path))
        form = {"user_count": "1", "spawn_rate": "1", "host": fake_triton.url, "run_time": "2s", "scenario": "server",
                "target_qps": "20", "model": "fake", "output_tokens": "4"}  # fmt: skip

        def swarm():
            try:
                urllib.request.urlopen(f"http://{address}/swarm", urllib.parse.urlencode(form).encode(), timeout=10)
                return True
            except OSError:
                return False

        until(swarm)
        until(lambda: scraped(address).get("tritonmark_client_end_time_seconds"))
        assert scraped(address) == scraped(targets(tmp_path)[0][0])
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert not targets(tmp_path)


def test_a_scraper_that_hangs_does_not_delay_a_request(fake_triton, tmp_path):
    fake_triton.plan({"ttft_ms": 5, "itl_ms": 2})
    process = load(fake_triton.url, "fake", tmp_path, "--scenario", "server", "--target-qps", "20", "--run-time", "3s",
                   "--output-tokens", "4")  # fmt: skip
    ((address, _),) = until(lambda: targets(tmp_path))
    host, port = address.split(":")
    hung = [socket.create_connection((host, int(port))) for _ in range(30)]
    started = time.monotonic()
    process.communicate(timeout=90)
    assert time.monotonic() - started < 20
    (folder,) = {p.parent for p in tmp_path.rglob("run.json")}
    assert store.load(folder).summary["failed"] == 0
    for one in hung:
        one.close()


class Prometheus:
    """The real one, which finds the load test by the discovery file alone."""

    def __init__(self, folder, results):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (folder / "prometheus.yml").write_text(
            "global: {scrape_interval: 1s, scrape_timeout: 1s}\n"
            "scrape_configs:\n- job_name: tritonmark\n  file_sd_configs:\n"
            f"  - {{files: ['{results}/.prometheus/targets/*.json'], refresh_interval: 1s}}\n"
        )
        self.process = subprocess.Popen(
            ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
             f"--web.listen-address=127.0.0.1:{self.port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, query):
        """Labels and value of each series at this moment."""
        url = f"http://127.0.0.1:{self.port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
        with urllib.request.urlopen(url, timeout=10) as answer:
            result = json.load(answer)["data"]["result"]
        return [(r["metric"], float(r["value"][1])) for r in result]

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=20)


@pytest.mark.live
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is not installed")
def test_prometheus_has_what_the_sealed_run_has(tmp_path):
    from exporters.export import export_model
    from exporters.server import TritonServer

    results = tmp_path / "results"
    results.mkdir()
    prometheus = Prometheus(tmp_path, results)
    try:
        export_model("phi-2-tiny", "torch-eager", "synthetic", tmp_path / "models")
        with TritonServer(tmp_path / "models", models=["phi-2-tiny"], log_path=tmp_path / "triton.log") as server:
            process = load(server.http_url, "phi-2-tiny", results, "--scenario", "server", "--target-qps", "4",
                           "--run-time", "10s", "--server-metrics", server.metrics_url)  # fmt: skip
            output, _ = process.communicate(timeout=120)
        (folder,) = {p.parent for p in results.rglob("run.json")}
        run, window = store.load(folder), "[2m]"  # last values: the target is gone by now

        def value(metric):
            ((_, number),) = prometheus.ask(f"last_over_time({metric}{window})")
            return number

        outcomes = {
            m["outcome"]: v for m, v in prometheus.ask(f"last_over_time(tritonmark_client_requests_total{window})")
        }
        assert outcomes == run.summary["outcomes"], output
        assert value("tritonmark_client_tokens_out_total") == run.summary["tokens_out"]
        assert value("tritonmark_client_tokens_in_total") == run.summary["tokens_in"]
        assert value("tritonmark_client_verdict_ok") == float(run.valid)
        labels = prometheus.ask(f"last_over_time(tritonmark_client_in_flight{window})")[0][0]
        assert labels["run"] == run.document["run_id"] and labels["job"] == "tritonmark" and labels["role"] == "local"
        edges = [0.0, *names.LATENCY_BUCKETS_S]
        for metric, family in names.of_requests("llm"):
            if metric.live != "histogram":
                continue
            assert value(f"{family.name}_count") > 0
            for q in (0.5, 0.99):
                asked = value_of_quantile(prometheus, family.name, q, window)
                sealed = run.summary[metric.name][f"p{q * 100:g}"] / 1e9
                low, high = next((a, b) for a, b in pairwise(edges) if a < sealed <= b)
                assert low <= asked <= high or abs(asked - sealed) <= sealed * 0.02, (family.name, q)
        assert run.document["server_statistics"]["requests"] == run.summary["completed"]
        counters = run.document["server_statistics"]["counters"]
        assert counters["tritonmark_tokens_out_total"] == run.summary["tokens_out"]
    finally:
        prometheus.stop()


def value_of_quantile(prometheus, name, q, window):
    query = f"histogram_quantile({q}, sum by (le) (last_over_time({name}_bucket{window})))"
    ((_, number),) = prometheus.ask(query)
    return number
