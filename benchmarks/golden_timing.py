"""How true are our times? Lays what the client recorded beside what a fake server wrote down when it sent.

64 streams at 20 ms a token for 20 s, by default, through the real load generator in one process and the fake Triton in
another. Both read CLOCK_MONOTONIC, so a recorded arrival can be subtracted from the clock just before the write that
sent it. What is left is the error of the whole path: kernel, event loop, parser. The target is p99 under 2 ms.

    python benchmarks/golden_timing.py                    # the sealed rows of `locust -f loadgen/llm.py`
    python benchmarks/golden_timing.py --path client      # the streaming client alone, in a small gevent loop
    python benchmarks/golden_timing.py --path client-kernel    # the same, arrivals stamped by the kernel
    python benchmarks/golden_timing.py --batch            # all 64 streams send at the same instant: the worst case

Rows: `arrival`, recorded arrival of each response less the clock before its write; `ITL`, recorded gap less true gap;
`TTFT`, recorded first - sent less true first write - sent. How true `sent` is, is bounded by `server: request read`,
the time from `sent` until the server had read the request. The other rows are the server's own lateness, for which no
client can be blamed: they say how busy the machine was.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
TARGET_MS = 2.0
TTFT_MS = 50.0  # the fake's

Row = tuple[int, int, list[int]]  # sent, first, arrivals with tokens; absolute monotonic ns


def load_fake() -> Any:
    spec = importlib.util.spec_from_file_location("triton_server", ROOT / "tests" / "fakes" / "triton_server.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def through_client(
    url: str, streams: int, tokens: int, seconds: float, itl_ms: float, kernel_stamps: bool = False
) -> dict[str, Row]:
    """The streaming client by itself: `streams` greenlets, each sending its next request when the last one ended."""
    command = [sys.executable, __file__, "--child", url, str(streams), str(tokens), str(seconds)]
    command += ["kernel"] if kernel_stamps else []
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=seconds * 3 + 60).stdout
    return {key: (sent, first, arrivals) for key, (sent, first, arrivals) in json.loads(output).items()}


def child(url: str, streams: int, tokens: int, seconds: float) -> None:
    """The measuring process of `through_client`; prints its rows as JSON."""
    from gevent import monkey

    monkey.patch_all()
    import gc

    import gevent

    from loadgen.core.record import Outcome, Phase, Record
    from loadgen.edge.clients.triton_http import TritonHttp

    client = TritonHttp(url, "fake", clock=time.monotonic_ns, kernel_stamps="kernel" in sys.argv)
    records: list[Record] = []
    end = time.monotonic() + seconds

    def user(number: int) -> None:
        gevent.sleep(number * 0.0137)
        while time.monotonic() < end:
            record = Record(len(records), 0, 0, 0, Phase.MEASURE, 0, tokens)
            records.append(record)
            client.stream(json.dumps({"id": str(record.seq), "max_tokens": tokens}).encode(), record)

    gc.collect()
    gc.freeze()
    cpu, wall = time.process_time(), time.monotonic()
    gevent.joinall([gevent.spawn(user, number) for number in range(streams)], raise_error=True)
    share = (time.process_time() - cpu) / (time.monotonic() - wall)
    print(f"client CPU {share:.0%} of a core", file=sys.stderr)
    assert all(record.outcome is Outcome.OK for record in records), [r.error for r in records if r.error][:3]
    print(json.dumps({str(r.seq): (r.sent_ns, r.first_ns, list(r.chunk_ns)) for r in records}))


def through_locust(url: str, streams: int, tokens: int, seconds: float, itl_ms: float) -> dict[str, Row]:
    """The sealed rows of a headless run of the real locust file: open loop, Poisson arrivals."""
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as results:
        command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadgen" / "llm.py"), "--headless", "--host", url]
        rate = streams / (TTFT_MS + tokens * itl_ms) * 1e3  # Little's law: `streams` in flight on the average
        command += ["--model", "fake", "--scenario", "server", "--target-qps", f"{rate:.3f}", "--warmup", "64"]
        command += ["--output-tokens", str(tokens), "--run-time", f"{seconds:g}s", "--results", results]
        anchors = [monotonic_less_wall()]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds * 3 + 90)
        anchors.append(monotonic_less_wall())
        found = list(Path(results).rglob("run.json"))
        if not found:
            raise SystemExit(f"locust sealed no run (exit {run.returncode}):\n{run.stderr[-3000:]}")
        document = json.loads(found[0].read_text())
        columns = ["seq", "phase", "outcome", "sent_ns", "first_ns", "chunk_ns"]
        rows = pq.read_table(found[0].parent / "records.parquet", columns=columns).to_pylist()
    audit = document["audit"]["workers"][0]
    print(
        f"client CPU {audit['cpu_share']:.0%} of a core; loop lag p50 {audit['loop_lag_p50_ns'] / 1e6:.2f}, "
        f"p99 {audit['loop_lag_p99_ns'] / 1e6:.2f}, max {audit['loop_lag_max_ns'] / 1e6:.2f} ms; "
        f"wall clock moved {(anchors[1] - anchors[0]) / 1e6:+.3f} ms against the monotonic clock during the run",
        file=sys.stderr,
    )
    t0 = document["t0_wall_ns"] + anchors[0]
    assert rows and all(row["outcome"] == "ok" for row in rows)
    return {
        f"{document['run_id']}-{row['seq']}": (
            row["sent_ns"] + t0,
            row["first_ns"] + t0,
            [at + t0 for at in row["chunk_ns"]],
        )
        for row in rows
        if row["phase"] == "measure"
    }


def monotonic_less_wall() -> int:
    """Offset of CLOCK_MONOTONIC from the wall clock: the tightest of several readings."""
    readings = []
    for _ in range(50):
        before, wall, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        readings.append((after - before, (before + after) // 2 - wall))
    return min(readings)[1]


def line(name: str, errors: Sequence[int]) -> float:
    """Print quantiles of |error| and the median of the signed error, in ms; returns the p99."""
    values = np.asarray(errors) / 1e6
    size = np.sort(np.abs(values))
    p50, p99, p999 = (float(np.quantile(size, q)) for q in (0.5, 0.99, 0.999))
    print(f"{name:24}{len(size):>9}{np.median(values):>+10.3f}{p50:>9.3f}{p99:>9.3f}{p999:>9.3f}{size[-1]:>9.3f}")
    return p99


def compare(rows: dict[str, Row], log: list[dict[str, Any]], itl_ns: int, batch: bool) -> bool:
    """Print the table; True if arrivals, gaps and TTFT are within the target at p99."""
    truth = {row["id"]: row for row in log}
    arrival, gap, ttft, late, server_gap, write, read = [], [], [], [], [], [], []
    for key, (sent, first, arrivals) in rows.items():
        sends = [(before, after) for before, after, tokens in truth[key]["events"] if tokens]
        assert len(sends) == len(arrivals), f"request {key}: {len(arrivals)} responses recorded, {len(sends)} sent"
        arrival += [at - before for at, (before, _) in zip(arrivals, sends, strict=True)]
        gap += [(b - a) - (d[0] - c[0]) for (a, b), (c, d) in zip(pairwise(arrivals), pairwise(sends), strict=True)]
        ttft.append((first - sent) - (sends[0][0] - sent))
        read.append(truth[key]["arrived_ns"] - sent)
        server_gap += [b[0] - a[0] - itl_ns for a, b in pairwise(sends)]
        if not batch:
            late += [before - sends[0][0] - k * itl_ns for k, (before, _) in enumerate(sends)]
        write += [after - before for before, after in sends]
    print(f"{'|error| in ms':24}{'n':>9}{'median':>10}{'p50':>9}{'p99':>9}{'p99.9':>9}{'max':>9}")
    worst = max(line("arrival", arrival), line("ITL", gap), line("TTFT", ttft))
    line("server: request read", read)
    line("server: gap - plan", server_gap)
    if late:
        line("server: drift from first", late)
    line("server: time in write", write)
    print(f"{'within' if worst < TARGET_MS else 'OUTSIDE'} the target of {TARGET_MS:g} ms at p99 (worst {worst:.3f})")
    return worst < TARGET_MS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", choices=["locust", "client", "client-kernel"], default="locust")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--itl-ms", type=float, default=20.0)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--batch", action="store_true", help="all streams send on one time grid")
    options = parser.parse_args()
    pace = {"batch_ms": options.itl_ms} if options.batch else {"itl_ms": options.itl_ms}
    paths: dict[str, Callable[[str, int, int, float, float], dict[str, Row]]] = {
        "locust": through_locust,
        "client": through_client,
        "client-kernel": partial(through_client, kernel_stamps=True),
    }
    fake = load_fake().start({"ttft_ms": TTFT_MS} | pace)
    try:
        rows = paths[options.path](fake.url, options.streams, options.tokens, options.seconds, options.itl_ms)
        log = fake.log()
    finally:
        fake.stop()
    batched = ", all at one instant" if options.batch else ""
    load = os.getloadavg()[0]
    print(f"{options.streams} streams, {options.itl_ms:g} ms a token{batched}; {options.path}; load {load:.2f}")
    return 0 if compare(rows, log, round(options.itl_ms * 1e6), options.batch) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
    else:
        sys.exit(main())
