"""Telemetry against fake GPUs that know what energy they gave, and the server's figures against known counts."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rows import make_rows

from loadgen.core.metrics import summarise
from loadgen.edge import live_names as names
from loadgen.edge import scenarios, server_stats
from loadgen.edge.errors import UserError
from loadgen.edge.telemetry import Settings, shown
from loadgen.edge.telemetry_sampler import series
from loadgen.edge.telemetry_sources import Exported, Host, Missing, parsed
from loadgen.edge.telemetry_table import STREAM, conclude

ROOT = Path(__file__).parents[3]
FAKE = ROOT / "tests" / "fakes" / "pynvml_fake"
WINDOW = (0.7, 3.6)  # s of the fake's clock that are measured
PLANS = {
    "constant": [{"watts": 300.0}],
    "ramp": [{"watts": [[0, 100.0], [2, 100.0], [2.5, 600.0], [4, 500.0]]}],
    "gap": [{"watts": 300.0, "gap": [1.0, 3.2]}],
    "throttle": [{"watts": 300.0, "throttle": [[0, 0], [2.0, 0x40]]}],
    "capped": [{"watts": 700.0, "throttle": 0x4}],
    "lost": [{"watts": 300.0, "lost_at": 2.0}],
    "two": [{"watts": 300.0}, {"watts": 200.0}],
    "one lost of two": [{"watts": 300.0}, {"watts": 200.0, "lost_at": 2.0}],
    "one idle of two": [{"watts": 300.0}, {"watts": 70.0, "utilisation": 0}],
    "counter off": [{"watts": 300.0, "counter": 1.2}],
    "no counter": [{"watts": 300.0, "counter": False}],
    "none": [],
}


def scenario():
    return scenarios.resolve("server", "phi-2-tiny", "smoke", {"target_qps": 1.0})


def rows_to(end_ns):
    """Two completed requests of 4 and 6 tokens, the last of which ends the window."""
    return make_rows([
        {"due": 0, "chunks": [10**8, 2 * 10**8], "tokens": [1, 3]},
        {"due": 10**8, "chunks": [2 * 10**8, end_ns], "tokens": [1, 5]},
    ])  # fmt: skip


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """The sampler's streams of all plans, sampled at the same time by real sampler processes."""
    folder, running = tmp_path_factory.mktemp("telemetry"), {}
    t0 = time.monotonic() + 1.5  # by then all have started
    for name, plan in PLANS.items():
        out = folder / name / STREAM
        out.parent.mkdir()
        env = os.environ | {"PYTHONPATH": f"{FAKE}{os.pathsep}{ROOT}", "PYNVML_FAKE_PLAN": json.dumps(plan),
                            "PYNVML_FAKE_T0": str(t0)}  # fmt: skip
        command = [sys.executable, "-m", "loadgen.edge.telemetry_sampler", "--out", str(out), "--nvml", "pynvml"]
        running[name] = subprocess.Popen(command, stdin=subprocess.PIPE, env=env)
    time.sleep(t0 + 4.6 - time.monotonic())
    for process in running.values():
        process.stdin.close()
        assert process.wait(timeout=10) == 0
    for name in PLANS:
        with (folder / name / STREAM).open("a") as file:
            file.write(json.dumps({"settings": {"source": "nvml", "gpus": None}}) + "\n")
            file.write(json.dumps({"t0": round((t0 + WINDOW[0]) * 1e9)}) + "\n")
    return folder


def concluded(streams, name, document=None):
    rows = rows_to(round((WINDOW[1] - WINDOW[0]) * 1e9))
    summary, rows = summarise([rows], scenario())
    more, cautions = conclude(streams / name, document or {}, scenario(), summary, rows)
    return more["telemetry"], summary, [c.code for c in cautions]


def truth(plan):
    """What the fake says of itself, by its own integral."""
    spec = importlib.util.spec_from_file_location("pynvml_truth", FAKE / "pynvml.py")
    fake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake)
    return fake.true_joules(plan, *WINDOW)


@pytest.mark.parametrize(("name", "tolerance"), [("constant", 1e-6), ("ramp", 0.03), ("capped", 1e-6)])
def test_energy_is_what_the_gpu_gave(streams, name, tolerance):
    telemetry, summary, cautions = concluded(streams, name)
    joules = truth(PLANS[name][0])
    assert summary["energy_joules"] == pytest.approx(joules, rel=tolerance)
    assert telemetry["counter_joules"] == pytest.approx(joules, rel=max(tolerance, 1e-4))
    assert summary["mean_power_watts"] == pytest.approx(joules / (WINDOW[1] - WINDOW[0]), rel=tolerance)
    assert summary["tokens_per_joule"] == pytest.approx(10 / joules, rel=tolerance)
    assert telemetry["power_valid"] and cautions == []
    assert telemetry["rate_hz"] == pytest.approx(5, rel=0.05)


def test_two_gpus_are_summed(streams):
    telemetry, summary, _ = concluded(streams, "two")
    assert summary["energy_joules"] == pytest.approx(500 * (WINDOW[1] - WINDOW[0]), rel=1e-6)
    assert [d["device"] for d in telemetry["devices"]] == ["gpu0", "gpu1"]


def test_an_idle_gpu_is_no_part_of_the_run(streams):
    telemetry, summary, _ = concluded(streams, "one idle of two")
    assert telemetry["idle_gpus"] == ["gpu1"]
    assert summary["mean_power_watts"] == pytest.approx(300, rel=1e-6)


def test_a_gpu_without_a_counter_is_measured_all_the_same(streams):
    telemetry, summary, cautions = concluded(streams, "no counter")
    assert telemetry["counter_joules"] is None and telemetry["power_valid"] and cautions == []
    assert summary["mean_power_watts"] == pytest.approx(300, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "code", "quoted"),
    [("gap", "power_gap", False), ("throttle", "throttled", True), ("lost", "power_lost", False),
     ("one lost of two", "power_lost", False), ("counter off", "power_disagrees", True)],
)  # fmt: skip
def test_what_is_wrong_is_named(streams, name, code, quoted):
    telemetry, summary, cautions = concluded(streams, name)
    assert code in cautions and not telemetry["power_valid"]
    assert ("energy_joules" in summary) == quoted  # a part of the energy is never the run's


def test_no_library_is_absence_and_not_zero(streams):
    telemetry, summary, cautions = concluded(streams, "none")
    assert "energy_joules" not in summary and telemetry["devices"] == [] and not telemetry["power_valid"]
    assert "NVML Shared Library Not Found" in telemetry["missing"][0] and cautions == []
    _, _, cautions = concluded(streams, "none", {"hardware": {"gpus": [{"name": "H100"}]}})
    assert cautions == ["telemetry_missing"]  # there is a GPU, and its power is not known


def test_the_table_has_what_was_sampled_on_the_runs_clock(streams):
    concluded(streams, "ramp")
    table = pq.read_table(streams / "ramp" / "telemetry.parquet").to_pydict()
    assert min(table["time_ns"]) < 0 < max(table["time_ns"])
    spec = importlib.util.spec_from_file_location("pynvml_truth", FAKE / "pynvml.py")
    fake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake)
    for t, watts in zip(table["time_ns"], table["power_w"], strict=True):  # 10 ms late at most on a busy machine
        around = [fake.watts_at(PLANS["ramp"][0], t / 1e9 + WINDOW[0] + late) for late in (-0.05, 0, 0.05)]
        assert min(around) - 1 <= watts <= max(around) + 1
    assert set(table["sm_clock_hz"]) == {1.98e9} and set(table["temperature_c"]) == {None}


def test_a_torn_stream_costs_its_last_line(streams):
    with (streams / "capped" / STREAM).open("a") as file:
        file.write('{"t": 12, "device": "gp')
    _, summary, _ = concluded(streams, "capped")
    assert "energy_joules" in summary


def test_a_damaged_stream_costs_the_telemetry_and_not_the_run(tmp_path):
    (tmp_path / STREAM).write_text("nonsense\n")
    summary, rows = summarise([rows_to(10**9)], scenario())
    more, cautions = conclude(tmp_path, {}, scenario(), summary, rows)
    assert more == {} and [c.code for c in cautions] == ["telemetry_unreadable"]


def test_the_sampler_ends_with_its_parent(tmp_path):
    out = tmp_path / STREAM
    code = ("import subprocess, sys, os, time; p = subprocess.Popen([sys.executable, '-m', 'loadgen.edge."
            f"telemetry_sampler', '--out', {str(out)!r}, '--host'], stdin=subprocess.PIPE); print(p.pid, flush=True);"
            "time.sleep(1.5); os.kill(os.getpid(), 9)")  # fmt: skip
    pid = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    for _ in range(50):
        if not Path("/proc", pid).exists():
            assert '"device": "host"' in out.read_text()
            return
        time.sleep(0.1)
    pytest.fail("the sampler outlived its parent")


DCGM = """# TYPE DCGM_FI_DEV_POWER_USAGE gauge
DCGM_FI_DEV_POWER_USAGE{gpu="1",UUID="GPU-b"} 400.5
DCGM_FI_DEV_POWER_USAGE{gpu="0",UUID="GPU-a"} 300.0
# TYPE DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION counter
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{gpu="0",UUID="GPU-a"} 5000000
# TYPE DCGM_FI_DEV_SM_CLOCK gauge
DCGM_FI_DEV_SM_CLOCK{gpu="0",UUID="GPU-a"} 1980
# TYPE DCGM_FI_DEV_FB_USED gauge
DCGM_FI_DEV_FB_USED{gpu="0",UUID="GPU-a"} 10
# TYPE DCGM_FI_PROF_DRAM_ACTIVE gauge
DCGM_FI_PROF_DRAM_ACTIVE{gpu="0",UUID="GPU-a"} 0.5
"""
TRITON = """# TYPE nv_gpu_power_usage gauge
nv_gpu_power_usage{gpu_uuid="GPU-a"} 310.25
# TYPE nv_energy_consumption counter
nv_energy_consumption{gpu_uuid="GPU-a"} 1234.5
# TYPE nv_gpu_utilization gauge
nv_gpu_utilization{gpu_uuid="GPU-a"} 0.75
# TYPE nv_inference_count counter
nv_inference_count{model="m",version="1"} 7
nv_inference_count{model="other",version="1"} 9
# TYPE tritonmark_requests_running gauge
tritonmark_requests_running{model="m",version="1"} 3
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{model_name="/models/m"} 55
"""


def test_dcgm_and_triton_tell_in_their_own_units():
    first, second = parsed(DCGM)
    assert first == {"device": "gpu0", "power_w": 300.0, "energy_j": 5000.0, "sm_clock_hz": 1.98e9,
                     "memory_used_bytes": 10 * 2**20, "dram_active": 0.5}  # fmt: skip
    assert second == {"device": "gpu1", "power_w": 400.5}
    assert parsed(TRITON) == [{"device": "gpu0", "power_w": 310.25, "energy_j": 1234.5, "utilisation": 0.75}]


def test_series_of_this_model_and_its_backend():
    assert series(TRITON, "m") == {"nv_inference_count": 7, "tritonmark_requests_running": 3,
                                   'vllm:generation_tokens_total{model_name="/models/m"}': 55}  # fmt: skip


def test_a_page_that_did_not_move_is_no_sample(monkeypatch):
    monkeypatch.setattr("loadgen.edge.telemetry_sources.scrape", lambda url: TRITON)
    source = Exported("http://x/metrics")
    assert source.sample() == []
    monkeypatch.setattr("loadgen.edge.telemetry_sources.scrape", lambda url: TRITON.replace("1234.5", "1240.0"))
    assert source.sample()[0]["energy_j"] == 1240.0
    monkeypatch.setattr("loadgen.edge.telemetry_sources.scrape", lambda url: "# nothing\n")
    with pytest.raises(Missing, match="tells of no GPU"):
        Exported("http://x/metrics")


def test_rapl_wraps_and_is_absent_where_it_cannot_be_read(tmp_path):
    assert [r["device"] for r in Host(tmp_path).sample()] == ["host"]
    for name in ("intel-rapl:0", "intel-rapl:0:0"):  # the second is a part of the first
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text("900000000")
        (tmp_path / name / "max_energy_range_uj").write_text("1000000000")
    host = Host(tmp_path)
    assert [r["device"] for r in host.sample()] == ["host", "cpu0"]
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("50000000")
    row = host.sample()[1]
    assert row["energy_j"] == pytest.approx(150.0) and row["power_w"] > 0


@pytest.mark.parametrize(
    ("change", "flag"),
    [({"source": "sometimes"}, "--telemetry"), ({"hz": 0.0}, "--telemetry-hz"), ({"gpus": "a"}, "--gpus"),
     ({"server": "8002"}, "--server-metrics")],
)  # fmt: skip
def test_bad_options_are_named(change, flag):
    with pytest.raises(UserError, match=f"^{flag} is"):
        Settings(**change).check()


def test_live_families_of_a_sample():
    rows = [{"device": "gpu0", "power_w": 300.0, "throttle": 0x40, "t": 1}, {"device": "cpu0", "power_w": 90.0},
            {"device": "host", "cpu_utilisation": 0.5}]  # fmt: skip
    found = {f["name"]: f["samples"] for f in shown(rows, ("a",) * 6)}
    assert found["tritonmark_gpu_power_watts"] == [[["a"] * 6 + ["0"], 300.0]]
    why = {s[0][-1]: s[1] for s in found["tritonmark_gpu_throttled"]}
    assert why["hw_thermal"] == 1.0 and sum(why.values()) == 1.0
    assert found["tritonmark_host_cpu_power_watts"][0][1] == 90.0
    assert "tritonmark_gpu_temperature_celsius" not in found  # not told, so not there
    assert set(found) <= {f.name for f in names.all_families()}


def stats(count, queue_ns, infer_ns, first_ns=None):
    part = {"count": count, "ns": 0}
    inference = {"success": {"count": count, "ns": queue_ns + infer_ns}, "fail": part, "compute_input": part,
                 "queue": {"count": count, "ns": queue_ns}, "compute_infer": {"count": count, "ns": infer_ns},
                 "compute_output": part}  # fmt: skip
    version = {"inference_count": count, "execution_count": count, "inference_stats": inference}
    if first_ns is not None:
        version["response_stats"] = {"0": {"success": {"count": count, "ns": first_ns}}}
    return server_stats.flat({"model_stats": [version]})


def described(before, after, decoupled, page=None, tracks=None):
    ms = 10**6
    rows = make_rows([{"due": 0, "sent": 2 * ms, "chunks": [12 * ms, 22 * ms], "tokens": [1, 1]}] * 4)
    old = dict.fromkeys(page, 0.0) if page else None
    return server_stats.describe({"statistics": before, "page": old}, {"statistics": after, "page": page},
                                 tracks or {}, rows, 22 * ms, decoupled)  # fmt: skip


def test_latency_of_a_plain_model_is_split_whole():
    seen = described(stats(10, 10, 10), stats(14, 10 + 4 * 3_000_000, 10 + 4 * 15_000_000), decoupled=False)
    assert seen["requests"] == 4
    parts = seen["latency_ms"]
    assert parts["client_wait"] == pytest.approx(2.0) and parts["server_queue"] == pytest.approx(3.0)
    assert parts["server_compute"] == pytest.approx(15.0) and parts["network"] == pytest.approx(2.0)
    assert sum(parts[k] for k in ("client_wait", "network", "server_queue", "server_compute")) == pytest.approx(22.0)


def test_a_streaming_model_says_what_is_not_known():
    seen = described(stats(0, 0, 0), stats(4, 4_000_000, 4_000_000), decoupled=True)
    assert "server_compute" not in seen["latency_ms"] and "network" not in seen["latency_ms"]
    assert any("first response" in text for text in seen["unknown"])


def test_a_streaming_model_with_first_response_figures():
    page = {"nv_inference_first_response_histogram_ms_sum": 32.0, "nv_inference_first_response_histogram_ms_count": 4.0}
    seen = described(stats(0, 0, 0), stats(4, 0, 0), decoupled=True, page=page)
    assert seen["first_response_ms"] == pytest.approx(8.0)
    assert seen["latency_ms"]["network"] == pytest.approx(2.0)  # 10 ms at the client
    by_statistics = described(stats(0, 0, 0, 0), stats(4, 4_000_000, 0, 4 * 7_000_000), decoupled=True)
    assert by_statistics["first_response_ms"] == pytest.approx(8.0)


def test_gauges_are_means_over_the_window():
    ms = 10**6
    track = [(-5 * ms, 8.0), (0, 2.0), (11 * ms, 4.0), (30 * ms, 100.0)]
    seen = described(stats(0, 0, 0), stats(4, 0, 0), True, tracks={"tritonmark_requests_waiting": track})
    assert seen["gauges"]["tritonmark_requests_waiting"] == {"mean": pytest.approx(3.0), "max": 4.0}
    assert seen["latency_ms"]["engine_wait"] == pytest.approx(3.0 / (4 / 0.022) * 1e3)


def test_others_on_the_server_are_noticed():
    seen = described(stats(0, 0, 0), stats(9, 0, 0), decoupled=False)
    assert any("served others" in text for text in seen["unknown"])


def test_a_server_without_statistics():
    seen = described(None, None, decoupled=False)
    assert seen["requests"] is None and len(seen["unknown"]) == 2


@pytest.mark.parametrize(("host", "page"), [("http://h:8010", 8012), ("http://h:8000", 8002), ("http://h", 8002)])
def test_the_metrics_page_is_the_servers_own_when_another_server_answers_too(monkeypatch, host, page):
    """deploy/per-gpu.yml has Tritons on 8000 and 8010 of one host: the second's runs once had the first's counts."""
    monkeypatch.setattr(server_stats, "scrape", lambda url: "nv_inference_count 1\n")
    assert server_stats.metrics_url(host, "auto") == f"http://h:{page}/metrics"
