"""Which GPUs this machine has, and what fits on them. `find_gpus` looks; `fit` decides: a pure function of a model and
of given GPUs, so that it can be asked about any machine.

What a model needs on each of `tp` GPUs: its weights / tp, the KV cache of 8 sequences of 1024 tokens / tp, and an
overhead for CUDA's context, the code it loads, and activations.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from exporters.catalogue import Model
from exporters.preflight import BYTES, Gpu, weight_bytes

GB = 1e9
SEQUENCES, TOKENS = 8, 1024  # the least that is worth a load test
OVERHEAD_BYTES = {"llm": 2.0 * GB, "video": 12.0 * GB}  # video: diffusers' own figure for CogVideoX-5b is 33 GB in bf16
LEAST_CAPABILITY = {"fp8": 8.9, "nvfp4": 10.0}  # of precisions whose products the GPU has to know
SIZES = (1, 2, 4, 8)  # GPUs that may share a model
QUERY = ("nvidia-smi", "--query-gpu=name,compute_cap,memory.total,memory.free", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class LocalGpu(Gpu):
    """One GPU of this machine, with the memory in bytes that nobody uses now."""

    free_bytes: int = 0


@dataclass(frozen=True)
class Fit:
    """Whether a model in `precision`, shared by `tp` GPUs, can run: `reason` says why not, `note` what to know if so.
    `needed_bytes` is for each GPU."""

    precision: str
    tp: int
    fits: bool
    reason: str
    note: str
    needed_bytes: float


def weights_bytes(model: Model, precision: str) -> float:
    """Memory of a model's weights; in 8 bit and less, embeddings and output layer stay in 16 bit."""
    return weight_bytes(model, precision) if model.family == "llm" else model.parameters * BYTES[precision]


def needed_bytes(model: Model, precision: str, tp: int = 1) -> float:
    """Memory on each of `tp` GPUs; see the module."""
    cache = model.kv_bytes_per_token * SEQUENCES * TOKENS * (2 if precision == "fp32" else 1)
    return (weights_bytes(model, precision) + cache) / tp + OVERHEAD_BYTES[model.family]


def fit(model: Model, precision: str, tp: int, gpus: Sequence[LocalGpu]) -> Fit:
    """Can `model` run on `gpus`? Only the `tp` with most free memory are looked at. Tiny models run without any."""
    needed = needed_bytes(model, precision, tp)
    if model.tiny_of:
        return Fit(precision, tp, True, "", "needs no GPU", needed)
    taken = sorted(gpus, key=lambda gpu: -gpu.free_bytes)[:tp]
    reason = _obstacle(model, precision, tp, taken, needed)
    slow = "" if reason else _slow(precision, min(gpu.capability for gpu in taken))
    return Fit(precision, tp, not reason, reason, slow, needed)


def fits(model: Model, precisions: Sequence[str], gpus: Sequence[LocalGpu]) -> list[Fit]:
    """For each precision the fewest GPUs that do; where even all of them don't, why one doesn't."""
    found = []
    for precision in precisions:
        sizes = [size for size in SIZES if size <= max(len(gpus), 1)] if _shares(model) else [1]
        tried = [fit(model, precision, size, gpus) for size in sizes]
        found.append(next((one for one in tried if one.fits), tried[-1]))
    return found


def _shares(model: Model) -> bool:
    return model.family == "llm" and not model.tiny_of


def _obstacle(model: Model, precision: str, tp: int, gpus: Sequence[LocalGpu], needed: float) -> str:
    if not gpus:
        return "no GPU: only the -tiny models run here"
    if len(gpus) < tp:
        return f"{tp} GPUs are needed, {len(gpus)} are there"
    oldest = min(gpus, key=lambda gpu: gpu.capability)
    least = LEAST_CAPABILITY.get(precision, 0.0)
    if oldest.capability < least:
        return f"{precision} needs compute capability {least}, {oldest.name} has {oldest.capability}"
    free = gpus[-1].free_bytes
    if needed <= free:
        return ""
    enough = [size for size in SIZES if size > tp and needed_bytes(model, precision, size) <= free]
    advice = f"; {enough[0]} of these would do" if enough and _shares(model) else ""
    each = f" on each of {tp}" if tp > 1 else ""
    return f"needs {needed / GB:.1f} GB{each}, {gpus[-1].name} has {free / GB:.1f} GB free{advice}"


def _slow(precision: str, capability: float) -> str:
    """What is emulated there. bf16 and its tensor cores came with 8.0, fp16's tensor cores with 7.0."""
    if precision == "bf16" and capability < 8.0:
        return f"bf16 is emulated below compute capability 8.0: take {'fp16' if capability >= 7.0 else 'fp32'}"
    if precision == "fp16" and capability < 7.0:
        return "fp16 is slower than fp32 below compute capability 7.0"
    return ""


def find_gpus() -> list[LocalGpu]:
    """The NVIDIA GPUs of this machine, by NVML where its Python module is installed, else by nvidia-smi; none where
    neither answers."""
    with contextlib.suppress(Exception):  # no module, no driver, no GPU: all mean the same here
        return _by_nvml()
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [
        LocalGpu(row[0], float(row[1]), int(row[2]) << 20, int(row[3]) << 20)
        for row in rows
        if len(row) == 4 and row[1].replace(".", "", 1).isdigit() and row[2].isdigit() and row[3].isdigit()
    ]


def _by_nvml() -> list[LocalGpu]:
    import pynvml

    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [_gpu(pynvml, handle) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _gpu(pynvml, handle) -> LocalGpu:
    name = pynvml.nvmlDeviceGetName(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    name = name.decode() if isinstance(name, bytes) else name  # older versions of the module
    return LocalGpu(name, float(f"{major}.{minor}"), int(memory.total), int(memory.free))
