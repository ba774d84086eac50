"""A fake Triton that does what a plan says and writes down what it really sent.

It shares no code with the project: its own HTTP parsing, event building and clock reading, so that a fault of the
client can't cancel out. Times are `time.monotonic_ns()`, which is CLOCK_MONOTONIC: the same clock in every process of
one host, so its log can be laid beside a client's record.

    python tests/fakes/triton_server.py --port 0 --plan plan.json --log sent.jsonl      # prints the port

`GET /fake/log` gives the log so far, a JSON object a line and a request: id, model, connection, arrived_ns, started_ns,
events, ended, ended_ns. An event is [before_ns, after_ns, tokens]: the clock just before and just after the write that
completed it. `POST /fake/plan` replaces the plan and empties the log. A plan is {"server": {...}, "models": {name:
{...}}, ...}; what stands outside "server" and "models" holds for each model. `MODEL_PLAN` and `SERVER_PLAN` below list
every key with its default.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

MODEL_PLAN: dict[str, Any] = {
    "ttft_ms": 0.0,
    "itl_ms": 0.0,  # time between events; 0 sends the whole stream in one write
    "tokens": [1],  # tokens in each event; the list cycles
    "max_tokens": 8,  # when the request's body has none
    "num_input_tokens": 5,
    "text": "é",  # a token; not ASCII on purpose
    "batch_ms": 0.0,  # all streams send on one time grid of this step, as a batching server does
    "stall_at_event": None,  # [k, seconds]: wait before event k (from 0)
    "status": 200,  # any other: the first response is an error
    "error": "planned error",
    "error_as_event": False,  # the error status comes with an event as its body, as from a Triton model
    "error_at": None,  # error event instead of event k, inside the 200 stream
    "raw_at": None,  # [k, text]: text as the data of event k, e.g. malformed JSON
    "close_at": None,  # close the connection instead of event k
    "close_how": "fin",  # or "rst"
    "hang_at": None,  # send nothing more from event k, and keep the connection
    "end_at": None,  # end the stream cleanly before event k, without the final usage
    "send_usage": True,  # num_input_tokens and total_output_tokens in the final, empty response
    "usage_error": 0,  # added to total_output_tokens: a server that miscounts
    "output_ids": None,  # a list of token ids to send, cycled, in each response
    "send_counts": True,  # num_output_tokens in each response
    "each": {},  # more fields of each response
    "merge_final": False,  # usage in the last response with tokens, instead of an empty one after it
    "join": None,  # events in one write; by default 1, or all where no time lies between them
    "cut_at": [],  # byte offsets where an event is cut into TCP segments (negative: from its end)
    "cut_ms": 2.0,  # pause between those segments
    "newline": "\n",
    "noise": False,  # comments, empty lines, other fields and data over two lines
    "framing": "chunked",  # or "length" (Content-Length) or "close" (HTTP/1.0)
    "slow_headers_ms": 0.0,  # head of the response this long before its first event, in two halves
    "send_continue": False,  # "100 Continue" first
    "keep_alive": True,  # False: "Connection: close"
    "close_after_ms": None,  # close the idle connection although keep-alive was promised
    "ready": True,
    "versions": ["1"],
    "backend": "python",  # of the configuration; "vllm" takes and gives what Triton's vLLM backend does
    "parameters": {},  # of the configuration, each {"string_value": text}
    "reason": "planned: not ready",
}
SERVER_PLAN: dict[str, Any] = {
    "models": ["fake"],
    "stalls": [],  # [[second since first request, seconds], ...]: nothing is sent by any stream meanwhile
    "capacity": None,  # streams decoded at once; the others wait first in, first out
    "name": "triton",
    "version": "2.99.0-fake",
}
GENERATE = re.compile(r"/v2/models/([^/]+)/generate_stream")
MODEL = re.compile(r"/v2/models/([^/]+)(/ready|/config)?")
LAST_CHUNK = b"0\r\n\r\n"
clock = time.monotonic_ns


class Server:
    """Plan, queue and log: what all connections share."""

    def __init__(self, plan: dict[str, Any], log_file: TextIO | None) -> None:
        self.log_file = log_file
        self.connections = 0
        self.epoch = 0  # how often the plan was set; streams of an earlier plan no longer count
        self.use(plan)

    def use(self, plan: dict[str, Any]) -> None:
        """Start afresh with `plan`. An unknown key is an error: a misspelt plan would test nothing."""
        self.settings = SERVER_PLAN | plan.get("server", {})
        named = plan.get("models", {})
        common = {key: value for key, value in plan.items() if key not in ("server", "models")}
        for keys, known in [
            (plan.get("server", {}), SERVER_PLAN),
            *((m, MODEL_PLAN) for m in [common, *named.values()]),
        ]:
            if unknown := set(keys) - set(known):
                raise ValueError(f"unknown in plan: {sorted(unknown)}")
        names = list(named) or self.settings["models"]
        self.models = {name: MODEL_PLAN | common | named.get(name, {}) for name in names}
        self.epoch += 1
        self.first_request_ns: int | None = None
        self.decoding = 0
        self.waiting: deque[Stream] = deque()
        self.rows: list[dict[str, Any]] = []
        self.made: dict[tuple[str, int], list[tuple[bytes, int]]] = {}

    def after_stall(self, due_ns: int) -> int:
        """`due_ns`, or the end of the whole-server stall it falls into."""
        if self.first_request_ns is not None:
            for offset_s, length_s in self.settings["stalls"]:
                start = self.first_request_ns + round(offset_s * 1e9)
                if start <= due_ns < start + round(length_s * 1e9):
                    due_ns = start + round(length_s * 1e9)
        return due_ns

    def admit(self, stream: Stream) -> None:
        if self.settings["capacity"] is None or self.decoding < self.settings["capacity"]:
            self.decoding += 1
            stream.start()
        else:
            self.waiting.append(stream)

    def release(self, stream: Stream) -> None:
        """A stream ended: log it, and give its place to the first one waiting."""
        if self.log_file:
            self.log_file.write(json.dumps(stream.row) + "\n")
            self.log_file.flush()
        if stream.epoch != self.epoch:
            return
        if stream in self.waiting:  # its client left before it began
            self.waiting.remove(stream)
            return
        if self.waiting:
            self.waiting.popleft().start()
        else:
            self.decoding -= 1

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """The endpoints that aren't inference."""
        if path == "/fake/log":
            return 200, "".join(json.dumps(row) + "\n" for row in self.rows).encode()
        if path == "/fake/plan" and method == "POST":
            try:
                self.use(json.loads(body))
            except ValueError as error:
                return 400, {"error": str(error)}
            return 200, {}
        if path in ("/v2/health/live", "/v2/health/ready"):
            return 200, b""
        if path == "/v2":
            return 200, {
                "name": self.settings["name"],
                "version": self.settings["version"],
                "extensions": ["statistics"],
            }
        if path == "/v2/repository/index" and method == "POST":
            rows = [{"name": name, "version": "1"} | _state(plan) for name, plan in self.models.items()]
            return 200, rows
        if match := MODEL.fullmatch(path):
            return self.answer_model(*match.groups())
        return 404, {"error": "Not Found"}

    def answer_model(self, name: str, what: str | None) -> tuple[int, Any]:
        plan = self.models.get(name)
        if what == "/ready":
            ready = plan is not None and plan["ready"]
            return (200, b"") if ready else (400, {"error": "Model version not ready"})
        if plan is None:
            return 404, {"error": f"Request for unknown model: '{name}' is not found"}
        if what == "/config":
            config = {"name": name, "backend": plan["backend"], "max_batch_size": 0, "parameters": plan["parameters"]}
            return 200, config | {"model_transaction_policy": {"decoupled": True}}
        return 200, {"name": name, "versions": plan["versions"], "platform": "python", "inputs": [], "outputs": []}


def _state(plan: dict[str, Any]) -> dict[str, str]:
    return {"state": "READY"} if plan["ready"] else {"state": "UNAVAILABLE", "reason": plan["reason"]}


class Connection(asyncio.Protocol):
    """One client connection: cuts requests out of the bytes and answers them one after the other."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.number = server.connections
        self.buffer = b""
        self.stream: Stream | None = None
        server.connections += 1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        # Without this the kernel holds small writes back by up to 40 ms and the log would be a lie.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.stream:
            self.stream.end("peer_closed")

    def data_received(self, data: bytes) -> None:
        arrived = clock()
        self.buffer += data
        if not self.buffer[:1].isalpha() and self.buffer:  # a TLS hello or other noise: hang up, as Triton does
            self.transport.close()
            return
        while self.stream is None:
            head, blank, rest = self.buffer.partition(b"\r\n\r\n")
            if not blank:
                return
            length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
            size = int(length[1]) if length else 0
            if len(rest) < size:
                return
            self.buffer = rest[size:]
            method, path, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
            self.respond(method, path.partition("?")[0], rest[:size], arrived)

    def respond(self, method: str, path: str, body: bytes, arrived: int) -> None:
        match = GENERATE.fullmatch(path)
        if not match or match[1] not in self.server.models:
            status, answer = self.server.answer(method, path, body)
            if match:
                status, answer = self.server.answer_model(match[1], None)
            self.send_plain(status, answer)
            return
        if self.server.first_request_ns is None:
            self.server.first_request_ns = arrived
        self.stream = Stream(self, match[1], json.loads(body), arrived)
        self.server.admit(self.stream)

    def send_plain(self, status: int, answer: Any) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        kind = "text/plain" if isinstance(answer, bytes) else "application/json"
        head = f"HTTP/1.1 {status} Fake\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)


class Stream:
    """One generate_stream response, event by event at its due times."""

    def __init__(self, connection: Connection, model: str, body: dict[str, Any], arrived: int) -> None:
        self.connection, self.server = connection, connection.server
        self.loop = asyncio.get_running_loop()
        self.epoch = self.server.epoch
        self.plan = self.server.models[model]
        self.timers: list[asyncio.TimerHandle] = []
        self.row: dict[str, Any] = {
            "id": str(body.get("id", "")),
            "model": model,
            "connection": connection.number,
            "arrived_ns": arrived,
            "started_ns": None,
            "events": [],
            "ended": None,
            "ended_ns": None,
        }
        self.server.rows.append(self.row)
        plan, total = self.plan, int(body.get("max_tokens", self.plan["max_tokens"]))
        if plan["backend"] == "vllm":
            plan, total = _as_vllm(plan, body)
        if (made := self.server.made.get((model, total))) is None:
            made = self.server.made[model, total] = _events(plan, model, total)
        self.events = made  # making them anew for each of many requests that arrive at once would delay the others
        self.next = 0
        self.due = 0
        self.head_sent = False
        stall = self.plan["stall_at_event"]
        faults = [self.plan[key] for key in ("error_at", "close_at", "hang_at", "end_at")]
        self.stops = [k for k in (*faults, stall and stall[0], len(self.events)) if k is not None]

    def start(self) -> None:
        """Called when the queue lets it in. The time to first token counts from here, as in a server."""
        plan, write = self.plan, self.connection.transport.write
        self.row["started_ns"] = self.due = clock()
        self.due += round((plan["ttft_ms"] + plan["slow_headers_ms"]) * 1e6)
        if plan["send_continue"]:
            write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if plan["slow_headers_ms"]:
            head, self.head_sent = self.head(), True
            write(head[:20])
            self.later(plan["slow_headers_ms"] / 2e3, write, head[20:])
        if plan["status"] != 200:
            self.at(self.due, self.refuse)
        else:
            self.schedule()

    def schedule(self) -> None:
        """Set the timer for the next event, after every stall that delays it. Later events count from it."""
        stall = self.plan["stall_at_event"]
        if stall and stall[0] == self.next:
            self.due += round(stall[1] * 1e9)
        if self.plan["batch_ms"]:
            step = round(self.plan["batch_ms"] * 1e6)
            self.due = (self.due // step + 1) * step
        self.due = self.server.after_stall(self.due)
        self.at(self.due, self.step)

    def at(self, due_ns: int, call: Callable[[], None]) -> None:
        if due_ns <= clock() and self.next == 0:  # a null server answers within the read; later events never recurse
            call()
        else:
            self.timers.append(self.loop.call_at(due_ns / 1e9, call))  # the loop's clock is CLOCK_MONOTONIC too

    def later(self, delay_s: float, call: Callable[..., None], *arguments: Any) -> None:
        self.timers.append(self.loop.call_later(delay_s, call, *arguments))

    def step(self) -> None:
        """Send what is due: an event, several in one write, or the planned fault. No step sends past a fault."""
        self.timers.clear()
        if self.fault():
            return
        plan, first = self.plan, self.next
        at_once = plan["join"] or (1 if plan["itl_ms"] or plan["batch_ms"] or plan["cut_at"] else len(self.events))
        self.next = min(first + at_once, *(k for k in self.stops if k > first))
        batch = self.events[first : self.next]
        data = b"".join(self.frame(event) for event, _ in batch)
        offsets = sorted({offset % len(data) for offset in plan["cut_at"]})
        pieces = [data[a:b] for a, b in zip([0, *offsets], [*offsets, len(data)], strict=True)]
        pause = plan["cut_ms"] / 1e3
        for number, piece in enumerate(pieces[:-1]):
            self.later(number * pause, self.send, piece, [])
        if len(pieces) == 1:
            self.complete(data, batch)
        else:
            self.later((len(pieces) - 1) * pause, self.complete, pieces[-1], batch)

    def complete(self, data: bytes, batch: list[tuple[bytes, int]]) -> None:
        """Send the last (mostly the only) piece of a step, and set up the next."""
        if self.next < len(self.events):
            self.send(data, batch)
            self.due = (max(self.due, clock()) if self.plan["cut_at"] else self.due) + round(self.plan["itl_ms"] * 1e6)
            self.schedule()
        elif self.fault(data, batch):  # a fault planned for after the last event
            return
        else:
            self.send(data + (LAST_CHUNK if self.plan["framing"] == "chunked" else b""), batch)
            self.end("complete")

    def fault(self, data: bytes = b"", batch: list[tuple[bytes, int]] | None = None) -> bool:
        """Whether the plan's fault for this event was played instead of the event, after sending `data`."""
        plan, transport = self.plan, self.connection.transport
        kinds = [key for key in ("error_at", "close_at", "hang_at", "end_at") if plan[key] == self.next]
        if not kinds:
            return False
        if kinds[0] == "error_at":
            data += self.frame(_event(plan, {"error": plan["error"]})) + LAST_CHUNK
        elif kinds[0] == "end_at":
            data += LAST_CHUNK
        if data:
            self.send(data, batch or [])
        if kinds[0] == "close_at":
            if plan["close_how"] == "rst":
                linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # makes close() send a reset
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                transport.abort()
            else:
                transport.close()
        if kinds[0] != "hang_at":
            self.end({"error_at": "error", "end_at": "early", "close_at": "closed"}[kinds[0]])
        return True

    def send(self, data: bytes, batch: list[tuple[bytes, int]]) -> None:
        """One write, stamped on both sides. The head goes along with the first event, as Triton does it."""
        if not self.head_sent:
            self.head_sent = True
            data = self.head() + data
        before = clock()
        self.connection.transport.write(data)  # sends at once unless the kernel's buffer is full
        after = clock()
        self.row["events"].extend([before, after, tokens] for _, tokens in batch)

    def refuse(self) -> None:
        """The first response is an error: as JSON, or as an event in a chunked body."""
        status, text = self.plan["status"], json.dumps({"error": self.plan["error"]}).encode()
        if self.plan["error_as_event"]:
            head = f"HTTP/1.1 {status} Fake\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            self.connection.transport.write(head.encode() + self.frame(b"data: " + text + b"\n\n") + LAST_CHUNK)
        else:
            self.connection.send_plain(status, json.loads(text))
        self.end("refused")

    def head(self) -> bytes:
        version = "1.0" if self.plan["framing"] == "close" else "1.1"
        head = f"HTTP/{version} 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
        if self.plan["framing"] == "chunked":
            head += "Transfer-Encoding: chunked\r\n"
        if self.plan["framing"] == "length":
            head += f"Content-Length: {sum(len(event) for event, _ in self.events)}\r\n"
        if not self.plan["keep_alive"]:
            head += "Connection: close\r\n"
        return head.encode() + b"\r\n"

    def frame(self, event: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(event), event) if self.plan["framing"] == "chunked" else event

    def end(self, how: str) -> None:
        """Log how it ended, free its place, and let the connection go on to its next request."""
        if self.row["ended"] is not None:
            return
        self.row["ended"], self.row["ended_ns"] = how, clock()
        for timer in self.timers:
            timer.cancel()
        self.server.release(self)
        self.connection.stream = None
        transport, after_ms = self.connection.transport, self.plan["close_after_ms"]
        if not self.plan["keep_alive"] or self.plan["framing"] == "close":
            transport.close()
        elif after_ms is not None:
            self.loop.call_later(after_ms / 1e3, transport.close)
        elif self.connection.buffer:
            self.connection.data_received(b"")


def _as_vllm(plan: dict[str, Any], body: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Plan and number of tokens of a request to Triton's vLLM backend: lengths only from `sampling_parameters` (16 where
    there are none), counts only where they were asked for, the prompt's count in each response, never a total."""
    asked = json.loads(body.get("sampling_parameters", "{}"))
    total = asked.get("max_tokens", 16) if asked.get("ignore_eos") else min(asked.get("max_tokens", 16), 3)
    counts = {"send_usage": False, "send_counts": bool(body.get("return_num_output_tokens"))}
    each = {"num_input_tokens": plan["num_input_tokens"]} if body.get("return_num_input_tokens") else {}
    return plan | counts | {"each": each}, total


def _event(plan: dict[str, Any], message: dict[str, Any] | str) -> bytes:
    """An event as bytes, in the line ends and with the noise the plan asks for."""
    text = message if isinstance(message, str) else json.dumps(message, ensure_ascii=False, separators=(",", ":"))
    lines = [f"data: {text}"]
    if plan["noise"]:
        middle = text.index(",") + 1 if "," in text else len(text)
        lines = [": comment", "", "event: message", f"data:{text[:middle]}", f"data: {text[middle:]}", "id: 1"]
    newline: str = plan["newline"]
    return (newline.join(lines) + newline * 2).encode()


def _events(plan: dict[str, Any], model: str, total: int) -> list[tuple[bytes, int]]:
    """The events of a response of `total` tokens, and the tokens in each, made before the first is due."""
    events: list[tuple[bytes, int]] = []
    sent = 0
    usage = {"num_input_tokens": plan["num_input_tokens"], "total_output_tokens": total + plan["usage_error"]}
    while sent < total:
        tokens = min(plan["tokens"][len(events) % len(plan["tokens"])], total - sent)
        sent += tokens
        message: dict[str, Any] = {"model_name": model, "model_version": "1", "text_output": plan["text"] * tokens}
        if plan["send_counts"]:
            message["num_output_tokens"] = tokens
        message |= plan["each"]
        if plan["output_ids"]:
            message["output_ids"] = [
                plan["output_ids"][k % len(plan["output_ids"])] for k in range(sent - tokens, sent)
            ]
        if plan["merge_final"] and sent == total and plan["send_usage"]:
            message |= usage
        raw = plan["raw_at"]
        events.append((_event(plan, raw[1] if raw and raw[0] == len(events) else message), tokens))
    if plan["send_usage"] and not plan["merge_final"]:
        final = {"model_name": model, "model_version": "1", "text_output": ""} | usage
        events.append((_event(plan, final | ({"num_output_tokens": 0} if plan["send_counts"] else {})), 0))
    return events


async def serve(port: int, plan: dict[str, Any], log_file: TextIO | None, host: str = "127.0.0.1") -> None:
    """Listen on `host` until SIGTERM or SIGINT; print the port first."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    state = Server(plan, log_file)
    listener = await loop.create_server(lambda: Connection(state), host, port, backlog=1024)
    print(listener.sockets[0].getsockname()[1], flush=True)
    await stop.wait()
    listener.close()
    for row in state.rows:
        if row["ended"] is None and log_file:
            log_file.write(json.dumps(row) + "\n")


class FakeTriton:
    """A running fake server, in its own process."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port
        self.url = f"http://127.0.0.1:{port}"

    def plan(self, plan: dict[str, Any]) -> None:
        """Replace the plan and empty the log."""
        request = urllib.request.Request(f"{self.url}/fake/plan", json.dumps(plan).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=10) as answer:
            answer.read()

    def log(self) -> list[dict[str, Any]]:
        """A row for each request since the plan was set, in order of arrival."""
        with urllib.request.urlopen(f"{self.url}/fake/log", timeout=30) as answer:
            return [json.loads(line) for line in answer.read().splitlines()]

    def stop(self) -> None:
        """End the process, by its own id."""
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(5)
        if self.process.stdout:
            self.process.stdout.close()


def start(plan: dict[str, Any] | None = None, log: Path | None = None) -> FakeTriton:
    """Start this file as a process of its own and wait until it listens."""
    command = [sys.executable, str(Path(__file__).resolve()), "--port", "0", "--plan", json.dumps(plan or {})]
    process = subprocess.Popen(command + (["--log", str(log)] if log else []), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.strip().isdigit():
        process.kill()
        raise RuntimeError("the fake server did not start")
    return FakeTriton(process, int(line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--host", default="127.0.0.1", help="other addresses are for tests in a network namespace")
    parser.add_argument("--plan", default="{}", help="a JSON file, or the JSON itself")
    parser.add_argument("--log", type=Path, help="append the log to this file, a line as each request ends")
    options = parser.parse_args()
    text = options.plan if options.plan.lstrip().startswith("{") else Path(options.plan).read_text(encoding="utf-8")
    gc.disable()  # a collection amid the log's many small lists would delay sends by milliseconds
    with contextlib.ExitStack() as stack:
        log_file = stack.enter_context(options.log.open("a", encoding="utf-8")) if options.log else None
        asyncio.run(serve(options.port, json.loads(text), log_file, options.host))


if __name__ == "__main__":
    main()
