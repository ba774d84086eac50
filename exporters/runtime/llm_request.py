"""What a client asks of a language model. Runs inside Triton beside model.py; imports nothing of this project."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from request_fields import BadRequestError, convert, text_of

DEFAULTS: dict[str, Any] = {
    "max_tokens": None,  # filled from the settings
    "min_tokens": 0,
    "ignore_eos": False,
    "temperature": 0.0,  # 0 is greedy
    "top_k": 0,  # 0 is off
    "top_p": 1.0,  # 1 is off
    "seed": None,
    "stream": False,
    "return_token_ids": False,
}
KINDS: dict[str, type] = {
    "max_tokens": int, "min_tokens": int, "ignore_eos": bool, "temperature": float,
    "top_k": int, "top_p": float, "seed": int, "stream": bool, "return_token_ids": bool,
}  # fmt: skip


@dataclass(slots=True)
class Prompt:
    """One checked request. `text` is the prompt; lengths are in tokens; `seed` None means a fresh one."""

    text: str
    max_tokens: int
    min_tokens: int
    ignore_eos: bool
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    stream: bool
    return_token_ids: bool

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1


@dataclass(slots=True)
class Output:
    """What an engine made for one request since the last time: new token ids, and the reason why no more will come."""

    request_id: Any
    tokens: list[int]
    finished: bool
    error: str | None = None

    def add(self, tokens: list[int], finished: bool, error: str | None) -> None:
        """What was made after it, for a reader who gets both at once."""
        self.tokens = self.tokens + tokens
        self.finished, self.error = finished, error


def parse_prompt(fields: dict[str, Any], default_max_tokens: int, max_context: int) -> Prompt:
    """Check `fields` and fill in the defaults; raises BadRequestError."""
    text = text_of("text_input", fields.get("text_input"))
    if not text:
        raise BadRequestError("text_input is missing or empty; send the prompt as a STRING of shape [1]")
    values = {name: convert(name, fields.get(name), KINDS[name], default) for name, default in DEFAULTS.items()}
    if values["max_tokens"] is None:
        values["max_tokens"] = default_max_tokens
    prompt = Prompt(text=text, **values)
    _check(prompt, max_context)
    return prompt


def _check(prompt: Prompt, max_context: int) -> None:
    if prompt.max_tokens < 1:
        raise BadRequestError(f"max_tokens is {prompt.max_tokens}; it must be at least 1")
    if prompt.max_tokens >= max_context:
        raise BadRequestError(
            f"max_tokens is {prompt.max_tokens}; prompt and answer share a context of {max_context} tokens"
        )
    if not 0 <= prompt.min_tokens <= prompt.max_tokens:
        raise BadRequestError(
            f"min_tokens is {prompt.min_tokens}; it must be from 0 to max_tokens ({prompt.max_tokens})"
        )
    if not (math.isfinite(prompt.temperature) and prompt.temperature >= 0):
        raise BadRequestError(f"temperature is {prompt.temperature}; it must be 0 (greedy) or a positive number")
    if prompt.top_k < 0:
        raise BadRequestError(f"top_k is {prompt.top_k}; it must be 0 (off) or positive")
    if not 0 < prompt.top_p <= 1:
        raise BadRequestError(f"top_p is {prompt.top_p}; it must be above 0 and at most 1 (off)")
    if prompt.temperature == 0 and (prompt.top_k > 1 or prompt.top_p < 1):
        raise BadRequestError("top_k and top_p need a temperature above 0; without one the answer is greedy")
    if prompt.seed is not None and not 0 <= prompt.seed < 2**64:
        raise BadRequestError(f"seed is {prompt.seed}; it must be from 0 to 2**64 - 1")


def check_context(prompt_tokens: int, max_tokens: int, max_context: int) -> None:
    """A request whose prompt and answer together do not fit into the context is a BadRequestError."""
    if prompt_tokens + max_tokens > max_context:
        raise BadRequestError(
            f"the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}; together they may have"
            f" {max_context}"
        )
