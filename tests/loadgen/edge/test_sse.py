"""Events and responses are the same wherever the network cuts the bytes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.edge.clients import sse
from loadgen.edge.clients.sse import EventBuffer, HttpResponse, ProtocolError

STREAM = 'data: {"é":1}\n\n: comment\n\ndata:a\ndata: b\nid: 3\n\nevent: x\n\n\ndata: last\n\n'.encode()
EVENTS = ['{"é":1}'.encode(), b"a\nb", b"last"]


def events_of(pieces: list[bytes]) -> list[bytes]:
    buffer = EventBuffer()
    found = []
    for piece in pieces:
        buffer.bytes.extend(piece)
        found += buffer.take()
    assert buffer.rest() is None
    return found


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_events_do_not_depend_on_where_one_cut_falls(newline: bytes) -> None:
    stream = STREAM.replace(b"\n", newline)
    for cut in range(len(stream) + 1):
        assert events_of([stream[:cut], stream[cut:]]) == EVENTS, cut


@given(st.lists(st.integers(0, len(STREAM) * 2), max_size=12), st.sampled_from([b"\n", b"\r\n"]))
def test_events_do_not_depend_on_any_set_of_cuts(cuts: list[int], newline: bytes) -> None:
    stream = STREAM.replace(b"\n", newline)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    assert events_of([stream[a:b] for a, b in itertools.pairwise(edges)]) == EVENTS


def test_bare_carriage_returns_end_lines_too() -> None:
    assert events_of([b"data: a\r\rdata: b\r\r", b"\n"]) == [b"a", b"b"]


def test_an_event_comes_out_with_the_read_that_completes_it_and_only_once() -> None:
    buffer = EventBuffer()
    buffer.bytes.extend(b"data: one\n")
    assert buffer.take() == []
    buffer.bytes.extend(b"\ndata: two\n\ndata: thr")
    assert buffer.take() == [b"one", b"two"]
    assert buffer.take() == []
    assert buffer.rest() == b"thr"


def test_an_endless_event_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 100)
    buffer = EventBuffer()
    buffer.bytes.extend(b"data: " + b"x" * 200)
    with pytest.raises(ProtocolError, match="longer than 100 bytes"):
        buffer.take()


def chunked(*chunks: bytes) -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


def test_a_chunked_response_is_complete_only_with_its_last_byte() -> None:
    wire = chunked(STREAM[:7], STREAM[7:30], STREAM[30:])
    response, found = HttpResponse(), []
    for offset in range(len(wire)):
        assert not response.complete
        response.feed(wire[offset : offset + 1])
        found += response.events()
    assert response.complete and response.framed and response.keep_alive
    assert (response.status, found) == (200, EVENTS)


def test_interim_responses_are_skipped() -> None:
    response = HttpResponse()
    response.feed(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert response.started and not response.complete
    response.feed(chunked(b"data: x\n\n"))
    assert (response.status, response.complete, response.events()) == (200, True, [b"x"])


@pytest.mark.parametrize(
    ("head", "framed", "keep_alive"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", True, True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\n", True, False),
        (b"HTTP/1.1 200 OK\r\n\r\n", False, False),
        (b"HTTP/1.0 200 OK\r\n\r\n", False, False),
    ],
)
def test_framing_and_keep_alive_follow_the_head(head: bytes, framed: bool, keep_alive: bool) -> None:
    response = HttpResponse()
    response.feed(head)
    assert (response.framed, response.keep_alive, response.complete) == (framed, keep_alive, False)


@pytest.mark.parametrize(
    "wire",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_other_protocols_are_refused(wire: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"\w+ "):
        HttpResponse().feed(wire)


def test_bytes_after_the_response_forbid_reuse_of_the_connection() -> None:
    response = HttpResponse()
    with pytest.raises(ProtocolError, match="after the end"):
        response.feed(chunked(b"data: x\n\n") + chunked(b"data: y\n\n"))
    assert response.complete and not response.keep_alive
