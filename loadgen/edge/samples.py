"""The prompt library (LoadGen's QSL): which texts there are, and the request body for one of them.

A library is a JSONL file with a `text` (or `prompt`, `text_input`) string a line, or the built-in one. Sample indices
come from `core/sample_order.py`, so every backend and every repeat sees the same prompts in the same order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from loadgen.core import sample_order
from loadgen.core.record import Int64
from loadgen.core.scenario import Kind, Scenario
from loadgen.edge.errors import UserError
from loadgen.edge.scenarios import DATA

BLOCK = 1 << 14
_KEYS = ("text", "prompt", "text_input")


class PromptLibrary:
    """Prompts by index, with the part of the request body that depends only on the prompt encoded once."""

    def __init__(self, source: str, scenario: Scenario) -> None:
        path = DATA / "prompts.jsonl" if source == "builtin" else Path(source)
        self.texts = read_prompts(path)
        self.sha256 = hashlib.sha256("\0".join(self.texts).encode()).hexdigest()
        rest = {"max_tokens": scenario.output_tokens, "min_tokens": scenario.output_tokens, "ignore_eos": True,
                "temperature": 0.0, "stream": True}  # fmt: skip
        tail = json.dumps(rest)[1:].encode()
        self._bodies = [b'"text_input":' + json.dumps(t).encode() + b"," + tail for t in self.texts]

    def __len__(self) -> int:
        return len(self.texts)

    def body(self, sample: int, request_id: str) -> bytes:
        """The JSON body of one request: greedy, exactly `output_tokens` long, with an id the server can log."""
        return b'{"id":"' + request_id.encode() + b'",' + self._bodies[sample]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a JSONL file. Raises UserError naming the file and the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from {path}: {error}; give a JSONL file with --prompts") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompts.append(next(row[key] for key in _KEYS if isinstance(row.get(key), str) and row[key]))
        except (ValueError, AttributeError, StopIteration):
            raise UserError(
                f"{path} line {number}: expected a JSON object with a non-empty text under {_KEYS}"
            ) from None
    if not prompts:
        raise UserError(f"{path} holds no prompts; expected one JSON object a line")
    return prompts


def sample_indices(scenario: Scenario, library: int, count: int) -> Int64:
    """Samples of the first `count` slots in LoadGen's order, for a library of that many prompts; shape (count,)."""
    loaded = sample_order.loaded_set(library, library, scenario.seeds.qsl)
    if scenario.kind is Kind.OFFLINE:
        return sample_order.offline(loaded, count)
    floor = scenario.minimums.queries
    if scenario.kind is Kind.MULTI_STREAM:
        queries = -(-count // scenario.samples_per_query)
        grid = sample_order.multi_stream(loaded, queries, scenario.seeds.sample, floor, scenario.samples_per_query)
        return np.asarray(grid.reshape(-1)[:count])
    return sample_order.with_replacement(loaded, count, scenario.seeds.sample, floor)


def sample_stream(scenario: Scenario, library: int, worker: int, workers: int) -> Iterator[tuple[int, int]]:
    """(seq, sample) without end for closed loops: the slots k with k mod workers = worker."""
    count, done = BLOCK, 0
    while True:
        indices = sample_indices(scenario, library, count)
        for seq in range(done + (worker - done) % workers, count, workers):
            yield seq, int(indices[seq])
        done, count = count, count * 4
