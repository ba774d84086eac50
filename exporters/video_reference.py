"""`reference_video.npz` and `.jsonl`: clips of the plain diffusers pipeline, and how near another's frames come.

    references = read_references(folder)          # prompt, seed, sizes and frames of each
    video_agreement(references[0].frames, frames)  # PSNR in dB; infinite when equal

The runtime's engine is not used here: the pipeline is called as its documentation says, on the CPU unless there is a
GPU. Equal frames need equal noise: it comes from a CPU generator with the request's seed, as in the runtime.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporters.errors import UserError
from exporters.layout import import_path
from exporters.reference import free_gpu, prompts

NAME = "reference_video"
MAX_CLIPS = 8  # a reference is for comparing, and 49 frames of 480 x 720 are 51 MB
CLIP_FIELDS = {"frames": "num_frames", "steps": "num_inference_steps", "height": "height", "width": "width"}
MIN_PSNR_DB = {"fp32": 60.0, "fp16": 35.0, "bf16": 30.0}  # eager against compiled: rounding only


@dataclass(frozen=True)
class ReferenceClip:
    """One reference: `request` are the fields to send, `frames` uint8 of shape (frames, height, width, 3)."""

    request: dict[str, Any]
    frames: np.ndarray


def video_agreement(reference: np.ndarray, frames: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 `frames` against `reference`, of the same shape, in dB; `inf` when equal.

    PSNR = 10 log10(255² / mean squared error), over all pixels of all frames. Raises ValueError on unequal shapes.
    """
    if reference.shape != frames.shape:
        raise ValueError(f"clips of shape {reference.shape} and {frames.shape} cannot be compared")
    error = float(np.mean((reference.astype(np.float64) - frames.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def parse_clip(words: str) -> dict[str, int]:
    """`frames=9,steps=8` as fields of a request for a clip. Raises UserError."""
    fields = {}
    for word in filter(None, words.split(",")):
        name, _, value = (part.strip() for part in word.partition("="))
        if name not in CLIP_FIELDS or not value.isdigit() or int(value) < 1:
            raise UserError(f"--reference-clip has {word!r}; give {', '.join(CLIP_FIELDS)}, such as frames=9,steps=8")
        fields[CLIP_FIELDS[name]] = int(value)
    return fields


def prompt_distance(references: Sequence[ReferenceClip]) -> float:
    """How near the clips of two prompts with one seed come, in dB: a PSNR of no more says nothing about the prompt.
    `-inf` where no two have one seed."""
    pairs = [(a, b) for i, a in enumerate(references) for b in references[:i] if a.request["seed"] == b.request["seed"]]
    return max((video_agreement(a.frames, b.frames) for a, b in pairs), default=-math.inf)


def write_references(version: Path, count: int, source: Path | None, clip: Mapping[str, int]) -> None:
    """Make `count` clips (at most 8) with the weights of the `version` folder, as they are served by default but for
    the fields in `clip`. Two neighbours have one seed (prompt k has seed k // 2), so that a prompt's part is seen."""
    if count > MAX_CLIPS:
        count = MAX_CLIPS
    texts = prompts(count, source)
    import torch
    from diffusers import CogVideoXPipeline

    with import_path():
        from video_request import BadRequestError, parse_order
        from video_weights import load_parts
    settings = json.loads((version / "settings.json").read_text(encoding="utf-8"))
    fields = {n: settings[n] for n in ("num_frames", "height", "width", "num_inference_steps", "guidance_scale")}
    fields |= clip
    try:
        parse_order({"text_input": "-", **fields}, settings)
    except BadRequestError as error:
        raise UserError(f"--reference-clip cannot be served: {error}") from None
    device = "cuda" if torch.cuda.is_available() and settings["device"] != "cpu" else "cpu"
    pipe = CogVideoXPipeline(**load_parts(version / "weights", settings, device))
    pipe.set_progress_bar_config(disable=True)
    clips, rows = [], []
    for number, text in enumerate(texts):
        seed = number // 2
        video = pipe(
            prompt=text, **fields, use_dynamic_cfg=settings["dynamic_cfg"], output_type="np",
            max_sequence_length=pipe.transformer.config.max_text_seq_length,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).frames[0]  # fmt: skip
        clips.append((video * 255).round().astype(np.uint8))
        rows.append({"text_input": text, "seed": seed, **fields})
    del pipe
    free_gpu()
    np.savez_compressed(version.parent / f"{NAME}.npz", frames=np.stack(clips))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (version.parent / f"{NAME}.jsonl").write_text(lines, encoding="utf-8")


def read_references(folder: Path) -> list[ReferenceClip]:
    """The references of an exported model. Raises UserError where there are none."""
    try:
        lines = (folder / f"{NAME}.jsonl").read_text(encoding="utf-8").splitlines()
        with np.load(folder / f"{NAME}.npz") as stored:
            frames = stored["frames"]
        return [ReferenceClip(json.loads(line), clip) for line, clip in zip(lines, frames, strict=True)]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"no reference clips in {folder} ({error}); export the model with --reference 2") from None
