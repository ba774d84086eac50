"""How much of a clip is rounding: CogVideoX-5b at its own width, compiled and eager in bf16 and eager in fp32.

    python benchmarks/video_rounding.py                  # 24 of 42 layers, 8 steps: 20 GB, 13 minutes of 2 cores
    python benchmarks/video_rounding.py --layers 4 --steps 2

Prints PSNR (dB) between clips of 9 frames of 96 x 96: the same order, another prompt, another seed. fp32 has the
same weights. Only then does a tolerance for bf16 mean something: it must lie between rounding and another seed. The
text encoder is cut to two layers (of T5's 24), since it is run once and rounds what both sides get alike.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "exporters" / "runtime"), str(ROOT / "benchmarks" / "gpu"), str(ROOT)]

from byte_tokenizer import save_byte_tokenizer  # noqa: E402
from video_engine import Engine  # noqa: E402
from video_request import ClipOrder  # noqa: E402

from exporters.video_reference import video_agreement  # noqa: E402

PROMPT = "A red kite climbs over a windy beach."
OTHER = "Under water: a sea turtle glides over a coral reef while sunlight dances on the sand."


def engine(layers: int) -> Engine:
    """The runtime's own, on the CPU, with weights drawn there."""
    model = tomllib.loads((ROOT / "exporters" / "models.toml").read_text(encoding="utf-8"))["cogvideox-5b"]
    parts = copy.deepcopy(model["parts"])
    parts["transformer"]["config"]["num_layers"] = layers
    parts["text_encoder"]["config"]["num_layers"] = 2
    folder = Path(tempfile.mkdtemp(prefix="video-rounding-"))
    save_byte_tokenizer(folder / "tokenizer")
    settings = {**model["runtime"], "parts": parts, "precision": "bf16", "seed": 0, "draw_on_load": True}
    return Engine(folder, settings | {"transformer_mode": "eager"}, "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    made, started = engine(options.layers), time.monotonic()

    def clip(title: str, text: str = PROMPT, seed: int = 0):
        order = ClipOrder(text, "", seed, 9, 96, 96, options.steps, made.settings["guidance_scale"], 8, "none", False)
        frames = made.generate(order).frames
        print(f"{time.monotonic() - started:7.1f} s  {title}", flush=True)
        return frames

    eager, prompt, seed = clip("eager"), clip("another prompt", OTHER), clip("another seed", PROMPT, 1)
    blocks = made.pipe.transformer.transformer_blocks
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False)  # as the engine does for transformer_mode compile
    compiled = clip("compiled")
    for block in blocks:
        block._compiled_call_impl = None
    for part in (made.pipe.transformer, made.pipe.vae, made.pipe.text_encoder):
        part.float()
    exact = clip("fp32")
    for title, frames in (("compiled", compiled), ("another prompt", prompt), ("another seed", seed), ("fp32", exact)):
        print(f"{title} against eager: {video_agreement(eager, frames):.1f} dB")
    print(f"fp32 against compiled: {video_agreement(compiled, exact):.1f} dB")


if __name__ == "__main__":
    main()
