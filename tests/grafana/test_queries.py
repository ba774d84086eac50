"""Every query of every dashboard, asked of a real Prometheus that watched real runs on the real Triton.

One text run and one video run are shared by all tests. There is no GPU here: DCGM's and Triton's GPU families, and the
first-response histogram that only Triton 2.52 or later has, come from tests/fakes/gpu_exporter.py, and NVML's from
tests/fakes/pynvml_fake: for those queries only names, labels and units are shown to be right.
"""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from gpu_exporter import GpuExporter

from loadgen.edge import store

pytestmark = [
    pytest.mark.live, pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is not installed"),
]  # fmt: skip
ROOT = Path(__file__).parents[2]
BOARDS = {p.stem: json.loads(p.read_text()) for p in sorted((ROOT / "grafana" / "dashboards").glob("*.json"))}
TEXT, VIDEO = "phi-2-tiny", "cogvideox-5b-tiny"
# Queries that cannot have data here, and why.
SILENT = {"tritonmark_host_cpu_power_watts": "RAPL is readable on bare metal only"}
WINDOW_S = 180
H100 = "1x-NVIDIA H100 80GB HBM3"  # what the text run is told that it ran on: prices and rooflines are for known GPUs
PUBLISHED = {"ID": "6.0-0001", "Submitter": "S", "Availability": "available", "Category": "closed", "Nodes": 1,
             "Suite": "datacenter", "System": "x", "Platform": "8xGPU", "Model": "llama2-70b-99", "Scenario": "offline",
             "Accelerator": "NVIDIA H100-SXM-80GB", "a#": "8", "version": "v6.0", "weight_data_types": "FP8",
             "Performance_Result": 800.0, "Performance_Units": "Tokens/s"}  # fmt: skip


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Prometheus:
    """The real one, with the project's alert rules."""

    def __init__(self, folder, jobs):
        self.port = free_port()
        (folder / "prometheus.yml").write_text(json.dumps({
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(ROOT / "prometheus/alerts.yml")], "scrape_configs": jobs,
        }))  # fmt: skip
        self.process = subprocess.Popen(
            ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
             f"--web.listen-address=127.0.0.1:{self.port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, path, **words):
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?" + urllib.parse.urlencode(words, doseq=True)
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{words}: {error.read().decode()}") from None

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=20)


class Bench:
    """What the tests share: Prometheus, the sealed runs by model, and the time that was watched."""

    def __init__(self, prometheus, runs, began):
        self.prometheus, self.runs, self.began, self.ended = prometheus, runs, began, time.time()

    def values(self, variable, chosen):
        """What Grafana would offer for a variable, in its order."""
        if variable["type"] == "custom":
            return variable["query"].split(",")
        if variable["type"] == "textbox":
            return [variable["query"]]
        asked = re.fullmatch(r"label_values\((?:(.*), )?(\w+)\)", self.fill(variable["query"]["query"], chosen), re.S)
        words = {"start": self.began, "end": self.ended} | ({"match[]": asked[1]} if asked[1] else {})
        found = sorted(self.prometheus.ask(f"label/{asked[2]}/values", **words), reverse=variable["sort"] == 2)
        assert found, f"no value of ${variable['name']} to choose"
        return found

    def choices(self, board):
        """Each choice of the first variable that has one value at a time, with what follows from it."""
        variables = [v for v in board["templating"]["list"] if v["type"] != "datasource"]
        single = [v for v in variables if not v["multi"] and v["type"] == "query"]
        for first in self.values(single[0], {}) if single else [None]:
            chosen = {}
            for variable in variables:
                if single and variable["name"] == single[0]["name"]:
                    chosen[variable["name"]] = first
                elif variable["includeAll"]:
                    chosen[variable["name"]] = variable["allValue"]
                else:
                    chosen[variable["name"]] = self.values(variable, chosen)[0]
            yield chosen

    @staticmethod
    def fill(text, chosen):
        words = {"__rate_interval": "4s", "__range": f"{WINDOW_S}s", **chosen}
        return re.sub(r"\$\{?(\w*[a-z]\w*)\}?", lambda m: words.get(m[1], m[0]), text)

    def data(self, expression, instant):
        """Numbers of each series that the panel would show, NaN left out.

        A busy machine may make the client late and so a run INVALID; that is not the question here, so it counts then.
        """
        if not all(r.valid for r in self.runs.values()):
            expression = expression.replace("tritonmark_sealed_valid == 1", "tritonmark_sealed_valid >= 0")
        if instant:
            found = self.prometheus.ask("query", query=expression, time=self.ended)["result"]
            series = [(s["metric"], [s["value"]]) for s in found]
        else:
            found = self.prometheus.ask("query_range", query=expression, start=self.began, end=self.ended, step=1)
            series = [(s["metric"], s["values"]) for s in found["result"]]
        told = [(m, [float(v) for _, v in points if not math.isnan(float(v))]) for m, points in series]
        return [(m, numbers) for m, numbers in told if numbers]


def run(file, url, model, results, *arguments, env=None):
    return subprocess.Popen(
        [sys.executable, "-m", "locust", "-f", str(ROOT / "loadgen" / file), "--headless", "--only-summary", "--host", url,
         "--model", model, "--results", str(results), "--scenario", "server", *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True,
    )  # fmt: skip


def until(condition, seconds=30.0):
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, "it did not happen in time"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    from exporters.export import export_model
    from exporters.server import TritonServer

    folder = tmp_path_factory.mktemp("bench")
    results, history = folder / "results", f"127.0.0.1:{free_port()}"
    results.mkdir()
    for model in (TEXT, VIDEO):
        export_model(model, out=folder / "models")
    fake_nvml = os.environ | {"PYTHONPATH": str(ROOT / "tests/fakes/pynvml_fake"),
                              "PYNVML_FAKE_PLAN": json.dumps([{"watts": 300.0, "throttle": 0x20}])}  # fmt: skip
    (folder / "prices.toml").write_text('currency = "USD"\n[per_gpu_hour]\nh100-sxm = 2.5\n')
    (folder / "published.json").write_text(json.dumps([PUBLISHED]))
    began = time.time()
    sealed = subprocess.Popen(
        [sys.executable, "-m", "tritonmark", "history", str(results), "--port", history.split(":")[1], "--prices",
         str(folder / "prices.toml"), "--published", str(folder / "published.json")],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    with (
        GpuExporter(TEXT) as gpus,
        TritonServer(folder / "models", models=[TEXT, VIDEO], log_path=folder / "triton.log") as server,
    ):
        triton = server.metrics_url.removeprefix("http://").removesuffix("/metrics")
        prometheus = Prometheus(folder, [
            {"job_name": "tritonmark", "file_sd_configs": [
                {"files": [f"{results}/.prometheus/targets/*.json"], "refresh_interval": "1s"}]},
            {"job_name": "triton", "static_configs": [{"targets": [triton, f"127.0.0.1:{free_port()}"]}]},
            {"job_name": "dcgm", "static_configs": [{"targets": [gpus.address]}]},
            {"job_name": "tritonmark-history", "static_configs": [{"targets": [history]}]},
        ])  # fmt: skip
        try:
            loads = [
                run("llm.py", server.http_url, TEXT, results, "--target-qps", "4", "--run-time", "10s", "--hardware", H100,
                    "--telemetry", f"http://{gpus.address}/metrics", "--server-metrics", server.metrics_url),
                run("video.py", server.http_url, VIDEO, results, "--target-qps", "2", "--run-time", "6s", "--clip",
                    "steps=3", "--telemetry", "nvml", env=fake_nvml),
            ]  # fmt: skip
            told = [load.communicate(timeout=120)[0] for load in loads]
            runs = {r.document["model"]: r for r in (store.load(p.parent) for p in results.rglob("run.json"))}
            assert set(runs) == {TEXT, VIDEO}, told
            until(lambda: len(prometheus.ask("query", query="tritonmark_sealed_info")["result"]) == 3)
            until(
                lambda: prometheus.ask("query", query='ALERTS{alertname="TargetDown", alertstate="firing"}')["result"]
            )
            yield Bench(prometheus, runs, began)
        finally:
            prometheus.stop()
            sealed.terminate()
            sealed.wait(timeout=20)


def queries():
    for name, board in BOARDS.items():
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                yield pytest.param(name, target, id=f"{name}-{panel['id']}-{panel['title']}-{target['refId']}")


@pytest.mark.parametrize(("board", "target"), list(queries()))
def test_every_query_returns_data(bench, board, target):
    instant, silent = target.get("instant", False), [why for name, why in SILENT.items() if name in target["expr"]]
    choices = list(bench.choices(BOARDS[board]))
    for part in parts(target["expr"]):
        answers = [bench.data(bench.fill(part, chosen), instant) for chosen in choices]
        assert any(answers) != bool(silent), f"{silent or 'no data'}: {part}"


def parts(expression):
    """The whole, and each alternative of an `or on (…)` by itself, which a better source would otherwise hide."""
    alternatives = re.split(r"\nor on \(\w*\) ", expression)
    return [expression, *(a for a in alternatives if a.count("(") == a.count(")") and a != expression)]


def test_runs_are_marked_where_they_began_and_were_sealed(bench):
    for mark in BOARDS["live"]["annotations"]["list"]:
        found = bench.data(bench.fill(mark["expr"], {}), instant=True)
        assert {m["run"] for m, _ in found} == {r.document["run_id"] for r in bench.runs.values()}
        assert all(bench.began * 1000 < v < bench.ended * 1000 for _, (v,) in found)


def shown(bench, board, title, model=TEXT, **labels):
    """Values that a panel shows of a model's run, by the labels that tell its series apart."""
    (panel,) = (p for p in BOARDS[board]["panels"] if p["title"] == title)
    target = panel["targets"][0]
    wanted = {"model": model} if board == "generations" else {"run": bench.runs[TEXT].document["run_id"]}
    (chosen,) = (c for c in bench.choices(BOARDS[board]) if all(c.get(k, v) == v for k, v in wanted.items()))
    found = bench.data(bench.fill(target["expr"], chosen), target.get("instant", False))
    return [v for m, values in found for v in values if labels.items() <= m.items()]


def test_what_is_shown_is_what_was_sealed(bench):
    text = bench.runs[TEXT].summary
    assert shown(bench, "live", "Ended well") == [text["completed"]]
    assert shown(bench, "live", "Failed") == [text["failed"] / text["scheduled"]]
    assert shown(bench, "live", "Verdict so far") == [float(bench.runs[TEXT].valid)]
    assert shown(bench, "live", "Phase") == [1.0]
    assert shown(bench, "generations", "tokens/s") == [pytest.approx(text["tokens_per_s"])]
    assert shown(bench, "generations", "p99 TTFT") == [text["ttft_ns"]["p99"] / 1e9]
    assert shown(bench, "generations", "p99 TPOT against the baseline GPU", backend="torch-eager")[0] == 1
    gpus = len(bench.runs[TEXT].document["telemetry"]["devices"])  # the fake NVML's, which all worked
    dollars = gpus * 2.5 / 3600 / text["tokens_per_s"] * 1e6
    assert shown(bench, "generations", "Cost per million tokens", currency="USD") == [pytest.approx(dollars)]
    per_gpu = shown(bench, "generations", "tokens/s per GPU")
    assert gpus > 1 and per_gpu == [pytest.approx(text["tokens_per_s"] / gpus)]
    (published,) = shown(bench, "generations", "tokens/s per GPU", model="llama2-70b-99")
    assert published == pytest.approx(100.0), "published: 800 on 8 GPUs"


def test_only_valid_runs_are_compared(bench):
    """The same query finds as many INVALID runs as there are, when it is asked for those."""
    (panel,) = (p for p in BOARDS["generations"]["panels"] if p["title"].startswith("Requests/s per GPU: "))
    for valid in (0, 1):
        found = []
        for chosen in bench.choices(BOARDS["generations"]):
            expression = bench.fill(panel["targets"][0]["expr"], chosen)
            assert "tritonmark_sealed_valid == 1" in expression
            asked = expression.replace("tritonmark_sealed_valid == 1", f"tritonmark_sealed_valid == {valid}")
            found += bench.prometheus.ask("query", query=asked, time=bench.ended)["result"]
        assert len(found) == sum(r.valid == valid for r in bench.runs.values())


def test_units_are_those_that_the_panels_name(bench):
    assert set(shown(bench, "live", "Power", gpu="1")) == {200.0}
    assert set(shown(bench, "live", "SM clock")) == {1.98e9}
    assert set(shown(bench, "live", "GPU memory")) == {6144 * 2**20}
    assert set(shown(bench, "live", "Utilisation")) == {0.9}
    assert shown(bench, "fleet", "Power of all GPUs") == [500.0]
    heat = shown(bench, "fleet", "Throttled by heat")
    assert heat[-1] == pytest.approx(0.5, abs=0.2)


def test_alerts_fire_for_what_is_wrong_here(bench):
    """A Triton that is not there, and a GPU that the exporter says is held back by heat."""
    found = bench.prometheus.ask("query", query='ALERTS{alertstate="firing"}', time=bench.ended)["result"]
    names = {s["metric"]["alertname"] for s in found}
    assert {"TargetDown", "GpuThrottled"} <= names and "GpuXid" not in names
