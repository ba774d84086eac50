"""HTTP/1.1 responses and server-sent events from bytes, without a socket or a clock.

The one rule: bytes go in exactly as they arrived, and everything they completed comes out at once. Nothing here waits
for more, so the caller may stamp the arrival of a read before parsing it and give every event in it that stamp.

    response = HttpResponse()
    response.feed(read_from_socket)
    for payload in response.events():       # the data of each event which that read completed
        json.loads(payload)
    response.complete                       # True once the body ended the way its framing said it would
"""

from __future__ import annotations

import httptools

MAX_EVENT_BYTES = 16 << 20  # an event that never ends must not eat the client's memory


class ProtocolError(Exception):
    """The peer does not speak HTTP/1.1 or server-sent events."""


def _data_of(event: bytes) -> bytes | None:
    """The data of one event: its `data` lines joined by line feeds, or None for a comment or a bare field."""
    if event.startswith(b"data: ") and b"\n" not in event:  # how Triton writes every event
        return event[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


class EventBuffer:
    """Bytes of a `text/event-stream`, cut at blank lines wherever the network cut them.

    It works on bytes to the end: a character split over two reads is whole again before anybody decodes it.
    """

    def __init__(self) -> None:
        self.bytes = bytearray()
        self._searched = 0  # no blank line before this offset, so a long event costs linear time

    def take(self) -> list[bytes]:
        """Data of every event that is complete by now, in order; each is returned once."""
        buffer = self.bytes
        if b"\r" in buffer:
            self._unify_line_ends()
        if buffer.find(b"\n\n", self._searched) < 0:
            if len(buffer) > MAX_EVENT_BYTES:
                raise ProtocolError(f"an event is longer than {MAX_EVENT_BYTES} bytes")
            self._searched = max(len(buffer) - 1, 0)
            return []
        end = buffer.rfind(b"\n\n")
        block = bytes(buffer[:end])
        del buffer[: end + 2]
        self._searched = 0
        if block.startswith(b"data: ") and b"\n" not in block:  # one event in this read: by far the most common
            return [block[6:]]
        found = (_data_of(event) for event in block.split(b"\n\n"))
        return [data for data in found if data is not None]

    def rest(self) -> bytes | None:
        """Data of an event that the end of the stream left without its blank line, or None."""
        event = bytes(self.bytes).strip(b"\r\n")
        self.bytes.clear()
        return _data_of(event)

    def _unify_line_ends(self) -> None:
        """CRLF and CR end lines too. A CR at the very end stays: its LF may be in the next read."""
        held = b"\r" if self.bytes.endswith(b"\r") else b""
        body = bytes(self.bytes[: len(self.bytes) - len(held)])
        self.bytes[:] = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n") + held
        self._searched = 0


class HttpResponse:
    """One final response. Interim 1xx responses are skipped; a second response in the same bytes is a fault.

    Attributes:
        status: HTTP status, 0 until the head is complete.
        complete: the body ended as its framing (chunks or Content-Length) promised.
        framed: the head promised such an end; otherwise only a closed connection ends the body.
        keep_alive: the connection may carry another request once this response is complete.
        started: at least one byte of any response has arrived.
    """

    def __init__(self) -> None:
        self.status = 0
        self.complete = False
        self.framed = False
        self.keep_alive = False
        self.started = False
        self._events = EventBuffer()
        self.on_body = self._events.bytes.extend  # straight into the buffer: no Python call a chunk
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Parse one read.

        Raises:
            ProtocolError: the bytes are not an HTTP response.
        """
        self.started = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            raise ProtocolError("unasked switch to another protocol") from None
        except httptools.HttpParserError as error:
            raise ProtocolError(str(error.__context__ or error)) from None

    def events(self) -> list[bytes]:
        """Data of the events completed since the last call."""
        return self._events.take()

    def last_event(self) -> bytes | None:
        """At the end of the body: data of an event whose blank line is missing, or None."""
        return self._events.rest()

    def body(self) -> bytes:
        """The body received so far, for responses that are not event streams."""
        return bytes(self._events.bytes)

    # Called by httptools.

    def on_message_begin(self) -> None:
        if self.complete:
            self.keep_alive = False
            raise ProtocolError("bytes after the end of the response")

    def on_header(self, name: bytes, value: bytes) -> None:
        key = name.lower()
        if key == b"content-length" or (key == b"transfer-encoding" and b"chunked" in value.lower()):
            self.framed = True

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self.keep_alive = self._parser.should_keep_alive()

    def on_message_complete(self) -> None:
        if 100 <= self.status < 200:  # "100 Continue": the response proper is still to come
            self.status, self.framed = 0, False
        else:
            self.complete = True
