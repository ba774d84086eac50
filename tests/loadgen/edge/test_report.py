"""Reports say what the rows hold, in every format, and let nothing break out of them."""

import io
import json
import re
import subprocess
import sys

import pytest
from fabricated import fabricate
from rich.console import Console

from loadgen.edge import report, report_html
from loadgen.edge.report_plots import BINS, figures

EVIL = "boom: <script>alert(1)</script> | pipe"


def printed(*runs) -> str:
    out = io.StringIO()
    report.text(runs, Console(file=out, width=140))
    return out.getvalue()


def test_the_table_holds_the_rows_figures(tmp_path):
    text = printed(fabricate(tmp_path))
    rows = {line[:30].strip(): re.sub(r"\s+", " ", line[30:]).strip() for line in text.splitlines()}
    assert rows["TTFT from due p50/p90/p99"] == "51.0 / 91.0 / 100 ms"
    assert rows["TTFT from send p50/p90/p99"] == "50.0 / 90.0 / 99.0 ms"
    assert rows["TPOT p50/p90/p99"] == "10.0 / 10.0 / 10.0 ms"
    assert rows["E2E from due p50/p90/p99"] == "71.0 / 111 / 120 ms"
    assert rows["scheduled"] == "100"
    assert rows["tokens out"] == "300"
    assert rows["goodput share"] == "100.0%"
    assert rows["client: lateness p50/p99/max"] == "1.00 / 2.00 / 3.00 ms"
    assert rows["client: CPU, ceiling"] == "25%, 40/s"
    assert "SYNTHETIC weights" in text
    assert "VALID for preset smoke; not MLPerf length: needs ≥ 600 s (ran 9.9 s)" in text


def test_failures_are_shown_and_named(tmp_path):
    run = fabricate(tmp_path, failures=5)
    text = printed(run)
    assert "51.0 / 91.0 / failed ms" in text
    assert "INVALID: failed_error, ttft_limit, tpot_limit" in text
    assert "failed_error: 5 of 100 requests (limit 0). read the errors" in text


def test_a_run_of_nothing_but_failures_has_a_report(tmp_path):
    run = fabricate(tmp_path, count=3, failures=3)
    assert "failed / failed / failed ms" in printed(run)
    assert "INVALID" in report_html.html([run])


def test_a_run_without_rows_has_a_report(tmp_path):
    run = fabricate(tmp_path, count=0)
    assert "no_requests" in printed(run)
    assert "No request was measured" in report_html.html([run])


def test_several_runs_are_columns(tmp_path):
    runs = [fabricate(tmp_path / "a"), fabricate(tmp_path / "b", count=80, name="multi_stream")]
    text = printed(*runs)
    assert "server 10/s" in text and "multi_stream" in text
    assert "Query from due" in text
    assert text.count("VALID for preset") == 2


def test_a_pipe_gets_no_colours(tmp_path):
    assert "\x1b" not in printed(fabricate(tmp_path))


def test_markdown_is_a_table_that_nobody_can_break(tmp_path):
    run = fabricate(tmp_path, label="GPU | <b>X</b>")
    text = report.markdown([run])
    assert "| TTFT from due p50/p90/p99 | 51.0 / 91.0 / 100 ms |" in text
    assert "<b>" not in text
    assert "GPU \\| &lt;b>X" in text


def test_json_is_the_sealed_documents(tmp_path):
    run = fabricate(tmp_path)
    (entry,) = json.loads(json.dumps(report.as_json([run])))["runs"]
    assert entry["summary"] == run.summary
    assert entry["folder"] == str(run.folder)


def test_html_is_one_file_that_calls_nobody_and_escapes_everybody(tmp_path):
    page = report_html.html([fabricate(tmp_path, failures=2, error=EVIL, label=f"X</script>{EVIL}")])
    own = re.sub(r"<script>.*?</script>", "", page, count=1, flags=re.S)  # plotly itself
    assert "<script>alert" not in page
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", own)
    assert "@import" not in own and "url(" not in own
    assert page.count("</script>") == 3


def test_figures_stay_small_however_many_rows(tmp_path):
    run = fabricate(tmp_path, count=20_000)
    for figure in figures(run):
        assert all(len(trace["x"]) <= max(2 * BINS, 400) for trace in figure["data"])
    throughput = figures(run)[2]["data"][0]
    width_s = run.summary["duration_s"] / BINS
    assert sum(throughput["y"]) * width_s == pytest.approx(run.summary["tokens_out"], rel=1e-3)


def test_the_distribution_ends_below_one_when_requests_failed(tmp_path):
    curve = figures(fabricate(tmp_path, failures=10))[0]["data"][0]
    assert curve["y"][-1] == pytest.approx(0.9)
    assert curve["x"][-1] == pytest.approx(90.0)


def call(*arguments: str) -> subprocess.CompletedProcess:
    code = "from loadgen.edge.report_cli import report; report()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_the_command_finds_runs_and_answers_by_validity(tmp_path):
    good = fabricate(tmp_path / "good")
    done = call(str(tmp_path))
    assert done.returncode == 0 and "TTFT" in done.stdout
    bad = fabricate(tmp_path / "bad", failures=1)
    assert call(str(tmp_path)).returncode == 3
    assert call(str(good.folder)).returncode == 0
    done = call(str(bad.folder), "--format", "html")
    assert (bad.folder / "report.html").read_text().startswith("<!doctype html>")
    assert str(bad.folder / "report.html") in done.stdout
    assert len(json.loads(call(str(tmp_path), "--format", "json", "--last", "1").stdout)["runs"]) == 1
    assert "UserError" in call(str(tmp_path / "none")).stderr
