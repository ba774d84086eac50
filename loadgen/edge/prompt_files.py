"""Prompts from files: JSONL, JSON (ShareGPT too) and Parquet → `Prompt`s. Anything broken is one line, naming its row.

A row is an object or record with one of
    text, prompt, text_input or input       the prompt itself
    question, and system_prompt if any      OpenOrca: joined by an empty line
    conversations: [{from, value}, ...]     ShareGPT: the first turn of a human; the turn after it is the reference
and, if there is one, a reference answer in output, response or reference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from loadgen.edge.errors import UserError

TEXT_KEYS = ("text", "prompt", "text_input", "input")
REFERENCE_KEYS = ("output", "response", "reference")
HUMANS = ("human", "user")
BATCH = 1024


@dataclass(frozen=True)
class Prompt:
    """One entry of a library: its text, and what a good answer looks like, where the file says so."""

    text: str
    reference: str | None = None


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts of a file (all of them by default). Raises UserError naming the file and the row."""
    read = {".parquet": _parquet_rows, ".json": _json_rows}.get(path.suffix.lower(), _jsonl_rows)
    prompts = []
    try:
        for where, row in islice(read(path), limit):
            try:
                prompts.append(_prompt(row))
            except ValueError as error:
                raise UserError(f"{path} {where}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read prompts from {path}: {reason}; give a JSONL, JSON or Parquet file") from None
    if not prompts:
        raise UserError(f"{path} holds no prompts; expected a row with one of: {', '.join(TEXT_KEYS)}, conversations")
    return prompts


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8") as lines:  # by \n alone: a text may hold other line separators
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    raise UserError(f"{path} line {number}: this is no JSON; expected one object a line") from None
                yield f"line {number}", row


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: this is no JSON ({error.msg}); name JSON lines .jsonl") from None
    except RecursionError:
        raise UserError(f"{path}: the JSON is nested too deeply") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of conversations or prompts, not a {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        yield f"entry {number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = {*TEXT_KEYS, *REFERENCE_KEYS, "question", "system_prompt", "conversations"}
    try:
        with path.open("rb") as stream:
            file = pq.ParquetFile(stream)
            columns = [name for name in file.schema_arrow.names if name in wanted]
            number = 0
            for batch in file.iter_batches(BATCH, columns=columns) if columns else ():
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except pa.ArrowException as error:
        raise UserError(f"{path} is no readable Parquet file: {str(error).splitlines()[0]}") from None


def _prompt(row: Any) -> Prompt:
    """One row as a prompt. Raises ValueError, saying what was expected."""
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object, not a {type(row).__name__}")
    if "conversations" in row:
        return _first_turn(row["conversations"])
    reference = next((row[key] for key in REFERENCE_KEYS if isinstance(row.get(key), str) and row[key]), None)
    if isinstance(row.get("question"), str) and row["question"]:
        system = row.get("system_prompt")
        return Prompt(f"{system}\n\n{row['question']}" if isinstance(system, str) and system else row["question"],
                      reference)  # fmt: skip
    for key in TEXT_KEYS:
        if isinstance(row.get(key), str) and row[key]:
            return Prompt(row[key], reference)
    raise ValueError(f"expected a non-empty text under one of: {', '.join(TEXT_KEYS)}, question, conversations")


def _first_turn(turns: Any) -> Prompt:
    turns = [turn for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    for at, turn in enumerate(turns):
        if turn.get("from") in HUMANS and isinstance(turn.get("value"), str) and turn["value"]:
            after = turns[at + 1].get("value") if at + 1 < len(turns) else None
            return Prompt(turn["value"], after if isinstance(after, str) and after else None)
    raise ValueError('the conversation has no turn {"from": "human", "value": "…"} with a text')
