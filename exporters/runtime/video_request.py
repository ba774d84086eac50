"""What a client asks of a video model, checked. Runs inside Triton beside model.py; imports nothing of this project."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from request_fields import BadRequestError, convert, text_of

OUTPUTS = ("sheet", "mp4", "tensor", "none")
SPATIAL = 16  # pixels: the VAE makes 8 of one latent, the transformer takes patches of 2 x 2 latents
TEMPORAL = 8  # frames of two latents: the VAE decodes them in pairs behind the first, and an odd one gives 4 too many
KINDS: dict[str, type] = {
    "seed": int, "num_frames": int, "height": int, "width": int, "num_inference_steps": int,
    "guidance_scale": float, "fps": int, "output": str, "negative_prompt": str, "stream": bool,
}  # fmt: skip


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


def parse_order(fields: dict[str, Any], settings: dict) -> ClipOrder:
    """Check `fields` and fill in the defaults of `settings`; raises BadRequestError."""
    text = text_of("text_input", fields.get("text_input"))
    if not text:
        raise BadRequestError("text_input is missing or empty; send the prompt as a STRING of shape [1]")
    defaults = {
        "seed": 0, "fps": settings["fps"], "output": "sheet", "negative_prompt": "", "stream": False,
        "num_frames": settings["num_frames"], "height": settings["height"], "width": settings["width"],
        "num_inference_steps": settings["num_inference_steps"], "guidance_scale": settings["guidance_scale"],
    }  # fmt: skip
    values = {name: convert(name, fields.get(name), KINDS[name], default) for name, default in defaults.items()}
    order = ClipOrder(text, **values)
    _check(order, settings)
    return order


def check_tokens(name: str, tokens: int, limit: int) -> None:
    """The text encoder sees `limit` tokens; more would be cut off without a word."""
    if tokens > limit:
        raise BadRequestError(f"{name} has {tokens} tokens; the model reads {limit}")


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
