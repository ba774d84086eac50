"""One scenario over several servers: fakes that note what reached them, and two real Tritons."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import triton_server

from exporters.export import export_model
from exporters.server import TritonServer
from loadgen.core.metrics import join
from loadgen.edge import report, report_html, store

LLM = str(Path(__file__).parents[3] / "loadgen" / "llm.py")
FAST = {"ttft_ms": 5, "itl_ms": 2}


@pytest.fixture
def two():
    servers = [triton_server.start(FAST) for _ in range(2)]
    yield servers
    for server in servers:
        server.stop()


def load(results, hosts, model, *arguments):
    command = [sys.executable, "-m", "locust", "-f", LLM, "--headless", "--only-summary", "--host", ",".join(hosts),
               "--model", model, "--results", str(results), *arguments]  # fmt: skip
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(process, results):
    output, _ = process.communicate(timeout=90)
    (path,) = results.rglob("run.json")
    return store.load(path.parent), output


SERVER = ("--scenario", "server", "--target-qps", "30", "--run-time", "2s", "--output-tokens", "4")


def test_slots_are_shared_out_by_their_number_whatever_the_workers(two, tmp_path):
    urls = [server.url for server in two]
    run, output = finished(load(tmp_path, urls, "fake", *SERVER, "--split", "2,1", "--processes", "2"), tmp_path)
    rows = join(run.rows())
    assert rows.ok.all() and np.array_equal(rows.server, np.array([0, 1, 0])[rows.seq % 3]), output
    for number, server in enumerate(two):
        there = {row["id"] for row in server.log()}
        assert {f"{run.folder.name}-{seq}" for seq in rows.seq[rows.server == number]} <= there
        assert not {f"{run.folder.name}-{seq}" for seq in rows.seq[rows.server != number]} & there
    assert run.document["servers"] == [{"url": urls[0], "share": 2}, {"url": urls[1], "share": 1}]
    seen = run.summary["servers"]
    assert [s["requests"] for s in seen] == [int((rows.server == n).sum()) for n in range(2)]
    assert sum(s["tokens_out"] for s in seen) == run.summary["tokens_out"]
    assert f"server {urls[1]}: " in output and f"server {urls[1]}: " in report_html.html([run])


def test_a_server_that_dies_is_named(two, tmp_path):
    process = load(tmp_path, [server.url for server in two], "fake", *SERVER[:5], "4s", *SERVER[6:])
    while not two[1].log():
        assert process.poll() is None
    two[1].process.kill()
    run, output = finished(process, tmp_path)
    (reason,) = [r for r in run.document["verdict"]["reasons"] if r["code"] == "failed_error"]
    assert process.returncode == 3 and f"all of them to {two[1].url}" in reason["seen"], output
    rows = join(run.rows())
    assert rows.ok[rows.server == 0].all() and not rows.ok[rows.server == 1].all()
    assert np.array_equal(rows.seq, np.arange(run.document["audit"]["scheduled"]))
    report.text([run])


@pytest.mark.parametrize(
    ("plan", "arguments", "message"),
    [
        ({"server": {"version": "2.60.0"}}, (), "different version ('2.99.0-fake' and '2.60.0')"),
        ({"parameters": {"tritonmark.precision": {"string_value": "fp8"}}}, (), "different parameters"),
        ({"server": {"models": ["other"]}}, (), "no model 'fake'"),
        ({}, ("--split", "1"), "--split is '1'"),
        ({}, ("--split", "1,0"), "--split is '1,0'"),
        ({}, ("--split", "900,900"), "may add up to 1000"),
    ],
)
def test_unlike_servers_and_bad_shares_are_refused(two, tmp_path, plan, arguments, message):
    two[1].plan(FAST | plan)
    process = load(tmp_path, [server.url for server in two], "fake", *SERVER, *arguments)
    output, _ = process.communicate(timeout=60)
    error = next(line for line in output.splitlines() if line.startswith("error: "))
    assert process.returncode == 2 and message in error and not list(tmp_path.rglob("run.json"))


def test_one_server_twice_is_refused(two, tmp_path):
    output, _ = load(tmp_path, [two[0].url, two[0].url + "/"], "fake", *SERVER).communicate(timeout=60)
    assert f"--host names {two[0].url} twice" in output


def test_runs_from_before_there_was_a_server_column_are_read(two, tmp_path):
    import pyarrow.parquet as pq

    run, _ = finished(load(tmp_path, [two[0].url], "fake", *SERVER), tmp_path)
    path = run.folder / "records.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["server"]), path)
    assert (join(run.rows()).server == 0).all() and "servers" not in json.loads((run.folder / "run.json").read_text())


@pytest.mark.slow
@pytest.mark.live
def test_two_real_tritons(tmp_path):
    export_model("phi-2-tiny", out=tmp_path / "models")
    with TritonServer(tmp_path / "models") as first, TritonServer(tmp_path / "models") as second:
        urls = [first.http_url, second.http_url]
        words = ("--scenario", "concurrency", "--concurrency", "4", "--run-time", "3s", "--output-tokens", "8")
        run, output = finished(load(tmp_path / "results", urls, "phi-2-tiny", *words), tmp_path / "results")
    assert not run.summary["failed"], output
    one, two = run.summary["servers"]
    assert one["requests"] + two["requests"] == run.summary["completed"] and abs(one["requests"] - two["requests"]) <= 1
    assert run.document["server_statistics"]["requests"] >= run.summary["completed"], "both are counted"
