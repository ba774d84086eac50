"""Accuracy mode's files: answers streamed beside the rows, and what they come to against a reference.

`accuracy.arrows` grows while the run goes, like the rows, and becomes `accuracy.parquet` (sample, text, token_ids)
when the run is sealed. A reference is JSONL with `prompt`, `token_ids` and, if wanted, `output`; an export has one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from loadgen.core import accuracy
from loadgen.core.reason import Reason
from loadgen.core.record import Outcome, Phase, Record
from loadgen.core.scenario import Scenario
from loadgen.edge.errors import UserError
from loadgen.edge.prompt_files import read_prompts

ANSWERS = pa.schema([("sample", pa.int64()), ("text", pa.string()), ("token_ids", pa.list_(pa.int32()))])
NAME = "accuracy.parquet"


def pack_answers(records: list[Record]) -> bytes:
    """Answers of completed measured records as one Arrow batch; empty where there are none."""
    rows = [
        {"sample": r.sample, "text": "".join(r.answer.text), "token_ids": list(r.answer.token_ids)}
        for r in records
        if r.answer is not None and r.outcome is Outcome.OK and r.phase is Phase.MEASURE
    ]
    return pa.RecordBatch.from_pylist(rows, schema=ANSWERS).serialize().to_pybytes() if rows else b""


class AnswerWriter:
    """Appends answers to the open run; `close` turns them into Parquet, a batch at a time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "accuracy.arrows"
        self._file = self.path.open("wb", buffering=0)
        self._stream = pa.ipc.new_stream(self._file, ANSWERS)

    def write(self, packed: bytes) -> None:
        """Appends one worker's batch."""
        self._stream.write_batch(pa.ipc.read_record_batch(pa.py_buffer(packed), ANSWERS))

    def close(self) -> None:
        self._stream.close()
        self._file.close()
        with self.path.open("rb") as file, pq.ParquetWriter(self.path.with_suffix(".parquet"), ANSWERS) as out:
            for batch in pa.ipc.open_stream(file):
                out.write_batch(batch)
        self.path.unlink()


def answers(folder: Path) -> Iterator[dict[str, Any]]:
    """The kept answers of a sealed run, in order of completion; none where the run kept none."""
    if (folder / NAME).is_file():
        for batch in pq.ParquetFile(folder / NAME).iter_batches(1024):
            yield from batch.to_pylist()


def read_reference(path: Path) -> list[list[int]]:
    """Token ids of every line. Raises UserError naming the file and the line."""
    ids = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            row = json.loads(line)["token_ids"]
            if not row or not all(type(token) is int for token in row):
                raise UserError(f"{path} line {number}: token_ids must be a list of at least one whole number")
            ids.append(row)
    except OSError as error:
        raise UserError(f"cannot read the reference {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} line {len(ids) + 1}: expected an object with token_ids; see `export`") from None
    if not ids:
        raise UserError(f"{path} is empty: it holds no reference answers")
    return ids


def check(scenario: Scenario) -> None:
    """Before the run: does the reference belong to these prompts? Raises UserError."""
    if scenario.reference and len(read_reference(Path(scenario.reference))) < scenario.library_size:
        raise UserError(f"{scenario.reference} has fewer answers than there are prompts ({scenario.library_size})")


def assess(folder: Path, scenario: Scenario) -> tuple[dict[str, Any], list[Reason]]:
    """`summary["accuracy"]` and the reasons it gives. A prompt without an answer counts as an empty answer."""
    kept = {row["sample"]: row for row in answers(folder)}
    facts: dict[str, Any] = {"answers": len(kept), "without_ids": sum(not row["token_ids"] for row in kept.values())}
    if not scenario.reference or not scenario.library_size:
        return facts, []
    references = read_reference(Path(scenario.reference))[: scenario.library_size]
    found = [kept[i]["token_ids"] if i in kept else [] for i in range(len(references))]
    facts |= accuracy.agreement(found, references)
    facts["equal"] = sum(mine == other for mine, other in zip(found, references, strict=True))
    if Path(scenario.prompts).is_file():
        prompts = read_prompts(Path(scenario.prompts), scenario.max_prompts)
        pairs = [(kept[i]["text"], p.reference) for i, p in enumerate(prompts) if i in kept and p.reference]
        if pairs:
            facts["rouge"] = accuracy.mean_rouge([mine for mine, _ in pairs], [str(other) for _, other in pairs])
    return facts, _reasons(facts, scenario.min_agreement)


def _reasons(facts: dict[str, Any], least: float | None) -> list[Reason]:
    if facts["without_ids"]:
        seen = f"{facts['without_ids']} of {facts['answers']} answers without token ids"
        return [Reason("accuracy", seen, "token ids in each answer", "export again: return_token_ids must be honoured")]
    share = facts["token_agreement"]
    if least is None or share >= least:
        return []
    advice = f"first divergence at token {facts['divergence']['earliest']}: look for changed weights, precision, tokens"
    return [Reason("accuracy", f"token agreement {share:.2%}", f"≥ {least:.2%}", advice)]
