"""The process behind a scrape endpoint: `python -m loadgen.edge.live_server SOCKET_FD PORT BIND`.

Rendering a page takes milliseconds, and a scraper may hang: neither may happen where arrivals are stamped. So the load
process only hands its figures over, as one datagram about twice a second, and this process answers scrapes from the
last one. It ends when the load process does. It knows nothing of the project, and imports nothing of it.

Protocol (JSON, one message a datagram): in {"generation": n, "families": [...]}; out first {"port": n} or {"error":
text}, then {"scraped": generation} after each answer that was sent.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from socketserver import TCPServer
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

MAX_BYTES = 1 << 20
PORTS_TRIED = 200
HISTORY_PORT = 9465  # where `tritonmark history` listens unless told otherwise
HANG_S = 15.0  # a scraper that sends or takes nothing for so long is dropped


class Figures:
    """A collector (prometheus_client's protocol) of the last families that the load process handed over."""

    def __init__(self) -> None:
        self.generation, self.families = 0, []  # type: tuple[int, list[dict[str, Any]]]

    def collect(self) -> Iterator[Metric]:
        for family in self.families:
            yield _metric(family)


def _metric(family: dict[str, Any]) -> Metric:
    name, text, labels = family["name"], family["help"], family["labels"]
    if family["kind"] == "histogram":
        histogram = HistogramMetricFamily(name, text, labels=labels)
        for values, counts, total in family["samples"]:
            histogram.add_metric(values, _cumulative(family["buckets"], counts), total)
        return histogram
    make = CounterMetricFamily if family["kind"] == "counter" else GaugeMetricFamily
    metric = make(name, text, labels=labels)
    for values, value in family["samples"]:
        metric.add_metric(values, value)
    return metric


def _cumulative(edges: list[float], counts: list[int]) -> list[tuple[str, float]]:
    out, running = [], 0
    for edge, count in zip([*map(repr, edges), "+Inf"], counts, strict=True):
        running += count
        out.append((edge, float(running)))
    return out


class _Threaded(WSGIServer):
    """A thread a scrape, so that a hung one keeps nobody waiting."""

    def server_bind(self) -> None:
        """Without asking a name server for this host's name, which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        threading.Thread(target=self._answer, args=(request, client_address), daemon=True).start()

    def _answer(self, request: Any, client_address: Any) -> None:
        with suppress(OSError):
            request.settimeout(HANG_S)
            self.finish_request(request, client_address)
        self.shutdown_request(request)


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Scrapes are not news."""


class _Answer(list[bytes]):
    """A response body that tells when it was sent."""

    def __init__(self, body: Any, sent: Any) -> None:
        super().__init__(body)
        self.close = sent


def serve(control: socket.socket, port: int, bind: str) -> None:
    """Answers scrapes on the first free port from `port` until `control` is closed by its other end."""
    control.setblocking(True)  # gevent, at the other end of the fork, leaves its sockets non-blocking
    figures, registry = Figures(), CollectorRegistry(auto_describe=False)
    registry.register(figures)
    inner = make_wsgi_app(registry)

    def application(environ: Any, start: Any) -> Any:
        generation = figures.generation

        def sent() -> None:
            with suppress(OSError):
                control.send(json.dumps({"scraped": generation}).encode(), socket.MSG_DONTWAIT)

        return _Answer(inner(environ, start), sent)

    try:
        server = bound(application, port, bind)
    except OSError as error:
        control.send(json.dumps({"error": error.strerror or str(error)}).encode())
        return
    control.send(json.dumps({"port": server.server_port}).encode())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while message := control.recv(MAX_BYTES):
        news = json.loads(message)
        figures.families = news["families"]
        figures.generation = news["generation"]


def bound(application: Any, port: int, bind: str, tries: int = PORTS_TRIED) -> WSGIServer:
    """A server on the first free one of `tries` ports from `port`; 0 is any. Raises OSError.

    A search passes over `HISTORY_PORT`: Prometheus would scrape a load process as history, and history could not start.
    """
    candidates = range(port, min(port + tries, 65536)) if port else (0,)
    for candidate in (c for c in candidates if c == port or c != HISTORY_PORT):
        try:
            return make_server(bind, candidate, application, _Threaded, _Quiet)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, "no free port")


if __name__ == "__main__":
    os.nice(10)  # behind the load process, which may have put itself ahead of all others
    with suppress(KeyboardInterrupt, ConnectionResetError):
        serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
