"""Asks a Triton server, before any load, whether it's there and serves the model, and says how to fix it if not.

probe("http://localhost:8000", "phi-2")
{"name": "triton", "version": "2.51.0", "ready": True, "model_versions": ["1"], "backend": "python", ...}
"""

from __future__ import annotations

import http.client
import json
import ssl
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

from loadgen.edge.errors import UserError

MAX_BODY_BYTES = 8 << 20
MAX_NAMES = 12  # in an error message; a repository may hold hundreds


def parse_base_url(base_url: str) -> SplitResult:
    """The parts of `http://host:port[/prefix]`.

    Raises:
        UserError: it is not an HTTP address.
    """
    try:
        url = urlsplit(base_url)
        if url.scheme in ("http", "https") and url.hostname and url.port != 0:
            return url
    except ValueError:  # a port that is no number
        pass
    raise UserError(
        f"{base_url!r} is not an HTTP address: give the server as http://HOST:PORT, e.g. http://localhost:8000"
    )


def probe(base_url: str, model: str, timeout_s: float = 10.0) -> dict[str, Any]:
    """What the server says about itself and about `model`.

    Returns:
        `name` and `version` of the server, `ready` (always True), `model_versions`, `backend` (or the platform, for an
        ensemble), `decoupled` (whether the model may answer a request with many responses) and `parameters` (those of
        its configuration, in which our exporters say what was exported).

    Raises:
        UserError: no connection, not a Triton server, no such model, or a model that isn't ready.
    """
    server = _Server(base_url, timeout_s)
    status, about = server.ask("GET", "/v2")
    if status != 200 or not isinstance(about, dict) or "version" not in about:
        raise UserError(
            f"{base_url} answers, but not as a Triton server (GET /v2 gave HTTP {status}): "
            "use Triton's HTTP port, 8000 unless changed, not its gRPC (8001) or metrics (8002) port"
        )
    status, reason = server.ask("GET", f"/v2/models/{quote(model, safe='')}/ready")
    if status != 200:
        raise _not_ready(server, model, reason)
    _, metadata = server.ask("GET", f"/v2/models/{quote(model, safe='')}")
    _, config = server.ask("GET", f"/v2/models/{quote(model, safe='')}/config")
    metadata = metadata if isinstance(metadata, dict) else {}
    config = config if isinstance(config, dict) else {}
    return {
        "name": about.get("name", ""),
        "version": about["version"],
        "ready": True,
        "model_versions": list(metadata.get("versions", [])),
        "backend": config.get("backend") or config.get("platform") or metadata.get("platform", ""),
        "decoupled": bool((config.get("model_transaction_policy") or {}).get("decoupled", False)),
        "parameters": {
            key: value.get("string_value", "")
            for key, value in (config.get("parameters") or {}).items()
            if isinstance(value, dict)
        },
    }


class _Server:
    """One short-lived connection a question: the probe runs once, and not on the measured path."""

    def __init__(self, base_url: str, timeout_s: float) -> None:
        self.base_url, self._timeout_s = base_url, timeout_s
        self._url = parse_base_url(base_url)

    def ask(self, method: str, path: str) -> tuple[int, Any]:
        """Status and decoded JSON, or the text where the body isn't JSON."""
        url = self._url
        tls = url.scheme == "https"
        make = http.client.HTTPSConnection if tls else http.client.HTTPConnection
        connection = make(str(url.hostname), url.port, timeout=self._timeout_s)
        try:
            connection.request(method, url.path.rstrip("/") + path, body=b"" if method == "POST" else None)
            response = connection.getresponse()
            text = response.read(MAX_BODY_BYTES).decode("utf-8", "replace")
        except ConnectionRefusedError:
            raise UserError(
                f"nothing listens at {self.base_url}: start Triton there, or correct the host and port"
            ) from None
        except TimeoutError:
            raise UserError(
                f"{self.base_url} didn't answer {method} {path} in {self._timeout_s:g} s: "
                "check the host, the firewall and whether the server hangs"
            ) from None
        except ssl.SSLError as error:
            raise UserError(
                f"no TLS with {self.base_url} ({error.reason or error}): use http:// if the server speaks plain "
                "HTTP, or trust its certificate"
            ) from None
        except http.client.HTTPException as error:
            raise UserError(
                f"{self.base_url} doesn't speak HTTP ({type(error).__name__}): "
                "use Triton's HTTP port, 8000 unless changed, not its gRPC port (8001)"
            ) from None
        except OSError as error:
            raise UserError(
                f"no connection to {self.base_url} ({error.strerror or error}): check the host name and the network"
            ) from None
        finally:
            connection.close()
        try:
            return response.status, json.loads(text)
        except (ValueError, RecursionError):
            return response.status, text


def _not_ready(server: _Server, model: str, reason: Any) -> UserError:
    """The server says "not ready" both for a wrong name and for a failed load; its index tells them apart."""
    status, index = server.ask("POST", "/v2/repository/index")
    rows = [row for row in index if isinstance(row, dict)] if status == 200 and isinstance(index, list) else None
    if rows is None:
        detail = reason.get("error", reason) if isinstance(reason, dict) else reason
        return UserError(f"model {model!r} is not ready at {server.base_url} ({detail}): see the server's log")
    names = sorted({str(row.get("name")) for row in rows})
    if model not in names:
        shown = ", ".join(names[:MAX_NAMES]) + (f" and {len(names) - MAX_NAMES} more" if names[MAX_NAMES:] else "")
        return UserError(f"no model {model!r} at {server.base_url}: give one it has ({shown or 'it has none'})")
    row = next(row for row in rows if row.get("name") == model)
    state = " ".join(f"{row.get('state', 'UNLOADED')}: {row.get('reason') or 'no reason given'}".split())
    return UserError(
        f"model {model!r} at {server.base_url} is not ready ({state}): "
        f"load it (POST /v2/repository/models/{model}/load) "
        "or see the server's log"
    )
