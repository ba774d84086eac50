"""Is this machine able to do what was asked? Answered before hours are spent.

`probe` looks (nvidia-smi, docker, disks, token), `problems` decides: a pure function of what is needed and what is
there, so that it can be asked about any machine. Each problem is one line: what is missing, and what to do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from exporters.errors import UserError
from exporters.gpus import Gpu, find_gpus

GB = 1e9
ROOM = 1.08  # weights, and as much again in percent for activations and the context that CUDA itself takes
PROBE_S = 20.0


@dataclass(frozen=True)
class Machine:
    """What is there. `driver` is None without an NVIDIA driver; `docker` says why docker cannot be used, or is empty;
    `image_present` whether the image need not be pulled; `free_bytes` is where the build writes."""

    gpus: tuple[Gpu, ...]
    driver: str | None
    docker: str
    image_present: bool
    free_bytes: int
    hub_token: bool


@dataclass(frozen=True)
class Needs:
    """What an export takes. `gpus` share `weight_bytes`; `disk_bytes` is all that is written besides the image."""

    what: str
    capability: float
    capability_for: str
    gpus: int
    weight_bytes: float
    disk_bytes: float
    image_gb: float
    least_driver: str
    gated: bool


def problems(needs: Needs, machine: Machine) -> list[str]:
    """All that stands in the way, a line each; empty when nothing does."""
    found = [f"docker cannot be used ({machine.docker}): it runs in a container"] if machine.docker else []
    found += _gpu_problems(needs, machine)
    if machine.driver and _version(machine.driver) < _version(needs.least_driver):
        found.append(f"driver {machine.driver} is too old: the image needs {needs.least_driver}; update the driver")
    pull = 0.0 if machine.image_present else needs.image_gb * GB
    if machine.free_bytes < needs.disk_bytes + pull:
        found.append(
            f"{machine.free_bytes / GB:.0f} GB free, but {needs.what} needs {(needs.disk_bytes + pull) / GB:.0f} GB"
            " on disk; free some, or choose another --build-cache"
        )
    if needs.gated and not machine.hub_token:
        found.append(f"{needs.what} is gated and no hub token was found: accept its licence, then `hf auth login`")
    return found


def _gpu_problems(needs: Needs, machine: Machine) -> list[str]:
    if not machine.gpus:
        return [f"no NVIDIA GPU was found, but {needs.what} is built and run on one (nvidia-smi must list it)"]
    old = [gpu for gpu in machine.gpus if gpu.capability < needs.capability]
    if old:
        return [
            f"{old[0].name} has compute capability {old[0].capability}, but {needs.capability_for} needs"
            f" {needs.capability}; choose another precision, backend or GPU"
        ]
    if len(machine.gpus) < needs.gpus:
        return [f"{needs.what} is spread over {needs.gpus} GPUs, but there are {len(machine.gpus)}"]
    each, least = needs.weight_bytes * ROOM / needs.gpus, min(gpu.memory_bytes for gpu in machine.gpus[: needs.gpus])
    if each > least:
        return [
            f"{needs.what} needs {each / GB:.0f} GB on each of {needs.gpus} GPU(s), {machine.gpus[0].name} has"
            f" {least / GB:.0f} GB; choose a smaller precision or a larger --tp"
        ]
    return []


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def require(needs: Needs, machine: Machine) -> None:
    """A UserError with every problem, or nothing."""
    if found := problems(needs, machine):
        raise UserError("this machine cannot do it: " + "; ".join(found))


def probe(image: str, folder: Path) -> Machine:
    """Look at this machine. Nothing here fails: what cannot be found out counts as not there."""
    docker = _docker_problem()
    present = not docker and bool(_answer("docker", "image", "inspect", "--format", "{{.Id}}", image))
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    return Machine(tuple(find_gpus()), _driver(), docker, present, free, _has_token())


def _driver() -> str | None:
    said = _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0].strip()
    return said if said[:1].isdigit() else None


def _docker_problem() -> str:
    if shutil.which("docker") is None:
        return "it is not installed"
    if not _answer("docker", "version", "--format", "{{.Server.Version}}"):
        return "its daemon does not answer"
    if "nvidia" not in _answer("docker", "info", "--format", "{{json .Runtimes}}"):
        return "it has no nvidia runtime; install the NVIDIA container toolkit"
    return ""


def _has_token() -> bool:
    """Whether a token of the hub is set or stored; it is never read into the export."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return bool(os.environ.get("HF_TOKEN")) or (home / "token").is_file()


def _answer(*command: str) -> str:
    """What a command prints, or nothing when it fails, hangs or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
