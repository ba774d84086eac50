"""What live metrics cost the load process: per record, and at 10,000 records per second.

    python benchmarks/live_metrics.py            cost per record of folding, and of handing a page over
    python benchmarks/live_metrics.py --check    fails where a record costs over 20 µs, or 10,000/s over 10 % of a core

Records come in batches of a flush (0.25 s), as in a run; what is timed is what the load process does beyond what it did
without metrics: counting a batch, building the page twice a second, and handing it over. The endpoint's own process is
running and is being scraped, and is not counted: it is another process.
"""

from __future__ import annotations

import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fakes")]

from rows import make_rows  # noqa: E402

from loadgen.edge import scenarios  # noqa: E402
from loadgen.edge.live import Endpoint, LiveRun  # noqa: E402

FLUSH_S, PAGES_PER_S = 0.25, 2
LIMIT_US, LIMIT_SHARE, RATE = 20.0, 0.10, 10_000


def batch(records: int, responses: int) -> object:
    """`records` rows of `responses` responses each, with latencies from 5 ms to some seconds."""
    rng = np.random.default_rng(1)
    first = rng.integers(5_000_000, 2_000_000_000, records)
    gaps = rng.integers(1_000_000, 50_000_000, (records, responses - 1))
    specs = [{"due": i * 1000, "chunks": np.cumsum([i * 1000 + first[i], *gaps[i]]).tolist(), "tokens": [1] * responses}
             for i in range(records)]  # fmt: skip
    return make_rows(specs)


def cpu_of(work, seconds: float = 2.0) -> float:
    """CPU seconds of one call, of this thread only."""
    calls, start = 0, time.thread_time()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        work()
        calls += 1
    return (time.thread_time() - start) / calls


def main() -> int:
    plan = scenarios.resolve("server", "phi-2-tiny", "smoke", {"target_qps": float(RATE)})
    document = {"model": "phi-2-tiny", "backend": "torch-eager", "precision": "fp32", "run_id": "benchmark"}
    run = LiveRun(document, plan, 1_000_000, 1, Path("results"))
    endpoint = Endpoint(9464, "127.0.0.1", fixed=False)
    threading.Thread(target=scrape, args=(endpoint.address,), daemon=True).start()
    page = cpu_of(lambda: endpoint.publish("run", run.families()))
    print(f"a page: {page * 1e3:.2f} ms, {PAGES_PER_S} a second: {page * PAGES_PER_S:.2%} of a core")
    worst = 0.0
    for rate, responses in ((100, 64), (1000, 64), (RATE, 1), (RATE, 16), (RATE, 64)):
        records = round(rate * FLUSH_S)
        rows = batch(records, responses)
        fold = cpu_of(lambda rows=rows: run.figures.add(rows))
        each = fold / records * 1e6
        share = fold / FLUSH_S + page * PAGES_PER_S
        worst = max(worst, share)
        print(f"{rate:6,} records/s of {responses:2} responses: {each:6.2f} µs a record, {share:6.2%} of a core")
        if "--check" in sys.argv and rate == RATE and each > LIMIT_US:
            print(f"over {LIMIT_US:g} µs a record")
            return 1
    endpoint.close()
    if "--check" in sys.argv and worst > LIMIT_SHARE:
        print(f"over {LIMIT_SHARE:.0%} of a core")
        return 1
    return 0


def scrape(address: str) -> None:
    while True:
        time.sleep(0.5)
        try:
            urllib.request.urlopen(f"http://{address}/metrics", timeout=5).read()
        except OSError:
            return


if __name__ == "__main__":
    sys.exit(main())
