"""Files on disk: a model appears in the repository complete or not at all. Its one rule: stage, hash, rename.

<out>/<name>/config.pbtxt  manifest.json  1/model.py ...
<out>/../.tritonmark-staging-XXXX/<name>/...   while it is being written: beside <out>, because a Triton that polls
                                               <out> takes every folder in it for a model; within <out> where beside it
                                               nothing can be written or is another disk. Holds a lock; what a crash
                                               leaves is swept by the next export.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from exporters.errors import UserError

RUNTIME = Path(__file__).with_name("runtime")
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
STAGING_PREFIX = ".tritonmark-staging-"
MANIFEST = "manifest.json"
OWN_FIELDS = {"manifest_version", "model", "files"}  # of every manifest that an export wrote
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # fcntl.h


def check_name(name: str) -> str:
    """`name` if it may be a Triton model name and a folder: no separators, no leading dot, plain ASCII."""
    if not NAME_PATTERN.fullmatch(name):
        raise UserError(
            f"bad model name {name!r}: use letters, digits, '.', '_' and '-', starting with a letter or digit"
        )
    return name


def hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """`{relative path: {sha256, size_bytes}}` of every file under `folder` but the manifest, sorted by path."""
    hashes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        relative = path.relative_to(folder).as_posix()
        if relative == MANIFEST:
            continue
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        hashes[relative] = {"sha256": digest, "size_bytes": path.stat().st_size}
    return hashes


@contextlib.contextmanager
def import_path(folder: Path = RUNTIME) -> Iterator[None]:
    """Import the runtime's modules the way Triton does: by their bare names, from their own folder."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def copy_runtime(version: Path, model: str, names: Iterable[str]) -> None:
    """`runtime/<model>.py` as `version/model.py`, and the modules `names` beside it under their own names."""
    shutil.copyfile(RUNTIME / f"{model}.py", version / "model.py")
    for name in names:
        shutil.copyfile(RUNTIME / f"{name}.py", version / f"{name}.py")


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write `manifest.json` with `facts`, the UTC time and the hashes of all files; returns what was written."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    manifest = {"manifest_version": 1, **facts, "created_utc": created, "files": hash_files(folder)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an exported model, or a UserError."""
    path = folder / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; export the model with `tritonmark export`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); move {folder} away and export the model again") from None


@contextlib.contextmanager
def staged(out: Path, name: str, force: bool = False) -> Iterator[Path]:
    """A new folder to fill; when the block ends well it becomes `out/name`, else it vanishes, on SIGTERM too.

    An existing target is a UserError, or with `force` is exchanged in one step, so that a reader sees the old
    model or the new one; a folder that no export wrote is never replaced. Of two exports of one name that run at once,
    the first to finish wins.
    """
    target = out / check_name(name)
    check = _refuse_foreign if force else _refuse_existing
    check(target)
    with _ended_in_order():
        try:
            out.mkdir(parents=True, exist_ok=True)
            staging, lock = _make_staging(out.resolve())
        except OSError as error:
            raise UserError(f"cannot write to {out} ({error.strerror}); choose another folder with --out") from None
        try:
            folder = staging / name
            folder.mkdir()
            yield folder
            for path in folder.rglob("*"):  # safetensors makes files for their owner only; Triton may be another
                path.chmod(0o755 if path.is_dir() else 0o644)
            _publish(folder, target, force)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            lock.close()


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit, so that what is half made is removed. Those that somebody handles already
    are left alone, and all of them outside the main thread, where Python cannot handle them."""
    numbers = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    caught = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in caught:
            signal.signal(number, _end)
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a second one must not cut the cleaning short
    raise SystemExit(128 + number)


def _make_staging(out: Path) -> tuple[Path, IO[str]]:
    """A new staging folder, from which a rename to `out` is possible, and its lock, held."""
    try:
        return _staging_in(out.parent, out)
    except OSError:
        return _staging_in(out, out)


def _staging_in(home: Path, out: Path) -> tuple[Path, IO[str]]:
    with _alone_in(home):  # or another export could sweep the new folder away before its lock is held
        _sweep(home)
        staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=home))
        lock = (staging / "lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    probe = out / f"{staging.name}.probe"  # a file: no poll takes it for a model
    try:
        (staging / "probe").touch()
        (staging / "probe").rename(probe)  # equal device numbers do not say that a rename is possible: bind mounts
        probe.unlink()
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)
        lock.close()
        raise
    return staging, lock


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Only one process at a time is inside, for one folder. The lock is on the folder itself, so it leaves no file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists; pass --force to replace it or --name for another name")


def _refuse_foreign(target: Path) -> None:
    """A UserError unless nothing is lost when `target` is replaced: it is an export, empty, or not there."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target} is not a folder, so --force does not replace it; remove it by hand")
    if target.is_dir() and not _is_export(target) and any(target.iterdir()):
        raise UserError(
            f"{target} was not written by an export (no {MANIFEST} of one), so --force does not replace it; move it"
            " away, or choose another --name"
        )


def _is_export(folder: Path) -> bool:
    try:
        return set(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))) >= OWN_FIELDS
    except (OSError, ValueError, TypeError):
        return False


def _sweep(home: Path) -> None:
    """Remove what crashed exports left: a staging folder whose lock nobody holds. To be called alone in `home`, where
    every export takes its lock before it lets another in."""
    for staging in home.glob(f"{STAGING_PREFIX}*/"):
        try:
            with (staging / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(staging, ignore_errors=True)
        except OSError:
            continue  # in use by another export, or of another user


def _publish(folder: Path, target: Path, force: bool) -> None:
    """Rename `folder` to `target`. With `force` the old one ends up in the staging folder, which is removed."""
    try:
        os.rename(folder, target)  # noqa: PTH104 (os.rename refuses a folder that is not empty; so may others)
        return
    except OSError:
        if not force:
            _refuse_existing(target)
            raise
    _refuse_foreign(target)
    if _exchange(folder, target):
        return
    replaced = folder.with_name("replaced")  # a file system without exchange: two renames, a short gap between them
    target.rename(replaced)
    try:
        folder.rename(target)
    except BaseException:  # also a signal: the old one must not go down with the staging folder
        replaced.rename(target)
        raise


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step with Linux's renameat2; False where it is not available."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    return libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0
