"""The fields of a request, before a model's own rules. Runs inside Triton beside model.py; imports nothing of this
project.

Every field may come as an input tensor or as a request parameter of the same name; the tensor wins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container
from typing import Any


class BadRequestError(ValueError):
    """The client's fault. The message is one line: which field, what is wrong with it, what is allowed."""


def read_request(request, parameters: Container[str]) -> dict[str, Any]:
    """All input tensors, and the request parameters that are named in `parameters`, as Python values; unchecked."""
    fields: dict[str, Any] = {}
    told = request.parameters()
    if told and told != "{}":
        fields.update((key, value) for key, value in json.loads(told).items() if key in parameters)
    for tensor in request.inputs():
        values = tensor.as_numpy().reshape(-1)
        if values.size != 1:
            raise BadRequestError(f"{tensor.name()} has {values.size} elements; send exactly one")
        fields[tensor.name()] = values[0] if values.dtype == object else values[0].item()
    return fields


def text_of(name: str, value: Any) -> str:
    """`value` as text; none is an empty one. Raises BadRequestError."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadRequestError(f"{name} is not UTF-8 (byte {error.start})") from None
    if not isinstance(value, str):
        raise BadRequestError(f"{name} is {value!r}; it must be a text")
    return value


def convert(name: str, value: Any, kind: type, default: Any) -> Any:
    """`value` as `kind`, or `default` where there is none; 2.0 is an int, True is no number. Raises BadRequestError."""
    if value is None:
        return default
    if kind is str:
        return text_of(name, value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    fits = isinstance(value, bool) if kind is bool else is_number
    if not fits or (kind is int and value != int(value)):
        raise BadRequestError(f"{name} is {value!r}; it must be of type {kind.__name__}")
    return kind(value)
