"""CogVideoX-5b on one GPU: seconds a denoising step eager and compiled, share of the arithmetic limit, VAE, memory.

    python benchmarks/gpu/video_engine.py --out OUT                     # 49 frames 480x720, 8 steps, guidance, bf16
    python benchmarks/gpu/video_engine.py --out OUT --tiny              # a rehearsal on a CPU, 10 s

It runs the runtime's own engine (exporters/runtime/video_*.py) without Triton, with synthetic weights drawn on the
device. 8 steps are not 50: times are a step's, and no whole clip's. It writes OUT/video_engine.json after each stage,
so that a run that is cut off keeps what it measured, and OUT/eager.png and OUT/compile.png, contact sheets to look at.
It needs torch, transformers, diffusers, av and pillow, and nothing of this project but these files: pass --wheels DIR
for wheels to unpack where nothing can be installed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUDGET_S = 330  # no new stage begins after that
DENSE_PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}  # dense bf16, by the maker


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="cogvideox-5b-tiny in fp32")
    parser.add_argument("--device", default="")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--eager-steps", type=int, default=4, help="steps of the eager clip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wheels", type=Path, help="folder of wheels to unpack and import from")
    return parser.parse_args()


def unpack(folder: Path) -> None:
    """Pure wheels, and manylinux ones with their libraries beside them, are importable once unpacked."""
    site = tempfile.mkdtemp(prefix="video-engine-site-")
    for wheel in sorted(folder.glob("*.whl")):
        zipfile.ZipFile(wheel).extractall(site)
    sys.path.append(site)  # behind what is installed


class Report:
    """The figures, written after each change."""

    def __init__(self, out: Path) -> None:
        self.path, self.figures, self.started = out / "video_engine.json", {}, time.monotonic()

    def add(self, **figures) -> None:
        self.figures |= figures
        self.figures["seconds_so_far"] = round(time.monotonic() - self.started, 1)
        self.path.write_text(json.dumps(self.figures, indent=1) + "\n")
        for name, value in figures.items():
            print(f"{time.monotonic() - self.started:7.1f} s  {name}: {value}", flush=True)

    @property
    def late(self) -> bool:
        return time.monotonic() - self.started > BUDGET_S


def forward_flops(config: dict, settings: dict) -> tuple[int, float]:
    """Tokens of one forward pass, and its floating-point operations (2 a multiply-add): linear layers of every token,
    and QK^T and AV of full attention. Norms, embeddings and the time MLP are left out (below 0.1 %)."""
    tokens = config["max_text_seq_length"]
    latents = (settings["num_frames"] - 1) // 4 + 1
    tokens += latents * (settings["height"] // 16) * (settings["width"] // 16)
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    linear = 2 * tokens * (4 * dim**2 + 8 * dim**2)
    attention = 4 * tokens**2 * dim
    return tokens, float(config["num_layers"] * (linear + attention))


def matmul_tflops(torch, device: str, dtype) -> float:
    """The best of a few large square products: what this device's arithmetic reaches at all."""
    size = 8192 if device.startswith("cuda") else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        wait(torch, device)
        began = time.perf_counter()
        for _ in range(4):
            a @ b
        wait(torch, device)
        best = min(best, (time.perf_counter() - began) / 4)
    return 2 * size**3 / best / 1e12


def wait(torch, device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> int:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    report = Report(args.out)
    if args.wheels:
        unpack(args.wheels)
    sys.path.insert(0, str(ROOT / "exporters" / "runtime"))
    import diffusers
    import torch
    import transformers
    from byte_tokenizer import save_byte_tokenizer
    from video_engine import Engine
    from video_request import ClipOrder

    device = args.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    title, precision = ("cogvideox-5b-tiny", "fp32") if args.tiny else ("cogvideox-5b", "bf16")
    model = tomllib.loads((ROOT / "exporters" / "models.toml").read_text())[title]
    name = torch.cuda.get_device_name(0) if device.startswith("cuda") else "CPU"
    report.add(model=title, weights="synthetic", precision=precision, device=name, torch=torch.__version__,
               diffusers=diffusers.__version__, transformers=transformers.__version__)  # fmt: skip
    settings = {**model["runtime"], "parts": model["parts"], "precision": precision, "seed": args.seed,
                "draw_on_load": True, "transformer_mode": "eager"}  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="video-engine-"))
    save_byte_tokenizer(folder / "tokenizer")
    order = ClipOrder("A red kite climbs over a windy beach.", "", args.seed, settings["num_frames"],
                      settings["height"], settings["width"], args.steps, settings["guidance_scale"], settings["fps"],
                      "none", False)  # fmt: skip

    began = time.monotonic()
    engine = Engine(folder, settings, device)
    wait(torch, device)
    dtype = next(engine.pipe.transformer.parameters()).dtype
    networks = [n for n in model["parts"] if n != "scheduler"]
    sizes = {n: sum(w.numel() for w in getattr(engine.pipe, n).parameters()) for n in networks}
    assert all(count == model["parts"][n]["parameters"] for n, count in sizes.items()), sizes
    tokens, flops = forward_flops(model["parts"]["transformer"]["config"], settings)
    passes = 2 if settings["guidance_scale"] > 1 else 1
    measured = matmul_tflops(torch, device, dtype)
    peak = next((t for part, t in DENSE_PEAK_TFLOPS.items() if part in name), None)
    report.add(draw_s=round(time.monotonic() - began, 1), parameters=sizes, tokens=tokens,
               tflop_a_step=flops * passes / 1e12, matmul_tflops=round(measured, 2), dense_peak_tflops=peak,
               frames=order.num_frames, height=order.height, width=order.width,
               guidance=order.guidance_scale)  # fmt: skip

    def speed(step_s: list[float]) -> dict:
        """Of the steps behind the first, which also picks kernels."""
        later = sorted(step_s[1:] or step_s)
        median = later[len(later) // 2]
        rate = flops * passes / median / 1e12
        shares = {"share_of_matmul": round(rate / measured, 3), "share_of_peak": peak and round(rate / peak, 3)}
        each = [round(s, 4) for s in step_s]
        return {"s_a_step": round(median, 4), "steps_s": each, "tflops": round(rate, 2), **shares}

    def run(title: str, steps: int) -> None:
        began = time.monotonic()
        clip = engine.generate(ClipOrder(**{n: getattr(order, n) for n in ClipOrder.__slots__}
                                         | {"num_inference_steps": steps}))  # fmt: skip
        save_sheet(clip.frames, args.out / f"{title}.png")
        report.add(**{title: speed(clip.step_s) | {
            "text_encode_s": round(clip.text_encode_s, 4), "vae_decode_s": round(clip.vae_decode_s, 3),
            "peak_memory_gb": round(clip.peak_memory_bytes / 1e9, 2), "wall_s": round(time.monotonic() - began, 2),
            "frames": {"mean": round(float(clip.frames.mean()), 1), "deviation": round(float(clip.frames.std()), 1),
                       "deviation_over_time": round(float(clip.frames.std(axis=0).mean()), 1),
                       "clipped": round(float(((clip.frames == 0) | (clip.frames == 255)).mean()), 4)}}})  # fmt: skip
        clips[title] = clip.frames

    clips: dict = {}
    run("eager", args.eager_steps)
    began = time.monotonic()
    for block in engine.pipe.transformer.transformer_blocks:
        block.compile(fullgraph=True, dynamic=False)  # as the engine does for transformer_mode compile
    warm = engine.warm_up()
    report.add(compile_first_step_s=round(warm.step_s[0], 1), compile_s=round(time.monotonic() - began, 1))
    if not report.late:
        run("compile", args.steps)
    if not report.late and args.steps != args.eager_steps:
        again = engine.generate(ClipOrder(**{n: getattr(order, n) for n in ClipOrder.__slots__}
                                          | {"num_inference_steps": args.eager_steps}))  # fmt: skip
        report.add(psnr_eager_compile_db=psnr(clips["eager"], again.frames))
    if not report.late:
        decode(torch, engine, order, device, report)
    report.add(finished=True)
    return 0


def decode(torch, engine, order, device: str, report: Report) -> None:
    """VAE decoding of noise: plain, then in tiles; seconds and peak memory."""
    from video_engine import _tile

    pipe = engine.pipe
    shape = (1, (order.num_frames - 1) // 4 + 1, pipe.vae.config.latent_channels, order.height // 8, order.width // 8)
    latents = torch.randn(shape, device=device, dtype=next(pipe.vae.parameters()).dtype)
    found = {}
    for title, prepare in (("plain", lambda: None), ("tiled", lambda: _tile(pipe.vae))):
        prepare()
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(2):
            wait(torch, device)
            began = time.perf_counter()
            with torch.no_grad():
                pipe.decode_latents(latents)
            wait(torch, device)
            seconds.append(round(time.perf_counter() - began, 3))
        memory = torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0
        found[title] = {"s": min(seconds), "peak_memory_gb": round(memory / 1e9, 2)}
    report.add(vae=found)


def save_sheet(frames, path: Path) -> None:
    """Up to 8 frames in rows of 4, as PNG."""
    import io

    from PIL import Image
    from video_output import sheet

    Image.open(io.BytesIO(sheet(frames))).save(path)


def psnr(first, second) -> float | None:
    """PSNR of two clips in dB; None (JSON has no infinity) when they are equal."""
    import math

    error = float(((first.astype("float64") - second.astype("float64")) ** 2).mean())
    return round(10 * math.log10(255**2 / error), 2) if error else None


if __name__ == "__main__":
    sys.exit(main())
