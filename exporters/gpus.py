"""Which GPUs this machine has, and what fits on them. `find_gpus` looks; `fit` decides: a pure function of a model, a
backend and given GPUs, so that it can be asked about any machine. What a backend needs is in `data/backends.toml`.

What a model needs on each of `tp` GPUs: its weights / tp, the KV cache of 8 sequences of 1024 tokens / tp, and an
overhead for CUDA's context, the code it loads, and activations.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.catalogue import Model

GB = 1e9
SEQUENCES, TOKENS = 8, 1024  # the least that is worth a load test
OVERHEAD_BYTES = {"llm": 2.0 * GB, "video": 12.0 * GB}  # video: diffusers' own figure for CogVideoX-5b is 33 GB in bf16
SIZES = (1, 2, 4, 8)  # GPUs that may share a model
QUERY = ("nvidia-smi", "--query-gpu=name,compute_cap,memory.total,memory.free", "--format=csv,noheader,nounits")
DATA = Path(__file__).with_name("data") / "backends.toml"


@dataclass(frozen=True)
class Gpu:
    """One GPU: name, compute capability (`8.9`), memory in bytes, and how much of it nobody uses now."""

    name: str
    capability: float
    memory_bytes: int
    free_bytes: int = 0


@dataclass(frozen=True)
class Fit:
    """Whether a model in `precision`, shared by `tp` GPUs, can run on `backend`: `reason` says why not, `note` what to
    know if so. `needed_bytes` is for each GPU."""

    backend: str
    precision: str
    tp: int
    fits: bool
    reason: str
    note: str
    needed_bytes: float


@functools.cache
def needs_table() -> Mapping[str, Any]:
    """`data/backends.toml`."""
    return tomllib.loads(DATA.read_text(encoding="utf-8"))


def least_capability(backend: str, precision: str) -> float:
    """The oldest compute capability on which `backend` runs `precision`."""
    table = needs_table()
    needs = table["backend"][backend]
    also = needs.get("also", {}).get(precision, 0.0)
    return max(needs["capability"], also, table["precision"][precision].get("capability", 0.0))


def _least(model: Model, precision: str, backend: str) -> float | None:
    """As least_capability, for a model: a mixture may need more. None where no GPU serves its experts."""
    least = least_capability(backend, precision)
    experts = needs_table()["backend"][backend].get("experts")
    if experts is None or "num_local_experts" not in model.config:
        return least
    return max(least, experts[precision]) if precision in experts else None


def can_share(model: Model, backend: str, precision: str) -> bool:
    """Whether several GPUs can share it."""
    return model.family == "llm" and precision in needs_table()["backend"][backend]["shared"]


def weights_bytes(model: Model, precision: str) -> float:
    """Memory of a model's weights; of a language model, embeddings and output layer stay in 16 bit at least."""
    size = needs_table()["precision"][precision]["bytes"]
    if model.family != "llm":
        return model.parameters * size
    ends = 2 * int(model.config["vocab_size"]) * int(model.config["hidden_size"])
    return (model.parameters - ends) * size + ends * max(size, 2.0)


def needed_bytes(model: Model, precision: str, tp: int = 1) -> float:
    """Memory on each of `tp` GPUs; see the module."""
    cache = model.kv_bytes_per_token * SEQUENCES * TOKENS * (2 if precision == "fp32" else 1)
    return (weights_bytes(model, precision) + cache) / tp + OVERHEAD_BYTES[model.family]


def fit(model: Model, precision: str, tp: int, gpus: Sequence[Gpu], backend: str = "torch-eager") -> Fit:
    """Can `model` run on `gpus`? Only the `tp` with most memory of those that know the precision are looked at."""
    needed = needed_bytes(model, precision, tp)
    if model.tiny_of and needs_table()["backend"][backend]["cpu"]:
        return Fit(backend, precision, tp, True, "", "needs no GPU", needed)
    least = _least(model, precision, backend)
    able = [gpu for gpu in gpus if least is not None and gpu.capability >= least]
    taken = sorted(able, key=lambda gpu: -_usable(gpu, backend))[:tp]
    if not gpus:
        reason = _without_gpu(model, precision, backend)
    elif least is None:
        reason = f"{backend} cannot capture experts in {precision}"
    elif not able:
        reason = _too_old(precision, least, backend, max(gpus, key=lambda gpu: gpu.capability))
    elif len(able) < tp:
        reason = f"{tp} GPUs are needed, {len(able)} are there"
    else:
        reason = _too_small(model, precision, tp, taken[-1], backend, needed)
    note = "" if reason else _slow(precision, min(gpu.capability for gpu in taken))
    return Fit(backend, precision, tp, not reason, reason, note, needed)


def fits(
    model: Model, precisions: Sequence[str], gpus: Sequence[Gpu], backend: str = "torch-eager"
) -> list[Fit]:  # fmt: skip
    """For each precision the fewest GPUs that do; where even all of them don't, why one doesn't."""
    found = []
    for precision in precisions:
        able = sum(gpu.capability >= (_least(model, precision, backend) or 0.0) for gpu in gpus)
        most = able if can_share(model, backend, precision) and not model.tiny_of else 1
        tried = [fit(model, precision, size, gpus, backend) for size in SIZES if size <= max(most, 1)]
        found.append(next((one for one in tried if one.fits), tried[-1]))
    return found


def _usable(gpu: Gpu, backend: str) -> float:
    share = needs_table()["backend"][backend].get("memory_share")
    return min(gpu.free_bytes, share * gpu.memory_bytes) if share else gpu.free_bytes


def _without_gpu(model: Model, precision: str, backend: str) -> str:
    if not needs_table()["backend"][backend]["cpu"]:
        return "needs an NVIDIA GPU"
    weights = weights_bytes(model, precision) / GB
    return f"there is no GPU; --device cpu runs it slowly, its weights take {weights:.1f} GB"


def _too_old(precision: str, least: float, backend: str, newest: Gpu) -> str:
    own = needs_table()["backend"][backend]["capability"]
    what = (
        f"needs compute capability {own}"
        if newest.capability < own
        else f"{precision} needs compute capability {least}"
    )
    return f"{what}, {newest.name} has {newest.capability}"


def _too_small(model: Model, precision: str, tp: int, gpu: Gpu, backend: str, needed: float) -> str:
    usable = _usable(gpu, backend)
    if needed <= usable:
        return ""
    each = f" on each of {tp}" if tp > 1 else ""
    taken = "free" if usable == gpu.free_bytes else f"({usable / gpu.memory_bytes:.0%} of all)"
    enough = [size for size in SIZES if size > tp and needed_bytes(model, precision, size) <= usable]
    advice = f"; {enough[0]} of these would do" if enough else ""
    if not can_share(model, backend, precision):
        advice = "; several cannot share it"
    return f"needs {needed / GB:.1f} GB{each}, {gpu.name} has {usable / GB:.1f} GB {taken}{advice}"


def _slow(precision: str, capability: float) -> str:
    """What is emulated there. bf16 and its tensor cores came with 8.0, fp16's tensor cores with 7.0."""
    if precision == "bf16" and capability < 8.0:
        return f"bf16 is emulated below compute capability 8.0: take {'fp16' if capability >= 7.0 else 'fp32'}"
    if precision == "fp16" and capability < 7.0:
        return "fp16 is slower than fp32 below compute capability 7.0"
    return ""


def find_gpus() -> list[Gpu]:
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
        Gpu(row[0], float(row[1]), int(row[2]) << 20, int(row[3]) << 20)
        for row in rows
        if len(row) == 4 and row[1].replace(".", "", 1).isdigit() and row[2].isdigit() and row[3].isdigit()
    ]


def _by_nvml() -> list[Gpu]:
    import pynvml

    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [_gpu(pynvml, handle) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _gpu(pynvml, handle) -> Gpu:
    name = pynvml.nvmlDeviceGetName(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    name = name.decode() if isinstance(name, bytes) else name  # older versions of the module
    return Gpu(name, float(f"{major}.{minor}"), int(memory.total), int(memory.free))
