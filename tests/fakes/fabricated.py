"""Sealed runs without a server: rows with latencies a test can name."""

from array import array
from collections.abc import Callable
from pathlib import Path

from loadgen.core.record import Outcome, Phase, Record
from loadgen.core.verdict import Audit, WorkerAudit
from loadgen.edge import scenarios, store

MS = 1_000_000


def fabricate(folder: Path, count: int = 100, failures: int = 0, error: str | Callable[[int], str] = "reset: gone", label: str = "GPU X",
              name: str = "server", **overrides) -> store.Run:  # fmt: skip
    """Row k is due at 100k ms and sent 1 ms later; TTFT k + 1 ms from due, then two gaps of 10 ms. The last ones fail."""
    scenario = scenarios.resolve(name, "phi-2-tiny", "smoke", {"target_qps": 10, "duration_s": 0.1, **overrides})
    writer = store.RunWriter(store.new_folder(folder, [label], "run"), {"scenario": scenario.to_json()})
    records = []
    for k in range(count):
        due = k * 100 * MS
        first = due + (k + 1) * MS
        record = Record(k, k // scenario.samples_per_query, k % 5, 0, Phase.MEASURE, due, 3)
        record.sent_ns, record.done_ns = due + MS, first + 20 * MS
        if k >= count - failures:
            record.outcome, record.error = Outcome.ERROR, error(k) if callable(error) else error
        else:
            record.first_ns, record.tokens_in, record.tokens_out, record.usage_out = first, 7, 3, 3
            record.chunk_ns = array("q", [first, first + 10 * MS, first + 20 * MS])
            record.chunk_tokens, record.outcome = array("i", [1, 1, 1]), Outcome.OK
        records.append(record)
    writer.write(store.pack(records) if records else store.pack([]))
    writer.close()
    document = {"run_id": writer.folder.name, "model": "phi-2-tiny", "backend": "torch-eager", "precision": "fp32",
                "weights": "synthetic", "hardware": {"label": label}, "started_utc": "2026-11-23T00:00:00+00:00",
                "client": {"versions": {"tritonmark": "0.1.0"}}}  # fmt: skip
    worker = WorkerAudit(0, count, MS, 2 * MS, 3 * MS, MS, MS, MS, 0.25, 1)
    return store.seal(writer.folder, document, scenario,
                      lambda rows: Audit((worker,), 1, count, len(rows), count / 10, 10.0))  # fmt: skip
