"""Live metrics of a load test: what Prometheus scrapes while it runs.

Every process has one endpoint: the master's tells of requests and of the run, a worker's of that worker. The only
process of a small test tells of both. The endpoint answers from a process of its own (`live_server`), to which figures
are handed as datagrams that are dropped when it does not take them: a scrape cannot delay an arrival.

While the process lives, Prometheus finds the endpoints by a file (`discovery.py`).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections import deque
from pathlib import Path
from typing import Any

import gevent
import gevent.event

from loadgen.core.record import Rows
from loadgen.core.scenario import Scenario
from loadgen.edge import live_names as names
from loadgen.edge.discovery import Discovery
from loadgen.edge.errors import UserError
from loadgen.edge.live_fold import RunFigures

BASE_PORT = 9464
START_S = 20.0
LINGER_S = 15.0  # at most so long a finished test waits for its last scrape
SCRAPER_GONE_S = 35.0  # who has not asked for so long is not waited for
PAGE_S = 5.0
RATE_S = 5.0
PHASES = ("warmup", "measure", "drain", "seal", "sealed")


class Endpoint:
    """The load process's end of its scrape endpoint. Nothing here blocks, and nothing that fails ends the load test."""

    def __init__(self, port: int, bind: str, fixed: bool) -> None:
        """Raises UserError where the address cannot be listened on; `fixed` names the option in the message."""
        self._parts: dict[str, list[dict[str, Any]]] = {}
        self._generation = self._scraped = 0
        self._scrapes: deque[float] = deque(maxlen=8)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "loadgen.edge.live_server", str(theirs.fileno()), str(port), bind]
        self._process = subprocess.Popen(
            command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True, env=environment(),
        )  # fmt: skip
        theirs.close()
        self._socket = ours
        ours.settimeout(START_S)
        try:
            answer = json.loads(ours.recv(1 << 16) or b'{"error": "its process ended"}')
        except OSError:
            answer = {"error": f"its process did not start in {START_S:g} s"}
        ours.settimeout(0)
        if "error" in answer:
            self.close()
            option = "--metrics-port and --metrics-bind" if fixed else "--metrics-bind, or --metrics-port off"
            raise UserError(f"cannot serve metrics on {bind} from port {port} ({answer['error']}); see {option}")
        self.port: int = answer["port"]
        self.address = f"{_reachable(bind)}:{self.port}"

    def publish(self, part: str, families: list[dict[str, Any]]) -> None:
        """Replaces one part of what is shown."""
        self._parts[part] = families
        self._generation += 1
        message = {"generation": self._generation, "families": [f for p in self._parts.values() for f in p]}
        with contextlib.suppress(OSError):  # full, or gone: the next one will do
            self._socket.send(json.dumps(message).encode(), socket.MSG_DONTWAIT)
        self._hear()

    def linger(self) -> None:
        """Waits until what was published last has been scraped, if anybody scrapes."""
        self._hear()
        if not self._scrapes or time.monotonic() - self._scrapes[-1] > SCRAPER_GONE_S:
            return
        apart = self._scrapes[-1] - self._scrapes[0]
        interval = apart / (len(self._scrapes) - 1) if len(self._scrapes) > 1 else LINGER_S
        until = time.monotonic() + min(LINGER_S, 1.5 * interval + 1.0)
        while self._scraped < self._generation and time.monotonic() < until and self._process.poll() is None:
            gevent.sleep(0.05)
            self._hear()

    def close(self) -> None:
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=2)
            return
        self._process.kill()

    def _hear(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while message := self._socket.recv(1 << 12, socket.MSG_DONTWAIT):
                self._scraped = max(self._scraped, json.loads(message)["scraped"])
                self._scrapes.append(time.monotonic())


class Live:
    """What one load process shows. With `--metrics-port off` every method does nothing."""

    def __init__(self, port: str, bind: str, results: Path, role: str) -> None:
        """`role` is master, worker or local. Raises UserError for a port that is none."""
        self.role, self.endpoint, self.discovery = role, None, Discovery(results)
        self._workers: dict[int, str] = {}
        self._run: LiveRun | None = None
        self.opened = gevent.event.Event()
        if not (port in ("auto", "off") or (port.isdigit() and int(port) < 65536)):
            raise UserError(f"--metrics-port is {port!r}; give auto, off or a port number")
        self._port, self._bind = port, bind

    def open(self) -> None:
        """Starts the endpoint: this greenlet waits, others go on. Raises UserError where it cannot listen."""
        if self._port != "off":
            auto = self._port == "auto"
            self.endpoint = Endpoint(BASE_PORT if auto else int(self._port), self._bind, fixed=not auto)
            atexit.register(self.close)
            at = f"http://{self.endpoint.address}/metrics"
            print(f"tritonmark: metrics of this {self.role} process on {at}", flush=True)
            if self.role != "worker":
                self._write_targets()
        self.opened.set()

    @property
    def wanted(self) -> bool:
        """Is there an endpoint, or will there be one?"""
        return self._port != "off"

    @property
    def address(self) -> str | None:
        """host:port of the endpoint."""
        return self.endpoint.address if self.endpoint else None

    def begin(self, document: dict[str, Any], scenario: Scenario, scheduled: int, workers: int, folder: Path) -> None:
        """A run begins: what was shown of the one before is gone."""
        self._run = LiveRun(document, scenario, scheduled, workers, folder)
        self.publish("run", self._run.families())

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Values of RUN_LABELS of the run that is shown."""
        return self._run.labels if self._run else None

    def worker_ready(self, worker: int, address: str | None) -> bool:
        """A worker tells where its own endpoint is; True where that is news."""
        if not self.endpoint or not address or address in (self.address, self._workers.get(worker)):
            return False
        self._workers[worker] = address
        self._write_targets()
        return True

    def observe(self, rows: Rows) -> None:
        """Measured rows arrived."""
        if self.endpoint and self._run:
            self._run.figures.add(rows)

    def progress(self, snapshot: dict[str, Any], t0_wall_ns: int | None, lost: int) -> None:
        """Where the run stands, about twice a second."""
        if self.endpoint and self._run and "phase" in snapshot and "sent" in snapshot:
            self._run.at(snapshot, t0_wall_ns, lost)
            self.endpoint.publish("run", self._run.families())

    def sealed(self, valid: bool) -> None:
        """The run is over: shows its verdict."""
        if self.endpoint and self._run:
            self._run.seal(valid)
            self.endpoint.publish("run", self._run.families())

    def publish(self, part: str, families: list[dict[str, Any]]) -> None:
        """Shows something else beside the run, such as telemetry."""
        if self.endpoint:
            self.endpoint.publish(part, families)

    def page(self) -> Any:
        """The endpoint's page for the web UI's own port, as Flask takes it. Only this greenlet waits for it."""
        if not self.endpoint:
            return "metrics are off\n", 404
        try:
            with urllib.request.urlopen(f"http://{self.endpoint.address}/metrics", timeout=PAGE_S) as answer:
                return answer.read(), 200, {"Content-Type": answer.headers["Content-Type"]}
        except OSError as error:
            return f"the metrics endpoint did not answer: {error}\n", 503

    def linger(self) -> None:
        """Waits for the last scrape of a finished run, if anybody scrapes; at most LINGER_S."""
        if self.endpoint:
            self.endpoint.linger()

    def close(self) -> None:
        if self.endpoint:
            self.discovery.remove()
            self.endpoint.close()
            self.endpoint = None

    def _write_targets(self) -> None:
        groups = [{"targets": [self.address], "labels": {"job": "tritonmark", "role": self.role}}]
        if self._workers:
            groups.append({"targets": list(self._workers.values()), "labels": {"job": "tritonmark", "role": "worker"}})
        self.discovery.write(groups)


class LiveRun:
    """One run as the master shows it."""

    def __init__(
        self, document: dict[str, Any], scenario: Scenario, scheduled: int, workers: int, folder: Path
    ) -> None:
        self.labels = names.run_labels(document, scenario.name)
        self.scenario, self.scheduled, self.workers = scenario, scheduled, workers
        self.info = [str(document.get("weights", "unknown")), scenario.preset, str(folder)]
        self.figures = RunFigures(scenario)
        self.snapshot: dict[str, Any] = {"phase": "warmup", "sent": 0, "in_flight": 0, "elapsed_s": 0.0}
        self.sent: deque[tuple[float, int]] = deque()
        self.t0_wall_ns: int | None = None
        self.lost, self.valid, self.end_s = 0, None, None  # type: int, bool | None, float | None

    def at(self, snapshot: dict[str, Any], t0_wall_ns: int | None, lost: int) -> None:
        now = time.monotonic()
        self.snapshot, self.t0_wall_ns, self.lost = snapshot, t0_wall_ns, lost
        self.sent.append((now, snapshot["sent"]))
        while len(self.sent) > 2 and now - self.sent[0][0] > RATE_S:
            self.sent.popleft()

    def seal(self, valid: bool) -> None:
        self.valid, self.end_s = valid, time.time()
        self.snapshot = {**self.snapshot, "phase": "sealed", "in_flight": 0}

    def families(self) -> list[dict[str, Any]]:
        phase, elapsed = self.snapshot["phase"], self.sent[-1][0] - self.sent[0][0] if self.sent else 0.0
        achieved = (self.sent[-1][1] - self.sent[0][1]) / elapsed if elapsed > 0 and phase == "measure" else None
        single: list[tuple[names.Family, float | None]] = [
            (names.VERDICT, float(self.figures.fine if self.valid is None else self.valid)),
            (names.IN_FLIGHT, self.snapshot["in_flight"]),
            (names.TARGET, self.scenario.target_qps if self.scenario.kind.open_loop else None),
            (names.ACHIEVED, achieved),
            (names.SCHEDULED, self.scheduled or None),
            (names.SENT, self.snapshot["sent"]),
            (names.WORKERS, self.workers),
            (names.LOST, self.lost),
            (names.ELAPSED, self.snapshot["elapsed_s"] if self.t0_wall_ns else None),
            (names.START, self.t0_wall_ns / 1e9 if self.t0_wall_ns else None),
            (names.END, self.end_s),
        ]
        return [
            *self.figures.families(self.labels),
            *(f.with_samples([[[], value]], self.labels) for f, value in single if value is not None),
            names.PHASE.with_samples([[[p], float(p == phase)] for p in PHASES], self.labels),
            names.INFO.with_samples([[self.info, 1.0]], self.labels),
        ]


def environment() -> dict[str, str]:
    """Ours, with the project importable: Locust's own folder stands first on the path of this process, not of that."""
    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)}


def _reachable(bind: str) -> str:
    """The address under which others find this host, where it listens on all of its addresses."""
    if bind not in ("0.0.0.0", "::", ""):
        return f"[{bind}]" if ":" in bind else bind
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it only asks the routing table (address of RFC 5737)
        return str(probe.getsockname()[0])
    return "127.0.0.1"
