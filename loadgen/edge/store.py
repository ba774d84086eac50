"""Results on disk: rows are written while running and sealed at the end; nothing is ever overwritten.

While a run is going its folder holds `start.json` (what was started, by whom) and `records.arrows`, an Arrow stream to
which a batch of rows is appended several times a second. Sealing turns the stream into `records.parquet`, adds
`run.json` last, and only then removes the first two. So a folder with `run.json` is sealed; any other is a run that
was cut off, and `recover` seals what it has as INVALID.

    results/<hardware>/<model>/<backend>-<precision>/<scenario>/<run id>/{run.json,records.parquet}
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from loadgen.core.metrics import Summary, select, summarise
from loadgen.core.reason import Reason
from loadgen.core.record import NEVER, OUTCOMES, SCHEMA, SCHEMA_VERSION, Phase, Record, Rows
from loadgen.core.scenario import Scenario
from loadgen.core.verdict import Audit, judge
from loadgen.edge.errors import UserError
from loadgen.edge.telemetry_table import SERVER_TABLE, STREAM, TABLE, conclude

_TYPES = {"int64": pa.int64(), "int32": pa.int32(), "int16": pa.int16(), "string": pa.string(),
          "list<int64>": pa.list_(pa.int64()), "list<int32>": pa.list_(pa.int32())}  # fmt: skip
_OUTCOMES = pa.array([o.value for o in OUTCOMES])
ARROW_SCHEMA = pa.schema([pa.field(c.name, _TYPES[c.type], metadata={"meaning": c.meaning}) for c in SCHEMA])
# Sealing leaves none of these; `records.parquet` has a checksum of its own.
_UNSEALED = ("start.json", "records.arrows", "records.parquet.tmp", "run.json.tmp", STREAM)
M_MMAP_THRESHOLD = -3  # malloc.h
DICTIONARIES = ["phase", "outcome", "error"]  # columns that repeat; for the others a dictionary is only memory
GROUP_VALUES = 200_000  # rows + responses of one Parquet row group: bounds memory while sealing and reading


def pack(records: list[Record]) -> pa.RecordBatch:
    """Records as one Arrow batch. The arrays of chunk times are joined bytewise: no Python object a token."""
    columns = []
    offsets = np.concatenate([[0], np.cumsum([len(r.chunk_ns) for r in records])]).astype(np.int32)
    for column in SCHEMA:
        values = [getattr(r, column.name) for r in records]
        if column.type.startswith("list"):
            item = np.int64 if column.name == "chunk_ns" else np.int32
            flat = np.frombuffer(b"".join(v.tobytes() for v in values), dtype=item)
            columns.append(pa.ListArray.from_arrays(offsets, pa.array(flat)))
        else:
            columns.append(pa.array(values, type=_TYPES[column.type]))
    return pa.RecordBatch.from_arrays(columns, schema=ARROW_SCHEMA)


def to_rows(table: pa.Table) -> Rows:
    """An Arrow table with the columns of `SCHEMA` as numpy columns; null becomes `NEVER`."""
    table = table.combine_chunks()
    out: dict[str, Any] = {}
    for name in {f.name for f in fields(Rows)} & {c.name for c in SCHEMA} - {"chunk_ns", "chunk_tokens", "outcome"}:
        if name in table.column_names:  # asked_in and server came later than the first sealed runs
            out[name] = table[name].cast(pa.int64()).fill_null(NEVER).to_numpy()
        else:
            out[name] = np.full(len(table), 0 if name == "server" else NEVER, dtype=np.int64)
    out["measured"] = pc.equal(table["phase"], Phase.MEASURE.value).to_numpy()
    out["outcome"] = pc.index_in(table["outcome"], value_set=_OUTCOMES).cast(pa.int8()).to_numpy()
    lengths = table["chunk_ns"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    out["chunk_offsets"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    out["chunk_ns"] = table["chunk_ns"].combine_chunks().flatten().to_numpy()
    out["chunk_tokens"] = table["chunk_tokens"].combine_chunks().flatten().cast(pa.int64()).to_numpy()
    return Rows(**out)


def new_folder(root: Path, parts: Iterable[str], run_id: str) -> Path:
    """Makes `root/parts…/run_id`, with `-2`, `-3` … behind an id that is taken. Raises UserError where it cannot."""
    parent = root.joinpath(*(slug(p) for p in parts))
    for n in range(1, 1000):
        folder = parent / (run_id if n == 1 else f"{run_id}-{n}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot write results to {root}: {error.strerror}; choose another --results") from error
        return folder
    raise UserError(f"{parent} holds 1000 runs named {run_id}; choose another --results")


def slug(text: str) -> str:
    """A folder name: lower case, digits, dots and dashes; never empty, never a path."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "unknown"


class RunWriter:
    """Appends batches to an open run folder. `write` never raises: a full disk is remembered in `broken`."""

    def __init__(self, folder: Path, start: dict[str, Any]) -> None:
        self.folder = folder
        self.rows = 0
        self.broken: str | None = None
        try:
            write_json(folder / "start.json", start | {"pid": os.getpid()})
            self._file = (folder / "records.arrows").open("wb", buffering=0)
            self._stream = pa.ipc.new_stream(self._file, ARROW_SCHEMA)
        except OSError as error:
            raise UserError(
                f"cannot write to {folder}: {error.strerror}; free space or choose another --results"
            ) from error

    def write(self, batch: pa.RecordBatch) -> None:
        """Appends one batch; the file is unbuffered, so a killed process loses only what it had not handed over."""
        if self.broken:
            return
        try:
            self._stream.write_batch(batch)
            self.rows += batch.num_rows
        except OSError as error:
            self.broken = f"rows could not be written: {error.strerror or error}"

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.close()
        self._file.close()


def return_freed_memory() -> None:
    """Has glibc give arrays back when they are freed. By itself it raises this bound with use, and keeps them."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 18)


def stream_tables(path: Path) -> Iterator[pa.Table]:
    """Whole batches of an Arrow stream file, grouped to bounded size; stops quietly at a torn last batch."""
    pending: list[pa.RecordBatch] = []
    values = groups = 0
    if path.stat().st_size:
        with path.open("rb") as file, contextlib.suppress(pa.ArrowInvalid, OSError):
            for batch in pa.ipc.open_stream(file):
                pending.append(batch)
                values += batch.num_rows + len(batch.column("chunk_ns").flatten())
                if values >= GROUP_VALUES:
                    yield pa.Table.from_batches(pending)
                    pending, values, groups = [], 0, groups + 1
    if pending or not groups:
        yield pa.Table.from_batches(pending, schema=ARROW_SCHEMA)


Assess = Callable[[Path, Scenario], tuple[dict[str, Any], list[Reason]]]


def seal(
    folder: Path, document: dict[str, Any], scenario: Scenario, make_audit: Callable[[Rows], Audit],
    assess: Assess | None = None,
) -> Run:  # fmt: skip
    """Turns the streamed rows into `records.parquet` and writes `run.json` with summary and verdict.

    `make_audit` gets the measured rows. Raises UserError, and leaves the stream in place, when the disk is
    full; `recover` can seal the folder once there is room.
    """
    parquet, partial = folder / "records.parquet", folder / "records.parquet.tmp"
    held = contextlib.ExitStack()
    try:
        held.enter_context((folder / "records.arrows").open("rb"))  # so that `_alive` sees a run that is being sealed
        return_freed_memory()
        with pq.ParquetWriter(partial, ARROW_SCHEMA, compression="zstd", use_dictionary=DICTIONARIES) as writer:

            def copied() -> Iterator[Rows]:
                for table in stream_tables(folder / "records.arrows"):
                    writer.write_table(table)
                    yield to_rows(table)
                    del table
                    pa.default_memory_pool().release_unused()

            summary, rows = summarise(copied(), scenario, len(document.get("servers") or [0]))
        audit = make_audit(rows)
        verdict = judge(summary, rows, scenario, audit)
        measured: dict[str, Any] = {}
        if (folder / STREAM).is_file():
            measured, remarks = conclude(folder, document, scenario, summary, rows)
            verdict = replace(verdict, cautions=(*verdict.cautions, *remarks))
        if assess:  # accuracy mode
            summary["accuracy"], more = assess(folder, scenario)
            verdict = replace(verdict, reasons=(*verdict.reasons, *more))
        sealed = (
            document
            | measured
            | {
                "schema": SCHEMA_VERSION,
                "scenario": scenario.to_json(),
                "audit": audit.to_json(),
                "summary": summary,
                "verdict": verdict.to_json(),
                "records": {"rows": pq.read_metadata(partial).num_rows, "sha256": sha256(partial)},
                "files": {
                    p.name: sha256(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name not in _UNSEALED
                },
            }
        )
        sealed["seal"] = digest(sealed)
        write_json(folder / "run.json.tmp", sealed)
        partial.rename(parquet)
        (folder / "run.json.tmp").rename(folder / "run.json")
    except OSError as error:
        for path in (partial, folder / "run.json.tmp", folder / TABLE, folder / SERVER_TABLE):
            path.unlink(missing_ok=True)
        raise UserError(
            f"could not seal {folder}: {error.strerror or error}; its rows are safe in records.arrows: "
            f"free space, then `tritonmark report {folder}` seals it"
        ) from error
    finally:
        held.close()
    for name in ("records.arrows", "start.json", STREAM):
        (folder / name).unlink(missing_ok=True)
    return Run(folder, json.loads(json.dumps(sealed)))  # as a reader of the file would see it


@dataclass(frozen=True)
class Run:
    """A sealed run: its folder and the document of `run.json`."""

    folder: Path
    document: dict[str, Any]

    @property
    def scenario(self) -> Scenario:
        return Scenario.from_json(self.document["scenario"])

    @property
    def summary(self) -> Summary:
        summary: Summary = self.document["summary"]
        return summary

    @property
    def valid(self) -> bool:
        return bool(self.document["verdict"]["valid"])

    def tables(self) -> Iterator[pa.Table]:
        """The rows, one Parquet row group at a time."""
        file = pq.ParquetFile(self.folder / "records.parquet")
        for index in range(file.num_row_groups):
            yield file.read_row_group(index)

    def rows(self) -> Iterator[Rows]:
        """Measured rows, one Parquet row group at a time."""
        for table in self.tables():
            rows = to_rows(table)
            yield select(rows, rows.measured)


def load(folder: Path) -> Run:
    """Reads a sealed run; seals one that was cut off and whose process is gone. Raises UserError for anything else."""
    try:
        document = json.loads((folder / "run.json").read_text())
        if document["schema"] != SCHEMA_VERSION:
            raise UserError(f"{folder} has schema {document['schema']}, this tool reads {SCHEMA_VERSION}")
        if not (folder / "records.parquet").is_file():
            raise UserError(f"{folder} has no records.parquet: the run is incomplete")
        run = Run(folder, document)
        verify(run)
        return run
    except FileNotFoundError:
        if (folder / "start.json").is_file():
            return recover(folder)
        raise UserError(
            f"{folder} is not a run: it has no run.json; give a folder that `tritonmark run` made"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'run.json'} is not readable ({error}); the file is damaged") from error


def recover(folder: Path) -> Run:
    """Seals the rows of a run whose recorder died, as INVALID `cut_off`. Raises UserError while it is still running."""
    start = json.loads((folder / "start.json").read_text())
    pid = start.pop("pid")
    if pid != os.getpid() and _alive(pid, folder):
        raise UserError(f"{folder} is still being recorded by process {pid}; wait for it or stop it")
    scheduled = start.pop("scheduled", 0)
    ended = "the load generator died before it could seal the run"
    scenario = Scenario.from_json(start.pop("scenario"))
    from loadgen.edge.comparison import assess  # accuracy mode only, and that part knows this one

    return seal(
        folder, start, scenario,
        lambda rows: Audit((), start.get("workers", 1), max(scheduled, len(rows)), len(rows), 0.0, ended=ended),
        assess if scenario.keep_outputs else None,
    )  # fmt: skip


def _alive(pid: int, folder: Path) -> bool:
    """Is that process alive and does it hold the stream open? (A pid may have been given to another process.)"""
    links = Path(f"/proc/{pid}/fd")
    try:
        return any(os.path.realpath(link) == str((folder / "records.arrows").resolve()) for link in links.iterdir())
    except OSError:
        return False


def verify(run: Run) -> None:
    """Raises UserError when `records.parquet` is not the file that was sealed."""
    if sha256(run.folder / "records.parquet") != run.document["records"]["sha256"]:
        raise UserError(f"{run.folder / 'records.parquet'} was changed after the run was sealed: its checksum differs")


def verify_all(run: Run) -> None:
    """Raises UserError when `run.json`, or a file that was beside it, is not what was sealed.

    Runs that were sealed before these checksums existed pass; `verify`, which every load does, has their rows. So do
    those that counted the telemetry's stream, which sealing turns into tables and removes.
    """
    if run.document.get("seal", expected := digest(run.document)) != expected:
        raise UserError(f"{run.folder / 'run.json'} was changed after the run was sealed: its checksum differs")
    for name, checksum in run.document.get("files", {}).items():
        path = run.folder / name
        if name in _UNSEALED:
            continue
        if not path.is_file():
            raise UserError(f"{path} is missing: it was sealed with the run")
        if sha256(path) != checksum:
            raise UserError(f"{path} was changed after the run was sealed: its checksum differs")


def digest(document: dict[str, Any]) -> str:
    """Checksum of a sealed document without its own `seal`, whatever its layout in the file."""
    plain = json.loads(json.dumps({k: v for k, v in document.items() if k != "seal"}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes and syncs JSON; NaN and infinity are refused, since no other tool could read them."""
    with path.open("w") as file:
        json.dump(document, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
