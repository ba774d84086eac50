"""The part of a run that one Locust worker does: warm up, wait for T0, send its slots on time, hand over its rows.

Open loop: one dispatcher greenlet sleeps to absolute deadlines and spawns a greenlet a request, so neither a slow
answer nor another request can delay an arrival. It never re-anchors; when it wakes late it sends late, and says so.
Closed loop (SingleStream, MultiStream, Concurrency): each stream sends its next query when the last one is complete.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gevent
import numpy as np
from gevent.event import AsyncResult
from gevent.pool import Group, Pool

from loadgen.core import schedule
from loadgen.core.record import Int64, Outcome, Phase, Record
from loadgen.core.scenario import EQUAL_ISSUE, Kind, Scenario
from loadgen.core.verdict import WorkerAudit
from loadgen.edge.accuracy import pack_answers
from loadgen.edge.clients.triton_http import TritonHttp
from loadgen.edge.clients.triton_video import TritonVideo
from loadgen.edge.clips import pack_clips
from loadgen.edge.errors import UserError
from loadgen.edge.samples import PromptLibrary, sample_indices, sample_stream
from loadgen.edge.store import pack

FLUSH_S = 0.25  # rows older than this are out of the process, so a crash costs less than a second of them
LAG_PERIOD_S = 0.01
BACKOFF_S = 0.1  # a closed loop that met a failure waits, instead of hammering a dead server
DEAD_AFTER = 50  # failures in a row with which a closed loop gives up
BLOCK = 4096
SPIN = 64  # spawns without a break; then waiting greenlets get their turn

Send = Callable[[str, dict[str, Any]], None]


class Clock:
    """Monotonic ns relative to T0. Before T0 is known it counts from the making of the clock."""

    def __init__(self) -> None:
        self.base = time.monotonic_ns()

    def __call__(self) -> int:
        return time.monotonic_ns() - self.base

    def start_at(self, ns: int) -> int:
        """Moves zero to `ns` of this host's CLOCK_MONOTONIC; returns how far zero moved."""
        moved = ns - self.base
        self.base = ns
        return moved


def due_times(scenario: Scenario) -> Int64:
    """All due times of an open-loop scenario, in ns; LoadGen's own number of queries. Empty for closed loops.

    With equal issue that is a whole number of passes over the library, whose size must be known then.
    """
    length, floor = scenario.minimums.duration_ns, max(scenario.minimums.queries, 1)
    qps = scenario.target_qps or 0.0
    dataset = scenario.library_size if scenario.sample_order == EQUAL_ISSUE and scenario.library_size else None
    if scenario.kind is Kind.OFFLINE:
        return schedule.offline(_padded(max(floor, round(1.1 * length / 1e9 * qps)), dataset))
    if scenario.kind is not Kind.SERVER:
        return np.empty(0, dtype=np.int64)
    if scenario.arrivals == "constant":
        return schedule.constant(qps, _padded(max(floor, int(length / 1e9 * qps) + 1), dataset))
    return schedule.loadgen_server(qps, length, floor, scenario.seeds.schedule, dataset=dataset)


def _padded(count: int, dataset: int | None) -> int:
    return -(-count // dataset) * dataset if dataset else count


class LoadWorker:
    """One worker's share of one run.

    `plan` is the conductor's message: scenario, hosts, turns (whose each slot is), model, worker (index), workers, tag.
    `send(kind, data)` carries "ready", "rows" and "end" messages back; `fire(record)` shows Locust a finished request.
    """

    def __init__(self, plan: dict[str, Any], send: Send, fire: Callable[[Record], None]) -> None:
        self.scenario = Scenario.from_json(plan["scenario"])
        self.index, self.workers = plan["worker"], plan["workers"]
        self.clock = Clock()
        make = TritonVideo if self.scenario.clip else TritonHttp
        self.turns = plan["turns"]
        self.clients = [
            make(host, plan["model"], timeout_s=self.scenario.timeout_s, clock=self.clock, kernel_stamps=True,
                 keep_outputs=self.scenario.keep_outputs)
            for host in plan["hosts"]
        ]  # fmt: skip
        self.library = PromptLibrary(self.scenario.prompts, self.scenario, plan["tag"], plan["dialect"])
        if len(self.library) != self.scenario.library_size:
            raise UserError(f"load worker {self.index} finds {len(self.library)} prompts, the conductor "
                            f"{self.scenario.library_size}: give all hosts the same --prompts file")  # fmt: skip
        self.tag, self.send, self.fire = plan["tag"], send, fire
        self.go: AsyncResult = AsyncResult()
        cap = max(1, self.scenario.max_in_flight // self.workers) if self.scenario.kind.open_loop else None
        self.in_flight, self.streams = Pool(cap), Group()
        self.open: dict[int, Record] = {}  # by identity; what is spawned and not finished
        self.finished: list[Record] = []
        self.sent = self.failures_in_a_row = 0
        self.lateness, self.lag = array("q"), array("q")
        self.ended: str | None = None

    def run(self) -> None:
        """Everything from warm-up to the "end" message. Never raises; an error of its own becomes `ended`."""
        flusher = None
        try:
            self._warm_up()
            # A full collection in mid-run would stop every stream for tens of ms: what exists now is kept for good.
            gc.collect()
            gc.freeze()
            due = due_times(self.scenario)
            self.send("ready", {"worker": self.index})
            self._shift_warm_up(self.clock.start_at(self.go.get()))
            self.flush()  # before T0: what is slow the first time is then behind us
            flusher = gevent.spawn(self._flush_forever)
            self._measure(due)
        except gevent.GreenletExit:
            self.ended = self.ended or "stopped"
        except Exception as error:
            self.ended = f"load worker {self.index} failed: {type(error).__name__}: {error}"
        finally:
            gevent.kill(flusher) if flusher else None
            self.streams.kill()
            self.in_flight.kill()
            for record in list(self.open.values()):  # killed before its greenlet began: nobody else can say so
                record.outcome, record.done_ns, record.error = Outcome.CUT, self.clock(), "cut: before it was sent"
                self._finish(record)
            for client in self.clients:
                client.close()
            self.flush()
            self.send("end", {"worker": self.index, "ended": self.ended, "dispatched": self.sent, **self.audit()})

    def _warm_up(self) -> None:
        """`warmup` requests before T0: one alone, then the rest together. Their rows are marked, not measured."""
        samples = sample_stream(self.scenario, len(self.library), 0, 1)
        for wave in ((0, 1), (1, self.scenario.warmup)):
            records = [self._record(-1 - n, next(samples)[1], self.clock(), Phase.WARMUP) for n in range(*wave)]
            gevent.joinall([gevent.spawn(self._request, r) for r in records[: self.scenario.warmup]])

    def _shift_warm_up(self, moved_ns: int) -> None:
        """Warm-up rows were timed before T0 was known: express them relative to T0, like all others."""
        for record in self.finished:
            for name in ("due_ns", "sent_ns", "first_ns", "done_ns"):
                value = getattr(record, name)
                setattr(record, name, None if value is None else value - moved_ns)
            record.chunk_ns = array("q", (t - moved_ns for t in record.chunk_ns))

    def _measure(self, due: Int64) -> None:
        while self.clock() < 0:
            gevent.sleep(min(0.05, -self.clock() / 1e9))
        self.cpu_start, self.wall_start = time.process_time(), self.clock()
        watcher = gevent.spawn(self._watch_lag)
        try:
            if self.scenario.kind.open_loop:
                self._open_loop(due)
            else:
                self._closed_loops()
            self.in_flight.join()
        finally:
            watcher.kill()
            self.cpu_s = time.process_time() - self.cpu_start
            self.wall_s = (self.clock() - self.wall_start) / 1e9

    def _open_loop(self, due: Int64) -> None:
        """Every slot of this worker's stripe at its due time, or shed and counted when the cap is reached."""
        scenario, clock = self.scenario, self.clock
        samples = sample_indices(scenario, len(self.library), len(due))
        window = scenario.kind is Kind.OFFLINE  # its cap is a window: requests wait for room, and their wait counts
        behind = 0
        for seq, due_ns in _pairs(*schedule.stripe(due, self.index, self.workers)):
            while (wait_ns := due_ns - clock()) > 0:
                behind = 0
                gevent.sleep(wait_ns / 1e9)
            behind += 1
            if behind % SPIN == 0:
                gevent.sleep(0)
            record = self._record(seq, int(samples[seq]), due_ns)
            self.sent += 1
            if self.in_flight.full() and not window:
                record.outcome, record.done_ns = Outcome.SHED, clock()
                record.error = f"shed: {len(self.in_flight)} requests were in flight"
                self._finish(record)
                continue
            if not window:
                self.lateness.append(clock() - due_ns)
            self._spawn(record)

    def _closed_loops(self) -> None:
        """The streams of a closed loop: one for SingleStream and MultiStream, `concurrency` otherwise."""
        scenario, total = self.scenario, self.scenario.concurrency if self.scenario.kind is Kind.CONCURRENCY else 1
        streams = len(range(self.index, total, self.workers))
        active = min(self.workers, total)
        if not streams:
            return
        if scenario.kind is Kind.MULTI_STREAM:
            slots = sample_stream(scenario, len(self.library), 0, 1)
        else:
            slots = sample_stream(scenario, len(self.library), self.index, active)
        for _ in range(streams):
            self.streams.spawn(self._closed_loop, slots, total)
        self.streams.join(raise_error=True)

    def _closed_loop(self, slots: Iterator[tuple[int, int]], total: int) -> None:
        """One query after another, until one was issued after the minimum duration and there are enough of them.

        That is LoadGen's rule; the query that passes the mark is still measured.
        """
        minimums, size = self.scenario.minimums, self.scenario.samples_per_query
        issued = 0
        while True:
            due_ns = self.clock()
            query = [self._record(seq, sample, due_ns) for seq, sample in (next(slots) for _ in range(size))]
            issued += 1
            self.sent += size
            gevent.joinall([self._spawn(r) for r in query])
            if due_ns >= minimums.duration_ns and issued * total >= minimums.queries:
                return
            if any(r.outcome is not Outcome.OK for r in query):
                if self.failures_in_a_row >= DEAD_AFTER:
                    self.ended = f"{DEAD_AFTER} requests in a row failed, the last with {query[-1].error}"
                    return
                gevent.sleep(BACKOFF_S)

    def _record(self, seq: int, sample: int, due_ns: int, phase: Phase = Phase.MEASURE) -> Record:
        query = seq // self.scenario.samples_per_query
        server = self.turns[seq % len(self.turns)]
        return Record(seq, query, sample, self.index, phase, due_ns, *self.library.asks(sample), server=server)

    def _spawn(self, record: Record) -> gevent.Greenlet:
        self.open[id(record)] = record
        return self.in_flight.spawn(self._request, record)

    def _request(self, record: Record) -> None:
        try:
            self.clients[record.server].stream(self.library.body(record.sample, f"{self.tag}-{record.seq}"), record)
        finally:
            self._finish(record)

    def _finish(self, record: Record) -> None:
        self.failures_in_a_row = 0 if record.outcome is Outcome.OK else self.failures_in_a_row + 1
        self.open.pop(id(record), None)
        self.finished.append(record)
        if record.phase is Phase.MEASURE:
            self.fire(record)

    def _flush_forever(self) -> None:
        while True:
            gevent.sleep(FLUSH_S)
            self.flush()

    def flush(self) -> None:
        """Hands the finished rows over as one Arrow batch, with the counts that a progress display wants."""
        records, self.finished = self.finished, []
        batch = pack(records).serialize().to_pybytes() if records else b""
        data = {"batch": batch, "worker": self.index, "in_flight": len(self.in_flight), "sent": self.sent}
        if self.scenario.keep_outputs:
            data["answers"] = pack_answers(records)
        if self.scenario.clip and (clips := pack_clips(records, self.library.texts)):
            data["clips"] = clips
        self.send("rows", data)

    def _watch_lag(self) -> None:
        """How late the event loop wakes a greenlet: arrivals can have been stamped late by as much."""
        while True:
            before = self.clock()
            gevent.sleep(LAG_PERIOD_S)
            self.lag.append(self.clock() - before - round(LAG_PERIOD_S * 1e9))

    def audit(self) -> dict[str, Any]:
        """This worker's account of itself, as plain types."""
        wall_s, cpu_s = getattr(self, "wall_s", 0.0), getattr(self, "cpu_s", 0.0)
        audit = WorkerAudit(
            self.index, self.sent, *_percentiles(self.lateness), *_percentiles(self.lag),
            cpu_share=cpu_s / wall_s if self.sent and wall_s > 0 else 0.0,  # without a slot it ends at once
            max_rss_bytes=peak_memory_bytes(),
        )  # fmt: skip
        return {"audit": asdict(audit), "wall_s": wall_s}


def never_began(plan: dict[str, Any], why: str) -> dict[str, Any]:
    """The "end" of a worker that could not begin."""
    audit = asdict(WorkerAudit(plan["worker"], 0, 0, 0, 0, 0, 0, 0, 0.0, 0))
    return {"worker": plan["worker"], "ended": why, "dispatched": 0, "audit": audit, "wall_s": 0.0}


def _pairs(seq: Int64, due_ns: Int64) -> Iterator[tuple[int, int]]:
    """Slots as Python numbers, a block at a time: a million at once would be 70 MB of objects."""
    for start in range(0, len(seq), BLOCK):
        yield from zip(seq[start : start + BLOCK].tolist(), due_ns[start : start + BLOCK].tolist(), strict=True)


def _percentiles(values: array[int]) -> tuple[int, int, int]:
    """p50, p99 and max; zeros where nothing was measured."""
    ordered = np.sort(np.frombuffer(values, dtype=np.int64)) if values else np.zeros(1, dtype=np.int64)
    return tuple(int(ordered[min(len(ordered) - 1, int(len(ordered) * p))]) for p in (0.5, 0.99, 1.0))  # type: ignore[return-value]


def peak_memory_bytes() -> int:
    """Most resident memory of this process. getrusage would give the parent's too: its figure survives exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
