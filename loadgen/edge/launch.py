"""Runs a locust file in a process of its own, shows its progress, and brings back the sealed run.

Locust patches the interpreter that imports it, and drawing a progress bar takes milliseconds in which no arrival could
be stamped: so load and display are two processes, joined by a pipe of JSON lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from loadgen.edge import scenarios, store
from loadgen.edge.errors import UserError
from loadgen.edge.options import PROGRESS_FD
from loadgen.edge.progress import watch

LOCUST_FILES = Path(__file__).parents[1]


@dataclass
class Launched:
    """How a load process ended: its exit code (0 VALID, 3 INVALID), the run it sealed, and whether by Ctrl-C."""

    exit_code: int
    run: store.Run
    interrupted: bool = False


def launch(arguments: list[str], console: Console, locust_file: str | None = None) -> Launched:
    """Runs `locust -f loadgen/<locust_file> --headless` with `arguments` to its end; None: the one for `--model`.

    Ctrl-C is passed on once, and the run is then sealed as INVALID. Raises UserError with the load process's own
    message when nothing could be measured, and RuntimeError with the end of its log when it crashed without a run.
    """
    file = LOCUST_FILES / (locust_file or locust_file_for(arguments))
    command = [sys.executable, "-m", "locust", "-f", str(file), "--headless", "--only-summary"]
    receive, send = os.pipe()
    seen: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+", prefix="tritonmark-load-") as log:
        with _Interrupts() as interrupts, os.fdopen(receive) as lines:
            process = subprocess.Popen(
                [*command, *arguments, *own_port(arguments)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=(send,), env=os.environ | {PROGRESS_FD: str(send)}, start_new_session=True,
            )  # fmt: skip
            os.close(send)
            interrupts.go_to(process)
            watch(_remember(lines, seen), console)
            code = process.wait()
        try:
            launched = _result(code, seen.get("folder"), log)
        except (UserError, RuntimeError):
            if interrupts.came:  # before there was a run to seal
                raise KeyboardInterrupt from None
            raise
        launched.interrupted = interrupts.came
        return launched


def own_port(arguments: list[str]) -> list[str]:
    """Where master and workers of `--processes` meet: Locust's port 5557 is one for all tests of a machine, and open to
    other hosts."""
    if "--processes" not in arguments or "--master-bind-port" in arguments:
        return []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return ["--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--master-port", port]


def locust_file_for(arguments: list[str]) -> str:
    """`video.py` for a model that is bound to a clip in `models.toml`, else `llm.py`."""
    model = arguments[arguments.index("--model") + 1] if "--model" in arguments[:-1] else ""
    return "video.py" if "clip" in scenarios.binding(model) else "llm.py"


def _remember(lines: IO[str], seen: dict[str, Any]) -> Iterator[str]:
    """Passes lines on, and notes the folder of the run when one names it."""
    for line in lines:
        with contextlib.suppress(ValueError, AttributeError):
            seen.update({k: v for k, v in json.loads(line).items() if k == "folder"})
        yield line


class _Interrupts:
    """While inside, Ctrl-C and SIGTERM end the load process, which seals; this process waits for it.

    Entered before the load process starts: a Ctrl-C while it does would leave it behind, in a session of its own.
    """

    came = False
    told = False
    process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Interrupts:
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def go_to(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._pass_on()

    def _note(self, _number: int, _frame: Any) -> None:
        self.came = True
        self._pass_on()

    def _pass_on(self) -> None:
        if self.came and not self.told and self.process is not None and self.process.poll() is None:
            self.told = True
            self.process.send_signal(signal.SIGINT)


def _result(code: int, folder: str | None, log: IO[str]) -> Launched:
    log.seek(0)
    text = log.read()
    errors = re.findall(r"^(?:\S+: )?error: (.*)$", text, re.M)  # ours, and argparse's "locust: error: ..."
    if code == 2 and errors:
        raise UserError(errors[-1])
    if folder is None:
        raise RuntimeError(
            f"the load process ended with {code} before a run began; the end of its log:\n{text[-3000:]}"
        )
    run = store.load(Path(folder))  # seals what there is when the load process was killed
    return Launched(code if code in (0, 3) else 3, run)
