"""Accuracy mode's files: answers streamed beside the rows, and the reference that they are compared with.

`accuracy.arrows` grows while the run goes, like the rows, and becomes `accuracy.parquet` (seq, sample, text, token_ids)
when the run is sealed, also when it is sealed late, after a crash. A reference is JSONL with `prompt`, `token_ids` and,
if wanted, `output`; an export has one. `edge/comparison.py` compares the two.
"""

from __future__ import annotations

import contextlib
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from loadgen.core.record import Outcome, Phase, Record
from loadgen.edge.errors import UserError

ANSWERS = pa.schema(
    [("seq", pa.int64()), ("sample", pa.int64()), ("text", pa.string()), ("token_ids", pa.list_(pa.int32()))]
)
STREAM, NAME = "accuracy.arrows", "accuracy.parquet"
GROUP_ROWS = 1024  # answers of one Parquet row group, and how many are in memory at once


def pack_answers(records: list[Record]) -> bytes:
    """Answers of completed measured records as one Arrow batch; empty where there are none."""
    rows = [
        {"seq": r.seq, "sample": r.sample, "text": "".join(r.answer.text), "token_ids": list(r.answer.token_ids)}
        for r in records
        if r.answer is not None and r.outcome is Outcome.OK and r.phase is Phase.MEASURE
    ]
    return pa.RecordBatch.from_pylist(rows, schema=ANSWERS).serialize().to_pybytes() if rows else b""


class AnswerWriter:
    """Appends answers to the open run. `write` never raises: a full disk is remembered in `broken`."""

    def __init__(self, folder: Path) -> None:
        self.broken: str | None = None
        try:
            self._file = (folder / STREAM).open("wb", buffering=0)
            self._stream = pa.ipc.new_stream(self._file, ANSWERS)
        except OSError as error:
            raise UserError(
                f"cannot write answers to {folder}: {error.strerror or error}; free space or choose another --results"
            ) from error

    def write(self, packed: bytes) -> None:
        """Appends one worker's batch."""
        if self.broken:
            return
        try:
            self._stream.write_batch(pa.ipc.read_record_batch(pa.py_buffer(packed), ANSWERS))
        except OSError as error:
            self.broken = f"answers could not be written: {error.strerror or error}"

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.close()
        self._file.close()


def finish(folder: Path) -> None:
    """Turns the stream of answers, as far as it is whole, into Parquet. Raises OSError and keeps it on a full disk."""
    stream, partial = folder / STREAM, folder / f"{NAME}.tmp"
    if not stream.is_file():
        return
    try:
        with pq.ParquetWriter(partial, ANSWERS) as out:
            for table in _tables(stream):
                out.write_table(table)
        partial.rename(folder / NAME)
    finally:
        partial.unlink(missing_ok=True)
    stream.unlink()


def _tables(stream: Path) -> Iterator[pa.Table]:
    """Whole batches, grouped; stops quietly at a torn last one, which a killed recorder leaves."""
    pending: list[pa.RecordBatch] = []
    with stream.open("rb") as file, contextlib.suppress(pa.ArrowInvalid, OSError):
        for batch in pa.ipc.open_stream(file):
            pending.append(batch)
            if sum(b.num_rows for b in pending) >= GROUP_ROWS:
                yield pa.Table.from_batches(pending)
                pending = []
    if pending:
        yield pa.Table.from_batches(pending)


def answers(folder: Path) -> Iterator[dict[str, Any]]:
    """The kept answers of a sealed run, in order of completion; none where the run kept none."""
    if (folder / NAME).is_file():
        for batch in pq.ParquetFile(folder / NAME).iter_batches(GROUP_ROWS):
            yield from batch.to_pylist()


def read_reference(path: Path) -> dict[str, array[int]]:
    """Token ids by prompt. Raises UserError naming file and line; a prompt that has two answers is refused as well."""
    found: dict[str, array[int]] = {}
    number = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                prompt, ids = row["prompt"], row["token_ids"]
                if not isinstance(prompt, str) or not ids or not all(type(token) is int for token in ids):
                    raise UserError(
                        f"{path} line {number}: expected a prompt (text) and token_ids (at least one whole number)"
                    )
                if found.setdefault(prompt, array("i", ids)) != array("i", ids):
                    raise UserError(f"{path} line {number}: this prompt has other token_ids in an earlier line")
    except OSError as error:
        raise UserError(f"cannot read the reference {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(f"{path} line {number}: expected an object with prompt and token_ids; see `export`") from None
    if not found:
        raise UserError(f"{path} is empty: it holds no reference answers")
    return found
