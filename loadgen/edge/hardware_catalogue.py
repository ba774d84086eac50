"""The catalogue of GPUs (`hardware.toml`): recognised by name and memory as probed; what is not in it stays unknown.

recognise("NVIDIA H100 80GB HBM3", 81559).bandwidth_gbs     3350
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from loadgen.core.roofline import Machine
from loadgen.edge.errors import UserError
from loadgen.edge.store import slug

DATA = Path(__file__).parents[1] / "data"
PEAKS = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8", "fp4")
MEMORY_TOLERANCE = 0.08  # drivers keep some of it, and sellers count in other units
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5, "fp4": 0.5, "nvfp4": 0.5}
# Weights in whole numbers are widened before they are multiplied, so 16 bit is the peak that counts.
COMPUTED_IN = {"int8": "bf16", "int4": "bf16", "nvfp4": "fp4"}


@dataclass(frozen=True)
class Gpu:
    """One entry; figures are per GPU, None or absent where unknown. `peaks` are dense TFLOPS by precision."""

    key: str
    name: str
    match: str
    generation: str
    year: int
    date: str
    memory_gib: float
    memory: str
    bandwidth_gbs: float
    capability: float
    peaks: Mapping[str, float]
    source: str
    power_w: float | None = None
    launch_usd: float | None = None
    unverified: tuple[str, ...] = ()
    note: str = ""

    def peak_flops(self, precision: str) -> float | None:
        """Operations per second of one GPU in which a model of `precision` computes; None where it is unknown."""
        wanted = COMPUTED_IN.get(precision, precision)
        if wanted == "bf16" and precision != "bf16" and "bf16" not in self.peaks:
            wanted = "fp16"  # before Ampere
        tera = self.peaks.get(wanted)
        return None if tera is None else tera * 1e12

    def supports(self) -> list[str]:
        """Precisions that its tensor cores know, by compute capability."""
        least = {"fp16": 7.0, "int8": 7.5, "tf32": 8.0, "bf16": 8.0, "fp8": 8.9, "fp4": 10.0}
        return [name for name, capability in least.items() if self.capability >= capability]


@dataclass(frozen=True)
class Hardware:
    """The GPUs that a run was served by: `gpu` None where they were not recognised. Each `group` of them shares one
    copy of the model (tensor parallel)."""

    label: str
    gpu: Gpu | None
    count: int
    measured: Mapping[str, Any] = field(default_factory=dict)
    group: int = 1

    @property
    def copies(self) -> int:
        """Of the model, beside each other."""
        return max(1, self.count // self.group)

    @property
    def name(self) -> str:
        """ "H100 SXM", "2x H100 SXM", or the label where the GPU is not in the catalogue."""
        if self.gpu is None:
            return self.label
        return f"{self.count}x {self.gpu.name}" if self.count > 1 else self.gpu.name

    @property
    def year(self) -> int:
        """Of the generation; unknown hardware comes first."""
        return self.gpu.year if self.gpu else 0

    def machine(self, precision: str) -> Machine | None:
        """What a roofline needs of the GPUs that share one copy of the model: measured by the probe where it was run,
        else by data sheet. None where neither is. The probe has no fp8 or fp4 product: such a peak is the data sheet's.
        """
        sheet = self.gpu.peak_flops(precision) if self.gpu else None
        if bandwidth := self.measured.get("copy_bytes_s"):
            measured = (self.measured.get("matmul_flops_s") or {}).get(COMPUTED_IN.get(precision, precision))
            source = "as measured by the probe"
            if not measured and sheet:
                source = f"with the bandwidth by the probe and the {precision} peak by data sheet"
            peak = measured or sheet
        elif self.gpu:
            bandwidth, peak, source = self.gpu.bandwidth_gbs * 1e9, sheet, "by data sheet"
        else:
            return None
        name = self.gpu.name if self.gpu else self.label
        return Machine(name, bandwidth * self.group, peak * self.group if peak else None, source, self.group)


@cache
def catalogue() -> dict[str, Gpu]:
    """All entries, oldest generation first as in the file."""
    document = tomllib.loads((DATA / "hardware.toml").read_text(encoding="utf-8"))
    return {
        key: Gpu(key=key, **{**entry, "unverified": tuple(entry.get("unverified", ()))})
        for key, entry in document.items()
    }


def recognise(name: str, memory_mib: float | str | None = None) -> Gpu | None:
    """The entry for a GPU as nvidia-smi names it, with its memory in MiB where that is known; None if there is none."""
    plain = name.strip().removeprefix("NVIDIA ").strip()
    try:
        gib = float(memory_mib) / 1024 if memory_mib else None
    except ValueError:
        gib = None
    for gpu in catalogue().values():
        if re.fullmatch(gpu.match, plain) and (
            gib is None or abs(gib - gpu.memory_gib) <= MEMORY_TOLERANCE * gpu.memory_gib
        ):
            return gpu
    return None


def of_run(document: Mapping[str, Any]) -> Hardware:
    """The hardware of a sealed run: by its probed GPUs, else by its label (`4x-NVIDIA H200`, `h100-sxm`).

    GPUs of several kinds, which no entry describes, are unknown. GPUs count that worked while power was sampled (one
    Triton may run a copy of the model on each of its host's), at least tensor parallel x servers.
    """
    hardware = document.get("hardware") or {}
    label, gpus = str(hardware.get("label") or "unknown"), hardware.get("gpus") or []
    group = max(1, int((document.get("exported") or {}).get("tp") or 1))
    telemetry = document.get("telemetry") or {}
    worked = len(telemetry.get("devices") or []) if telemetry.get("energy_of") == "gpu" else 0
    used = max(worked, group * len(document.get("servers") or [0]))
    measured = hardware.get("measured") or {}
    if gpus:
        found = [recognise(g.get("name", ""), g.get("memory_mib")) for g in gpus]
        known = found[0] if all(g == found[0] for g in found) else None
        return Hardware(label, known, min(used, len(gpus)), measured, group)
    return Hardware(label, of_label(label), used, measured, group)


def of_label(label: str) -> Gpu | None:
    """The entry for a user's label: its key, or a GPU's name behind a count."""
    if label in catalogue():
        return catalogue()[label]
    name = re.sub(r"^\d+x[- ]", "", label)
    return recognise(name) or next((g for g in catalogue().values() if slug(g.name) == slug(name)), None)


def prices(path: Path | None) -> tuple[dict[str, float], str]:
    """Price per GPU and hour by catalogue key, and the currency's name. Raises UserError naming what is wrong."""
    if path is None:
        return {}, ""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --prices {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--prices {path} is not TOML: {error}") from None
    table = document.get("per_gpu_hour")
    if not isinstance(table, dict):
        raise UserError(f"--prices {path} has no table [per_gpu_hour]; see loadgen/data/prices.example.toml")
    unknown = sorted(set(table) - set(catalogue()))
    if unknown:
        raise UserError(f"--prices {path}: no GPU {unknown[0]!r} in the catalogue; `tritonmark gpus` lists them")
    out = {}
    for key, value in table.items():
        if value == "":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise UserError(f'--prices {path}: {key} is {value!r}; give a price per hour above 0, or ""')
        out[key] = float(value)
    return out, str(document.get("currency") or "")


def markdown() -> str:
    """The catalogue as a table, for the documents."""
    head = ["key", "GPU", "generation", "date", "memory", "GB/s", *(p.upper() for p in PEAKS), "W", "CC", "unverified"]
    rows = []
    for g in catalogue().values():
        peaks = [f"{g.peaks[p]:g}" if p in g.peaks else "–" for p in PEAKS]
        power = "–" if g.power_w is None else f"{g.power_w:g}"
        rows.append([f"`{g.key}`", g.name, g.generation, g.date, f"{g.memory_gib:g} GB {g.memory}",
                     f"{g.bandwidth_gbs:g}", *peaks, power, f"{g.capability:.1f}",
                     ", ".join(g.unverified)])  # fmt: skip
    return "\n".join("| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *rows])
