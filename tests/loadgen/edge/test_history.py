"""Sealed runs as metrics: against the runs' own summaries, by promtool, and through a real Prometheus."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import grid
import pytest
from click.testing import CliRunner
from fabricated import fabricate
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from loadgen.core.metrics import METRICS
from loadgen.edge import history_names as names
from loadgen.edge import store
from loadgen.edge.history import History, of_published
from loadgen.edge.history_cli import history
from loadgen.edge.import_mlperf import medians, read

BESIDE = sorted(Path(__file__).parents[4].glob("*/data/mlperf/inference_v*_summary_results.json"))
DATA = Path(os.environ.get("TRITONMARK_MLPERF_DATA", BESIDE[0].parent if BESIDE else "no published files"))
PUBLISHED = sorted(DATA.glob("inference_v*_summary_results.json"))  # all rounds; see test_import_mlperf.py
ROW = {"ID": "6.0-0001", "Submitter": "S", "Category": "closed", "Suite": "datacenter", "Platform": "8xGPU",
       "Model": "llama2-70b-99", "Scenario": "offline", "Nodes": 2, "Accelerator": "NVIDIA H200-SXM-141GB", "a#": "4",
       "version": "v6.0", "Performance_Result": 800.0, "Performance_Units": "Tokens/s"}  # fmt: skip
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (apt: prometheus)")


@pytest.fixture
def served():
    """Starts `tritonmark history`; gives a function from a path to its page."""
    started = []

    def start(results, *options):
        command = [sys.executable, "-c", "import tritonmark; tritonmark.main()", "history", str(results), "--port", "0"]
        process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        line = process.stdout.readline()
        assert "sealed runs of" in line, line + process.stderr.read()
        base = line.rsplit(" ", 1)[1].strip().removesuffix("/metrics")

        def page(path="/metrics"):
            with urllib.request.urlopen(base + path, timeout=20) as answer:
                return answer.read().decode()

        return process, page, base

    yield start
    for process in started:
        process.kill()
        process.communicate()


def samples(page):
    return {(s.name, tuple(sorted(s.labels.items()))): s.value
            for f in text_string_to_metric_families(page) for s in f.samples}  # fmt: skip


def of(found, name, **labels):
    """The values of `name` whose labels include `labels`."""
    return [v for (n, pairs), v in found.items() if n == name and labels.items() <= dict(pairs).items()]


def test_every_figure_of_the_summary_is_there_and_equal(served, tmp_path):
    run = fabricate(tmp_path, count=100, failures=2)
    gpu = grid.one(tmp_path / "more", "H200", "vllm")
    found = samples(served(tmp_path)[1]())
    for r in (run, gpu):
        name = r.document["run_id"]
        for metric in METRICS:
            value, family = r.summary.get(metric.name), names.of_metric(metric).name
            if isinstance(value, dict):
                wanted = {s: value[s] / 1e9 for s in names.STATS if value.get(s) is not None}
                assert {s: of(found, family, run=name, stat=s) for s in names.STATS} == {
                    s: [wanted[s]] if s in wanted else [] for s in names.STATS
                }
            else:
                assert of(found, family, run=name) == ([] if value is None else [pytest.approx(value)]), metric.name
    assert of(found, "tritonmark_sealed_ttft_seconds", run="run", stat="p99") == [], "a failed one has no latency"
    assert of(found, names.VALID.name, run="run") == [float(run.valid)]
    labels = {"generation": "Hopper", "gpu": "H200 SXM", "backend": "vllm", "load": "single stream"}
    labels["source"] = "measured"
    assert of(found, names.INFO.name, **labels) == [1.0]
    assert of(found, names.SHARE.name, work="decode", run=gpu.document["run_id"])[0] > 0
    assert of(found, names.UNREADABLE.name) == [0.0]
    assert {n for n, _ in found} <= {f.name for f in names.families()}


def test_runs_come_and_go_and_what_is_broken_is_counted_and_named(served, tmp_path):
    process, page, base = served(tmp_path)
    assert "tritonmark_sealed_info{" not in page()
    run = fabricate(tmp_path)
    assert len(of(samples(page()), names.INFO.name)) == 1
    assert "<!doctype html>" in page("/report/run")
    assert page("/healthy") == "ok\n"
    for path in ("/report/other", "/report/../run", "/"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            page(path)
    document = (run.folder / "run.json").read_text()
    changed = json.loads(document)
    changed["summary"]["tokens_out"] += 1
    bad = {"half": document[:100], "changed": json.dumps(changed), "other": "[]", "empty": "{}", "the copy": document,
           "deep": "[" * 100_000}  # fmt: skip
    for name, value in {"model": "\ud800", "started_utc": "never", "summary": changed["summary"] | {"qps": 10**400},
                        "scenario": None, "hardware": [1]}.items():  # fmt: skip
        odd = json.loads(document) | {"run_id": name, name: value}
        bad[name] = json.dumps(odd | {"seal": store.digest(odd)})
    for name, text in bad.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    found = samples(page())
    assert of(found, names.UNREADABLE.name) == [len(bad)] and len(of(found, names.INFO.name)) == 1
    with (run.folder / "records.parquet").open("a") as records:
        records.write("more")
    with pytest.raises(urllib.error.HTTPError, match="404") as refused:
        page("/report/run")
    assert "was changed after the run was sealed" in refused.value.read().decode()
    shutil.rmtree(run.folder)
    assert len(of(samples(page()), names.INFO.name)) == 1, "the copy takes its place"
    shutil.rmtree(tmp_path / "the copy")
    assert of(samples(page()), names.INFO.name) == []
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 0 and "Traceback" not in errors
    said = [line for line in errors.splitlines() if line.startswith("skipped:")]
    assert len(said) == len(bad) and "was changed after it was sealed" in errors and "is a copy of" in errors
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(base, timeout=2)


def test_prices_make_costs(served, tmp_path):
    run = grid.one(tmp_path, "H100", "vllm")
    prices = tmp_path / "prices.toml"
    prices.write_text('currency = "EUR"\n[per_gpu_hour]\nh100-sxm = 3.6\n')
    process, page, _ = served(tmp_path, "--prices", str(prices))
    found = samples(page())
    (cost,) = of(found, names.TOKEN_COST.name, currency="EUR")
    assert cost == pytest.approx(1e6 / run.summary["tokens_per_s"] / 3600 * 3.6)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 0 and not errors


def test_published_results_stand_beside_and_are_marked(served, tmp_path):
    run = grid.one(tmp_path / "results", "H200", "vllm")
    file = tmp_path / "summary_results.json"
    changes = [{}, {"Performance_Result": 1600.0, "ID": "6.0-0002"}, {"Category": "open"},
               {"Performance_Result": 9.0, "Performance_Units": "Latency (ms)", "Scenario": "SingleStream"}]  # fmt: skip
    file.write_text(json.dumps([ROW | change for change in changes]))
    found = samples(served(tmp_path / "results", "--published", str(file))[1]())
    family = names.per_gpu(next(m for m in METRICS if m.name == "tokens_per_s")).name
    told = {"run": "MLPerf v6.0", "model": "llama2-70b-99", "scenario": "offline", "backend": "published"}
    assert of(found, family, source="published", **told) == [150.0], "the median of 100 and 200 tokens/s per GPU"
    assert of(found, family, source="measured") == [pytest.approx(run.summary["tokens_per_s"])]
    assert of(found, names.INFO.name, source="published", gpu="H200 SXM", generation="Hopper", **told) == [1.0]
    assert len(of(found, names.INFO.name)) == 2


def test_published_accelerators_are_the_catalogues_gpus(tmp_path):
    known = {"NVIDIA H100-PCIe-80GB": "H100 PCIe", "NVIDIA H100-SXM-80GB": "H100 SXM", "NVIDIA L40S": "L40S",
             "NVIDIA B200-SXM-180GB": "B200 (HGX)", "NVIDIA GB200": "GB200 (per GPU)",
             "NVIDIA GH200 Grace Hopper Superchip 96GB": "GH200 96 GB",
             "NVIDIA GH200 Grace Hopper Superchip 144GB": "GH200 144 GB"}  # fmt: skip
    others = ("Virtualized NVIDIA H200-SXM-141GB", "NVIDIA H200-NVL-141GB", "NVIDIA GB300", "TPU v6")
    file = tmp_path / "summary_results.json"
    file.write_text(json.dumps([ROW | {"Accelerator": name} for name in (*known, *others)]))
    at = names.LABELS.index("hardware")
    shown = {run.labels[at]: run.samples[0][1][0] for run in of_published(read(file))}
    assert shown == known | {name: name for name in others}


@pytest.mark.skipif(not PUBLISHED, reason="no published MLPerf files; set TRITONMARK_MLPERF_DATA")
@needs_promtool
def test_all_published_rounds_are_shown_once(served, tmp_path):
    page = served(tmp_path, *(word for path in PUBLISHED for word in ("--published", str(path))))[1]()
    found = samples(page)
    assert len(found) == sum(not line.startswith("#") for line in page.splitlines()), "no series stands there twice"
    rows = [row for path in PUBLISHED for row in read(path)]
    wanted = [m for m in medians(rows) if m["unit"] in ("Tokens/s", "Samples/s", "Queries/s")]
    shown = [v for (name, pairs), v in found.items() if name.startswith("tritonmark_sealed_gpu_")]
    assert sorted(shown) == sorted(m["median"] for m in wanted) and len(wanted) > 50
    assert not of(found, names.INFO.name, source="measured")
    assert subprocess.run(["promtool", "check", "metrics"], input=page, text=True, check=False).returncode == 0


@needs_promtool
def test_promtool_has_no_complaint(served, tmp_path):
    fabricate(tmp_path)
    grid.one(tmp_path / "more", "H100", "vllm")
    checked = subprocess.run(["promtool", "check", "metrics"], input=served(tmp_path)[1](), capture_output=True,
                             text=True, check=False)  # fmt: skip
    assert checked.returncode == 0 and not checked.stderr.strip(), checked.stdout + checked.stderr


@needs_promtool
def test_an_openmetrics_export_is_prometheus_own_past(tmp_path):
    """promtool makes blocks of it, and a Prometheus that has scraped nothing answers from them."""
    runs = [grid.one(tmp_path / "results", gpu, "vllm", repeat) for gpu in ("H100", "H200") for repeat in (0, 1)]
    out, blocks = tmp_path / "all.om", tmp_path / "blocks"
    done = CliRunner().invoke(history, [str(tmp_path / "results"), "--openmetrics", str(out)])
    assert done.exit_code == 0, done.output
    parsed = {s.labels["run"]: s for f in parse_openmetrics(out.read_text()) if f.name == names.VALID.name
              for s in f.samples}  # fmt: skip
    assert set(parsed) == {r.document["run_id"] for r in runs}
    subprocess.run(["promtool", "tsdb", "create-blocks-from", "openmetrics", str(out), str(blocks)], check=True,
                   capture_output=True)  # fmt: skip
    (tmp_path / "empty.yml").write_text("")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    prometheus = subprocess.Popen(
        ["prometheus", f"--config.file={tmp_path / 'empty.yml'}", f"--storage.tsdb.path={blocks}",
         "--storage.tsdb.retention.time=100y", f"--web.listen-address={address}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        family = names.of_metric(next(m for m in METRICS if m.name == "tokens_per_s")).name
        at = parsed[runs[0].document["run_id"]].timestamp
        asked = urllib.parse.urlencode({"query": family, "time": str(float(at) + 1)})
        deadline, result = time.monotonic() + 20, []
        while not result and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://{address}/api/v1/query?{asked}", timeout=5) as answer:
                    result = json.load(answer)["data"]["result"]
            except OSError:
                time.sleep(0.2)
        got = {r["metric"]["run"]: float(r["value"][1]) for r in result}
        first = runs[0]
        assert got[first.document["run_id"]] == pytest.approx(first.summary["tokens_per_s"])
    finally:
        prometheus.terminate()
        prometheus.wait(20)


def test_bad_input_is_one_line(tmp_path):
    def error(*words):
        done = CliRunner().invoke(history, words)
        assert done.exit_code == 1 and "\n" not in str(done.exception)
        return str(done.exception)

    assert "is not a folder" in error(str(tmp_path / "none"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "choose another --port" in error(str(tmp_path), "--port", str(taken.getsockname()[1]))
    assert "give --openmetrics another" in error(str(tmp_path), "--openmetrics", str(tmp_path / "no" / "folder" / "x"))
    assert "give --openmetrics another" in error(str(tmp_path), "--openmetrics", str(tmp_path))
    assert not list(tmp_path.parent.glob("*.part")), "half a file"
    assert "leave one of them out" in error(str(tmp_path), "--openmetrics", "-", "--published", str(tmp_path / "x"))
    assert "cannot read --prices" in error(str(tmp_path), "--prices", str(tmp_path / "none.toml"))


def test_a_thousand_runs_are_read_once(tmp_path):
    """A scan reads what is new; the others cost a stat each."""
    run = fabricate(tmp_path / "one")
    document = run.document
    for n in range(1000):
        folder = tmp_path / "many" / str(n)
        folder.mkdir(parents=True)
        document["run_id"] = f"run-{n}"
        document["seal"] = store.digest(document)
        (folder / "run.json").write_text(json.dumps(document))
    task = History(tmp_path / "many")
    assert task.scan() == [] and len(task.runs()) == 1000
    held = {id(r) for r in task.runs()}
    os.utime(tmp_path / "many" / "7" / "run.json", (1, 1))
    task.scan()
    assert len(held & {id(r) for r in task.runs()}) == 999
