"""The servers of one run, `--host http://a:8000,http://b:8000`: the same model on all, and how slots are shared out."""

from __future__ import annotations

from typing import Any

from loadgen.core.split import pattern
from loadgen.edge.clients.triton_probe import probe
from loadgen.edge.errors import UserError
from loadgen.edge.hardware import is_local

MOST_TURNS = 1000
ALIKE = ("version", "backend", "decoupled", "parameters")  # of the probe: else two things would be measured as one


def urls(host: str | None) -> list[str]:
    """The addresses in `--host`. Raises UserError where one is given twice."""
    found = [part.strip().rstrip("/") for part in (host or "").split(",") if part.strip()] or [""]
    if twice := next((url for url in found if found.count(url) > 1), None):
        raise UserError(f"--host names {twice} twice; give each server once, and --split for unequal shares")
    return found


def shares(split: str | None, servers: int) -> list[int]:
    """The shares in `--split`, equal ones by default. Raises UserError."""
    if not split:
        return [1] * servers
    parts = [part.strip() for part in split.split(",")]
    if len(parts) != servers or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(
            f"--split is {split!r}; give each of the {servers} servers in --host a whole number above 0, such as 2,1"
        )
    if sum(map(int, parts)) > MOST_TURNS:
        raise UserError(f"--split is {split!r}; its numbers may add up to {MOST_TURNS} at most")
    return [int(part) for part in parts]


def ask(host: str | None, model: str, split: str | None) -> tuple[dict[str, Any], list[dict[str, Any]], list[int]]:
    """What the first server says, a line for each server where there are several, and whose turn each slot is.

    Raises UserError for a server that is not there, or is unlike the first one.
    """
    where = urls(host)
    weights = shares(split, len(where))
    found = [probe(url, model) for url in where]
    for url, other in zip(where[1:], found[1:], strict=True):
        for name in ALIKE:
            if other[name] != found[0][name]:
                first, second = (_short(x[name], y[name]) for x, y in ((found[0], other), (other, found[0])))
                raise UserError(f"{where[0]} and {url} serve {model} with different {name} ({first} and {second}): "
                                "measure unlike servers in runs of their own, and compare those")  # fmt: skip
    rows = [{"url": url, "share": share} for url, share in zip(where, weights, strict=True)]
    return {"url": where[0], **found[0]}, rows if len(rows) > 1 else [], pattern(weights)


def farthest(host: str | None) -> str:
    """The server whose hardware is asked for: one elsewhere, where there is one, since it is not this machine's."""
    where = urls(host)
    return next((url for url in where if not is_local(url)), where[0])


def _short(mine: Any, other: Any) -> str:
    """A value; of two dictionaries only what differs."""
    if isinstance(mine, dict) and isinstance(other, dict):
        return ", ".join(f"{k} {mine.get(k)!r}" for k in sorted(mine.keys() | other) if mine.get(k) != other.get(k))
    return repr(mine)
