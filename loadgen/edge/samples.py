"""The prompt library (LoadGen's QSL): which texts there are, and the request body for one of them.

A library is the built-in file, one of the user's (`prompt_files`) or synthetic (`synthetic`). In front of each text may
stand a salt, different for each run and sample, so that no server answers from a prefix it saw before. Sample indices
come from `core/sample_order.py`, so every backend and every repeat sees the same prompts in the same order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from loadgen.core import lengths, sample_order
from loadgen.core.record import Int64
from loadgen.core.scenario import EQUAL_ISSUE, Clip, Kind, Scenario
from loadgen.edge import synthetic
from loadgen.edge.clients.dialects import NATIVE, request_fields
from loadgen.edge.errors import UserError
from loadgen.edge.prompt_files import read_prompts
from loadgen.edge.scenarios import DATA, SYNTHETIC, VIDEO_PROMPTS, length_statistics

BLOCK = 1 << 14
BUILTIN = DATA / "prompts.jsonl"
FILES = {"builtin": BUILTIN, VIDEO_PROMPTS: DATA / "video_prompts.jsonl"}
SYNTHETIC_PROMPTS = 1024  # unless --max-prompts says otherwise
SALT_LETTERS = 10  # of 32: 50 random bits


class PromptLibrary:
    """Prompts by index, with the part of the request body that depends only on the prompt encoded once.

    `run_id` makes the salt where the scenario has no `salt_seed`. `sha256` is of what is the same in every run: texts
    without salt and answer lengths. `references` holds known good answers, None where there is none.
    """

    def __init__(self, source: str, scenario: Scenario, run_id: str = "", dialect: str = NATIVE) -> None:
        self.salt = _salt_key(scenario, run_id)
        self.asked_in: Int64 | None = None
        if source == SYNTHETIC:
            bare, self.texts, self.asked_in = _synthesised(scenario, self.salt or "")
            self.references: list[str | None] = [None] * len(bare)
        else:
            prompts = read_prompts(FILES.get(source) or Path(source), scenario.max_prompts)
            bare = [prompt.text for prompt in prompts]
            self.references = [prompt.reference for prompt in prompts]
            self.texts = [f"{_salt(self.salt, i)} {text}" for i, text in enumerate(bare)] if self.salt else bare
        asked = lengths.parse(scenario.output_tokens, length_statistics("output"))
        self.asked_out = lengths.draw(asked, len(bare), scenario.prompt_seed + 1)
        told = "\0".join(bare) + "\0" + ",".join(map(str, self.asked_out.tolist()))
        self.sha256 = hashlib.sha256(told.encode()).hexdigest()
        pairs = zip(self.texts, self.asked_out.tolist(), strict=True)
        if scenario.clip:
            self._bodies = [_clip_body(text, scenario.clip) for text in self.texts]
        else:
            ids = scenario.keep_outputs
            self._bodies = [_body(text, request_fields(dialect, tokens, ids)) for text, tokens in pairs]

    def __len__(self) -> int:
        return len(self.texts)

    def body(self, sample: int, request_id: str) -> bytes:
        """The JSON body of one request, with an id that the server can log: greedy, exactly `asked_out[sample]` tokens;
        for a video model the scenario's clip, answered with a contact sheet."""
        return b'{"id":"' + request_id.encode() + b'",' + self._bodies[sample]

    def asks(self, sample: int) -> tuple[int, int | None]:
        """Output tokens (frames) asked of a sample, and its exact input tokens, or None where none were asked for."""
        return int(self.asked_out[sample]), None if self.asked_in is None else int(self.asked_in[sample])

    def describe(self, scenario: Scenario) -> dict[str, object]:
        """What `run.json` says about the prompts."""
        salt = "off" if not scenario.salt else "run id" if scenario.salt_seed is None else f"seed {scenario.salt_seed}"
        known = {"source": scenario.prompts, "count": len(self), "sha256": self.sha256, "salt": salt}
        if self.asked_in is not None:
            known |= {"tokenizer_sha256": hashlib.sha256(Path(str(scenario.tokenizer)).read_bytes()).hexdigest(),
                      "input_tokens": int(self.asked_in.sum())}  # fmt: skip
        return known | {"output_frames" if scenario.clip else "output_tokens": int(self.asked_out.sum())}


def _body(text: str, fields: dict[str, Any]) -> bytes:
    return b'"text_input":' + json.dumps(text).encode() + b"," + json.dumps(fields)[1:].encode()


def _clip_body(text: str, clip: Clip) -> bytes:
    fields = {
        "num_frames": clip.frames, "height": clip.height, "width": clip.width, "num_inference_steps": clip.steps,
        "guidance_scale": clip.guidance, "seed": clip.seed, "output": "sheet", "stream": True,
    }  # fmt: skip
    return _body(text, fields)


def _salt_key(scenario: Scenario, run_id: str) -> str | None:
    if not scenario.salt:
        return None
    return f"run {run_id}" if scenario.salt_seed is None else f"seed {scenario.salt_seed}"


def _salt(key: str | None, sample: int) -> str:
    """Ten letters and digits, from the first of which on two salts differ with 31 to 1."""
    digest = hashlib.blake2b(f"{key}\0{sample}".encode(), digest_size=SALT_LETTERS).digest()
    return "".join("abcdefghijkmnpqrstuvwxyz23456789"[byte % 32] for byte in digest)


def _synthesised(scenario: Scenario, key: str) -> tuple[list[str], list[str], Int64]:
    """Bodies without salt, whole prompts and their lengths. Without a salt its place is filled the same in each run."""
    if not scenario.tokenizer:
        raise UserError(
            "--prompts synthetic needs --tokenizer FILE, the tokenizer.json of the served model (an export has it in "
            "its folder, under 1/weights)"
        )
    tokenizer = _tokenizer(scenario.tokenizer)
    words = synthetic.vocabulary([prompt.text for prompt in read_prompts(BUILTIN)])
    asked = lengths.parse(str(scenario.input_tokens), length_statistics("input"))
    drawn = lengths.draw(asked, scenario.max_prompts or SYNTHETIC_PROMPTS, scenario.prompt_seed)
    bare = _bodies_of(scenario.tokenizer, words, tuple(drawn.tolist()), scenario.prompt_seed)
    return list(bare), synthetic.salted(tokenizer, words, bare, drawn.tolist(), key), drawn


@lru_cache(maxsize=2)
def _tokenizer(path: str) -> object:
    return synthetic.load_tokenizer(path)


@lru_cache(maxsize=2)
def _bodies_of(path: str, words: tuple[str, ...], drawn: tuple[int, ...], seed: int) -> tuple[str, ...]:
    """The expensive part, kept: a load process asks for it when it checks its options, and again in the run."""
    return tuple(synthetic.bodies(_tokenizer(path), words, drawn, seed))


def sample_indices(scenario: Scenario, library: int, count: int) -> Int64:
    """Samples of the first `count` slots in LoadGen's order, for a library of that many prompts; shape (count,)."""
    loaded = sample_order.loaded_set(library, library, scenario.seeds.qsl)
    equal = scenario.sample_order == EQUAL_ISSUE
    if scenario.kind is Kind.OFFLINE:
        if equal:
            return sample_order.offline_equal_issue(loaded, count, scenario.seeds.sample)[:count]
        return sample_order.offline(loaded, count)
    floor = scenario.minimums.queries
    if scenario.kind is Kind.MULTI_STREAM:
        queries = -(-count // scenario.samples_per_query)
        grid = sample_order.multi_stream(loaded, queries, scenario.seeds.sample, floor, scenario.samples_per_query)
        return np.asarray(grid.reshape(-1)[:count])
    if equal:
        return sample_order.equal_issue(loaded, count, scenario.seeds.sample, max(floor, 1))
    return sample_order.with_replacement(loaded, count, scenario.seeds.sample, floor)


def sample_stream(scenario: Scenario, library: int, worker: int, workers: int) -> Iterator[tuple[int, int]]:
    """(seq, sample) without end for closed loops: the slots k with k mod workers = worker."""
    count, done = BLOCK, 0
    while True:
        indices = sample_indices(scenario, library, count)
        for seq in range(done + (worker - done) % workers, count, workers):
            yield seq, int(indices[seq])
        done, count = count, count * 4
