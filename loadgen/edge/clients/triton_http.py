"""Streams one request through Triton's `POST /v2/models/<model>/generate_stream` and fills in its `Record`.

The one rule: every read gets one arrival stamp, taken right after `recv` returned and before anything is parsed; all
events in that read share it. Locust's own streaming call blocks until 1,024 bytes are there and so reports a TTFT a
hundred times too high; here `recv` returns what has arrived.

Sockets are plain blocking ones: under Locust they are monkey-patched, so that a wait yields to other greenlets; without
it they work with threads. Nothing imports gevent.

    TritonHttp("http://localhost:8000", "phi-2", clock=clock).stream(b'{"text_input": "Hi", "max_tokens": 8}', record)
    record.outcome, record.first_ns, list(record.chunk_tokens)

When a stream counts as whole: its body ended as its HTTP framing promised, no event was an error, and there was at
least one event. A missing final usage doesn't make it an error, for some backends send none: `usage_out` stays None
and the verdict names it. A body without framing (HTTP/1.0) is whole only if the final usage had arrived.
"""

from __future__ import annotations

import json
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from loadgen.core.record import Answer, Outcome, Record
from loadgen.edge.clients.sse import HttpResponse, ProtocolError
from loadgen.edge.clients.triton_probe import parse_base_url, probe

__all__ = ["TritonHttp", "probe"]

RECV_BYTES = 64 << 10
MAX_ERROR_CHARS = 300
MAX_TOKENS_A_RESPONSE = 2**31 - 1  # what the int32 column holds

# How long after sending on a reused connection its loss still means that the server had closed it while idle. A later
# loss is a server that took the request and died, which has to be seen and not tried again.
STALE_WINDOW_NS = 1_000_000_000

# Linux stamps received TCP bytes for whoever asks; Python has no name for the option. (level, type) of the answer.
_STAMP = (socket.SOL_SOCKET, 35)  # SO_TIMESTAMPNS
_STAMP_BYTES = 64
_timespec = struct.Struct("qq").unpack

decode = json.JSONDecoder().decode


class _StaleError(Exception):
    """A reused connection had been closed before the request reached the server."""


class RequestError(Exception):
    """The request failed; becomes the outcome and the error text of its row, never leaves this module."""

    def __init__(self, kind: str, text: str, outcome: Outcome = Outcome.ERROR) -> None:
        super().__init__(kind, text)
        self.error = f"{kind}: {' '.join(text.split())}"[:MAX_ERROR_CHARS]
        self.outcome = outcome


class TritonHttp:
    """A pool of connections to one model. One instance serves any number of greenlets or threads.

    Args:
        base_url: `http://host:port` or `https://host:port`, with a path prefix if a proxy needs one.
        model: name of the model in the server's repository.
        timeout_s: deadline of the whole request, connect included; a server that keeps dripping can't outlive it.
        connect_timeout_s: deadline of the connect alone.
        clock: monotonic integer nanoseconds, relative to the start of the run.
        kernel_stamps: take arrivals from the kernel (Linux, no TLS), so that a busy event loop can't make them late.
            When a read holds segments that arrived apart, they get the stamp of the last one.
        keep_outputs: keep text and token ids of each answer in its record (accuracy mode).

    `take` reads one event into a record; a subclass for other answers replaces it, and `counted`, what they consist of.

    Raises:
        UserError: `base_url` isn't an HTTP address.
    """

    counted = "tokens"

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        timeout_s: float = 600.0,
        connect_timeout_s: float = 10.0,
        clock: Callable[[], int],
        kernel_stamps: bool = False,
        keep_outputs: bool = False,
    ) -> None:
        url = parse_base_url(base_url)
        self._host = str(url.hostname)
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        self._kernel_stamps = kernel_stamps and not self._tls and sys.platform == "linux"
        self.take: Callable[[bytes, int, Record], object] = _take_and_keep if keep_outputs else _take
        self._timeout_ns = round(timeout_s * 1e9)
        self._connect_timeout_s = connect_timeout_s
        self._clock = clock
        self._peer: tuple[int, Any] | None = None  # family and address that the first connection found
        self._idle: list[socket.socket] = []  # last in, first out: the warmest connection is reused
        path = f"{url.path.rstrip('/')}/v2/models/{quote(model, safe='')}/generate_stream"
        self._head = (
            f"POST {path} HTTP/1.1\r\nHost: {url.netloc.rpartition('@')[2]}\r\n"
            "Content-Type: application/json\r\nAccept: text/event-stream\r\nContent-Length: "
        ).encode()

    def stream(self, payload: bytes, record: Record) -> None:
        """Send the JSON `payload` and fill in everything of `record` that only the wire knows.

        Whatever the network or the server does becomes `record.outcome` and `record.error` ("class: text"). Only what
        is raised into the greenlet from outside (a kill, Ctrl-C) propagates: the row is CUT, the connection closed.
        """
        request = b"%b%d\r\n\r\n%b" % (self._head, len(payload), payload)
        deadline = self._clock() + self._timeout_ns
        try:
            try:
                self._exchange(request, record, deadline, self._reusable())
            except _StaleError:
                self._exchange(request, record, deadline, None)
            record.outcome = Outcome.OK
        except RequestError as failure:
            record.outcome, record.error = failure.outcome, failure.error
        except BaseException as interruption:
            record.outcome, record.error = Outcome.CUT, f"cut: {type(interruption).__name__}"
            raise
        finally:
            if record.done_ns is None:
                record.done_ns = self._clock()

    def close(self) -> None:
        """Close the idle connections. Those in use close when their request ends."""
        while self._idle:
            self._idle.pop().close()

    def _reusable(self) -> socket.socket | None:
        """An idle connection that the server hasn't closed in the meantime."""
        while self._idle:
            connection = self._idle.pop()
            if self._tls:  # unread session tickets look like data, so only trying tells
                return connection
            try:
                connection.settimeout(0.0)
                connection.recv(1, socket.MSG_PEEK)  # returns b"" on a closed one, and stray bytes are no better
            except BlockingIOError:
                return connection
            except OSError:
                pass
            connection.close()
        return None

    def _connect(self, deadline: int) -> socket.socket:
        limit_s = min(self._connect_timeout_s, max((deadline - self._clock()) / 1e9, 1e-3))
        where = f"{self._host}:{self._port}"
        try:
            connection = self._open(limit_s)
            try:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._kernel_stamps:
                    connection.setsockopt(*_STAMP, 1)
                return self._tls.wrap_socket(connection, server_hostname=self._host) if self._tls else connection
            except BaseException:
                connection.close()
                raise
        except TimeoutError as error:
            raise RequestError("timeout", f"no connection to {where} in {limit_s:g} s", Outcome.TIMEOUT) from error
        except OSError as error:
            raise _failure_of(error, f"connecting to {where}") from error

    def _open(self, limit_s: float) -> socket.socket:
        """A connected socket. The name is looked up once: gevent does that in a thread, which stalls a burst."""
        if self._peer is None:
            connection = socket.create_connection((self._host, self._port), limit_s)
            self._peer = connection.family, connection.getpeername()
            return connection
        family, address = self._peer
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(limit_s)
            connection.connect(address)
        except BaseException:
            connection.close()
            raise
        return connection

    def _exchange(self, request: bytes, record: Record, deadline: int, idle: socket.socket | None) -> None:
        connection = idle or self._connect(deadline)
        response = HttpResponse()
        try:
            record.sent_ns = sent = self._clock()
            connection.settimeout(max((deadline - sent) / 1e9, 1e-3))
            connection.sendall(request)
            self._read(connection, response, record, deadline)
        except TimeoutError as error:
            got = f"{record.tokens_out} {self.counted} received"
            text = f"not finished {self._timeout_ns / 1e9:g} s after it began, with {got}"
            raise RequestError("timeout", text, Outcome.TIMEOUT) from error
        except ProtocolError as error:
            raise RequestError("protocol", str(error)) from error
        except OSError as error:
            if idle is not None and not response.started and self._clock() - sent < STALE_WINDOW_NS:
                raise _StaleError from error
            raise _failure_of(error, f"after {record.tokens_out} {self.counted}") from error
        finally:
            if response.complete and response.keep_alive:
                self._idle.append(connection)
            else:
                connection.close()

    def _read(self, connection: socket.socket, response: HttpResponse, record: Record, deadline: int) -> None:
        """Read to the end of the response. Under load most of the client's time is spent in this loop."""
        clock, take, events = self._clock, self.take, 0
        now = arrival = record.sent_ns or 0
        while not response.complete:
            if now >= deadline:  # a server that always has a byte ready would never let `recv` time out
                raise TimeoutError
            connection.settimeout((deadline - now) / 1e9)
            if self._kernel_stamps:
                data, notes, _, _ = connection.recvmsg(RECV_BYTES, _STAMP_BYTES)
                age_ns = _age_ns(notes)  # before `clock`: what passes between the two may only make an arrival late
                now = clock()
                arrival = max(arrival, now - age_ns)
            else:
                data = connection.recv(RECV_BYTES)
                now = arrival = clock()
            if not data:
                _check_end_of_connection(response, record)
                break
            response.feed(data)
            if response.status == 200:
                for payload in response.events():
                    take(payload, arrival, record)
                    events += 1
        if response.status != 200:
            raise RequestError(f"http_{response.status}", _error_text(response.body()))
        if (last := response.last_event()) is not None:
            take(last, arrival, record)
            events += 1
        if not events:
            raise RequestError("empty", "the stream ended without one event")
        record.done_ns = arrival


def _age_ns(notes: list[tuple[int, int, bytes]]) -> int:
    """How long ago the kernel received what was just read; 0 if it doesn't say, or if the wall clock was set back."""
    for level, kind, value in notes:
        if (level, kind) == _STAMP and len(value) == 16:
            seconds, nanoseconds = _timespec(value)
            age_ns: int = time.time_ns() - seconds * 1_000_000_000 - nanoseconds
            return max(age_ns, 0)
    return 0


def read_event(payload: bytes) -> dict[str, Any]:
    """An event's JSON object. Bytes that aren't UTF-8 spoil a text, which nobody measures, and no more than that."""
    try:
        message = decode(payload.decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise RequestError("malformed", f"{error} in event {payload[:120]!r}") from error
    if type(message) is not dict:
        raise RequestError("malformed", f"an event is not a JSON object: {payload[:120]!r}")
    return message


def _take(payload: bytes, arrival: int, record: Record) -> dict[str, Any]:
    """Add one event to its row, and give what was in it."""
    message = read_event(payload)
    tokens = message.get("num_output_tokens")
    if tokens:
        record.chunk_tokens.append(count(message, "num_output_tokens"))
        record.chunk_ns.append(arrival)
        record.tokens_out += tokens
        if record.first_ns is None:
            record.first_ns = arrival
    elif record.first_ns is None and tokens is None and message.get("text_output"):
        record.first_ns = arrival  # a server that counts nothing still has a time to first text
    if "total_output_tokens" in message:
        record.usage_out = count(message, "total_output_tokens")
    if "num_input_tokens" in message:
        record.tokens_in = count(message, "num_input_tokens")
    if "error" in message:
        raise RequestError("server_error", f"{message['error']} (after {record.tokens_out} tokens)")
    return message


def _take_and_keep(payload: bytes, arrival: int, record: Record) -> None:
    """`_take`, and the text and token ids too."""
    message = _take(payload, arrival, record)
    ids = message.get("output_ids")
    record.answer = record.answer or Answer()
    record.answer.text.append(str(message.get("text_output") or ""))
    try:
        record.answer.token_ids.extend(ids if isinstance(ids, list) else [] if ids is None else [ids])
    except (TypeError, OverflowError) as error:
        raise RequestError("malformed", f"output_ids is {str(ids)[:40]!r}, not token ids") from error


def count(message: dict[str, Any], key: str) -> int:
    value = message[key]
    if type(value) is int and 0 <= value <= MAX_TOKENS_A_RESPONSE:
        return value
    raise RequestError("malformed", f"{key} is {str(value)[:40]!r}, not a number of tokens")


def _check_end_of_connection(response: HttpResponse, record: Record) -> None:
    """The server closed the connection: is what came before a whole response?"""
    if not response.started:
        raise ConnectionResetError("the server closed the connection without a response")
    if response.status not in (0, 200):
        return  # its status says more than the missing end of its text
    if response.framed or not response.status:
        text = f"the connection closed before the end of the response, after {record.tokens_out} tokens"
        raise RequestError("truncated", text)
    if record.usage_out is None:
        text = (
            f"the body has no framing and no final usage came, so its end after {record.tokens_out} tokens is unproven"
        )
        raise RequestError("truncated", text)


def _failure_of(error: OSError, when: str) -> RequestError:
    """Name the failure by a word from a short list, so that it can be a label of a metric."""
    if isinstance(error, ssl.SSLError):
        kind = "tls"
    elif isinstance(error, ConnectionRefusedError):
        kind = "refused"
    elif isinstance(error, ConnectionError):
        kind = "reset"
    else:
        kind = "dns" if isinstance(error, socket.gaierror) else "network"
    return RequestError(kind, f"{error.strerror or error} ({when})")


def _error_text(body: bytes) -> str:
    """Triton's text from `{"error": …}`, which comes as an event when the first response of a stream is the error."""
    text = body.decode("utf-8", "replace").strip()
    try:
        return str(decode(text.removeprefix("data:").strip())["error"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return text or "no error text"
