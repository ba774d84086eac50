"""`tritonmark probe-gpu`: what this GPU's memory and cores really do, by a short copy and a few matrix products.

A data sheet's bandwidth is not reached by any program. A roofline against the measured one says how much a backend
leaves; `tritonmark run --gpu-probe FILE` seals the measurement with the run. Needs torch; without a GPU the CPU is
measured, which is there to try it out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click

from loadgen.edge.errors import UserError
from loadgen.edge.hardware import cpu_model
from loadgen.edge.text_file import write

COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}  # far larger than any cache
SIDE = {"cuda": 8192, "cpu": 1024}
DTYPES = {"cuda": ("fp32", "fp16", "bf16"), "cpu": ("fp32",)}
REPEATS = 10


@click.command(name="probe-gpu")
@click.option("--out", type=click.Path(path_type=Path), help="write the JSON here  [default: stdout]")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cuda", "cpu"]))
def probe_gpu(out: Path | None, device: str) -> None:
    """Measure memory bandwidth and matrix products of this machine's GPU, for a roofline of what it can really do.

    Takes some ten seconds; nothing else should run on the GPU meanwhile.
    """
    text = json.dumps(measure(device), indent=1)
    write(out, text + "\n") if out else click.echo(text)
    if out:
        click.echo(f"wrote {out}; give it to a run with --gpu-probe {out}")


def measure(device: str = "auto") -> dict[str, Any]:
    """`copy_bytes_s` (bytes read and written a second) and `matmul_flops_s` by precision: medians of ten.

    Raises UserError without torch, or without a GPU where one was asked for.
    """
    try:
        import torch
    except ImportError:
        raise UserError("probe-gpu needs torch; install it with `make setup` or pip install torch") from None
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no CUDA GPU; see nvidia-smi, or try --device cpu")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    size = COPY_BYTES[kind]
    if kind == "cuda":
        size = min(size, torch.cuda.mem_get_info()[0] // 4)
    source = torch.empty(size, dtype=torch.uint8, device=kind).fill_(1)
    target = torch.empty_like(source)
    copy_s = _median_s(lambda: target.copy_(source), torch, kind)
    source = target = torch.empty(0)  # the memory back, before the matrices
    n = SIDE[kind]
    flops = {}
    for name in DTYPES[kind]:
        pair = [torch.randn(n, n, device=kind, dtype=types[name]) for _ in range(2)]
        flops[name] = 2 * n**3 / _median_s(partial(torch.matmul, *pair), torch, kind)
    name = torch.cuda.get_device_name() if kind == "cuda" else cpu_model()
    return {
        "device": name, "kind": kind, "torch": torch.__version__, "copy_bytes": size, "repeats": REPEATS,
        "copy_bytes_s": 2 * size / copy_s, "matmul_side": n, "matmul_flops_s": flops,
    }  # fmt: skip


def _median_s(work: Callable[[], Any], torch: Any, kind: str) -> float:
    """Median time of `work` after three warm-ups; on a GPU by its own events."""
    for _ in range(3):
        work()
    times = []
    for _ in range(REPEATS):
        if kind == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begun = time.perf_counter()
            work()
            times.append(time.perf_counter() - begun)
    return float(median(times))
