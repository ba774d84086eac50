"""The live board under overload: quantiles are of requests that completed, and none is a bucket's open end."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROMTOOL = shutil.which("promtool")
pytestmark = pytest.mark.skipif(not PROMTOOL, reason="promtool is not installed (Debian: prometheus)")


def query(title: str, number: int) -> str:
    board = json.loads((ROOT / "grafana/dashboards/live.json").read_text())
    (panel,) = (p for p in board["panels"] if p["title"] == title)
    expr = panel["targets"][number]["expr"]
    return expr.replace("$run", "r").replace("$__rate_interval", "4s").replace("$__range", "60s")


def answers(
    folder, buckets: dict[str, int], expr: str, value: float | None, labels: str = "{}"
) -> subprocess.CompletedProcess:
    """promtool's own PromQL over a histogram that grew by `buckets` (cumulative) a second for a minute."""
    name = "tritonmark_client_ttft_seconds_bucket"
    series = [{"series": f'{name}{{run="r", le="{le}"}}', "values": f"0+{n}x60"} for le, n in buckets.items()]
    series.append(
        {"series": 'tritonmark_client_limit_seconds{run="r", metric="ttft", percentile="p99"}', "values": "2+0x60"}
    )
    wanted = [] if value is None else [{"labels": labels, "value": value}]
    test = {"interval": "1s", "input_series": series,
            "promql_expr_test": [{"expr": f"round({expr}, 0.0005) >= 0", "eval_time": "60s", "exp_samples": wanted}]}  # fmt: skip
    (folder / "test.yml").write_text(yaml.safe_dump({"evaluation_interval": "1s", "tests": [test]}))
    return subprocess.run(
        [PROMTOOL, "test", "rules", "test.yml"], cwd=folder, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("failing", [0, 55, 5000])
def test_the_quantiles_of_completed_requests_do_not_move_when_others_fail(tmp_path, failing):
    buckets = {"0.1": 0, "0.2": 100, "600.0": 100, "+Inf": 100 + failing}
    for number, value in enumerate((0.15, 0.19, 0.199)):
        done = answers(tmp_path, buckets, query("TTFT", number), value)
        assert done.returncode == 0, done.stdout + done.stderr


def test_where_nothing_completes_no_latency_is_shown(tmp_path):
    done = answers(tmp_path, {"0.2": 0, "600.0": 0, "+Inf": 100}, query("TTFT", 0), None)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("failing", "share"), [(0, 0.0995), (5000, 2.0)])
def test_the_share_of_the_limit_counts_failures_and_stays_on_the_page(tmp_path, failing, share):
    buckets = {"0.1": 0, "0.2": 100, "600.0": 100, "+Inf": 100 + failing}
    done = answers(tmp_path, buckets, query("p99 of its limit", 0), share, '{metric="ttft"}')
    assert done.returncode == 0, done.stdout + done.stderr
