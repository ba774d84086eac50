"""Sealed runs of simulated rows, through the real RunWriter and seal: nobody was served, the times are drawn.

`document["synthetic"]` is True in each, so that no one takes one for a measurement.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from loadgen.core.record import Outcome, Phase
from loadgen.core.scenario import Kind, Scenario
from loadgen.core.verdict import Audit
from loadgen.edge import samples, store
from loadgen.edge.worker import due_times

MS = 1_000_000
T0 = 1_790_000_000_123_000_000
BATCH = 50_000


def simulate(
    folder: Path, scenario: Scenario, *, count: int | None = None, ttft_ms: float = 200.0, tpot_ms: float = 20.0,
    tokens: int = 8, library: int = 13_368, failed: int = 0, document: dict[str, Any] | None = None, seed: int = 1,
) -> store.Run:  # fmt: skip
    """A run of `count` requests (default: all that the scenario wants), the first `failed` of them refused."""
    rng = np.random.default_rng(seed)
    scenario = replace(scenario, library_size=library)
    due = due_times(scenario)
    n = len(due) if count is None else count
    first = (ttft_ms * MS * rng.uniform(0.8, 1.0, n)).astype(np.int64)
    done = first + (tpot_ms * MS * (tokens - 1) * rng.uniform(0.8, 1.0, n)).astype(np.int64)
    if scenario.kind in (Kind.SINGLE_STREAM, Kind.MULTI_STREAM) and n:
        width = scenario.samples_per_query
        longest = done[: n - n % width].reshape(-1, width).max(axis=1)
        due = np.repeat(np.concatenate(([0], np.cumsum(longest)[:-1])), width)
        n, first, done = len(due), first[: len(due)], done[: len(due)]
    if scenario.kind is Kind.CONCURRENCY:  # streams in turn, each sends when its last request is done
        streams = done.reshape(-1, scenario.concurrency)
        due = (np.cumsum(streams, axis=0) - streams).ravel()
    due = due[:n]
    facts = {"run_id": "simulated", "synthetic": True, "model": "phi-2", "backend": "torch-eager", "precision": "fp16",
             "weights": "synthetic", "t0_wall_ns": T0, "prompts": {"source": "simulated", "count": library},
             "hardware": {"label": "sim", "gpus": [], "cpu": {"model": "sim", "cores": 2, "memory_bytes": 2**33},
                          "probed": True}}  # fmt: skip
    folder.mkdir(parents=True)
    writer = store.RunWriter(folder, {"scenario": scenario.to_json(), "scheduled": n})
    sample = samples.sample_indices(scenario, library, n)
    for start in range(0, n, BATCH):
        part = slice(start, min(start + BATCH, n))
        writer.write(_batch(scenario, part, due, first, done, sample, tokens, failed))
    writer.close()
    return store.seal(folder, facts | (document or {}), scenario, lambda rows: Audit((), 1, n, len(rows), 600.0))


def _batch(
    scenario: Scenario, part: slice, due: Any, first: Any, done: Any, sample: Any, tokens: int, failed: int
) -> Any:
    seq = np.arange(part.start, part.stop)
    rows, bad = len(seq), seq < failed
    due, first, done = due[part], due[part] + first[part], due[part] + done[part]
    chunk_ns = np.stack([first, done], axis=1).ravel()
    chunk_tokens = np.tile(np.array([1, tokens - 1], dtype=np.int32), rows)
    offsets = np.arange(0, 2 * rows + 1, 2, dtype=np.int32)
    counts = pa.array(np.where(bad, 0, tokens).astype(np.int32))
    columns = {
        "seq": seq, "query": seq // scenario.samples_per_query, "sample": sample[part],
        "worker": np.zeros(rows, dtype=np.int16), "server": np.zeros(rows, dtype=np.int16),
        "phase": pa.array([Phase.MEASURE.value] * rows),
        "due_ns": due, "sent_ns": due + 1000, "first_ns": pa.array(first, mask=bad), "done_ns": done,
        "tokens_in": np.full(rows, 7, dtype=np.int32), "tokens_out": counts, "usage_out": counts,
        "asked_out": np.full(rows, tokens, dtype=np.int32),
        "asked_in": pa.nulls(rows, pa.int32()),
        "chunk_ns": pa.ListArray.from_arrays(offsets, pa.array(chunk_ns)),
        "chunk_tokens": pa.ListArray.from_arrays(offsets, pa.array(chunk_tokens)),
        "outcome": pa.array(np.where(bad, Outcome.ERROR.value, Outcome.OK.value)),
        "error": pa.array(np.where(bad, "refused", None)),
    }  # fmt: skip
    return pa.RecordBatch.from_arrays(
        [pa.array(columns[f.name]) if isinstance(columns[f.name], np.ndarray) else columns[f.name]
         for f in store.ARROW_SCHEMA],
        schema=store.ARROW_SCHEMA,
    )  # fmt: skip
