"""Tokens/s of steady decode in a sealed `concurrency` run: while every stream is between its first and its last token.

    python benchmarks/gpu/steady_decode.py results/1x-nvidia-h100-80gb-hbm3/phi-2/torch-compile-bf16/concurrency/*

End to end, prompts take their share of the time; between them the server does nothing but decode. Counted are the times
in which all streams decode for at least a quarter of a second, so that one step more or less at their ends is little.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from loadgen.edge import store  # noqa: E402
from loadgen.edge.errors import UserError  # noqa: E402

LEAST_NS = 250_000_000


def spans(first_ns: np.ndarray, last_ns: np.ndarray, streams: int) -> list[tuple[int, int]]:
    """(start, end) of the times in which `streams` requests are between their first and last token, long enough."""
    at = np.concatenate([first_ns, last_ns])
    change = np.concatenate([np.ones_like(first_ns), -np.ones_like(last_ns)])
    order = np.lexsort((change, at))
    at, active = at[order], np.cumsum(change[order])
    full = np.flatnonzero(active[:-1] == streams)
    return [(int(at[i]), int(at[i + 1])) for i in full if at[i + 1] - at[i] >= LEAST_NS]


def steady(folder: Path) -> tuple[float, float]:
    """Tokens/s of steady decode in the run, and the seconds in which that was so. Raises ValueError without any."""
    run = store.load(folder)
    rows = pq.read_table(folder / "records.parquet", columns=["outcome", "first_ns", "chunk_ns", "chunk_tokens"])
    rows = rows.filter(np.array([outcome == "ok" for outcome in rows["outcome"].to_pylist()]))
    last = np.array([times[-1].as_py() for times in rows["chunk_ns"]])
    found = spans(rows["first_ns"].to_numpy(), last, run.scenario.concurrency)
    if not found:
        raise ValueError(f"{folder}: never did its {run.scenario.concurrency} streams all decode for a quarter second")
    times = rows["chunk_ns"].combine_chunks().flatten().to_numpy()
    tokens = rows["chunk_tokens"].combine_chunks().flatten().to_numpy()
    made = sum(int(tokens[(times > start) & (times <= end)].sum()) for start, end in found)
    seconds = sum(end - start for start, end in found) / 1e9
    return made / seconds, seconds


def main() -> int:
    for name in sys.argv[1:]:
        try:
            rate, seconds = steady(Path(name))
        except (ValueError, UserError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{rate:,.0f} tokens/s in {seconds:.1f} s of steady decode  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
