"""Rows by hand, for tests: a dict a row, times in ns."""

from typing import Any

import numpy as np

from loadgen.core.record import NEVER, OUTCOMES, Rows


def make_rows(specs: list[dict[str, Any]]) -> Rows:
    """`due`, `sent`, `chunks` (arrival times), `tokens` (in each), `done`, `outcome`, `query`, `phase`, `usage`,
    `asked`, `asked_in`."""

    def column(name: str, default: Any) -> np.ndarray:
        values = [default(i, s) if callable(default) else s.get(name, default) for i, s in enumerate(specs)]
        return np.array(values, dtype=np.int64)

    chunks = [s.get("chunks", []) for s in specs]
    tokens = [s.get("tokens", []) for s in specs]
    total = [sum(t) for t in tokens]
    return Rows(
        seq=column("seq", lambda i, s: s.get("seq", i)),
        query=column("query", lambda i, s: s.get("query", i)),
        sample=column("sample", 0),
        worker=column("worker", 0),
        server=column("server", 0),
        measured=np.array([s.get("phase", "measure") == "measure" for s in specs], dtype=bool),
        due_ns=column("due", 0),
        sent_ns=column("sent", lambda i, s: s.get("sent", s["due"])),
        first_ns=np.array([c[0] if c else NEVER for c in chunks], dtype=np.int64),
        done_ns=column("done", lambda i, s: s.get("done", chunks[i][-1] if chunks[i] else NEVER)),
        tokens_in=column("tokens_in", 10),
        tokens_out=np.array(total, dtype=np.int64),
        usage_out=column("usage", lambda i, s: s.get("usage", total[i])),
        asked_out=column("asked", lambda i, s: s.get("asked", total[i])),
        asked_in=column("asked_in", NEVER),
        outcome=np.array([OUTCOMES.index(s.get("outcome", "ok")) for s in specs], dtype=np.int8),
        chunk_offsets=np.concatenate([[0], np.cumsum([len(c) for c in chunks])]).astype(np.int64),
        chunk_ns=np.array([t for c in chunks for t in c], dtype=np.int64),
        chunk_tokens=np.array([n for t in tokens for n in t], dtype=np.int64),
    )
