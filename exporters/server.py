"""The embedded Triton as a context manager: started, awaited, and gone afterwards with all its children.

    with TritonServer("model_repository", models=["phi-2-tiny"]) as server:
        requests.get(f"{server.http_url}/v2/health/ready")

The end is certain in every case: leaving the block, an exception, Ctrl-C, and the death of this process (the kernel
then sends SIGTERM to the server). Start it from a thread that lives as long as the server should.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from exporters.errors import UserError
from exporters.wheel import Binary, find_binary

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None)
_POLL_S = 0.05
_EXIT_TIMEOUT_S = 30  # how long Triton waits for open requests when it stops
_START_ATTEMPTS = 3  # a port found free may be taken by somebody else before Triton binds it
_LOADED = re.compile(r"successfully loaded '([^']+)'")
_FAILED = re.compile(r"failed to load '([^']+)' version \d+: (.+)")
_LOG_PREFIX = re.compile(r"^[EIW]\d{4} [\d:.]+ \d+ [\w.]+:\d+\] ")


class TritonServer:
    """One tritonserver process. Ports of 0 are chosen; `http_url`, `grpc_port`, `metrics_url` and `pid` are known
    inside the block. `models` are the ones to load, all in the repository by default. `on_progress` gets one line of
    text per event. A start that fails is a UserError with the reason from the log, which stays at `log_path`."""

    def __init__(
        self,
        repository: Path | str,
        host: str = "127.0.0.1",
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        *,
        models: Sequence[str] | None = None,
        log_path: Path | str | None = None,
        ready_timeout_s: float = 600.0,
        http_threads: int = 16,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        self.repository = Path(repository)
        self.host = host
        self.models = find_models(self.repository, models)
        self.log_path = Path(log_path) if log_path else Path(tempfile.mkdtemp(prefix="tritonmark-")) / "triton.log"
        self.ready_s = 0.0  # seconds from start to ready
        self._wanted_ports = (http_port, grpc_port, metrics_port)
        self._ready_timeout_s = ready_timeout_s
        self._http_threads = http_threads
        self._tell = on_progress or (lambda message: None)
        self._process: subprocess.Popen | None = None
        self._shm_prefix = f"tritonmark_{os.getpid()}_{id(self):x}_"

    @property
    def http_url(self) -> str:
        return f"http://{_reachable(self.host)}:{self.http_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://{_reachable(self.host)}:{self.metrics_port}/metrics"

    @property
    def pid(self) -> int:
        """Process id of tritonserver; its children are the python stubs, one for each model instance."""
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process.pid

    def __enter__(self) -> TritonServer:
        binary = find_binary()
        self._tell(f"starting Triton with {', '.join(self.models)}")
        try:
            for attempt in range(_START_ATTEMPTS):
                self.http_port, self.grpc_port, self.metrics_port = _choose_ports(self.host, self._wanted_ports)
                self._start(binary)
                if self._await_ready(last=attempt == _START_ATTEMPTS - 1 or 0 not in self._wanted_ports):
                    break
                self.stop()
        except BaseException:
            self.stop()
            raise
        self._tell(f"ready at {self.http_url} after {self.ready_s:.1f} s")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def exit_reason(self) -> str | None:
        """Why the server has died, from the end of its log; None while it runs."""
        if self._process is None or self._process.poll() is None:
            return None
        return f"Triton ended with code {self._process.returncode}: {self._reason()} (log: {self.log_path})"

    def stop(self) -> None:
        """End the server and its stubs and wait for them: SIGTERM, later SIGKILL. Safe to call twice."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(timeout=_EXIT_TIMEOUT_S + 5)
        except subprocess.TimeoutExpired:
            self._tell("Triton does not stop; killing it")
        finally:
            # By process group and not by parent: the stubs of a server that crashed have lost their parent.
            family = [p for p in psutil.process_iter() if _group(p.pid) == process.pid]
            for member in family:
                with contextlib.suppress(psutil.Error):
                    member.kill()
            process.wait()
            psutil.wait_procs(family, timeout=5)
            for region in Path("/dev/shm").glob(f"{self._shm_prefix}*"):
                region.unlink(missing_ok=True)

    def _command(self, binary: Binary) -> list[str]:
        loads = [f"--load-model={name}" for name in self.models]
        return [
            str(binary.executable),
            f"--model-repository={self.repository.resolve()}",
            f"--backend-directory={binary.backends}",
            "--model-control-mode=explicit",  # a staging folder or a broken neighbour is never loaded
            *loads,
            "--disable-auto-complete-config",
            f"--http-address={self.host}",
            f"--http-port={self.http_port}",
            f"--http-thread-count={self._http_threads}",
            f"--grpc-address={self.host}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-address={self.host}",
            f"--metrics-port={self.metrics_port}",
            "--metrics-config=histogram_latencies=true",
            "--metrics-interval-ms=1000",
            f"--exit-timeout-secs={_EXIT_TIMEOUT_S}",
            "--backend-config=python,stub-timeout-seconds=600",
            "--backend-config=python,shm-default-byte-size=16777216",
            "--backend-config=python,shm-growth-byte-size=16777216",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
        ]

    def _start(self, binary: Binary) -> None:
        parent = os.getpid()
        bound_to_parent = threading.current_thread() is threading.main_thread()

        def follow_parent() -> None:  # in the child, before exec; the signal follows the death of the starting thread
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(binary),
                env=binary.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal reaches this process first, which stops it in order
                preexec_fn=follow_parent if bound_to_parent else None,
            )

    def _await_ready(self, last: bool) -> bool:
        """True when ready. False when a chosen port was taken meanwhile and another attempt is worth it."""
        started = time.monotonic()
        loaded: set[str] = set()
        while not self._answers():
            for name in _LOADED.findall(self._log()):
                if name not in loaded:
                    loaded.add(name)
                    self._tell(f"loaded {name} ({len(loaded)} of {len(self.models)})")
            if (reason := self.exit_reason()) is not None:
                if "address already in use" in self._log().lower() and not last:
                    return False
                raise UserError(reason)
            if time.monotonic() - started > self._ready_timeout_s:
                missing = ", ".join(name for name in self.models if name not in loaded) or "the HTTP endpoint"
                raise UserError(
                    f"Triton was not ready after {self._ready_timeout_s:.0f} s (waiting for {missing});"
                    f" see {self.log_path} or allow more time"
                )
            time.sleep(_POLL_S)
        self.ready_s = time.monotonic() - started
        return True

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.http_url}/v2/health/ready", timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def _reason(self) -> str:
        """The first failed model with its exception, else the last lines of the log."""
        text = self._log()
        if failed := _FAILED.search(text):
            return f"model {failed[1]} did not load: {failed[2].strip()[:500]}"
        lines = [_LOG_PREFIX.sub("", line).strip() for line in text.splitlines() if line[:1] == "E" or "error" in line]
        lines = lines or [line.strip() for line in text.splitlines() if line.strip()]
        return " | ".join(lines[-3:])[:500] or "it wrote nothing to its log"


def find_models(repository: Path, models: Sequence[str] | None = None) -> list[str]:
    """The models to load: those asked for, else every folder with a `config.pbtxt`; or a UserError."""
    export = "export one with: tritonmark export phi-2-tiny"
    try:
        found = sorted(
            path.name for path in repository.iterdir() if path.name[0] != "." and (path / "config.pbtxt").is_file()
        )
    except OSError as error:
        raise UserError(f"cannot read the model repository {repository} ({error.strerror}); {export}") from None
    if not found:
        raise UserError(f"the model repository {repository} has no model; {export}")
    unknown = [name for name in models or [] if name not in found]
    if unknown:
        raise UserError(f"no model {unknown[0]!r} in {repository}; choose from: {', '.join(found)}")
    return list(models) if models else found


def _choose_ports(host: str, wanted: tuple[int, int, int]) -> list[int]:
    """`wanted` with zeros replaced by free ports. All are held open until the last is chosen, so they differ."""
    with contextlib.ExitStack() as stack:
        ports = []
        for name, port in zip(("http", "grpc", "metrics"), wanted, strict=True):
            probe = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise UserError(
                    f"cannot use port {port} on {host} for {name} ({error.strerror}); choose another --{name}-port or 0"
                ) from None
            ports.append(probe.getsockname()[1])
        return ports


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host
