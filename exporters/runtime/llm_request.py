"""What a client asks for, read and checked. Runs inside Triton beside model.py; imports nothing of this project.

Every field may come as an input tensor or as a request parameter of the same name; the tensor wins.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

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
_KINDS: dict[str, type] = {
    "max_tokens": int, "min_tokens": int, "ignore_eos": bool, "temperature": float,
    "top_k": int, "top_p": float, "seed": int, "stream": bool, "return_token_ids": bool,
}  # fmt: skip


class BadRequestError(ValueError):
    """The client's fault. The message is one line: which field, what is wrong with it, what is allowed."""


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
    """What an engine made for one request since the last time: new token ids, or the reason why there are none."""

    request_id: Any
    tokens: list[int]
    finished: bool
    error: str | None = None


def read_request(request) -> dict[str, Any]:
    """All fields of a Triton request as Python values, without any check."""
    fields: dict[str, Any] = {}
    parameters = request.parameters()
    if parameters and parameters != "{}":
        fields.update((key, value) for key, value in json.loads(parameters).items() if key in _KINDS)
    for tensor in request.inputs():
        values = tensor.as_numpy().reshape(-1)
        if values.size != 1:
            raise BadRequestError(f"{tensor.name()} has {values.size} elements; send exactly one")
        fields[tensor.name()] = values[0] if values.dtype == object else values[0].item()
    return fields


def parse_prompt(fields: dict[str, Any], default_max_tokens: int, max_context: int) -> Prompt:
    """Check `fields` and fill in the defaults; raises BadRequestError."""
    text = fields.get("text_input")
    if text is None:
        raise BadRequestError("text_input is missing; send the prompt as a STRING of shape [1]")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRequestError(f"text_input is not UTF-8 (byte {error.start})") from None
    if not text:
        raise BadRequestError("text_input is empty; send at least one character")
    values = {name: _convert(name, fields.get(name), default) for name, default in DEFAULTS.items()}
    if values["max_tokens"] is None:
        values["max_tokens"] = default_max_tokens
    prompt = Prompt(text=text, **values)
    _check(prompt, max_context)
    return prompt


def _convert(name: str, value: Any, default: Any) -> Any:
    if value is None:
        return default
    kind = _KINDS[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = isinstance(value, bool) if kind is bool else is_number
    if not fits or (kind is int and value != int(value)):
        raise BadRequestError(f"{name} is {value!r}; it must be of type {kind.__name__}")
    return kind(value)


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
