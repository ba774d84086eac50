"""Telemetry of one run, as the load process sees it: starts the sampler, marks T0, shows the newest values, ends it.

Nothing here raises for what a machine lacks: a test without NVML, GPU or metrics page goes on, and its run says what is
missing.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gevent

from loadgen.core.energy import THROTTLE_BITS
from loadgen.edge import live_names as names
from loadgen.edge import server_stats
from loadgen.edge.errors import UserError
from loadgen.edge.hardware import is_local
from loadgen.edge.live import Live, environment
from loadgen.edge.telemetry_table import STREAM

FIRST_SAMPLE_S = 3.0  # how long T0 may wait for the first sample
AFTER_S = 1.0  # sampled after the last response
LAST_SAMPLE_S = 2.5  # how long sealing may wait for a sample after the window
SETTLE_S = 0.3  # our runtimes count into their metrics every 0.25 s
SHOW_S = 0.5


@dataclass(frozen=True)
class Settings:
    """`source`: auto, nvml, off or a URL; `server`: auto, off or a URL; `gpus`: indices whose energy counts."""

    source: str = "auto"
    hz: float = 5.0
    gpus: str | None = None
    server: str = "auto"

    def check(self) -> None:
        """Raises UserError for what cannot be meant."""
        for flag, value, words in (("--telemetry", self.source, ("auto", "nvml", "off")),
                                   ("--server-metrics", self.server, ("auto", "off"))):  # fmt: skip
            if value not in words and not value.startswith(("http://", "https://")):
                raise UserError(f"{flag} is {value!r}; give {', '.join(words)} or the http:// URL of a metrics page")
        if not 0.1 <= self.hz <= 50:
            raise UserError(f"--telemetry-hz is {self.hz:g}; give 0.1 to 50 samples per second")
        if self.gpus is not None and not all(part.strip().isdigit() for part in self.gpus.split(",")):
            raise UserError(f"--gpus is {self.gpus!r}; give GPU indices such as 0 or 0,1")


class Telemetry:
    """One run's telemetry: `start`, `before` T0, `mark` T0, `after` the last response."""

    def __init__(self, settings: Settings, hosts: Sequence[str], model: str, live: Live) -> None:
        self.settings, self.hosts, self.model, self.live = settings, hosts, model, live
        self.process: subprocess.Popen[bytes] | None = None
        self.shower: gevent.Greenlet | None = None
        self.newest: dict[str, dict[str, Any]] = {}
        self.pages: list[str] = []

    @property
    def page(self) -> str | None:
        """The page that is followed during the run: the first server's."""
        return self.pages[0] if self.pages else None

    def start(self, folder: Path) -> None:
        """Begins to sample into the run's folder. The server is asked for its metrics page here, before any load."""
        if self.settings.source == "off" and self.settings.server == "off":
            return
        self.path = folder / STREAM
        asked = self.settings.server.split(",")  # one page for each server, or one word for all
        asked = asked if len(asked) == len(self.hosts) else asked[:1] * len(self.hosts)
        pages = [server_stats.metrics_url(host, page) for host, page in zip(self.hosts, asked, strict=True)]
        self.pages = list(dict.fromkeys(page for page in pages if page))
        command = [sys.executable, "-m", "loadgen.edge.telemetry_sampler", "--out", str(self.path),
                   "--hz", str(self.settings.hz), "--model", self.model]  # fmt: skip
        source = self._sources(command)
        if self.page:
            command += ["--server", self.page]
        gpus = self.settings.gpus.replace(" ", "").split(",") if self.settings.gpus else None
        self._tell({"settings": {"source": source, "hz": self.settings.hz, "gpus": gpus, "page": self.page}})
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True, env=environment(),
            )  # fmt: skip
        except OSError as error:
            self._tell({"missing": f"the sampler did not start: {error}"})
            return
        self.shower = gevent.spawn(self._show)

    def before(self) -> None:
        """Just before T0: the server's counts, and a first sample to begin with."""
        if self.process:
            self._wait(time.monotonic_ns(), FIRST_SAMPLE_S, "any")
            gevent.sleep(SETTLE_S)
            self._tell({"before": server_stats.fetch(self.hosts, self.model, self.pages)})

    def mark(self, t0_wall_ns: int) -> None:
        """T0 on this host's monotonic clock, which the sampler's stamps are of."""
        if self.process:
            self._tell({"t0": time.monotonic_ns() + t0_wall_ns - time.time_ns()})

    def after(self) -> None:
        """After the last response: the server's counts, a last sample, and the end of the sampler."""
        if not self.process:
            return
        ended = time.monotonic_ns()
        gevent.sleep(AFTER_S)
        self._tell({"after": server_stats.fetch(self.hosts, self.model, self.pages)})
        self._wait(ended, LAST_SAMPLE_S - AFTER_S, "all")
        self.stop()

    def stop(self) -> None:
        """Ends the sampler, which has written all it had."""
        if self.shower:
            self.shower.kill()
        if self.process and self.process.stdin:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=1)
            if self.process.poll() is None:
                self.process.kill()
        self.process = None

    def _sources(self, command: list[str]) -> str | None:
        """Appends what is to be sampled; returns a word for the run's document."""
        source, local = self.settings.source, all(map(is_local, self.hosts))
        if source == "off":
            return "off"
        if len(self.hosts) > 1 and not local:
            self._tell({"missing": f"the power of {len(self.hosts)} servers' hosts is not added up"})
            return None
        if local:
            command.append("--host")
        if source.startswith("http"):
            command += ["--gpus-from", source]
            return source
        if source == "nvml" or local:
            if find_spec("pynvml"):
                command += ["--nvml", "pynvml"]
            else:
                self._tell({"missing": "nvidia-ml-py is not installed: pip install 'tritonmark[gpu]'"})
        if self.page and source == "auto":
            command += ["--gpus-from", self.page]
        return "nvml" if "--nvml" in command else self.page

    def _tell(self, line: dict[str, Any]) -> None:
        with contextlib.suppress(OSError), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _wait(self, since_ns: int, limit_s: float, which: str) -> None:
        """Until a device (or each that was seen) has a sample after `since_ns`; not for long, as there may be none."""
        until = time.monotonic() + limit_s
        while time.monotonic() < until and self.process and self.process.poll() is None:
            fresh = [row["t"] > since_ns for row in self.newest.values()]
            if fresh and (all(fresh) if which == "all" else any(fresh)):
                return
            gevent.sleep(0.05)

    def _show(self) -> None:
        """Follows the stream, and shows its newest rows."""
        with self.path.open("rb") as file:
            while True:
                for line in file.readlines():
                    if b'"device"' in line and line.endswith(b"\n"):
                        with contextlib.suppress(ValueError, KeyError):
                            row = json.loads(line)
                            self.newest.pop(row["device"], None) if "lost" in row else self.newest.update(
                                {row["device"]: row}
                            )
                if self.live.labels:
                    self.live.publish("telemetry", shown(list(self.newest.values()), self.live.labels))
                gevent.sleep(SHOW_S if len(self.newest) else 0.1)


def shown(rows: list[dict[str, Any]], labels: tuple[str, ...]) -> list[dict[str, Any]]:
    """The newest row of each device as live families."""
    out = []
    gpus = [r for r in rows if r["device"].startswith("gpu")]
    for column, family in names.GPU.items():
        samples: list[list[Any]] = []
        for row in (r for r in gpus if column in r):
            index = row["device"][3:]
            if column == "throttle":
                samples += [[[index, why], float(int(row[column]) & bit != 0)] for why, bit in THROTTLE_BITS.items()]
            else:
                samples.append([[index], row[column]])
        if samples:
            out.append(family.with_samples(samples, labels))
    packages = [r["power_w"] for r in rows if r["device"].startswith("cpu") and "power_w" in r]
    host = next((r for r in rows if r["device"] == "host"), {}) | ({"power_w": sum(packages)} if packages else {})
    out += [f.with_samples([[[], host[c]]], labels) for c, f in names.HOST.items() if c in host]
    return out
