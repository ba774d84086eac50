"""The streaming client against a fake Triton over real sockets: counts, order, times and every way to fail."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from loadgen.core.record import Outcome, Phase, Record
from loadgen.edge.clients import triton_http
from loadgen.edge.clients.triton_http import TritonHttp, probe
from loadgen.edge.errors import UserError

MS = 1_000_000
OK_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
TOKEN = b'data: {"num_output_tokens":1,"text_output":"x"}\n\n'
FINAL = b'data: {"num_output_tokens":0,"text_output":"","num_input_tokens":2,"total_output_tokens":1}\n\n'


def blank(seq: int = 0) -> Record:
    return Record(seq=seq, query=seq, sample=0, worker=0, phase=Phase.MEASURE, due_ns=0, asked_out=8)


def client_of(url: str, model: str = "fake", **options: Any) -> TritonHttp:
    return TritonHttp(url, model, **({"clock": time.monotonic_ns, "timeout_s": 10.0} | options))


def send(client: TritonHttp, seq: int = 0, max_tokens: int = 8) -> Record:
    record = blank(seq)
    client.stream(json.dumps({"id": str(seq), "text_input": "hi", "max_tokens": max_tokens}).encode(), record)
    assert record.done_ns is not None
    return record


def stream(fake: Any, plan: dict[str, Any], max_tokens: int = 8, **options: Any) -> Record:
    fake.plan(plan)
    return send(client_of(fake.url, **options), max_tokens=max_tokens)


@contextmanager
def scripted(*conversations: Callable[[socket.socket], None]) -> Iterator[tuple[str, list[bytes]]]:
    """A server that holds the n-th conversation on its n-th connection; gives its URL and the requests it read."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(10)
    seen: list[bytes] = []

    def run() -> None:
        for conversation in conversations:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(10)
                conversation(connection)

    def read(connection: socket.socket) -> bytes:
        data = connection.recv(65536)
        if data:
            seen.append(data)
        return data

    scripted.read = read  # type: ignore[attr-defined]
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
    finally:
        listener.shutdown(socket.SHUT_RDWR)  # wakes a waiting accept, as close would not
        listener.close()
        thread.join(5)


def answer(*parts: bytes) -> Callable[[socket.socket], None]:
    """A conversation: for each part, read a request and send the part; then close."""

    def conversation(connection: socket.socket) -> None:
        for part in parts:
            scripted.read(connection)  # type: ignore[attr-defined]
            connection.sendall(part)

    return conversation


def whole(*events: bytes) -> bytes:
    body = b"".join(events)
    return OK_HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


# Counts, order and times.


@pytest.mark.parametrize("kernel_stamps", [False, True])
def test_a_stream_becomes_a_row_that_agrees_with_what_was_sent(fake_triton: Any, kernel_stamps: bool) -> None:
    plan = {"ttft_ms": 20, "itl_ms": 10, "num_input_tokens": 7}
    record = stream(fake_triton, plan, kernel_stamps=kernel_stamps)
    (sent,) = fake_triton.log()
    assert (record.outcome, record.error) == (Outcome.OK, None)
    assert (record.tokens_in, record.tokens_out, record.usage_out) == (7, 8, 8)
    assert list(record.chunk_tokens) == [1] * 8
    assert record.first_ns == record.chunk_ns[0]
    truth = [event for event in sent["events"] if event[2]]
    assert record.sent_ns is not None and record.done_ns is not None
    assert record.sent_ns <= sent["arrived_ns"]
    for arrival, (before, _, _) in zip(record.chunk_ns, truth, strict=True):
        assert 0 <= arrival - before < 50 * MS
    assert 0 <= record.done_ns - sent["events"][-1][0] < 50 * MS
    assert record.first_ns - record.sent_ns >= 20 * MS


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux stamps received TCP bytes")
@pytest.mark.parametrize("kernel_stamps", [False, True])
def test_a_busy_client_stamps_late_unless_the_kernel_stamps(
    fake_triton: Any, kernel_stamps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, feed = iter(range(1000)), triton_http.HttpResponse.feed

    def slow_feed(response: Any, data: bytes) -> None:
        if next(reads) == 0:  # busy for 160 ms, as other greenlets would be; the second event comes meanwhile
            time.sleep(0.16)
        feed(response, data)

    monkeypatch.setattr(triton_http.HttpResponse, "feed", slow_feed)
    record = stream(fake_triton, {"itl_ms": 100}, max_tokens=3, kernel_stamps=kernel_stamps)
    sends = [before for before, _, tokens in fake_triton.log()[0]["events"] if tokens]
    late = [at - before for at, before in zip(record.chunk_ns, sends, strict=True)]
    assert all(0 <= ns < 40 * MS for ns in (late[0], late[2]))
    assert (late[1] < 40 * MS) is kernel_stamps and late[1] >= 0


def test_kernel_stamps_never_run_backwards_or_before_the_request(fake_triton: Any, monkeypatch: Any) -> None:
    for jump_ns in (10**12, -(10**12)):  # the wall clock is set while a stream runs
        wall = time.time_ns
        monkeypatch.setattr(triton_http.time, "time_ns", lambda jump=jump_ns, wall=wall: wall() + jump)
        record = stream(fake_triton, {"itl_ms": 3}, kernel_stamps=True)
        monkeypatch.undo()
        assert record.outcome is Outcome.OK and record.sent_ns is not None and record.done_ns is not None
        times = [record.sent_ns, *record.chunk_ns, record.done_ns]
        assert times == sorted(times)


def test_a_response_may_carry_several_tokens(fake_triton: Any) -> None:
    record = stream(fake_triton, {"tokens": [3, 1, 2], "itl_ms": 1}, max_tokens=11)
    assert list(record.chunk_tokens) == [3, 1, 2, 3, 1, 1]
    assert (record.tokens_out, record.usage_out, len(record.chunk_ns)) == (11, 11, 6)


def test_events_of_one_read_share_one_arrival(fake_triton: Any) -> None:
    record = stream(fake_triton, {"join": 4, "itl_ms": 20})
    assert len(record.chunk_ns) == 8
    assert len(set(record.chunk_ns[:4])) == 1 and len(set(record.chunk_ns[4:])) == 1
    assert record.chunk_ns[4] - record.chunk_ns[3] >= 10 * MS


@pytest.mark.parametrize(
    "cuts",
    [
        [6],  # chunk header | "da", "ta: "
        [9],  # inside the "data: " prefix
        [-29],  # between the two bytes of é, see the next test
        [-3],  # event complete but for the last byte of its blank line
        [2, 5, 8, 20, -40, -29, -9, -6, -3],
    ],
)
def test_an_event_may_arrive_in_pieces(fake_triton: Any, cuts: list[int]) -> None:
    plan = {"cut_at": cuts, "cut_ms": 3, "itl_ms": 3, "text": "é"}
    record = stream(fake_triton, plan, max_tokens=4)
    assert (record.outcome, record.error) == (Outcome.OK, None)
    assert (list(record.chunk_tokens), record.usage_out) == ([1] * 4, 4)
    truth = [event for event in fake_triton.log()[0]["events"] if event[2]]
    for arrival, (before, _, _) in zip(record.chunk_ns, truth, strict=True):
        assert 0 <= arrival - before < 50 * MS  # stamped with the piece that completed it


def test_the_split_character_is_really_split(fake_triton: Any) -> None:
    """Guards the test above: with these offsets the fake cuts between the bytes C3 and A9."""
    fake_triton.plan({"cut_at": [-29], "cut_ms": 5})
    body = b'{"max_tokens":1}'
    request = b"POST /v2/models/fake/generate_stream HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    pieces = []
    with socket.create_connection(("127.0.0.1", fake_triton.port), 5) as connection:
        connection.sendall(request)
        while not b"".join(pieces).endswith(b"0\r\n\r\n"):
            pieces.append(connection.recv(65536))
    assert pieces[0].endswith(b'"\xc3') and pieces[1].startswith(b'\xa9"')


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("noise", [False, True])
def test_comments_fields_and_line_ends(fake_triton: Any, newline: str, noise: bool) -> None:
    record = stream(fake_triton, {"newline": newline, "noise": noise, "itl_ms": 1})
    assert (record.outcome, record.error) == (Outcome.OK, None)
    assert (list(record.chunk_tokens), record.usage_out) == ([1] * 8, 8)


def test_usage_may_come_with_the_last_token(fake_triton: Any) -> None:
    record = stream(fake_triton, {"merge_final": True, "itl_ms": 1})
    assert (list(record.chunk_tokens), record.tokens_out, record.usage_out) == ([1] * 8, 8, 8)


def test_without_final_usage_the_row_is_ok_and_says_so(fake_triton: Any) -> None:
    record = stream(fake_triton, {"send_usage": False})
    assert (record.outcome, record.tokens_out, record.usage_out, record.tokens_in) == (Outcome.OK, 8, None, None)


def test_a_miscounting_server_is_recorded_as_it_counts(fake_triton: Any) -> None:
    record = stream(fake_triton, {"usage_error": 2})
    assert (record.outcome, record.tokens_out, record.usage_out) == (Outcome.OK, 8, 10)


def test_without_counts_no_token_is_invented_but_first_text_has_a_time(fake_triton: Any) -> None:
    record = stream(fake_triton, {"send_counts": False, "send_usage": False, "itl_ms": 5, "ttft_ms": 10})
    assert (record.outcome, record.tokens_out, record.usage_out) == (Outcome.OK, 0, None)
    assert len(record.chunk_ns) == 0
    first_sent = fake_triton.log()[0]["events"][0][0]
    assert record.first_ns is not None and 0 <= record.first_ns - first_sent < 50 * MS


def test_early_clean_end_is_a_whole_stream_with_fewer_tokens(fake_triton: Any) -> None:
    record = stream(fake_triton, {"end_at": 3, "itl_ms": 1})
    assert (record.outcome, record.tokens_out, record.usage_out) == (Outcome.OK, 3, None)


def test_no_output_tokens_at_all_is_still_a_stream(fake_triton: Any) -> None:
    record = stream(fake_triton, {}, max_tokens=0)
    assert (record.outcome, record.tokens_out, record.usage_out, record.first_ns) == (Outcome.OK, 0, 0, None)


# Framing.


def test_content_length(fake_triton: Any) -> None:
    record = stream(fake_triton, {"framing": "length"})
    assert (record.outcome, record.tokens_out, record.usage_out) == (Outcome.OK, 8, 8)


def test_content_length_cut_short_is_truncated(fake_triton: Any) -> None:
    record = stream(fake_triton, {"framing": "length", "close_at": 3})
    assert (record.outcome, record.tokens_out) == (Outcome.ERROR, 3)
    assert record.error == "truncated: the connection closed before the end of the response, after 3 tokens"


def test_a_body_without_framing_is_whole_only_with_its_final_usage(fake_triton: Any) -> None:
    record = stream(fake_triton, {"framing": "close"})
    assert (record.outcome, record.tokens_out, record.usage_out) == (Outcome.OK, 8, 8)
    record = stream(fake_triton, {"framing": "close", "close_at": 3})
    assert (record.outcome, record.tokens_out) == (Outcome.ERROR, 3)
    assert record.error is not None and record.error.startswith("truncated: the body has no framing")


def test_continue_and_slow_headers(fake_triton: Any) -> None:
    record = stream(fake_triton, {"send_continue": True, "slow_headers_ms": 40})
    assert (record.outcome, record.tokens_out) == (Outcome.OK, 8)
    assert record.first_ns is not None and record.sent_ns is not None
    assert 40 * MS <= record.first_ns - record.sent_ns < 140 * MS


def test_text_that_is_not_utf8_costs_no_row() -> None:
    bad = TOKEN.replace(b'"x"', b'"\xc3"')
    with scripted(answer(whole(bad, FINAL))) as (url, _):
        record = send(client_of(url))
    assert (record.outcome, record.tokens_out, record.usage_out, record.tokens_in) == (Outcome.OK, 1, 1, 2)


def test_the_last_event_may_lack_its_blank_line() -> None:
    with scripted(answer(whole(TOKEN, FINAL.rstrip()))) as (url, _):
        record = send(client_of(url))
    assert (record.outcome, record.tokens_out, record.usage_out) == (Outcome.OK, 1, 1)


# Failures are data.


@pytest.mark.parametrize("as_event", [False, True])
def test_http_error_carries_tritons_text_and_keeps_the_connection(fake_triton: Any, as_event: bool) -> None:
    fake_triton.plan({"status": 400, "error": "no room", "error_as_event": as_event})
    client = client_of(fake_triton.url)
    for seq in range(2):
        record = send(client, seq)
        assert (record.outcome, record.error) == (Outcome.ERROR, "http_400: no room")
        assert (record.tokens_out, record.first_ns) == (0, None)
    assert {row["connection"] for row in fake_triton.log()} == {fake_triton.log()[0]["connection"]}


def test_unknown_model(fake_triton: Any) -> None:
    record = send(client_of(fake_triton.url, "nope"))
    assert record.error == "http_404: Request for unknown model: 'nope' is not found"


def test_error_event_inside_a_200_stream(fake_triton: Any) -> None:
    record = stream(fake_triton, {"error_at": 3, "error": "out of\nblocks", "itl_ms": 2})
    assert record.outcome is Outcome.ERROR
    assert record.error == "server_error: out of blocks (after 3 tokens)"
    assert (list(record.chunk_tokens), record.tokens_out, record.usage_out) == ([1] * 3, 3, None)


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_connection_lost_amid_the_stream(fake_triton: Any, how: str) -> None:
    record = stream(fake_triton, {"close_at": 3, "close_how": how, "itl_ms": 5})
    assert (record.outcome, record.tokens_out) == (Outcome.ERROR, 3)
    kind = {"fin": "truncated", "rst": "reset"}[how]
    assert record.error is not None and record.error.startswith(f"{kind}: ") and record.error.count("3 tokens") == 1


def test_connection_lost_before_any_response(fake_triton: Any) -> None:
    record = stream(fake_triton, {"close_at": 0})
    assert record.outcome is Outcome.ERROR
    assert record.error == "reset: the server closed the connection without a response (after 0 tokens)"


def test_lost_after_the_usage_but_before_the_end_is_not_whole(fake_triton: Any) -> None:
    record = stream(fake_triton, {"close_at": 9, "itl_ms": 1})
    assert (record.outcome, record.tokens_out, record.usage_out) == (Outcome.ERROR, 8, 8)
    assert record.error is not None and record.error.startswith("truncated: ")


@pytest.mark.parametrize(
    "text",
    ['{"num_output_tokens":', "[1]", '{"num_output_tokens":"3"}', '{"num_output_tokens":-1}', "[" * 100_000, "[DONE]"],
)
def test_malformed_events(fake_triton: Any, text: str) -> None:
    record = stream(fake_triton, {"raw_at": [2, text], "itl_ms": 1})
    assert (record.outcome, record.tokens_out) == (Outcome.ERROR, 2)
    assert record.error is not None and record.error.startswith("malformed: ")
    assert len(record.error) <= 300 and "\n" not in record.error


def test_error_text_is_one_bounded_line(fake_triton: Any) -> None:
    record = stream(fake_triton, {"status": 500, "error": "many words\r\n\t" * 1000})
    assert record.error is not None and record.error.startswith("http_500: many words many words")
    assert len(record.error) == 300 and record.error.isprintable()


def test_a_stream_without_events_is_an_error() -> None:
    with scripted(answer(whole())) as (url, _):
        record = send(client_of(url))
    assert (record.outcome, record.error) == (Outcome.ERROR, "empty: the stream ended without one event")


def test_refused(unused_port: int) -> None:
    record = send(client_of(f"http://127.0.0.1:{unused_port}"))
    assert (record.outcome, record.sent_ns) == (Outcome.ERROR, None)
    assert record.error == f"refused: Connection refused (connecting to 127.0.0.1:{unused_port})"


def test_not_http() -> None:
    with scripted(answer(b"SSH-2.0-OpenSSH_9.2\r\n")) as (url, _):
        record = send(client_of(url))
    assert record.outcome is Outcome.ERROR and record.error is not None and record.error.startswith("protocol: ")


def test_plain_server_behind_https(fake_triton: Any) -> None:
    record = send(client_of(fake_triton.url.replace("http:", "https:")))
    assert record.outcome is Outcome.ERROR and record.error is not None and record.error.startswith("tls: ")


def test_silence_times_out_at_the_deadline(fake_triton: Any) -> None:
    started = time.monotonic_ns()
    record = stream(fake_triton, {"hang_at": 3, "itl_ms": 5}, timeout_s=0.3)
    assert (record.outcome, record.tokens_out) == (Outcome.TIMEOUT, 3)
    assert record.error == "timeout: not finished 0.3 s after it began, with 3 tokens received"
    assert record.done_ns is not None and 290 * MS < record.done_ns - started < 900 * MS


def test_a_dripping_server_cannot_outlive_the_deadline(fake_triton: Any) -> None:
    record = stream(fake_triton, {"itl_ms": 10}, max_tokens=1000, timeout_s=0.3)
    assert record.outcome is Outcome.TIMEOUT
    assert record.sent_ns is not None and record.done_ns is not None and record.done_ns - record.sent_ns < 900 * MS
    assert 5 < record.tokens_out < 40


def test_connect_has_its_own_deadline() -> None:
    with socket.socket() as deaf:  # a full backlog drops the handshake
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        crowd = [socket.socket() for _ in range(4)]
        for one in crowd:
            one.setblocking(False)
            one.connect_ex(deaf.getsockname())
        record = send(client_of(f"http://127.0.0.1:{deaf.getsockname()[1]}", connect_timeout_s=0.2))
        for one in crowd:
            one.close()
    assert (record.outcome, record.sent_ns) == (Outcome.TIMEOUT, None)
    assert record.error is not None and record.error.endswith("in 0.2 s")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x:1", "http://", "http://h:port", ""])
def test_a_wrong_address_is_the_users_error(url: str) -> None:
    with pytest.raises(UserError, match="http://HOST:PORT"):
        client_of(url)


# Connections.


def test_one_connection_serves_requests_in_a_row(fake_triton: Any) -> None:
    client = client_of(fake_triton.url)
    assert [send(client, seq).tokens_out for seq in range(4)] == [8] * 4
    assert len({row["connection"] for row in fake_triton.log()}) == 1


def test_the_connection_used_last_is_reused_first(fake_triton: Any) -> None:
    fake_triton.plan({"models": {"slow": {"ttft_ms": 80}, "fake": {"ttft_ms": 30}}})
    fast = client_of(fake_triton.url)
    with ThreadPoolExecutor(2) as pool:  # two connections; both become idle, that of seq 1 last
        first = pool.submit(send, fast, 0, 1)
        time.sleep(0.01)
        second = pool.submit(send, fast, 1, 1)
        assert first.result().outcome is second.result().outcome is Outcome.OK
    assert send(fast, 2).outcome is Outcome.OK
    used = {row["id"]: row["connection"] for row in fake_triton.log()}
    assert used["0"] != used["1"]
    assert used["2"] == used["1"]


@pytest.mark.parametrize("plan", [{"keep_alive": False}, {"error_at": 2, "itl_ms": 5}, {"close_at": 2, "itl_ms": 1}])
def test_a_connection_is_not_reused_after(fake_triton: Any, plan: dict[str, Any]) -> None:
    fake_triton.plan(plan)
    client = client_of(fake_triton.url)
    outcomes = [send(client, seq).outcome for seq in range(2)]
    assert outcomes == [Outcome.OK if plan == {"keep_alive": False} else Outcome.ERROR] * 2
    reused = len({row["connection"] for row in fake_triton.log()}) == 1
    assert reused is ("error_at" in plan)  # its end came in the same read as the error, so the connection is sound


def test_an_idle_connection_the_server_closed_is_replaced_unseen(fake_triton: Any) -> None:
    fake_triton.plan({"close_after_ms": 1})
    client = client_of(fake_triton.url)
    for seq in range(3):
        assert send(client, seq).outcome is Outcome.OK
        time.sleep(0.05)
    assert len({row["connection"] for row in fake_triton.log()}) == 3


def test_a_connection_closed_under_the_request_is_retried_once_on_a_fresh_one() -> None:
    reply = whole(TOKEN, FINAL)
    with scripted(answer(reply, b""), answer(reply)) as (url, seen):  # closes on its second request without a byte
        client = client_of(url)
        first, second = send(client, 0), send(client, 1)
    assert (first.outcome, second.outcome, second.error) == (Outcome.OK, Outcome.OK, None)
    assert second.tokens_out == 1
    assert len(seen) == 3 and seen[1] == seen[2]


def test_a_fresh_connection_is_never_retried() -> None:
    with scripted(answer(b""), answer(whole(TOKEN))) as (url, seen):
        record = send(client_of(url))
    assert record.outcome is Outcome.ERROR and len(seen) == 1


def test_a_server_that_dies_on_a_request_it_took_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_http, "STALE_WINDOW_NS", 50 * MS)

    def dies_slowly(connection: socket.socket) -> None:
        answer(whole(TOKEN, FINAL))(connection)
        scripted.read(connection)  # type: ignore[attr-defined]
        time.sleep(0.1)

    with scripted(dies_slowly, answer(whole(TOKEN))) as (url, seen):
        client = client_of(url)
        first, second = send(client, 0), send(client, 1)
    assert (first.outcome, second.outcome) == (Outcome.OK, Outcome.ERROR)
    assert second.error is not None and second.error.startswith("reset: ")
    assert len(seen) == 2


def test_many_threads_share_a_client(fake_triton: Any) -> None:
    fake_triton.plan({"itl_ms": 2, "tokens": [1, 2]})
    client = client_of(fake_triton.url)
    with ThreadPoolExecutor(16) as pool:
        records = list(pool.map(lambda seq: send(client, seq, 1 + seq % 7), range(96)))
    assert [(r.outcome, r.tokens_out, r.usage_out) for r in records] == [
        (Outcome.OK, 1 + seq % 7, 1 + seq % 7) for seq in range(96)
    ]
    assert {row["ended"] for row in fake_triton.log()} == {"complete"}
    assert len({row["connection"] for row in fake_triton.log()}) <= 16


# Cancellation.


def test_an_interrupt_cuts_the_row_closes_the_connection_and_propagates(fake_triton: Any) -> None:
    fake_triton.plan({"itl_ms": 20})
    calls = iter(range(1000))

    def clock() -> int:
        if next(calls) == 4:  # after the second read
            raise KeyboardInterrupt
        return time.monotonic_ns()

    client, record = client_of(fake_triton.url, clock=clock), blank()
    with pytest.raises(KeyboardInterrupt):
        client.stream(b'{"max_tokens": 8}', record)
    assert (record.outcome, record.error, record.tokens_out) == (Outcome.CUT, "cut: KeyboardInterrupt", 1)
    assert record.done_ns is not None and record.first_ns is not None and record.done_ns >= record.first_ns
    assert ended(fake_triton) == "peer_closed"


def ended(fake: Any) -> str | None:
    """How the first logged request ended, once the fake has noticed."""
    for _ in range(100):
        if fake.log()[0]["ended"]:
            break
        time.sleep(0.02)
    return fake.log()[0]["ended"]


def test_killing_a_greenlet_cuts_the_row_and_closes_the_connection(fake_triton: Any) -> None:
    """In a process of its own: monkey-patching would change the sockets of all other tests."""
    fake_triton.plan({"itl_ms": 20})
    script = """
        from gevent import monkey; monkey.patch_all()
        import gevent, sys, time
        from loadgen.core.record import Phase, Record
        from loadgen.edge.clients.triton_http import TritonHttp
        client = TritonHttp(sys.argv[1], "fake", clock=time.monotonic_ns)
        records = [Record(k, k, 0, 0, Phase.MEASURE, 0, 8) for k in range(4)]
        jobs = [gevent.spawn(client.stream, b'{"max_tokens": 100}', record) for record in records]
        gevent.sleep(0.3)
        gevent.killall(jobs, timeout=5)
        for record, job in zip(records, jobs):
            print(record.outcome, record.error, 2 < record.tokens_out < 30, record.done_ns is not None, job.dead)
        gevent.sleep(0.2)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), fake_triton.url],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert result.stdout.splitlines() == ["cut cut: GreenletExit True True True"] * 4
    assert [row["ended"] for row in fake_triton.log()] == ["peer_closed"] * 4


# The probe.


def test_probe_describes_server_and_model(fake_triton: Any) -> None:
    fake_triton.plan({"versions": ["1", "3"], "parameters": {"precision": {"string_value": "bf16"}}})
    assert probe(fake_triton.url, "fake", 5) == {
        "name": "triton",
        "version": "2.99.0-fake",
        "ready": True,
        "model_versions": ["1", "3"],
        "backend": "python",
        "decoupled": True,
        "parameters": {"precision": "bf16"},
    }


@pytest.fixture
def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_probe_says_what_is_wrong_where_and_how_to_fix_it(fake_triton: Any, unused_port: int) -> None:
    fake_triton.plan({"models": {"phi-2": {}, "llama": {"ready": False, "reason": "no\nGPU"}}})
    nowhere = f"http://127.0.0.1:{unused_port}"
    for url, model, words in [
        (nowhere, "phi-2", [nowhere, "nothing listens", "start Triton"]),
        (fake_triton.url, "phi2", ["'phi2'", fake_triton.url, "(llama, phi-2)"]),
        (fake_triton.url, "llama", ["'llama'", "UNAVAILABLE: no GPU", "/v2/repository/models/llama/load"]),
        (fake_triton.url + "/nowhere", "phi-2", ["not as a Triton server", "HTTP 404", "8000"]),
        (fake_triton.url.replace("http", "https"), "phi-2", ["TLS", "use http://"]),
        ("phi-2:8000", "phi-2", ["http://HOST:PORT"]),
    ]:
        with pytest.raises(UserError) as error:
            probe(url, model, 5)
        assert all(word in str(error.value) for word in words), str(error.value)
        assert "\n" not in str(error.value)


def test_probe_of_other_servers() -> None:
    with scripted(answer(b"SSH-2.0-OpenSSH_9.2\r\n")) as (url, _), pytest.raises(UserError, match="doesn't speak HTTP"):
        probe(url, "m", 5)
    metrics = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n# HELP nv"
    with scripted(answer(metrics)) as (url, _), pytest.raises(UserError, match="not as a Triton server"):
        probe(url, "m", 5)
    with scripted(lambda connection: time.sleep(0.5)) as (url, _), pytest.raises(UserError, match=r"in 0\.2 s"):
        probe(url, "m", 0.2)
