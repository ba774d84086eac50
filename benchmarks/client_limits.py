"""What the load generator itself can do on this machine, against the null server of the tests.

    python benchmarks/client_limits.py dispatch     dispatch lateness at 100 requests/s per worker
    python benchmarks/client_limits.py ceiling      requests/s and responses/s that one worker carries
    python benchmarks/client_limits.py soak         memory over a million requests

Each runs the real `locust -f loadgen/llm.py` in its own process and prints figures from the sealed run.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "fakes")]

import triton_server  # noqa: E402

from loadgen.edge import store  # noqa: E402

LOCUST = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadgen" / "llm.py"), "--headless", "--only-summary"]

peak_mb: dict[int, float] = {}  # most resident memory of each load process, sealing included


def measure(plan: dict, *arguments: str) -> store.Run:
    """One run against a fresh null server."""
    server = triton_server.start({"server": {"models": ["null"]}, **plan})
    try:
        with tempfile.TemporaryDirectory() as results:
            command = [*LOCUST, "--host", server.url, "--model", "null", "--results", results, *arguments]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            while process.poll() is None:
                with contextlib.suppress(OSError, IndexError):
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    peak_mb[process.pid] = int(status.split("VmHWM:")[1].split()[0]) / 1e3
                time.sleep(0.1)
            (folder,) = {p.parent for p in Path(results).rglob("run.json")}
            return store.load(folder)
    finally:
        server.stop()


def dispatch() -> None:
    for workers in (1, 2):
        rate = str(100 * workers)
        run = measure({"ttft_ms": 20, "itl_ms": 5}, "--scenario", "server", "--target-qps", rate, "--run-time", "20s",
                      "--output-tokens", "8", "--processes", str(workers))  # fmt: skip
        for w in run.document["audit"]["workers"]:
            late = [w[f"lateness_{p}_ns"] / 1e6 for p in ("p50", "p99", "max")]
            print(f"{workers} workers, {rate}/s, worker {w['worker']}: lateness p50/p99/max "
                  f"{late[0]:.2f}/{late[1]:.2f}/{late[2]:.2f} ms, CPU {w['cpu_share']:.0%}")  # fmt: skip


def ceiling() -> None:
    for tokens in (1, 64):
        run = measure({}, "--scenario", "concurrency", "--concurrency", "32", "--run-time", "10s",
                      "--output-tokens", str(tokens))  # fmt: skip
        s, w = run.summary, run.document["audit"]["workers"][0]
        print(f"{tokens} responses a request: {s['qps']:.0f} requests/s, {s['tokens_per_s']:.0f} responses/s, "
              f"CPU {w['cpu_share']:.0%}")  # fmt: skip


def soak() -> None:
    for count in (100_000, 1_000_000):
        run = measure({}, "--scenario", "offline", "--target-qps", "1", "--min-queries", str(count),
                      "--output-tokens", "4", "--max-in-flight", "64")  # fmt: skip
        w = run.document["audit"]["workers"][0]
        print(f"{run.summary['completed']:,} requests in {run.summary['duration_s']:.0f} s: peak memory "
              f"{w['max_rss_bytes'] / 1e6:.0f} MB while running, "
              f"{[*peak_mb.values()][-1]:.0f} MB with sealing", flush=True)  # fmt: skip


if __name__ == "__main__":
    {"dispatch": dispatch, "ceiling": ceiling, "soak": soak}[sys.argv[1]]()
