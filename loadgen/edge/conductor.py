"""The part of a run that happens once, on Locust's master (or the only process): plan, T0, recording, sealing.

    plan → every worker warms up and says "ready" → T0 is announced → "rows" arrive all the time → every worker says
    "end", or is lost → seal: summary, verdict, `run.json`.

A run always ends here, also when it was stopped, a worker was lost or every request failed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gevent
import numpy as np
import pyarrow as pa
from gevent.event import Event

from loadgen.core.clips import step_gaps
from loadgen.core.metrics import describe, select, tpot, ttft
from loadgen.core.record import NEVER, Rows
from loadgen.core.scenario import Scenario
from loadgen.core.verdict import Audit, WorkerAudit
from loadgen.edge import store
from loadgen.edge.about import package_version, tool_version
from loadgen.edge.accuracy import AnswerWriter
from loadgen.edge.clients.dialects import NATIVE
from loadgen.edge.clips import write_clips
from loadgen.edge.clocks import Clocks
from loadgen.edge.comparison import assess
from loadgen.edge.errors import UserError
from loadgen.edge.live import Live
from loadgen.edge.live_names import run_labels
from loadgen.edge.telemetry import Telemetry
from loadgen.edge.worker import due_times

LEAD_S = 0.5  # from the announcement of T0 to T0, beside the way there: long enough for the message to arrive
LOST_GRACE_S = 5.0  # how long a worker that is out of reach may take to come back when all others have ended
SILENT_S = 2.0  # without a message of a worker that sends rows four times a second
CUT_GRACE_S = 10.0
WINDOW_S = 5.0  # what "current" means in the progress display


class Conductor:
    """One run: `begin`, then messages from workers through `on_message`, until `sealed` is set.

    `send(kind, data, worker)` reaches one worker; `alive(worker)` says whether it still answers; `progress(dict)` is
    called about twice a second. `document` is what is known of server, model and client before the run.
    """

    def __init__(
        self,
        scenario: Scenario,
        document: dict[str, Any],
        results: Path,
        *,
        workers: int,
        send: Callable[[str, dict[str, Any], int], None],
        alive: Callable[[int], bool],
        progress: Callable[[dict[str, Any]], None],
        live: Live | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.scenario, self.workers, self.send, self.alive, self.progress = scenario, workers, send, alive, progress
        self.scheduled = len(due_times(scenario))
        now = datetime.now(UTC)
        digest = hashlib.sha256(json.dumps(scenario.to_json(), sort_keys=True).encode()).hexdigest()[:8]
        parts = [document["hardware"]["label"], document["model"], f"{document['backend']}-{document['precision']}"]
        folder = store.new_folder(results, [*parts, scenario.name], f"{now:%Y%m%dT%H%M%SZ}-{digest}")
        self.document = {
            "run_id": folder.name,
            "started_utc": now.isoformat(),
            **document,
            "client": client_facts(workers),
        }
        start = self.document | {"scenario": scenario.to_json(), "scheduled": self.scheduled, "workers": workers}
        self.writer = store.RunWriter(folder, start)
        self.live, self.telemetry = live, telemetry
        if live:
            live.begin(self.document, scenario, self.scheduled, workers, folder)
        self.answers = AnswerWriter(folder) if scenario.keep_outputs else None
        self.clocks = Clocks(lambda question, worker: send("ping", question, worker))
        self.ready: set[int] = set()
        self.absent: set[int] = set()  # not ready at T0: they take no part
        self.left: set[int] = set()  # ended before the run did
        self.heard: dict[int, float] = {}  # when a worker last sent rows
        self.silent: dict[int, float] = {}  # s in which a worker was not heard of
        self.ends: dict[int, dict[str, Any]] = {}
        self.lost: set[int] = set()
        self.state: dict[int, dict[str, int]] = {}
        self.recent: deque[tuple[float, Rows]] = deque()
        self.done = self.failed = 0
        self.ended: str | None = None
        self.started = time.monotonic()
        self.phase = "warmup"
        self.sealed = Event()
        self.run: store.Run | None = None
        self.error: UserError | None = None

    def conduct(self, hosts: list[str], turns: list[int], model: str) -> None:
        """Drives the run to its sealed end; slot k goes to `hosts[turns[k % len(turns)]]`.

        Blocks this greenlet; never raises for anything the run can do.
        """
        try:
            self.progress({"phase": "start", "folder": str(self.writer.folder)})
            if self.telemetry:
                self.telemetry.start(self.writer.folder)
            for worker in range(self.workers):
                plan = {"scenario": self.scenario.to_json(), "hosts": hosts, "turns": turns, "model": model}
                plan |= {"worker": worker, "workers": self.workers, "tag": self.writer.folder.name}
                plan |= {"labels": run_labels(self.document, self.scenario.name)}
                self.send("begin", plan | {"dialect": self.document.get("dialect", NATIVE)}, worker)
            self._wait(lambda: self.ready | set(self.ends))
            if self.telemetry:
                self.telemetry.before()
            self._start()
            self._wait(lambda: set(self.ends))
            if self.telemetry:
                self.telemetry.after()
        finally:
            if self.telemetry:
                self.telemetry.stop()
            self._seal()

    def _start(self) -> None:
        """Agrees on T0 with every worker that is ready, each in its own clock."""
        self.clocks.measure(self.ready)
        lead_ns = round(LEAD_S * 1e9) + self.clocks.slowest_ns
        t0, t0_wall = time.monotonic_ns() + lead_ns, time.time_ns() + lead_ns
        self.document["t0_wall_ns"] = t0_wall
        if self.telemetry:
            self.telemetry.mark(t0_wall)
        for worker in range(self.workers):
            there = self.clocks.there(worker, t0) if worker in self.ready else None
            if there is None:
                self.absent.add(worker)
            else:
                self.send("go", {"t0_ns": there}, worker)
                self.heard[worker] = t0 / 1e9
        self.phase, self.started = "measure", t0 / 1e9

    def cut(self, why: str) -> None:
        """Stops the run early: what is in flight becomes `cut`, the rest is not sent, and the run is sealed INVALID."""
        if self.ended is None and not self.sealed.is_set():
            self.ended, self.cut_by = why, time.monotonic() + CUT_GRACE_S
            for worker in range(self.workers):
                self.send("stop", {}, worker)

    def on_message(self, kind: str, data: dict[str, Any]) -> None:
        """A "ready", "rows" or "end" message of a worker. Messages after sealing are ignored."""
        if self.sealed.is_set():
            return
        worker = data["worker"]
        if kind == "pong":
            self.clocks.heard(data)
        elif kind == "ready":
            self.ready.add(worker)
            if worker in self.absent:
                self.send("stop", {}, worker)
        elif kind == "end":
            self._hear(worker)
            self.ends[worker] = data
            if data["ended"] == "stopped" and self.ended is None:
                self.left.add(worker)  # by a signal, or told so because it came too late
            if data["ended"] and self.ended is None and data["ended"] != "stopped":
                self.cut(data["ended"])
        else:
            self._hear(worker)
            self.state[worker] = {"in_flight": data["in_flight"], "sent": data["sent"]}
            if data["batch"]:
                self._record(data["batch"])
            write_clips(self.writer.folder, data.get("clips") or [])
            if self.answers and data.get("answers"):
                self.answers.write(data["answers"])
                if self.answers.broken:
                    self.cut(self.answers.broken)

    def _hear(self, worker: int) -> None:
        now = time.monotonic()
        if (gap := now - self.heard.get(worker, now)) > SILENT_S:
            self.silent[worker] = self.silent.get(worker, 0.0) + gap
        if worker in self.heard:
            self.heard[worker] = max(now, self.heard[worker])

    def _record(self, packed: bytes) -> None:
        batch = pa.ipc.read_record_batch(pa.py_buffer(packed), store.ARROW_SCHEMA)
        self.writer.write(batch)
        if self.writer.broken:
            self.cut(self.writer.broken)
        rows = store.to_rows(pa.Table.from_batches([batch]))
        self.done += int(rows.measured.sum())
        self.failed += int((rows.measured & ~rows.ok).sum())
        measured = select(rows, rows.measured)
        self.recent.append((time.monotonic(), measured))
        if self.live:
            self.live.observe(measured)

    def _wait(self, arrived: Callable[[], set[int]]) -> None:
        """Until every worker has arrived, or stayed out of reach for a while when the others had, or a cut has had its
        grace; reports progress meanwhile."""
        tick, awaited = 0, time.monotonic()  # when somebody in reach was awaited last
        while missing := set(range(self.workers)) - self.absent - arrived():
            gevent.sleep(0.1)
            tick += 1
            self.lost = self.absent | {worker for worker in missing if not self.alive(worker)}
            now = time.monotonic()
            if not missing <= self.lost:
                awaited = now
            if now > awaited + LOST_GRACE_S or (self.ended and now > self.cut_by):
                return
            if tick % 5 == 0:
                self.progress(self.snapshot())

    def snapshot(self) -> dict[str, Any]:
        """Where the run stands: counts so far, rates and percentiles of the last few seconds."""
        now = time.monotonic()
        while self.recent and now - self.recent[0][0] > WINDOW_S:
            self.recent.popleft()
        parts = [rows for _, rows in self.recent]
        elapsed = now - self.started
        total = self.scenario.minimums.duration_ns / 1e9
        rate = sum(int(r.tokens_out.sum()) for r in parts) / min(WINDOW_S, max(elapsed, 0.5))
        figures: dict[str, Any] = {"tokens_per_s": rate}
        if self.scenario.clip:
            figures = {"frames_per_s": rate, "step_ms": _percentiles([step_gaps(r) for r in parts])}
        else:
            figures["ttft_ms"] = _percentiles([ttft(r) for r in parts])
            figures["tpot_ms"] = _percentiles([tpot(r) for r in parts])
        return {
            "phase": "drain" if self.phase == "measure" and elapsed > total else self.phase,
            "elapsed_s": round(max(elapsed, 0.0), 2),
            "total_s": total,
            "scheduled": self.scheduled or None,
            "sent": sum(s["sent"] for s in self.state.values()),
            "done": self.done,
            "failed": self.failed,
            "in_flight": sum(s["in_flight"] for s in self.state.values()),
            **figures,
            "e2e_ms": _percentiles([(r.done_ns - r.due_ns)[r.ok] for r in parts]),
        }

    def _seal(self) -> None:
        self.phase = "seal"
        self.progress(self.snapshot())
        self.recent.clear()  # at thousands of requests/s the last seconds are tens of MB
        self.writer.close()
        try:
            if self.answers:
                self.answers.close()
            more = assess if self.answers else None
            self.run = store.seal(self.writer.folder, self.document, self.scenario, self._audit, more)
        except UserError as error:
            self.error = error
        finally:
            self.sealed.set()

    def _audit(self, rows: Rows) -> Audit:
        workers = tuple(
            replace(
                WorkerAudit(**self.ends[w]["audit"]),
                clock_error_ns=self.clocks.error_ns(w),
                silent_s=self.silent.get(w, 0.0),
            )
            for w in sorted(self.ends)
        )
        dispatched = sum(end["dispatched"] for end in self.ends.values())
        # Of a closed loop, and of a run that was cut, only what a lost worker had reported is known.
        reported = sum(s["sent"] for w, s in self.state.items() if w not in self.ends)
        planned = self.scheduled if self.scenario.kind.open_loop and not self.ended else 0
        return Audit(
            workers,
            self.workers,
            scheduled=planned or dispatched + reported,
            rows=len(rows),
            wall_s=max((end["wall_s"] for end in self.ends.values()), default=0.0),
            requested_qps=self.scenario.target_qps if self.scenario.kind.open_loop else None,
            achieved_qps=_rate(rows.sent_ns),
            scheduled_qps=_rate(rows.due_ns),
            ended=self.ended,
            left=() if self.ended else tuple(sorted(self.left)),  # a run that is cut ends all of them
            servers=tuple(server["url"] for server in self.document.get("servers", [])),
        )


def _rate(times_ns: np.ndarray) -> float | None:
    times = times_ns[times_ns != NEVER]
    span = int(times.max() - times.min()) if len(times) > 1 else 0
    return (len(times) - 1) / (span / 1e9) if span else None


def _percentiles(parts: list[np.ndarray]) -> dict[str, float | None]:
    described = describe(np.concatenate(parts) if parts else np.empty(0, dtype=np.int64), failed=0)
    return {p: described[p] / 1e6 if described.get(p) is not None else None for p in ("p50", "p99")}


def client_facts(workers: int) -> dict[str, Any]:
    """Facts about the load generator's own machine and software that a comparison needs to know."""
    return {
        "host": platform.node(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "workers": workers,
        "versions": {"tritonmark": tool_version()}
        | {name: package_version(name) for name in ("locust", "gevent", "numpy", "pyarrow")},
        "clock_resolution_ns": round(time.get_clock_info("monotonic").resolution * 1e9),
    }
