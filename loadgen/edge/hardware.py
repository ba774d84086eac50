"""Which hardware the server runs on: probed on this machine when the server is local, else what the user says."""

from __future__ import annotations

import ipaddress
import json
import os
import platform
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loadgen.edge.errors import UserError

_QUERY = "name,memory.total,driver_version,power.limit,clocks.max.sm,clocks.max.memory,uuid"


def describe(
    host: str, label: str | None = None, probe: str | None = None, serving: str | None = None
) -> dict[str, Any]:
    """`label` (the folder name of the results), GPUs and CPU of the server at URL `host`; what `probe`'s file measured.

    A remote server's hardware cannot be seen over HTTP: its label is "unknown" unless the user gives one. `serving`:
    indices such as 0,1 of the GPUs to describe, where others of the host do other work; `host_gpus` counts all. Raises
    UserError where there is no such GPU.
    """
    measured = {"measured": read_probe(Path(probe))} if probe else {}
    if not is_local(host):
        return {**measured, "label": label or "unknown", "gpus": [], "cpu": None, "probed": False}
    gpus = all_gpus = nvidia_gpus()
    if serving and all_gpus:
        try:
            gpus = [all_gpus[index] for index in sorted({int(part) for part in serving.split(",")})]
        except IndexError:
            found = f"0 to {len(all_gpus) - 1}" if len(all_gpus) > 1 else "0 alone"
            raise UserError(f"--gpus is {serving}, but this host's GPUs are {found}") from None
    cpu = {"model": cpu_model(), "cores": os.cpu_count(), "memory_bytes": memory_bytes()}
    found = f"{len(gpus)}x-{gpus[0]['name']}" if gpus else f"cpu-{cpu['model']}-{cpu['cores']}-cores"
    return {**measured, "label": label or found, "gpus": gpus, "host_gpus": len(all_gpus), "cpu": cpu,
            "probed": True}  # fmt: skip


def read_probe(path: Path) -> dict[str, Any]:
    """What `tritonmark probe-gpu` wrote: bandwidth and peaks as measured. Raises UserError where the file is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not float(found["copy_bytes_s"]) > 0 or not isinstance(found["matmul_flops_s"], dict):
            raise ValueError
    except OSError as error:
        raise UserError(f"cannot read --gpu-probe {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"--gpu-probe {path} is not what `tritonmark probe-gpu --out` writes") from None
    return dict(found)


def is_local(url: str) -> bool:
    """Does this URL lead to this machine?"""
    name = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(socket.gethostbyname(name)).is_loopback
    except (OSError, ValueError):
        return False


def nvidia_gpus() -> list[dict[str, Any]]:
    """What nvidia-smi says of each GPU (memory in MiB, power in W, clocks in MHz); empty where there is none."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    names = ("name", "memory_mib", "driver", "power_limit_w", "max_sm_mhz", "max_memory_mhz", "uuid")
    return [
        dict(zip(names, (v.strip() for v in line.split(",")), strict=False)) for line in output.splitlines() if line
    ]


def cpu_model() -> str:
    """The CPU's model name as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Physical memory of this machine."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None
