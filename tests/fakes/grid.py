"""Sealed runs of a planted GPU × backend grid: nobody was served. Speeds multiply, and repeats scatter."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from simulated_run import simulate

from loadgen.edge import scenarios, store

GPUS = {"A100": ("NVIDIA A100-SXM4-80GB", "81920", "400.00"), "H100": ("NVIDIA H100 80GB HBM3", "81559", "700.00"),
        "H200": ("NVIDIA H200", "143771", "700.00")}  # fmt: skip
HARDWARE = {"A100": 1.0, "H100": 1.6, "H200": 2.2}
COMPILER = {"torch-eager": 1.0, "torch-compile": 1.5, "vllm": 2.5}
INTERACTION = {("H200", "vllm"): 1.2}


def facts(gpu: str, backend: str, run_id: str) -> dict[str, Any]:
    name, memory, watts = GPUS[gpu]
    return {
        "run_id": run_id, "backend": backend, "precision": "bf16", "exported": {"model": "phi-2", "tp": "1", "seed": "0"},
        "prompts": {"source": "synthetic", "count": 64, "sha256": "abc"},
        "hardware": {"label": f"1x-{name}", "probed": True, "cpu": None,
                     "gpus": [{"name": name, "memory_mib": memory, "driver": "580.1", "power_limit_w": watts}]},
    }  # fmt: skip


def one(folder: Path, gpu: str, backend: str, repeat: int = 0, name: str = "single_stream", speed: float | None = None,
        count: int = 40, scatter: float = 0.01, seed: int | None = None, document: dict[str, Any] | None = None,
        failed: int = 0, **overrides: Any) -> store.Run:  # fmt: skip
    """A run whose speed is the planted one (or `speed`), times a scatter of its own."""
    if seed is None:
        seed = 1000 * list(GPUS).index(gpu) + 100 * list(COMPILER).index(backend) + repeat
    planted = HARDWARE[gpu] * COMPILER[backend] * INTERACTION.get((gpu, backend), 1.0) if speed is None else speed
    factor = planted * math.exp(scatter * np.random.default_rng(seed).normal())
    options = {"duration_s": 0.1, "input_tokens": "128", "prompts": "synthetic", **overrides}
    scenario = scenarios.resolve(name, "phi-2", "smoke", options)
    run_id = f"{gpu}-{backend}-{name}-{overrides.get('concurrency', '')}{overrides.get('target_qps', '')}r{repeat}"
    return simulate(folder / run_id, scenario, count=count, ttft_ms=50 / factor, tpot_ms=10 / factor, tokens=32, library=64,
                    seed=seed, failed=failed, document=facts(gpu, backend, run_id) | (document or {}))  # fmt: skip


def grid(folder: Path, holes: tuple[tuple[str, str], ...] = (), repeats: int = 2, **options: Any) -> list[store.Run]:
    return [one(folder, gpu, backend, repeat, **options) for gpu in HARDWARE for backend in COMPILER
            if (gpu, backend) not in holes for repeat in range(repeats)]  # fmt: skip
