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

import os
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

import numpy as np
import tokenizers
import torch
import triton_python_backend_utils as pb_utils
from devices import memory_explained
from llm_request import KINDS, Output, Prompt, check_context, parse_prompt
from llm_settings import MEMORY_SETTINGS, read_settings
from llm_text import TextStream
from request_fields import read_request
from triton_model import DRAIN_S, FINAL, DecoupledModel, device_of, number, parameters, refuse, text

METRICS = (
    ("running", "GAUGE", "tritonmark_requests_running", "Sequences in the running batch"),
    ("waiting", "GAUGE", "tritonmark_requests_waiting", "Sequences waiting for room in the batch"),
    ("kv_usage", "GAUGE", "tritonmark_kv_cache_usage_ratio", "Share of the KV cache in use, 0 to 1"),
    ("tokens_in", "COUNTER", "tritonmark_tokens_in_total", "Prompt tokens of accepted requests"),
    ("tokens_out", "COUNTER", "tritonmark_tokens_out_total", "Tokens generated and sent"),
    ("cancelled", "COUNTER", "tritonmark_requests_cancelled_total", "Requests whose client went away"),
)


class OpenRequest:
    """One request between its arrival and its final response. `sending` is held while a response is handed to Triton:
    one that came there behind the final response would find freed memory. `held` are the tokens so far of a request
    that does not stream: it gets one response."""

    __slots__ = ("held", "prompt", "prompt_tokens", "sender", "sending", "sent_tokens", "text")

    def __init__(self, sender, tokenizer, prompt_tokens: int, prompt: Prompt) -> None:
        self.sender, self.sending = sender, threading.Lock()
        self.text = TextStream(tokenizer)
        self.prompt, self.prompt_tokens = prompt, prompt_tokens
        self.held: list[int] = []
        self.sent_tokens = 0


class TritonPythonModel(DecoupledModel):
    """See the module. Triton calls initialize once, execute for new requests, finalize before unloading."""

    METRICS = METRICS

    def initialize(self, args: dict) -> None:
        """Load the model and answer one small request; any exception here is the reason that Triton logs."""
        folder = Path(__file__).resolve().parent
        self.settings = read_settings(folder, parameters(args))
        device = _device(self.settings["device"], args, self.settings["tp"])
        started = time.monotonic()
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "weights" / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.engine = _engine(folder, self.settings, device, args["model_name"])
        self._open: dict[str, OpenRequest] = {}
        self._start(args, self._deliver)
        pb_utils.Logger.log_info(
            f"{args['model_instance_name']}: {self.settings['precision']} on {device}, ready in"
            f" {time.monotonic() - started:.1f} s"
        )

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
        self.engine.stop(timeout_s=3.0)  # Triton ends instances one by one: the first waits in vain for the others
        self._fail_all("the model is being unloaded")
        for thread in self._threads:
            thread.join(timeout=2.0)

    def _accept(self, request, sender) -> None:
        context = self.settings["max_context"]
        prompt = parse_prompt(read_request(request, KINDS), self.settings["default_max_tokens"], context)
        ids = self.tokenizer.encode(prompt.text).ids
        check_context(len(ids), prompt.max_tokens, context)
        failure = self.engine.failure()
        request_id = uuid.uuid4().hex
        with self._lock:
            if self._stopping or failure:
                return refuse(sender, failure or "the model is being unloaded", pb_utils.TritonError.UNAVAILABLE)
            self._open[request_id] = OpenRequest(sender, self.tokenizer, len(ids), prompt)
        self._count(tokens_in=len(ids))
        self._busy.set()
        if not self.engine.submit(request_id, ids, prompt) and self._close(request_id):  # else it had its final one
            refuse(sender, "the batch loop takes no more requests", pb_utils.TritonError.UNAVAILABLE)
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
                    pb_utils.Logger.log_error(f"response of {output.request_id} lost: {error}")
                    if entry := self._close(output.request_id):
                        with suppress(Exception), entry.sending:
                            refuse(entry.sender, f"a response was lost: {error}", pb_utils.TritonError.INTERNAL)
            if not outputs and (failure := self.engine.failure()):
                self._fail_all(failure)
                return

    def _send(self, output: Output) -> None:
        entry = self._close(output.request_id) if output.finished else self._open.get(output.request_id)
        if entry is None:
            return  # cancelled meanwhile
        entry.held += output.tokens
        if output.error:
            if entry.prompt.stream and entry.held:  # what was made before it failed
                self._respond(entry, last=False)
            refuse(entry.sender, output.error, pb_utils.TritonError.INTERNAL)
        elif output.finished:
            self._respond(entry, last=True)
        elif entry.prompt.stream:
            with entry.sending:
                if output.request_id in self._open:
                    self._respond(entry, last=False)

    def _respond(self, entry: OpenRequest, last: bool) -> None:
        """Send the tokens that are held; with `last` also how the request ended."""
        tokens, entry.held = entry.held, []
        entry.sent_tokens += len(tokens)
        self._count(tokens_out=len(tokens))
        tensors = [text("text_output", entry.text.push(tokens, last)), number("num_output_tokens", len(tokens))]
        if entry.prompt.return_token_ids and tokens:
            tensors.append(pb_utils.Tensor("output_ids", np.array(tokens, dtype=np.int32)))
        if last:
            reason = "stop" if tokens and tokens[-1] in self.engine.end_ids else "length"
            tensors += _ending(reason, entry.prompt_tokens, entry.sent_tokens)
        entry.sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL if last else 0)

    def _look(self) -> bool:
        self._drop_cancelled()
        if failure := self.engine.failure():
            self._fail_all(failure)
        return self._publish() or bool(self._open)

    def _drop_cancelled(self) -> None:
        for request_id, entry in list(self._open.items()):
            # Triton frees the sender's factory with the final response, and asking after that is a segmentation fault
            # of the whole server. Final responses are sent only by who has closed the request, which takes the lock.
            with self._lock:
                gone = request_id in self._open and entry.sender.is_cancelled()
            if gone and self._close(request_id):
                self.engine.cancel(request_id)
                self._count(cancelled=1)
                tensors = [text("text_output", ""), number("num_output_tokens", 0)]
                tensors += _ending("cancelled", entry.prompt_tokens, entry.sent_tokens)
                with entry.sending:
                    entry.sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL)

    def _publish(self) -> bool:
        """Set gauges and counters; True while sequences are running or waiting, or tokens were counted."""
        running, waiting, kv_usage = self.engine.occupancy()
        if self.engine.leads:
            self._metrics["running"].set(running)
            self._metrics["waiting"].set(waiting)
            self._metrics["kv_usage"].set(kv_usage)
        return self._publish_tally() or bool(running or waiting)

    def _fail_all(self, reason: str) -> None:
        for request_id in list(self._open):
            if entry := self._close(request_id):
                with entry.sending:
                    refuse(entry.sender, reason, pb_utils.TritonError.UNAVAILABLE)


def _device(wanted: str, args: dict, ranks: int) -> str:
    """The torch device of this instance: `auto` follows Triton's placement where torch can."""
    if wanted == "auto" and ranks > 1:
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    return device_of(wanted, args)


def _engine(folder: Path, settings: dict, device: str, name: str):
    """The engine that settings.json names: transformers' continuous batching, unless another Python or several
    GPUs are to run it, lives in this process; every other one in a process of its own."""
    if settings["engine"] != "batching" or settings["tp"] > 1 or os.environ.get("TRITONMARK_ENGINE_PYTHON"):
        from llm_link import RemoteEngine

        tell = pb_utils.Logger.log_info
        return RemoteEngine(folder / "weights", settings, device, name, lambda text: tell(f"{name}: {text}"))
    from llm_engine import Engine

    with memory_explained(MEMORY_SETTINGS):
        return Engine(folder / "weights", settings, device)


def _ending(reason: str, tokens_in: int, tokens_out: int) -> list:
    return [
        text("finish_reason", reason),
        number("num_input_tokens", tokens_in),
        number("total_output_tokens", tokens_out),
    ]
