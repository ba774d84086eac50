"""A text-to-video model in Triton's python backend: decoupled, one clip at a time, with progress for each step.

This file is copied as `1/model.py`, with the other `video_*.py` beside it; none of them imports the project they come
from. Triton calls `execute`, which only checks and queues; `_work` makes one clip after another and sends what it has;
`_watch` looks for clients that went away and publishes metrics, and sleeps while no request is open.

Inputs (tensors or request parameters of the same name): text_input, negative_prompt, seed, num_frames, height, width,
num_inference_steps, guidance_scale, fps, output (sheet, mp4, tensor, none), stream.

With `stream` there is a response after text encoding (step 0) and after each denoising step: `step`, `steps`, `step_s`.
The last response has finish_reason (complete, cancelled), num_output_frames, height, width, num_input_tokens, stage
times text_encode_s, denoise_s, vae_decode_s, output_s (encoding the answer) and queue_s, peak_memory_bytes, work, and
the clip: `video`, base64 of a JPEG contact sheet or an MP4, or `frames`, a UINT8 tensor [frames, height, width, 3].
base64, because generate_stream carries JSON; over it, `frames` becomes a flat list of numbers.
"""

from __future__ import annotations

import base64
import contextlib
import locale
import queue
import time
from pathlib import Path

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from devices import memory_explained, use_compile_cache
from request_fields import read_request
from triton_model import DRAIN_S, FINAL, DecoupledModel, device_of, number, parameters, refuse, seconds, text
from video_engine import CancelledError, Clip, Engine, read_settings, work_of
from video_output import mp4, sheet
from video_request import KINDS, ClipOrder, check_tokens, parse_order

METRICS = (
    ("running", "GAUGE", "tritonmark_requests_running", "Clips being made: 0 or 1"),
    ("waiting", "GAUGE", "tritonmark_requests_waiting", "Requests waiting for their turn"),
    ("peak_memory", "GAUGE", "tritonmark_peak_memory_bytes", "Peak memory of the last clip"),
    ("clips", "COUNTER", "tritonmark_videos_total", "Clips finished"),
    ("frames", "COUNTER", "tritonmark_frames_out_total", "Frames of finished clips"),
    ("steps", "COUNTER", "tritonmark_denoise_steps_total", "Denoising steps done"),
    ("text_encode", "COUNTER", "tritonmark_text_encode_seconds_total", "Time spent encoding text"),
    ("denoise", "COUNTER", "tritonmark_denoise_seconds_total", "Time spent denoising"),
    ("vae_decode", "COUNTER", "tritonmark_vae_decode_seconds_total", "Time spent decoding latents"),
    ("cancelled", "COUNTER", "tritonmark_requests_cancelled_total", "Requests whose client went away"),
)
GAUGES = ("running", "waiting", "peak_memory")


class OpenRequest:
    """One request between its arrival and its final response."""

    __slots__ = ("arrived", "gone", "order", "sender", "started", "tokens")

    def __init__(self, sender, order: ClipOrder, tokens: int) -> None:
        self.sender, self.order, self.tokens = sender, order, tokens
        self.arrived = time.monotonic()
        self.gone = self.started = False


class TritonPythonModel(DecoupledModel):
    """See the module. Triton calls initialize once, execute for new requests, finalize before unloading."""

    METRICS = METRICS

    def initialize(self, args: dict) -> None:
        """Load the model and make one step of a clip; any exception here is the reason that Triton logs."""
        # Triton's interpreter starts in the C locale, in which inductor cannot read its own templates.
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
        folder = Path(__file__).resolve().parent
        self.settings = read_settings(folder, parameters(args))
        device, started = device_of(self.settings["device"], args), time.monotonic()
        self._tell = lambda text: pb_utils.Logger.log_info(f"{args['model_name']}: {text}")
        with memory_explained("num_frames, height or width"):
            self.engine = Engine(folder / "weights", self.settings, device, use_compile_cache(folder))
            self._tell(f"{self.settings['precision']} weights on {device} after {time.monotonic() - started:.1f} s")
            warm_up = self.engine.warm_up()
        self._tell(f"first step {warm_up.step_s[0]:.1f} s (compilation included), VAE {warm_up.vae_decode_s:.1f} s")
        self.work = work_of(self.settings)
        self._waiting: queue.Queue[OpenRequest] = queue.Queue()
        self._open: set[OpenRequest] = set()
        self._running = 0
        self._peak_memory = 0
        self._start(args, self._work)
        self._tell(f"ready in {time.monotonic() - started:.1f} s, {torch.get_num_threads()} threads")

    def finalize(self) -> None:
        """Let open requests finish for a while, then end the threads and fail the rest."""
        with self._lock:
            self._stopping = True
        deadline = time.monotonic() + DRAIN_S
        while self._open and time.monotonic() < deadline:
            time.sleep(0.05)
        self._ended.set()
        self._busy.set()
        for entry in list(self._open):
            entry.gone = True  # the one that is being made ends after its step
        for thread in self._threads:
            thread.join(timeout=10.0)
        for entry in list(self._open):
            if self._close(entry):
                refuse(entry.sender, "the model is being unloaded", pb_utils.TritonError.UNAVAILABLE)

    def _accept(self, request, sender) -> None:
        order = parse_order(read_request(request, KINDS), self.settings)
        tokens = self.engine.count_tokens(order.text)
        check_tokens("text_input", tokens, self.engine.text_limit)
        if order.negative_prompt:
            check_tokens("negative_prompt", self.engine.count_tokens(order.negative_prompt), self.engine.text_limit)
        entry = OpenRequest(sender, order, tokens)
        with self._lock:
            full = len(self._open) >= self.settings["max_queue"]
            if self._stopping or full:
                reason = "the model is being unloaded"
                if full:
                    reason = f"{len(self._open)} requests are open already (parameter max_queue); send fewer at once"
                return refuse(sender, reason, pb_utils.TritonError.UNAVAILABLE)
            self._open.add(entry)
        self._waiting.put(entry)
        self._busy.set()
        return None

    def _close(self, entry: OpenRequest) -> bool:
        """Whoever gets True sends the final response; everybody else gets False."""
        with self._lock:
            there = entry in self._open
            self._open.discard(entry)
            return there

    def _work(self) -> None:
        """One clip after another, until the model is unloaded."""
        while not self._ended.is_set():
            try:
                entry = self._waiting.get(timeout=0.5)
            except queue.Empty:
                continue
            with self._lock:
                entry.started = entry in self._open
            if not entry.started:
                continue  # its client went away while it waited
            self._running = 1
            try:
                self._make(entry)
            except CancelledError:
                if self._close(entry):
                    self._say_cancelled(entry)
            except Exception as error:  # out of memory, say: this clip fails, the next may not
                pb_utils.Logger.log_error(f"a clip failed: {type(error).__name__}: {error}")
                if self._close(entry):
                    refuse(entry.sender, f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)
            finally:
                self._running = 0

    def _make(self, entry: OpenRequest) -> None:
        queued_s, steps = time.monotonic() - entry.arrived, entry.order.num_inference_steps

        def on_step(step: int, took_s: float) -> None:
            if entry.gone:
                raise CancelledError
            self._count(steps=1 if step else 0)
            if entry.order.stream:
                tensors = [number("step", step), number("steps", steps), seconds("step_s", took_s)]
                entry.sender.send(pb_utils.InferenceResponse(tensors))

        clip = self.engine.generate(entry.order, on_step)
        if entry.gone:
            raise CancelledError
        started = time.perf_counter()
        answer = _payload(clip, entry.order)
        times = {
            "queue_s": queued_s, "text_encode_s": clip.text_encode_s, "denoise_s": sum(clip.step_s),
            "vae_decode_s": clip.vae_decode_s, "output_s": time.perf_counter() - started,
        }  # fmt: skip
        frames, height, width = clip.frames.shape[:3]
        tensors = [
            text("finish_reason", "complete"), number("num_output_frames", frames), number("height", height),
            number("width", width), number("num_input_tokens", entry.tokens), number("steps", steps),
            *(seconds(name, value) for name, value in times.items()), text("work", self.work),
            pb_utils.Tensor("peak_memory_bytes", np.array([clip.peak_memory_bytes], dtype=np.int64)), *answer,
        ]  # fmt: skip
        self._peak_memory = clip.peak_memory_bytes
        self._count(clips=1, frames=frames, text_encode=clip.text_encode_s, denoise=times["denoise_s"],
                    vae_decode=clip.vae_decode_s)  # fmt: skip
        if self._close(entry):
            entry.sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL)

    def _say_cancelled(self, entry: OpenRequest) -> None:
        """The final response of a request that the caller has closed."""
        self._count(cancelled=1)
        tensors = [text("finish_reason", "cancelled"), number("num_output_frames", 0)]
        entry.sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL)

    def _look(self) -> bool:
        self._drop_cancelled()
        return self._publish() or bool(self._open)

    def _drop_cancelled(self) -> None:
        for entry in list(self._open):
            # Triton frees the sender's factory with the final response, and asking after that is a segmentation fault
            # of the whole server. Final responses are sent only by who has closed the request, which takes the lock.
            with self._lock:
                entry.gone = entry.gone or (entry in self._open and entry.sender.is_cancelled())
                mine = entry.gone and not entry.started and entry in self._open
                if mine:
                    self._open.discard(entry)
            if mine:  # the one that is being made is ended by `_work`, between two steps
                self._say_cancelled(entry)

    def _publish(self) -> bool:
        """Set gauges and counters; True while a clip is made or waits, or something was counted."""
        with self._lock:
            waiting = len(self._open) - self._running
        for name, value in zip(GAUGES, (self._running, max(waiting, 0), self._peak_memory), strict=True):
            self._metrics[name].set(value)
        return self._publish_tally() or bool(self._running)


def _payload(clip: Clip, order: ClipOrder) -> list:
    """The clip in the form that was asked for."""
    if order.output == "tensor":
        return [pb_utils.Tensor("frames", clip.frames)]
    if order.output == "none":
        return []
    encoded = sheet(clip.frames) if order.output == "sheet" else mp4(clip.frames, order.fps)
    return [text("video", base64.b64encode(encoded).decode("ascii"))]
