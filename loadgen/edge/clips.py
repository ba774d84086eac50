"""The first videos of a run, kept beside it: `clips/<slot>.jpg`, a contact sheet, and `clips/<slot>.json`, its prompt
and what the server said of its stages. A handful of files, at most 1 MB each; pictures, not measurements: a run is
complete without them.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadgen.core.record import Record

FOLDER = "clips"
MAX_CLIPS = 16


@dataclass(frozen=True)
class StoredClip:
    """One kept video: its slot number, prompt, contact sheet, and the server's figures (seconds, bytes, counts)."""

    seq: int
    prompt: str
    sheet: Path
    facts: dict[str, Any]


def pack_clips(records: list[Record], texts: list[str]) -> list[dict[str, Any]]:
    """Kept clips of finished records as plain types, for the message to the conductor."""
    return [{"seq": r.seq, "prompt": texts[r.sample], "jpeg": r.clip.jpeg, "facts": r.clip.facts}
            for r in records if r.clip is not None]  # fmt: skip


def write_clips(folder: Path, clips: list[dict[str, Any]]) -> None:
    """Stores clips beside the run in `folder`. A full disk costs the pictures, never the run."""
    target = folder / FOLDER
    for clip in clips:
        name = f"{int(clip['seq']):03d}"
        with contextlib.suppress(OSError):
            target.mkdir(exist_ok=True)
            (target / f"{name}.jpg").write_bytes(clip["jpeg"])
            told = {"seq": clip["seq"], "prompt": clip["prompt"], "facts": clip["facts"]}
            (target / f"{name}.json").write_text(json.dumps(told, indent=1, ensure_ascii=False), encoding="utf-8")


def read_clips(folder: Path) -> list[StoredClip]:
    """The kept clips of a run in slot order; none where it kept none. What is not readable is passed over."""
    found = []
    for path in sorted((folder / FOLDER).glob("*.json"))[:MAX_CLIPS]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(path.read_text(encoding="utf-8"))
            sheet = path.with_suffix(".jpg")
            if sheet.is_file():
                found.append(StoredClip(int(told["seq"]), str(told["prompt"]), sheet, dict(told["facts"])))
    return found
