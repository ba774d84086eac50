"""One finding about a run, as verdicts and cautions give it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """A finding: a stable code, what was seen, the limit, and what to do about it."""

    code: str
    seen: str
    limit: str
    advice: str
