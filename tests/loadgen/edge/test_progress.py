"""The display of a running test: in a pipe, in a terminal, and fed with nonsense."""

import io
import json

from rich.console import Console

from loadgen.edge.progress import plain, watch

STATE = {"phase": "measure", "elapsed_s": 4.0, "total_s": 10.0, "sent": 9, "done": 7, "failed": 0, "in_flight": 2,
         "tokens_per_s": 1234.5, "ttft_ms": {"p50": 12.34, "p99": 99.0}, "tpot_ms": {"p50": None}, "e2e_ms": {}}  # fmt: skip


def test_a_line_says_time_left_counts_rate_and_percentiles():
    line = plain(STATE)
    assert "measure 4 s, 6 s left" in line
    assert "sent 9, done 7, in flight 2" in line
    assert "1,234 tokens/s" in line
    assert "TTFT p50 12.3 p99 99.0 ms" in line
    assert "TPOT p50 – p99 – ms" in line
    assert "FAILED 3" in plain(STATE | {"failed": 3})


def test_a_pipe_gets_plain_lines_and_few():
    out = io.StringIO()
    watch([json.dumps(STATE)] * 50, Console(file=out, width=200))
    assert out.getvalue().count("\n") == 1
    assert "\x1b" not in out.getvalue()


def test_a_terminal_is_redrawn():
    out = io.StringIO()
    watch([json.dumps(STATE)] * 3, Console(file=out, force_terminal=True, width=100))
    assert "6 s left" in out.getvalue()


def test_nonsense_is_passed_over():
    lines = [
        "",
        "{",
        "[1]",
        "null",
        '{"phase": 1}',
        '{"elapsed_s": "x"}',
        '{"elapsed_s": 1, "ttft_ms": 3, "total_s": null}',
    ]
    for terminal in (True, False):
        watch(lines, Console(file=io.StringIO(), force_terminal=terminal))
