"""Text files that commands write where the user says: whole or not at all."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from loadgen.edge.errors import UserError


def write(path: Path, body: str, remedy: str = "choose another --out") -> None:
    """Replaces a file in one step: a full disk leaves what was there, and no reader sees half. What is no file, such as
    /dev/stdout, is written to. Raises UserError, which ends in `remedy`."""
    target = path.resolve()
    part = target.with_name(f"{target.name}.part")
    try:
        if target.exists() and not target.is_file():
            target.write_text(body, encoding="utf-8")
        else:
            part.write_text(body, encoding="utf-8")
            part.replace(target)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}; {remedy}") from error
