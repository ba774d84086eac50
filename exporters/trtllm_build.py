"""Runs the steps of a plan, and skips those that are done: after a failure a build goes on where it stopped.

A step is done when its stamp holds the digest of all that went into it (its command, what it reads, every step
before) and what it makes is there. Two builds of one thing wait for each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from exporters.errors import UserError
from exporters.trtllm_plan import Step

TELL_S = 30.0  # between two lines of progress of one step
DOCKER_FAILED = 125  # the code of `docker run` for what went wrong before the command ran
_HINTS = ("Run 'docker", "See 'docker")  # what docker's own messages end with


def default_cache() -> Path:
    """Where finished steps are kept: it survives the export and is safe to delete."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tritonmark" / "trtllm"


def work_path(cache: Path, name: str, identity: Mapping[str, object]) -> Path:
    """The folder for what `identity` describes, the same one each time; it need not exist."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return (cache.expanduser() / f"{name}-{digest}").absolute()


@contextlib.contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """`folder`, made and held alone while the block runs."""
    try:
        for part in ("logs", "parts", "stamps"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise UserError(
            f"cannot write to {folder.parent} ({error.strerror}); choose another folder with --build-cache"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def run_steps(
    steps: list[Step], work: Path, inputs: str, tell: Callable[[str], None], after: Mapping[str, Callable[[], None]]
) -> None:
    """Run what is not done yet. `inputs` stands for what the first step reads besides its command; `after` has what is
    called once a step is done, now or before, and may end the build by a UserError before the long steps.

    A step that fails is a UserError with the last line of its log; what was finished before stays.
    """
    digest, fresh = hashlib.sha256(inputs.encode()).hexdigest(), False
    for number, step in enumerate(steps, start=1):
        digest = _digest(digest, step, work)
        stamp = work / "stamps" / step.name
        label = f"step {number}/{len(steps)} {step.name}"
        done = stamp.is_file() and stamp.read_text() == digest
        if done and not fresh and all((work / path).exists() for path in step.makes):
            tell(f"{label}: done before")
            if check := after.get(step.name):
                check()
            continue
        fresh = True  # what comes after is made anew too
        stamp.unlink(missing_ok=True)
        started = time.monotonic()
        _run(step, work / "logs" / f"{step.name}.log", label, tell)
        missing = [path for path in step.makes if not (work / path).exists()]
        if missing:
            raise UserError(f"{label} ended well but made no {missing[0]}; its log is {work / 'logs' / step.name}.log")
        stamp.write_text(digest)
        tell(f"{label}: {time.monotonic() - started:.1f} s")
        if check := after.get(step.name):
            check()


def _digest(before: str, step: Step, work: Path) -> str:
    command = [word.replace(str(work), "WORK") for word in step.command]
    parts = [before, step.name, *command, *(_listing(step.reads) if step.reads else ())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _listing(folder: Path) -> list[str]:
    """Names, sizes and times: the content of 140 GB is too long to hash."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [f"{path.relative_to(folder)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]


def _run(step: Step, log: Path, label: str, tell: Callable[[str], None]) -> None:
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(step.command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        except OSError as error:
            raise UserError(f"{label}: cannot start {step.command[0]} ({error.strerror}); install it") from None
        tell(f"{label}: {log}")
        started = told = time.monotonic()
        try:
            while process.poll() is None:
                time.sleep(0.05 if time.monotonic() - started < 2 else 1.0)
                if time.monotonic() - told > TELL_S:
                    told = time.monotonic()
                    tell(f"{label}: {told - started:.0f} s, {_last_line(log)}")
        except BaseException:
            process.terminate()  # docker hands it on to the container
            process.wait()
            raise
    if process.returncode == DOCKER_FAILED and step.command[0] == "docker":
        raise UserError(
            f"{label}: docker could not start the container: {_last_line(log).removeprefix('docker: ')} (log: {log})"
        )
    if process.returncode:
        raise UserError(
            f"{label} failed with code {process.returncode}: {_last_line(log)} (log: {log});"
            " finished steps are kept, so the same command goes on from here"
        )


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode("utf-8", "replace").split("\n")
    told = (line.strip()[:200] for line in reversed(lines) if line.strip() and not line.startswith(_HINTS))
    return next(told, "nothing in the log")


def place(work: Path, version: Path, names: tuple[str, ...]) -> None:
    """Put what was built into the version folder: by hard links where that is possible, for an engine may be 140 GB."""
    for name in names:
        shutil.copytree(work / name, version / name, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
