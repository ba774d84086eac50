"""A language model in Triton's python backend: decoupled, continuously batched, tokens counted by id on the server.

This file is copied as `1/model.py`, with the other `llm_*.py` beside it; none of them imports the project they come
from. Three threads share the work: Triton calls `execute`, which only checks and queues; the engine's batch loop
computes (for torch-compile in a process of its own, which several instances of this model share); `_deliver` sends what
it made. A fourth, `_watch`, sleeps while no request is open.

Inputs (tensors or request parameters of the same name): text_input, max_tokens, min_tokens, ignore_eos, temperature,
top_k, top_p, seed, stream, return_token_ids. Outputs: text_output (what is new since the last response) and
num_output_tokens (tokens in this one); with return_token_ids also output_ids, where there are any; on the last response
also finish_reason (length, stop, cancelled), num_input_tokens and total_output_tokens. A response may carry several
tokens: count num_output_tokens, never responses. An end token counts as a token and adds no text.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import tokenizers
import torch
import triton_python_backend_utils as pb_utils
from llm_request import BadRequestError, Output, check_context, parse_prompt, read_request
from llm_settings import read_settings
from llm_text import TextStream

WATCH_PERIOD_S = 0.25  # how soon a client that went away is noticed, and how fresh the gauges are
DRAIN_S = 20.0  # how long `finalize` waits for open requests
METRICS = (
    ("running", "GAUGE", "tritonmark_requests_running", "Sequences in the running batch"),
    ("waiting", "GAUGE", "tritonmark_requests_waiting", "Sequences waiting for room in the batch"),
    ("kv_usage", "GAUGE", "tritonmark_kv_cache_usage_ratio", "Share of the KV cache in use, 0 to 1"),
    ("tokens_in", "COUNTER", "tritonmark_tokens_in_total", "Prompt tokens of accepted requests"),
    ("tokens_out", "COUNTER", "tritonmark_tokens_out_total", "Tokens generated and sent"),
    ("cancelled", "COUNTER", "tritonmark_requests_cancelled_total", "Requests whose client went away"),
)


class OpenRequest:
    """One request between its arrival and its final response."""

    __slots__ = ("prompt_tokens", "return_ids", "sender", "sent_tokens", "text")

    def __init__(self, sender, tokenizer, prompt_tokens: int, return_ids: bool) -> None:
        self.sender = sender
        self.text = TextStream(tokenizer)
        self.prompt_tokens = prompt_tokens
        self.return_ids = return_ids
        self.sent_tokens = 0


class TritonPythonModel:
    """See the module. Triton calls initialize once, execute for new requests, finalize before unloading."""

    def initialize(self, args: dict) -> None:
        """Load the model and answer one small request; any exception here is the reason that Triton logs."""
        folder = Path(__file__).resolve().parent
        parameters = json.loads(args["model_config"]).get("parameters", {})
        self.settings = read_settings(folder, {key: value["string_value"] for key, value in parameters.items()})
        device = _device(self.settings["device"], args, self.settings["tp"])
        started = time.monotonic()
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "weights" / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.engine = _engine(folder, self.settings, device, args["model_name"])
        self._open: dict[str, OpenRequest] = {}
        self._tally = {"tokens_in": 0, "tokens_out": 0, "cancelled": 0}
        self._lock = threading.Lock()  # guards _open, _tally and _stopping
        self._stopping = False
        self._busy = threading.Event()
        self._ended = threading.Event()
        # The families are kept too: Triton drops the metrics of a family that is garbage.
        self._families, self._metrics = _metrics({"model": args["model_name"], "version": args["model_version"]})
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._deliver, self._watch)]
        for thread in self._threads:
            thread.start()
        pb_utils.Logger.log_info(
            f"{args['model_instance_name']}: {self.settings['precision']} on {device}, ready in"
            f" {time.monotonic() - started:.1f} s"
        )

    def execute(self, requests: list) -> None:
        """Check and queue; answers come from `_deliver`. No exception leaves this method."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._accept(request, sender)
            except BadRequestError as error:
                _refuse(sender, str(error), pb_utils.TritonError.INVALID_ARG)
            except Exception as error:
                _refuse(sender, f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)

    def is_ready(self) -> bool:
        """Asked by newer versions of Triton for `/v2/models/<name>/ready`."""
        return self.engine.failure() is None

    def finalize(self) -> None:
        """Let open requests finish for a while, then end the batch loop and fail the rest."""
        with self._lock:
            self._stopping = True
        deadline = time.monotonic() + DRAIN_S
        while self._open and self.engine.failure() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self._ended.set()
        self._busy.set()
        self.engine.stop(timeout_s=10.0)
        self._fail_all("the model is being unloaded")
        for thread in self._threads:
            thread.join(timeout=2.0)

    def _accept(self, request, sender) -> None:
        context = self.settings["max_context"]
        prompt = parse_prompt(read_request(request), self.settings["default_max_tokens"], context)
        ids = self.tokenizer.encode(prompt.text).ids
        check_context(len(ids), prompt.max_tokens, context)
        failure = self.engine.failure()
        request_id = uuid.uuid4().hex
        with self._lock:
            if self._stopping or failure:
                return _refuse(sender, failure or "the model is being unloaded", pb_utils.TritonError.UNAVAILABLE)
            self._open[request_id] = OpenRequest(sender, self.tokenizer, len(ids), prompt.return_token_ids)
            self._tally["tokens_in"] += len(ids)
        self._busy.set()
        if not self.engine.submit(request_id, ids, prompt):
            self._close(request_id)
            _refuse(sender, "the batch loop takes no more requests", pb_utils.TritonError.UNAVAILABLE)
        return None

    def _close(self, request_id: str) -> OpenRequest | None:
        """Whoever gets the request back sends its final response; everybody else gets None."""
        with self._lock:
            return self._open.pop(request_id, None)

    def _deliver(self) -> None:
        """Send what the batch loop makes, until it ends."""
        while not self._ended.is_set():
            outputs = self.engine.results(timeout_s=1.0)
            for output in outputs:
                try:
                    self._send(output)
                except Exception as error:  # one broken response must not end the others
                    self._close(output.request_id)
                    pb_utils.Logger.log_error(f"response of {output.request_id} lost: {error}")
            if not outputs and (failure := self.engine.failure()):
                self._fail_all(failure)
                return

    def _send(self, output: Output) -> None:
        entry = self._close(output.request_id) if output.finished else self._open.get(output.request_id)
        if entry is None:
            return  # cancelled meanwhile
        if output.error:
            _refuse(entry.sender, output.error, pb_utils.TritonError.INTERNAL)
            return
        entry.sent_tokens += len(output.tokens)
        self._tally["tokens_out"] += len(output.tokens)
        text = entry.text.push(output.tokens, output.finished)
        tensors = [_text("text_output", text), _number("num_output_tokens", len(output.tokens))]
        if entry.return_ids and output.tokens:
            tensors.append(pb_utils.Tensor("output_ids", np.array(output.tokens, dtype=np.int32)))
        if output.finished:
            reason = "stop" if output.tokens and output.tokens[-1] in self.engine.end_ids else "length"
            tensors += _ending(reason, entry.prompt_tokens, entry.sent_tokens)
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if output.finished else 0
        entry.sender.send(pb_utils.InferenceResponse(tensors), flags=flags)

    def _watch(self) -> None:
        """Drop requests whose client went away, publish the gauges; sleeps while nothing is open."""
        while not self._ended.is_set():
            self._busy.wait()
            self._ended.wait(WATCH_PERIOD_S)
            self._busy.clear()
            try:
                self._drop_cancelled()
                if failure := self.engine.failure():
                    self._fail_all(failure)
                busy = self._publish()
            except Exception as error:  # this thread must outlive a single bad look
                pb_utils.Logger.log_error(f"watching failed: {type(error).__name__}: {error}")
                busy = True
            if busy or self._open:
                self._busy.set()

    def _drop_cancelled(self) -> None:
        for request_id, entry in list(self._open.items()):
            # Triton frees the sender's factory with the final response, and asking after that is a segmentation fault
            # of the whole server. Final responses are sent only by who has closed the request, which takes the lock.
            with self._lock:
                gone = request_id in self._open and entry.sender.is_cancelled()
            if gone and self._close(request_id):
                self.engine.cancel(request_id)
                self._tally["cancelled"] += 1
                tensors = [_text("text_output", ""), _number("num_output_tokens", 0)]
                tensors += _ending("cancelled", entry.prompt_tokens, entry.sent_tokens)
                final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
                entry.sender.send(pb_utils.InferenceResponse(tensors), flags=final)

    def _publish(self) -> bool:
        """Set gauges and counters; True while sequences are running or waiting, or tokens were counted."""
        running, waiting, kv_usage = self.engine.occupancy()
        if self.engine.leads:
            self._metrics["running"].set(running)
            self._metrics["waiting"].set(waiting)
            self._metrics["kv_usage"].set(kv_usage)
        with self._lock:
            tally, self._tally = self._tally, dict.fromkeys(self._tally, 0)
        for name, amount in tally.items():
            if amount:
                self._metrics[name].increment(amount)
        return bool(running or waiting or any(tally.values()))

    def _fail_all(self, reason: str) -> None:
        for request_id in list(self._open):
            if entry := self._close(request_id):
                _refuse(entry.sender, reason, pb_utils.TritonError.UNAVAILABLE)


def _device(wanted: str, args: dict, ranks: int) -> str:
    """The torch device of this instance: `auto` follows Triton's placement where torch can."""
    if wanted != "auto":
        return wanted
    if ranks > 1:
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if args["model_instance_kind"] == "GPU" and torch.cuda.is_available():
        return f"cuda:{args['model_instance_device_id']}"
    return "cpu"


def _engine(folder: Path, settings: dict, device: str, name: str):
    """The engine that settings.json names: transformers' continuous batching, unless another Python or several
    GPUs are to run it, lives in this process; every other one in a process of its own."""
    if settings["engine"] != "batching" or settings["tp"] > 1 or os.environ.get("TRITONMARK_ENGINE_PYTHON"):
        from llm_link import RemoteEngine

        tell = pb_utils.Logger.log_info
        return RemoteEngine(folder / "weights", settings, device, name, lambda text: tell(f"{name}: {text}"))
    from llm_engine import Engine

    return Engine(folder / "weights", settings, device)


def _metrics(labels: dict) -> tuple[list, dict]:
    families, metrics = [], {}
    for name, kind, family, description in METRICS:
        families.append(pb_utils.MetricFamily(family, description, getattr(pb_utils.MetricFamily, kind)))
        metrics[name] = families[-1].Metric(labels=labels)
    return families, metrics


def _text(name: str, text: str):
    return pb_utils.Tensor(name, np.array([text.encode("utf-8")], dtype=object))


def _number(name: str, value: int):
    return pb_utils.Tensor(name, np.array([value], dtype=np.int32))


def _ending(reason: str, tokens_in: int, tokens_out: int) -> list:
    return [
        _text("finish_reason", reason),
        _number("num_input_tokens", tokens_in),
        _number("total_output_tokens", tokens_out),
    ]


def _refuse(sender, message: str, code: int) -> None:
    error = pb_utils.TritonError(message, code)
    sender.send(pb_utils.InferenceResponse([], error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
