"""One text-to-video pipeline without any Triton: load, prepare, make one clip. Runs beside model.py; imports nothing of
this project.

The pipeline is diffusers' own CogVideoXPipeline, called in three stages so that each can be timed: text encoding, the
denoising loop (with a callback a step), VAE decoding. How the transformer runs is a setting, `transformer_mode`:
`eager`, `compile` (torch.compile of each block: all blocks are alike, so one compilation serves all of them) or
`tensorrt`. What changes the result beyond rounding (`quantisation`, `step_cache`, `vae_tiling`) is other work and has
to be named in the parameter `tritonmark.work`, or the model refuses to load.
"""

from __future__ import annotations

import copy
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from devices import check_compiler
from diffusers import CogVideoXPipeline
from settings_file import read_file
from video_request import ClipOrder
from video_weights import DTYPES, load_parts

MODES = ("eager", "compile", "tensorrt")
QUANTISATIONS = ("none", "fp8")
STEP_CACHES = ("none", "first_block")
EXACT = "exact"
RECOMPILE_LIMIT = 64  # different clip sizes that may be compiled; torch's own limit of 8 would end the model


class CancelledError(Exception):
    """Raised by an `on_step` callback to end a clip."""


@dataclass(slots=True)
class Clip:
    """A finished clip: uint8 RGB `frames` of shape (frames, height, width, 3), and what it took. Times in seconds,
    `step_s` one a denoising step; `peak_memory_bytes` is the device's peak during the clip, on a CPU the process's."""

    frames: np.ndarray
    text_encode_s: float = 0.0
    step_s: list[float] = field(default_factory=list)
    vae_decode_s: float = 0.0
    peak_memory_bytes: int = 0


OnStep = Callable[[int, float], None]


class Engine:
    """The pipeline on one device. `generate` makes one clip at a time, so it is for one thread only."""

    def __init__(self, folder: Path, settings: dict, device: str, cache: Path | None = None) -> None:
        self.settings, self.device = settings, torch.device(device)
        if settings["transformer_mode"] == "compile":
            check_compiler(DTYPES[settings["precision"]], device)
        if settings["threads"]:
            torch.set_num_threads(settings["threads"])
        self.pipe = CogVideoXPipeline(**load_parts(folder, settings, device))
        self.pipe.set_progress_bar_config(disable=True)
        if settings["vae_tiling"]:
            _tile(self.pipe.vae)
        if settings["vae_slicing"]:
            self.pipe.vae.enable_slicing()
        self._counter = copy.deepcopy(self.pipe.tokenizer)  # a tokenizer's padding is state: not for two threads
        self.text_limit = int(self.pipe.transformer.config.max_text_seq_length)
        self._prepare_transformer(cache)

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, the end token among them. May be called while a clip is made."""
        return len(self._counter(text).input_ids)

    def generate(self, order: ClipOrder, on_step: OnStep | None = None) -> Clip:
        """Make one clip. `on_step(0, seconds)` is called after text encoding and `on_step(k, seconds)` after denoising
        step k; what it raises ends the clip and is raised here."""
        told, clip = on_step or (lambda step, seconds: None), Clip(np.empty(0, np.uint8))
        self._reset_peak()
        with torch.no_grad():
            started = self._now()
            embeds, negative = self._encode(order)
            clip.text_encode_s = self._now() - started
            told(0, clip.text_encode_s)
            latents = self._denoise(order, embeds, negative, clip, told)
            started = self._now()
            clip.frames = self._decode(latents)
            clip.vae_decode_s = self._now() - started
        clip.peak_memory_bytes = self._peak()
        wanted = (order.num_frames, order.height, order.width)
        if clip.frames.shape[:3] != wanted:
            raise RuntimeError(f"the VAE made frames of shape {clip.frames.shape[:3]}, not {wanted}")
        return clip

    def warm_up(self) -> Clip:
        """One step of a clip of the default size, so that the first request does not pay for compilation."""
        s = self.settings
        return self.generate(
            ClipOrder("warm up", "", 0, s["num_frames"], s["height"], s["width"], 1, s["guidance_scale"], s["fps"],
                      "none", False)
        )  # fmt: skip

    def _encode(self, order: ClipOrder):
        return self.pipe.encode_prompt(
            order.text, order.negative_prompt or None, do_classifier_free_guidance=order.guided,
            max_sequence_length=self.text_limit, device=self.device,
        )  # fmt: skip

    def _denoise(self, order: ClipOrder, embeds, negative, clip: Clip, told: OnStep) -> torch.Tensor:
        before = self._now()

        def after_step(pipe, index: int, timestep, tensors: dict) -> dict:
            nonlocal before
            now = self._now()
            clip.step_s.append(now - before)
            before = now
            told(index + 1, clip.step_s[-1])
            return tensors

        answer = self.pipe(
            prompt_embeds=embeds, negative_prompt_embeds=negative, num_frames=order.num_frames, height=order.height,
            width=order.width, num_inference_steps=order.num_inference_steps, guidance_scale=order.guidance_scale,
            use_dynamic_cfg=self.settings["dynamic_cfg"], max_sequence_length=self.text_limit, output_type="latent",
            generator=torch.Generator("cpu").manual_seed(order.seed),  # the same noise on every device
            callback_on_step_end=after_step, return_dict=False,
        )  # fmt: skip
        return answer[0]

    def _decode(self, latents: torch.Tensor) -> np.ndarray:
        video = self.pipe.decode_latents(latents)[0]  # channels, frames, height, width in -1 to 1
        video = ((video.float() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
        return video.permute(1, 2, 3, 0).contiguous().cpu().numpy()

    def _prepare_transformer(self, cache: Path | None) -> None:
        transformer, mode = self.pipe.transformer, self.settings["transformer_mode"]
        if self.settings["quantisation"] == "fp8":
            _to_fp8(transformer, self.device)
        if self.settings["step_cache"] == "first_block":
            from diffusers import FirstBlockCacheConfig

            transformer.enable_cache(FirstBlockCacheConfig(threshold=self.settings["step_cache_threshold"]))
        if mode == "compile":
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
            if not Path(sys.executable or "").name.startswith("python"):  # embedded in Triton: it cannot start workers
                from torch._inductor import config

                config.compile_threads = 1
            for block in transformer.transformer_blocks:
                block.compile(fullgraph=True, dynamic=False)
        elif mode == "tensorrt":
            from video_tensorrt import compile_transformer

            self.pipe.transformer = compile_transformer(self.pipe, self.settings, cache)

    def _now(self) -> float:
        """Monotonic seconds, after everything that the device was given is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _tile(vae: torch.nn.Module) -> None:
    """Decode in tiles of half the model's height and width, as diffusers does, rounded to 48 x 40 pixels: its overlaps
    of 1/6 and 1/5 are whole latents only then, and with others the decoded frames have another size."""
    tiles = [max(least, size // 2 // least * least) for size, least in
             ((vae.config.sample_height, 48), (vae.config.sample_width, 40))]  # fmt: skip
    vae.enable_tiling(tile_sample_min_height=tiles[0], tile_sample_min_width=tiles[1])


def _to_fp8(transformer: torch.nn.Module, device: torch.device) -> None:
    """Weights and activations of all blocks' linear layers in FP8, one scale a row (torchao)."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError("config.pbtxt: quantisation fp8 needs a GPU of compute capability 8.9 or higher; use none")
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError:
        raise ValueError("config.pbtxt: quantisation fp8 needs torchao; install it or use none") from None
    quantize_(transformer.transformer_blocks, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


def work_of(settings: dict) -> str:
    """What is done other than the model says: "exact", or "fp8", "first_block", "tiled_vae" joined by "+"."""
    other = [settings[name] for name in ("quantisation", "step_cache") if settings[name] != "none"]
    return "+".join([*other, *(["tiled_vae"] if settings["vae_tiling"] else [])]) or EXACT


def read_settings(folder: Path, overrides: dict[str, str]) -> dict:
    """As settings_file.read_file; a value that is not allowed, and other work that is not labelled as such, are a
    ValueError of one line."""
    settings = read_file(folder, overrides)
    for name, allowed in (("transformer_mode", MODES), ("quantisation", QUANTISATIONS), ("step_cache", STEP_CACHES)):
        if settings[name] not in allowed:
            raise ValueError(
                f"config.pbtxt: parameter {name} is {settings[name]!r}; choose one of {', '.join(allowed)}"
            )
    if settings["step_cache"] != "none" and settings["transformer_mode"] != "eager":
        raise ValueError(
            "config.pbtxt: step_cache works with transformer_mode eager only (a cache decides at each step)"
        )
    done, told = work_of(settings), overrides.get("tritonmark.work", EXACT)
    if done != told:
        raise ValueError(
            f"config.pbtxt: these settings do other work ({done}) than parameter tritonmark.work says ({told});"
            f" set it to {done}, so that results are not compared with those of the same work"
        )
    return settings
