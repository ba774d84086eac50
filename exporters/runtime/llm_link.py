"""One engine process behind several instances of a Triton model. Runs inside Triton; imports nothing of this project.

One instance of a python model sends about 8,000 responses a second at most, and shares its interpreter with whatever
computes. So the engine has a process of its own, and the model as many instances as its answers need: the first one
starts the engine, all of them talk to it over a socket. The engine ends when the last instance has left.

Messages to the engine: ("submit", id, token ids, Prompt), ("cancel", id). Messages from it: (outputs, occupancy), and
before the first of these lines of text while it loads, then None when it is ready, or an Exception's text.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import TextIO

from devices import memory_explained, use_compile_cache
from llm_request import Output, Prompt
from llm_settings import MEMORY_SETTINGS

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CONNECT_S = 10.0
ENGINES = {  # settings.json's `engine` -> module beside this one and class in it
    "batching": ("llm_engine", "HostedEngine"),
    "slots": ("llm_slots", "SlotEngine"),
    "vllm": ("vllm_engine", "VllmEngine"),
    "tensorrtllm": ("trtllm_engine", "TrtllmEngine"),
}


class RemoteEngine:
    """The engine as a model instance sees it. `leads` is true for the instance that started it."""

    def __init__(self, folder: Path, settings: dict, device: str, name: str, tell: Callable[[str], None]) -> None:
        self.end_ids = list(settings["end_token_ids"])
        self._failure: str | None = None
        self._occupancy = (0, 0, 0.0)
        self._sending = threading.Lock()
        self._base = base = _meeting_place(name, device)
        with _alone(base / "lock") as note:
            if reason := note.read():  # another instance tried while this one waited: it would fail in the same way
                raise RuntimeError(reason)
            self._link = _join(base)
            self.leads = self._link is None
            if self.leads:
                try:
                    self._process, self._link = _lead(base, folder, settings, device, tell)
                except Exception as error:
                    note.write(str(error))
                    shutil.rmtree(base, ignore_errors=True)  # whoever waits has the note open
                    raise

    def submit(self, request_id: str, ids: list[int], prompt: Prompt) -> bool:
        return self._send(("submit", request_id, ids, prompt))

    def cancel(self, request_id: str) -> None:
        self._send(("cancel", request_id))

    def results(self, timeout_s: float) -> list[Output]:
        """One Output for each request that made progress; empty after `timeout_s`, or when the engine is gone. A slow
        reader gets several tokens of a request at once, so it catches up."""
        newest: dict[str, Output] = {}
        try:
            wait = timeout_s
            while self._link.poll(wait):
                outputs, self._occupancy = self._link.recv()
                for output in outputs:
                    known = newest.get(output.request_id)
                    if known is None:
                        newest[output.request_id] = output
                    else:
                        known.add(output.tokens, output.finished, output.error)
                wait = 0.0
        except (EOFError, OSError):
            self._failure = self._failure or "the engine process has ended; its reason is in Triton's log"
        return list(newest.values())

    def failure(self) -> str | None:
        return self._failure

    def occupancy(self) -> tuple[int, int, float]:
        return self._occupancy

    def stop(self, timeout_s: float) -> None:
        """Leave; the last instance to do so ends the engine. It cannot outlive the one that started it: where Triton
        ends that one first, the others have nothing to answer any more."""
        self._failure = self._failure or "the model is being unloaded"
        self._link.close()
        if self.leads:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
            self._process.kill()
            self._process.wait()
            shutil.rmtree(self._base, ignore_errors=True)  # a killed engine has left it

    def _send(self, message: tuple) -> bool:
        try:
            with self._sending:
                self._link.send(message)
        except (OSError, ValueError):
            return False
        return True


def _meeting_place(name: str, device: str) -> Path:
    """A private folder that all instances of one model on one device of one Triton find."""
    folder = Path(tempfile.gettempdir()) / f"tritonmark-{os.getppid()}-{name}-{device.replace(':', '')}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user; remove it")
    return folder


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[TextIO]:
    """One instance at a time; all get the same file, whose text is why the engine did not start."""
    with path.open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        yield lock


def _join(base: Path) -> Connection | None:
    """A connection to the engine, or None where there is none."""
    try:
        link = Client(str(base / "engine"), "AF_UNIX")
        return link if link.poll(_CONNECT_S) and link.recv() is None else None
    except (OSError, EOFError):
        return None


def _lead(base: Path, *start) -> tuple[subprocess.Popen, Connection]:
    """The engine process, started and ready, and a connection to it."""
    process = _start(base, *start)
    link = _join(base)
    if link is None:
        raise RuntimeError("the engine process ended while it was starting; see the log above")
    return process, link


def _start(base: Path, folder: Path, settings: dict, device: str, tell: Callable[[str], None]) -> subprocess.Popen:
    """Start the engine process and wait until it is ready; what it says meanwhile goes to `tell`."""
    order = {"base": str(base), "folder": str(folder), "settings": settings, "device": device}
    variables = dict(os.environ)
    use_compile_cache(folder.parent, variables)
    process = subprocess.Popen(
        [_interpreter(), str(Path(__file__).resolve())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=variables,
    )  # fmt: skip
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.close()
    reason = "it gave no reason"
    for line in process.stdout:
        kind, _, text = line.rstrip("\n").partition(" ")
        if kind == "ready":
            return process
        if kind == "failed":
            reason = text
        elif kind == "say":
            tell(text)
    raise RuntimeError(f"the engine process ended with code {process.wait()}: {reason}")


def _interpreter() -> str:
    """This environment's Python, unless the engine's libraries live in another one. Embedded in Triton's stub it may
    not know its own name; the stub's environment is that of the first python3 on PATH."""
    known = sys.executable if Path(sys.executable or "").name.startswith("python") else shutil.which("python3")
    return os.environ.get("TRITONMARK_ENGINE_PYTHON") or known or "python3"


# The engine's side ---------------------------------------------------------------------------------------------------


class _Guests:
    """The instances that are connected, and which request came from which."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._listener = Listener(str(base / "engine"), "AF_UNIX", backlog=64)
        self._links: list[Connection] = []
        self._owner: dict[str, Connection] = {}
        self._lock = threading.Lock()

    def serve(self, engine) -> None:
        """Accept instances, for ever; stop `engine` when the last one has left."""
        while True:
            link = self._listener.accept()
            with self._lock:
                self._links.append(link)
            link.send(None)
            threading.Thread(target=self._listen, args=(link, engine), daemon=True).start()

    def _listen(self, link: Connection, engine) -> None:
        try:
            while True:
                kind, request_id, *rest = link.recv()
                if kind == "submit":
                    with self._lock:
                        self._owner[request_id] = link
                    try:
                        engine.submit(request_id, *rest)
                    except Exception as error:  # this request fails; the instance has others
                        self.deliver([Output(request_id, [], True, f"{type(error).__name__}: {error}")], (0, 0, 0.0))
                else:
                    engine.cancel(request_id)
                    with self._lock:
                        self._owner.pop(request_id, None)
        except (EOFError, OSError):
            pass
        with self._lock:
            self._links.remove(link)
            lost = [request_id for request_id, owner in self._owner.items() if owner is link]
            for request_id in lost:
                del self._owner[request_id]
            alone = not self._links
        for request_id in lost:
            engine.cancel(request_id)
        if alone:
            engine.stop()

    def deliver(self, outputs: list[Output], occupancy: tuple[int, int, float]) -> None:
        """Each instance gets the outputs of its own requests in one message."""
        mail: dict[Connection, list[Output]] = {}
        with self._lock:
            for output in outputs:
                owner = self._owner.get(output.request_id)
                if owner is not None:
                    mail.setdefault(owner, []).append(output)
                    if output.finished:
                        del self._owner[output.request_id]
            links = list(self._links)
        for link in links:
            with contextlib.suppress(OSError):
                if link in mail or link is links[0]:  # the first one publishes the gauges
                    link.send((mail.get(link, []), occupancy))


def main() -> None:
    """The engine process: read the order, load, say when ready, run the batch loop."""
    order = json.loads(sys.stdin.readline())
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    talk = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries and the processes they start print must not break the protocol

    def say(kind: str, text: str = "") -> None:
        talk.write(f"{kind} {text}".replace("\n", " | ") + "\n")
        talk.flush()

    base = Path(order["base"])
    alive = (base / "alive").open("w")
    fcntl.flock(alive, fcntl.LOCK_EX)  # an engine that is just ending still holds the device's memory
    (base / "engine").unlink(missing_ok=True)
    started = time.monotonic()
    ranks = None
    try:
        if order["settings"].get("engine") == "batching" and order["settings"]["tp"] > 1:
            ranks = importlib.import_module("llm_ranks")
            others = ranks.lead(order)
        module, name = ENGINES[order["settings"]["engine"]]
        engine_class = getattr(importlib.import_module(module), name)

        guests: list[_Guests] = []
        with memory_explained(MEMORY_SETTINGS):
            engine = engine_class(
                Path(order["folder"]), order["settings"], order["device"],
                deliver=lambda outputs, occupancy: guests[0].deliver(outputs, occupancy),
                tell=lambda text: say("say", f"{text} ({time.monotonic() - started:.1f} s)"),
            )  # fmt: skip
    except Exception as error:
        say("failed", f"{type(error).__name__}: {error}")
        sys.exit(1)
    guests.append(_Guests(base))
    threading.Thread(target=guests[0].serve, args=(engine,), daemon=True).start()
    say("ready")
    talk.close()
    code = 1
    try:
        engine.run()
        code = 0
    except Exception:
        traceback.print_exc()
        if ranks is not None:
            ranks.name_ended(others, 1.0)
    finally:
        shutil.rmtree(base, ignore_errors=True)
        os._exit(code)  # daemon threads may hold the interpreter up


if __name__ == "__main__":
    main()
