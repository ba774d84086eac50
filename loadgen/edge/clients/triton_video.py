"""`TritonHttp` for a video model: a response after text encoding, one a denoising step, and at last the video.

In the record each response is a chunk: its arrival, with 0 frames for a step and the clip's frames for the last one.
The first videos of a run (`KEPT_CLIPS` by slot number) keep their contact sheet and what the server says of its stages.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from loadgen.core.record import KeptClip, Phase, Record
from loadgen.edge.clients.triton_http import RequestError, TritonHttp, count, read_event

KEPT_CLIPS = 4
MAX_SHEET_BYTES = 1 << 20  # of one contact sheet; a larger one is not kept
FACTS = ("text_encode_s", "denoise_s", "vae_decode_s", "output_s", "queue_s", "peak_memory_bytes", "steps",
         "num_output_frames", "height", "width", "num_input_tokens", "work")  # fmt: skip


class TritonVideo(TritonHttp):
    """A pool of connections to one video model; everything but the reading of events is `TritonHttp`'s."""

    counted = "frames"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.take = take_video


def take_video(payload: bytes, arrival: int, record: Record) -> None:
    """Add one event to its row. Raises RequestError on an error event, or one that is not what the model sends."""
    message = read_event(payload)
    if "error" in message:
        raise RequestError("server_error", f"{message['error']} (after {len(record.chunk_ns)} responses)")
    frames = count(message, "num_output_frames") if "num_output_frames" in message else 0
    record.chunk_ns.append(arrival)
    record.chunk_tokens.append(frames)
    record.tokens_out += frames
    if record.first_ns is None:
        record.first_ns = arrival
    if "num_output_frames" in message:
        if message.get("finish_reason") != "complete":
            raise RequestError("server_error", f"the video ended with {message.get('finish_reason')!r}")
        record.usage_out = frames
        record.tokens_in = count(message, "num_input_tokens") if "num_input_tokens" in message else None
        if record.phase is Phase.MEASURE and record.seq < KEPT_CLIPS:
            record.clip = _kept(message)


def _kept(message: dict[str, Any]) -> KeptClip | None:
    """The contact sheet and facts of the last response; None where there is no sheet that can be shown."""
    try:
        jpeg = base64.b64decode(str(message.get("video", "")), validate=True)
    except (binascii.Error, ValueError):
        return None
    if not jpeg.startswith(b"\xff\xd8") or len(jpeg) > MAX_SHEET_BYTES:
        return None
    return KeptClip(jpeg, {name: message[name] for name in FACTS if isinstance(message.get(name), int | float | str)})
