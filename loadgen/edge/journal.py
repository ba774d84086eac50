"""The journal of a search or sweep: a file that is replaced as a whole after each probe, and belongs to one process.

It is `<results>/<kind>-<key>.json`; the key is a hash of all that decides what a probe means, so the same command finds
it again. While a command works on it, a lock lies on `<kind>-<key>.lock`; the system takes it off when the process
ends, however it ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadgen.edge.errors import UserError
from loadgen.edge.store import write_json


@dataclass
class Journal:
    """Entries of one search or sweep, on disk after each `append`. `facts` is what makes it this one and no other."""

    path: Path
    facts: dict[str, Any]
    entries: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def held(cls, kind: str, results: Path, facts: dict[str, Any], restart: bool = False) -> Iterator[Journal]:
        """`open`, for this process alone. Raises UserError where another process works on it."""
        with _alone(path_of(kind, results, facts).with_suffix(".lock"), kind):
            yield cls.open(kind, results, facts, restart)

    @classmethod
    def open(cls, kind: str, results: Path, facts: dict[str, Any], restart: bool = False) -> Journal:
        """The journal of these facts, with what it holds; empty where there is none. `restart` moves the old aside."""
        path = path_of(kind, results, facts)
        journal = cls(path, json.loads(_text(facts)))
        if restart and path.exists():
            aside = (path.with_suffix(f".{n}.old") for n in range(1, 10_000))
            path.rename(next(p for p in aside if not p.exists()))
        if path.exists():
            try:
                document = json.loads(path.read_text(encoding="utf-8"))
                journal.entries, journal.notes = document["entries"], document["notes"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} is damaged ({error}); --restart begins anew") from error
        return journal

    def append(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        self.save()

    def save(self) -> None:
        """Replaces the file as a whole. Raises UserError where it cannot be written."""
        document = {"facts": self.facts, "notes": self.notes, "entries": self.entries}
        partial = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(partial, document)
            partial.replace(self.path)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; choose another --results") from error


def path_of(kind: str, results: Path, facts: dict[str, Any]) -> Path:
    return results / f"{kind}-{hashlib.sha256(_text(facts).encode()).hexdigest()[:12]}.json"


def _text(facts: dict[str, Any]) -> str:
    return json.dumps(facts, sort_keys=True, default=str)


@contextmanager
def _alone(path: Path, kind: str) -> Iterator[None]:
    """Holds a lock on `path` while inside, and removes the file at the end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = path.open("a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise UserError(
                    f"another {kind} with these options is going on ({path} is locked): wait for it or stop it"
                ) from None
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break
            file.close()  # its holder removed it between our opening and our locking it
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --results") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
