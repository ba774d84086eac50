"""What the models of Triton's python backend share: taking requests in, watching clients, metrics, tensors. Runs inside
Triton beside model.py; imports nothing of this project.

Triton calls `execute`, which only checks and queues. `_watch` is a thread that looks for clients that went away and
publishes metrics, and sleeps while no request is open.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from request_fields import BadRequestError

WATCH_PERIOD_S = 0.25  # how soon a client that went away is noticed, and how fresh the metrics are
DRAIN_S = 20.0  # how long `finalize` waits for open requests
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
Line = tuple[str, str, str, str]  # of METRICS: own name, GAUGE or COUNTER, family, description


class DecoupledModel:
    """A subclass has METRICS, `_accept(request, sender)` (may raise) and `_look()`: drop requests whose client went
    away, publish; true while there is something to look at."""

    METRICS: tuple[Line, ...] = ()

    def _start(self, args: dict, *loops: Callable[[], None]) -> None:
        """Last in `initialize`: make the metrics, run `loops` and `_watch` in threads of their own."""
        self._lock = threading.Lock()  # guards what is open and _stopping
        self._counting = threading.Lock()  # guards _tally: sending must not wait for who asks about cancellation
        self._stopping = False
        self._busy, self._ended = threading.Event(), threading.Event()
        self._tally = {name: 0.0 for name, kind, *_ in self.METRICS if kind == "COUNTER"}
        labels = {"model": args["model_name"], "version": args["model_version"]}
        # The families are kept too: Triton drops the metrics of a family that is garbage.
        self._families = [
            pb_utils.MetricFamily(family, description, getattr(pb_utils.MetricFamily, kind))
            for _, kind, family, description in self.METRICS
        ]
        self._metrics = {line[0]: f.Metric(labels=labels) for line, f in zip(self.METRICS, self._families, strict=True)}
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (*loops, self._watch)]
        for thread in self._threads:
            thread.start()

    def execute(self, requests: list) -> None:
        """Check and queue; answers come from other threads. No exception leaves this method."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._accept(request, sender)
            except BadRequestError as error:
                refuse(sender, str(error), pb_utils.TritonError.INVALID_ARG)
            except Exception as error:
                refuse(sender, f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)

    def _watch(self) -> None:
        while not self._ended.is_set():
            self._busy.wait()
            self._ended.wait(WATCH_PERIOD_S)
            self._busy.clear()
            try:
                busy = self._look()
            except Exception as error:  # this thread must outlive a single bad look
                pb_utils.Logger.log_error(f"watching failed: {type(error).__name__}: {error}")
                busy = True
            if busy:
                self._busy.set()

    def _count(self, **amounts: float) -> None:
        with self._counting:
            for name, amount in amounts.items():
                self._tally[name] += amount

    def _publish_tally(self) -> bool:
        """Hand the counters to Triton; true if anything was counted."""
        with self._counting:
            tally, self._tally = self._tally, dict.fromkeys(self._tally, 0.0)
        for name, amount in tally.items():
            if amount:
                self._metrics[name].increment(amount)
        return any(tally.values())


def parameters(args: dict) -> dict[str, str]:
    """The parameters of config.pbtxt."""
    return {key: value["string_value"] for key, value in json.loads(args["model_config"]).get("parameters", {}).items()}


def device_of(wanted: str, args: dict) -> str:
    """The torch device of this instance: `auto` follows Triton's placement where torch can."""
    if wanted != "auto":
        return wanted
    if args["model_instance_kind"] == "GPU" and torch.cuda.is_available():
        return f"cuda:{args['model_instance_device_id']}"
    return "cpu"


def text(name: str, value: str):
    return pb_utils.Tensor(name, np.array([value.encode("utf-8")], dtype=object))


def number(name: str, value: int):
    return pb_utils.Tensor(name, np.array([value], dtype=np.int32))


def seconds(name: str, value: float):
    return pb_utils.Tensor(name, np.array([value], dtype=np.float64))


def refuse(sender, message: str, code: int) -> None:
    """The final response of a request that gets no answer."""
    sender.send(pb_utils.InferenceResponse([], pb_utils.TritonError(message, code)), flags=FINAL)
