"""How a load worker shows its own health while it works: lateness, loop lag, CPU and memory, twice a second."""

from __future__ import annotations

import time
from array import array
from pathlib import Path
from typing import Any

import gevent
import numpy as np

from loadgen.edge import live_names as names
from loadgen.edge.live import Live
from loadgen.edge.live_fold import Histogram
from loadgen.edge.worker import LoadWorker

PERIOD_S = 0.5
PAGE_BYTES = 4096


class WorkerHealth:
    """Watches one `LoadWorker` from a greenlet of its own until `stop`."""

    def __init__(self, live: Live, load: LoadWorker, labels: tuple[str, ...]) -> None:
        self.live, self.load, self.labels = live, load, labels
        self.lateness, self.lag = Histogram(names.HEALTH_BUCKETS_S), Histogram(names.HEALTH_BUCKETS_S)
        self.read = {"lateness": 0, "lag": 0}
        self.cpu = [(time.monotonic(), time.process_time())]
        self.greenlet = gevent.spawn(self._watch) if live.wanted else None

    def stop(self) -> None:
        """Shows the final state."""
        if self.greenlet:
            self.greenlet.kill()
            self._publish()

    def _watch(self) -> None:
        while True:
            self._publish()
            gevent.sleep(PERIOD_S)

    def _publish(self) -> None:
        self._fold(self.lateness, "lateness", self.load.lateness)
        self._fold(self.lag, "lag", self.load.lag)
        self.cpu = [*self.cpu[-2:], (time.monotonic(), time.process_time())]
        (before, used_before), (now, used) = self.cpu[0], self.cpu[-1]
        worker = str(self.load.index)
        samples: list[tuple[names.Family, list[Any]]] = [
            (names.WORKER_IN_FLIGHT, [[worker], len(self.load.in_flight)]),
            (names.WORKER_SENT, [[worker], self.load.sent]),
            (names.WORKER_LATENESS, self.lateness.sample(worker)),
            (names.WORKER_LAG, self.lag.sample(worker)),
            (names.WORKER_CPU, [[worker], used]),
            (names.WORKER_CPU_RATIO, [[worker], (used - used_before) / max(now - before, 1e-9)]),
            (names.WORKER_MEMORY, [[worker], resident_bytes()]),
        ]
        self.live.publish("worker", [f.with_samples([s], self.labels) for f, s in samples])

    def _fold(self, histogram: Histogram, name: str, values: array[int]) -> None:
        """What was appended since the last time. The view is gone before another greenlet can append."""
        new = np.frombuffer(values, dtype=np.int64)[self.read[name] :].copy() if values else np.empty(0, np.int64)
        self.read[name] += len(new)
        histogram.add(new)


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
