"""The process that samples hardware and server while a test runs: `python -m loadgen.edge.telemetry_sampler …`.

NVML calls may block for long, and a server under load answers its metrics late: neither may hold up arrivals, so this
is a process of its own, with a thread a source. It appends JSON lines as it goes and ends with its parent (its standard
input is then closed). A source that fails says so in a line and ends; the others go on.

    {"t": monotonic ns, "device": "gpu0", "power_w": 312.0, …}    telemetry
    {"t": …, "series": {"nv_inference_count{model=\\"m\\"}": 12.0}}  server metrics that changed, with --server
    {"t": …, "source": "nvml", "missing": "why"}                  a source that has nothing (more) to give
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from loadgen.edge.telemetry_sources import Exported, Host, Missing, Nvml, exposed, scrape

SERVER_HZ = 1.0
EXPORTER_HZ = 2.0  # exporters collect once a second at best; half of the pages then bring nothing new
SLOW_NS = 100_000_000
PATIENCE = 5  # failed scrapes in a row with which a source is given up


class Lines:
    """A file of JSON lines that several threads append to, each line whole."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._lock = file, threading.Lock()

    def write(self, at_ns: int, *rows: dict[str, Any]) -> None:
        text = "".join(json.dumps({"t": at_ns, **row}) + "\n" for row in rows)
        with self._lock:
            self._file.write(text)
            self._file.flush()


def every(hz: float, sample: Callable[[], list[dict[str, Any]]], lines: Lines, name: str) -> None:
    """Samples on a fixed grid until the source has no more to give. The stamp is the middle of a quick sampling."""
    period, failed = 1 / hz, 0
    due = time.monotonic()
    while True:
        before = time.monotonic_ns()
        try:
            rows, failed = sample(), 0
        except Missing as missing:
            rows, failed = [], failed + 1
            if failed >= PATIENCE or "every GPU was lost" in str(missing):
                lines.write(before, {"source": name, "missing": str(missing)})
                return
        after = time.monotonic_ns()
        if rows:  # a call that hung says nothing of the time in which it did
            lines.write(after if after - before > SLOW_NS else (before + after) // 2, *rows)
        due = max(due + period, time.monotonic())  # after a stall: no burst of samples to catch up
        time.sleep(max(0.0, due - time.monotonic()))


class ServerSeries:
    """The server's families that tell of inference, for one model; a series is written when it changes."""

    PREFIXES = ("nv_inference_", "nv_trt_llm_", "nv_llm_", "tritonmark_", "vllm:", "nv_cache_")
    MODEL_LABELS = ("model", "model_name")

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model, self._last = url, model, {}  # type: str, str, dict[str, float]

    def sample(self) -> list[dict[str, Any]]:
        now = series(scrape(self.url), self.model)
        changed = {k: v for k, v in now.items() if self._last.get(k) != v}
        self._last = now
        return [{"series": changed}] if changed else []


def series(page: str, model: str) -> dict[str, float]:
    """Series of an exposition that concern `model`, as `name{label="value",…}` → value; NaN is left out."""
    found = {}
    for name, labels, value in exposed(page):
        owner = next((labels[k] for k in ServerSeries.MODEL_LABELS if k in labels), model)
        if name.startswith(ServerSeries.PREFIXES) and _same(owner, model):
            text = ",".join(f'{k}="{v}"' for k, v in sorted(labels.items()) if k not in ("model", "version"))
            found[f"{name}{{{text}}}" if text else name] = value
    return found


def _same(owner: str, model: str) -> bool:
    """vLLM names a model by its path, TensorRT-LLM by its part of an ensemble: those concern the model too."""
    return owner == model or "/" in owner or owner in ("tensorrt_llm", "tensorrt_llm_bls")


Sampler = tuple[str, float, Callable[[], list[dict[str, Any]]]]


def sources(options: argparse.Namespace, lines: Lines) -> list[Sampler]:
    """Name, rate and sampler of every source there is; what is asked for and missing is written down."""
    found: list[Sampler] = []

    def add(name: str, hz: float, make: Callable[[], Any]) -> bool:
        try:
            found.append((name, hz, make().sample))
            return True
        except (Missing, ImportError, OSError) as error:
            lines.write(time.monotonic_ns(), {"source": name, "missing": str(error)})
            return False

    gpus = options.nvml and add("nvml", options.hz, lambda: Nvml(importlib.import_module(options.nvml)))
    for url in options.gpus_from or [] if not gpus else []:
        if add(url, min(options.hz, EXPORTER_HZ), partial(Exported, url)):
            break
    if options.host:
        add("host", options.hz, Host)
    if options.server:
        add("server", SERVER_HZ, lambda: ServerSeries(options.server, options.model))
    return found


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="samples hardware and server metrics into a file of JSON lines")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hz", type=float, default=5.0, help="samples per second of NVML and host")
    parser.add_argument("--nvml", help="module that binds NVML, usually pynvml")
    parser.add_argument("--gpus-from", action="append", help="metrics page with DCGM's or Triton's GPU families")
    parser.add_argument("--host", action="store_true", help="also this machine's CPU and memory")
    parser.add_argument("--server", help="Triton's metrics page")
    parser.add_argument("--model", default="")
    options = parser.parse_args(arguments)
    os.nice(5)  # behind the load process, which may have put itself ahead of all others
    with options.out.open("a") as file:
        lines = Lines(file)
        for name, hz, sample in sources(options, lines):
            threading.Thread(target=every, args=(hz, sample, lines, name), daemon=True).start()
        lines.write(time.monotonic_ns(), {"source": "sampler", "started": True})
        sys.stdin.buffer.read()  # until the parent closes it, or is gone
        os._exit(0)  # a thread may hang in a driver


if __name__ == "__main__":
    main(sys.argv[1:])
