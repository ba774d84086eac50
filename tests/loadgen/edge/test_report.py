"""Reports say what the rows hold, in every format, and let nothing break out of them."""

import io
import json
import re
import subprocess
import sys

import pytest
from fabricated import fabricate
from rich.console import Console

from loadgen.edge import report, report_data, report_html
from loadgen.edge.report_data import number
from loadgen.edge.report_plots import distributions, over_time
from loadgen.edge.report_series import BINS, QUANTILES, series

EVIL = "boom: <script>alert(1)</script> | pipe"


def printed(*runs, **options) -> str:
    out = io.StringIO()
    report.text(runs, Console(file=out, **options))
    return out.getvalue()


def rows(text: str) -> dict[str, str]:
    """First cell to the others of each line; the first of several lines with the same label counts."""
    lines = (re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in text.splitlines())
    out: dict[str, str] = {}
    for line in lines:
        out.setdefault(line[0], re.sub(r"\s+", " ", line[1]) if len(line) > 1 else "")
    return out


def test_one_run_has_a_column_a_percentile_and_its_limit(tmp_path):
    text = printed(fabricate(tmp_path))
    found = rows(text)
    assert found["TTFT"].startswith("51.0 ms 91.0 ms 100 ms")
    assert found["TTFT"].endswith("p99 ≤ 2,000 ms")
    assert found["TTFT from send"] == "50.0 ms 90.0 ms 99.0 ms"
    assert found["TPOT"].startswith("10.0 ms 10.0 ms 10.0 ms")
    assert found["E2E"].startswith("71.0 ms 111 ms 120 ms")
    assert found["scheduled"] == "100"
    assert found["tokens out"] == "300"
    assert found["goodput share"] == "100.0 %"
    assert found["dispatch lateness p50/p99/max"] == "1.00 ms 2.00 ms 3.00 ms"
    assert found["CPU of the busiest worker"] == "25.0 %"
    assert found["ceiling"] == "40.0 /s"
    assert "SYNTHETIC weights" in text
    assert "VALID for preset smoke; not MLPerf length: needs ≥ 600 s (ran 9.9 s)" in text
    assert "Lacking for MLPerf length min_duration: 9.9 s" in text


def test_failures_are_shown_named_and_quoted(tmp_path):
    text = printed(fabricate(tmp_path, failures=5, error="reset: gone"))
    assert rows(text)["TTFT"].startswith("51.0 ms 91.0 ms failed")
    assert rows(text)["failed"] == "5 (5 error)"
    assert "INVALID: failed_error, ttft_limit, tpot_limit" in text
    assert "INVALID because failed_error: 5 of 100 requests; needs 0." in text
    assert "→ read the errors in the report" in text
    assert "5 × reset: gone" in text


def test_many_different_errors_are_summed_up(tmp_path):
    run = fabricate(tmp_path, failures=9, error=lambda k: f"error {k}")
    assert "1 × error 91" in printed(run)
    assert "4 × other errors" in printed(run)


@pytest.mark.parametrize("count", [0, 3])
def test_a_run_without_a_success_has_every_report(tmp_path, count):
    run = fabricate(tmp_path, count=count, failures=count)
    assert rows(printed(run))["TTFT"].startswith("failed failed failed" if count else "– – –")
    assert "INVALID" in report.markdown([run])
    assert "INVALID" in report_html.html([run])


def test_several_runs_are_columns(tmp_path):
    runs = [fabricate(tmp_path / "a"), fabricate(tmp_path / "b", count=80, name="multi_stream"),
            fabricate(tmp_path / "c", name="offline")]  # fmt: skip
    text = printed(*runs)
    found = rows(text)
    assert found["scenario"] == "server multi stream offline"
    assert found["TTFT"].startswith("51.0 / 91.0 / 100 ms 41.0 / 73.0 / 80.0 ms")
    # Query q holds rows 8q to 8q + 7: the last is done 8q + 8 + 20 ms after its own due time. 5th and last of 10:
    assert found["Query"].split(" ms ")[1] == "68.0 / 100 / 100"
    assert found["dispatch lateness p50/p99/max"] == "1.00 / 2.00 / 3.00 ms – –"
    assert "server: VALID" in text and "multi stream: VALID" in text
    assert max(map(len, text.splitlines())) <= 120


def test_only_a_terminal_that_wants_colours_gets_them(tmp_path, monkeypatch):
    run = fabricate(tmp_path)
    assert "\x1b" not in printed(run)
    assert "\x1b[1;32m" in printed(run, force_terminal=True, color_system="standard", width=120)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[1;32m" not in printed(run, force_terminal=True, color_system="standard", width=120)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (0.0, "0"), (0.05264, "0.0526"), (0.9996, "1.00"), (9.996, "10.0"), (99.96, "100"),
     (52.64, "52.6"), (1333.4, "1,333"), (94, "94"), (1_000_000, "1,000,000")],
)  # fmt: skip
def test_numbers_keep_three_digits_and_every_digit_before_the_point(value, text):
    assert number(value) == text


def test_markdown_is_a_table_that_nobody_can_break(tmp_path):
    run = fabricate(tmp_path, label="GPU | <b>X</b>\n# y", failures=1, error=EVIL)
    text = report.markdown([run])
    assert "| TTFT | 51.0 / 91.0 / failed ms |" in text
    assert "<b>" not in text and "<script>" not in text
    assert "GPU \\| &lt;b&gt;X" in text
    assert not re.search(r"^# y", text, re.M)


def test_json_is_the_sealed_documents_and_the_errors(tmp_path):
    run = fabricate(tmp_path, failures=2, error="gone")
    (entry,) = json.loads(json.dumps(report.as_json([run]), allow_nan=False))["runs"]
    assert entry["document"] == run.document
    assert entry["folder"] == str(run.folder)
    assert entry["errors"] == [{"error": "gone", "count": 2}]
    assert entry["facts"]["weights"] == "SYNTHETIC weights"


def test_html_holds_the_figures_calls_nobody_and_escapes_everybody(tmp_path):
    page = report_html.html([fabricate(tmp_path, failures=2, error=EVIL, label=f"X</script>{EVIL}")])
    own = "".join(re.split(r"<script>.*?</script>", page, flags=re.S))  # without plotly.js and the drawing
    assert "<td>51.0 ms" in own and "<td>91.0 ms" in own and '<td class="failed">failed' in own
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in own
    assert "<script>alert" not in page
    assert not re.search(r"""(?:src|href|action)\s*=\s*["']?(?!#)""", own)
    assert "@import" not in own and "url(" not in own
    assert page.count("</script>") == 3
    assert len(page) < 8_000_000


def test_many_rows_make_few_points_and_lose_no_token(tmp_path):
    run = fabricate(tmp_path, count=4000)
    found = series(run)
    assert all(len(c["x"]) <= QUANTILES + 1 for c in found.cdf.values())
    assert all(len(v) <= BINS for v in found.over_time["e2e"].values())
    assert len(found.in_flight["t"]) <= BINS
    width_s = found.tokens_per_s["t"][1] - found.tokens_per_s["t"][0]
    assert sum(found.tokens_per_s["y"]) * width_s == pytest.approx(run.summary["tokens_out"], rel=1e-3)
    assert max(found.in_flight["y"]) == run.summary["peak_in_flight"]


def test_points_are_the_rows(tmp_path):
    found = series(fabricate(tmp_path, count=100, failures=10))
    assert found.over_time["ttft"]["t"][:2] == pytest.approx([0.0, 0.1])
    assert found.over_time["ttft"]["y"][:2] == pytest.approx([1.0, 2.0])
    assert found.failures == pytest.approx([9 + k / 10 for k in range(10)])
    assert found.in_flight["t"][:2] == pytest.approx([0.001, 0.021])
    assert found.in_flight["y"][:2] == [1, 0]


def test_a_distribution_agrees_with_the_table_and_stops_at_the_failures(tmp_path):
    run = fabricate(tmp_path, failures=10)
    curve = series(run).cdf["ttft"]
    assert curve["p"][-1] == pytest.approx(0.89) and curve["x"][-1] == pytest.approx(90.0)
    for name, p in (("p50", 0.5),):
        assert curve["x"][max(i for i, q in enumerate(curve["p"]) if q <= p)] == pytest.approx(
            run.summary["ttft_ns"][name] / 1e6, rel=0.02
        )


def test_limits_are_drawn_where_they_are(tmp_path):
    run = fabricate(tmp_path, ttft_ms=60, tpot_ms=12)
    found = series(run)
    shapes = distributions([run], [found])["layout"]["shapes"]
    assert [s["x0"] for s in shapes] == [60.0, 12.0]
    assert over_time(run, 0, found)["layout"]["shapes"][0]["y0"] == 60.0


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
    call(str(good.folder), "--out", str(tmp_path / "report.txt"))
    assert rows((tmp_path / "report.txt").read_text())["scheduled"] == "100"
    (bad.folder / "records.parquet").write_bytes(b"damaged")
    assert "was changed after the run was sealed" in call(str(bad.folder)).stderr


@pytest.mark.parametrize(
    ("name", "overrides", "load"),
    [
        ("server", {}, "10 /s poisson"),
        ("server", {"arrivals": "constant"}, "10 /s constant"),
        ("single_stream", {}, "1 in flight"),
        ("concurrency", {"concurrency": 5}, "5 in flight"),
        ("multi_stream", {}, "8 in flight"),
        ("offline", {}, "all due at once"),
    ],
)
def test_the_load_is_what_was_put_on_the_server_not_the_rate_that_was_expected(tmp_path, name, overrides, load):
    """`fabricate` gives every scenario a target rate, as docs/scenarios.md does for SingleStream."""
    assert report_data.facts(fabricate(tmp_path, name=name, **overrides))["load"] == load
