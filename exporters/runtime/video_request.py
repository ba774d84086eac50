"""What a client asks of a video model, read and checked. Runs inside Triton beside model.py; imports nothing of this
project.

Every field may come as an input tensor or as a request parameter of the same name; the tensor wins.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

OUTPUTS = ("sheet", "mp4", "tensor", "none")
SPATIAL = 16  # pixels: the VAE makes 8 of one latent, the transformer takes patches of 2 x 2 latents
TEMPORAL = 8  # frames of two latents: the VAE decodes them in pairs behind the first, and an odd one gives 4 too many
KINDS: dict[str, type] = {
    "seed": int, "num_frames": int, "height": int, "width": int, "num_inference_steps": int,
    "guidance_scale": float, "fps": int, "output": str, "negative_prompt": str, "stream": bool,
}  # fmt: skip


class BadRequestError(ValueError):
    """The client's fault. The message is one line: which field, what is wrong with it, what is allowed."""


@dataclass(frozen=True, slots=True)
class ClipOrder:
    """One checked request. Sizes in pixels; `guidance_scale` of 1 or less means no guidance, so half the work."""

    text: str
    negative_prompt: str
    seed: int
    num_frames: int
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    fps: int
    output: str
    stream: bool

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1


def read_request(request) -> dict[str, Any]:
    """All fields of a Triton request as Python values, without any check."""
    fields: dict[str, Any] = {}
    parameters = request.parameters()
    if parameters and parameters != "{}":
        fields.update((key, value) for key, value in json.loads(parameters).items() if key in KINDS)
    for tensor in request.inputs():
        values = tensor.as_numpy().reshape(-1)
        if values.size != 1:
            raise BadRequestError(f"{tensor.name()} has {values.size} elements; send exactly one")
        fields[tensor.name()] = values[0] if values.dtype == object else values[0].item()
    return fields


def parse_order(fields: dict[str, Any], settings: dict) -> ClipOrder:
    """Check `fields` and fill in the defaults of `settings`; raises BadRequestError."""
    text = _text("text_input", fields.get("text_input"))
    if not text:
        raise BadRequestError("text_input is missing or empty; send the prompt as a STRING of shape [1]")
    defaults = {
        "seed": 0, "fps": settings["fps"], "output": "sheet", "negative_prompt": "", "stream": False,
        "num_frames": settings["num_frames"], "height": settings["height"], "width": settings["width"],
        "num_inference_steps": settings["num_inference_steps"], "guidance_scale": settings["guidance_scale"],
    }  # fmt: skip
    order = ClipOrder(text, **{name: _convert(name, fields.get(name), value) for name, value in defaults.items()})
    _check(order, settings)
    return order


def check_tokens(name: str, tokens: int, limit: int) -> None:
    """The text encoder sees `limit` tokens; more would be cut off without a word."""
    if tokens > limit:
        raise BadRequestError(f"{name} has {tokens} tokens; the model reads {limit}")


def _text(name: str, value: Any) -> str:
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


def _convert(name: str, value: Any, default: Any) -> Any:
    if value is None:
        return default
    kind = KINDS[name]
    if kind is str:
        return _text(name, value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    fits = isinstance(value, bool) if kind is bool else is_number
    if not fits or (kind is int and value != int(value)):
        raise BadRequestError(f"{name} is {value!r}; it must be of type {kind.__name__}")
    return kind(value)


def _check(order: ClipOrder, settings: dict) -> None:
    if order.num_frames < 1 or (order.num_frames - 1) % TEMPORAL:
        raise BadRequestError(f"num_frames is {order.num_frames}; it must be 8 k + 1: 1, 9, 17 ... 49")
    for name in ("height", "width"):
        size = getattr(order, name)
        if size < SPATIAL or size % SPATIAL:
            raise BadRequestError(f"{name} is {size}; it must be a positive multiple of {SPATIAL}")
    pixels = order.num_frames * order.height * order.width
    if pixels > settings["max_pixels"]:
        raise BadRequestError(
            f"{order.num_frames} frames of {order.height} x {order.width} are {pixels} pixels; this model allows"
            f" {settings['max_pixels']} (parameter max_pixels)"
        )
    if not 1 <= order.num_inference_steps <= settings["max_steps"]:
        raise BadRequestError(
            f"num_inference_steps is {order.num_inference_steps}; it must be from 1 to {settings['max_steps']}"
        )
    if not 0 <= order.guidance_scale <= 100:
        raise BadRequestError(f"guidance_scale is {order.guidance_scale}; it must be from 0 to 100 (1 and less: off)")
    if not 1 <= order.fps <= 240:
        raise BadRequestError(f"fps is {order.fps}; it must be from 1 to 240")
    if not 0 <= order.seed < 2**63:
        raise BadRequestError(f"seed is {order.seed}; it must be from 0 to 2**63 - 1")
    if order.output not in OUTPUTS:
        raise BadRequestError(f"output is {order.output!r}; choose one of: {', '.join(OUTPUTS)}")
    if order.negative_prompt and not order.guided:
        raise BadRequestError("negative_prompt needs a guidance_scale above 1; without guidance it has no effect")
