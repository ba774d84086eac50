"""Room on a disk: looked at before much is written, and recognised where it ran out while writing."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from exporters.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_TEXTS = ("no space left", "disk quota exceeded", "storagefull")  # libraries in Rust raise types of their own


def size(count: float) -> str:
    """Bytes as `141.1 GB`, `1.4 MB` or `52.0 kB`."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if count >= unit), (1e3, "kB"))
    return f"{count / unit:.1f} {name}"


def require_space(
    folder: Path, needed: float, what: str, disk: str = "the disk of --out", remedy: str = "choose another --out"
) -> None:
    """A UserError where the disk that `folder` is (or will be) on has not `needed` bytes free."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(f"{what} needs {size(needed)}, {disk} has {size(free)} free; free some, or {remedy}")


def is_full(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, says that a disk is full."""
    return any(
        getattr(link, "errno", None) in FULL or any(text in str(link).lower() for text in FULL_TEXTS)
        for link in causes(error)
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and what it was raised from or while handling, each once."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__
