"""What `tritonmark doctor` looks at: nvidia-smi, ports, clock, limits, hub. Nothing here fails: what cannot be found
out is None, or says why."""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from exporters.catalogue import Model
from exporters.machine import busy_share, cores
from exporters.preflight import Machine, probe

PORTS = {
    8000: "Triton HTTP", 8001: "Triton gRPC", 8002: "Triton metrics", 8089: "Locust's page", 9090: "Prometheus",
    9464: "load metrics", 9465: "history", 3000: "Grafana",
}  # fmt: skip
CUDA = re.compile(r"CUDA (?:UMD )?Version\s*:\s*(\d+(?:\.\d+)+)")
SMI_S = 20.0
STA_UNSYNC, STATUS_AT, TIMEX_BYTES = 0x40, 40, 256  # struct timex of 64-bit Linux; larger than it is


@dataclass(frozen=True)
class Seen:
    """One look at this machine. `smi` is nvidia-smi's complaint, or empty; `clock` whether it is kept by NTP, None
    where the kernel does not say; `busy` the share of all cores in use; `hub` why the model cannot be had."""

    machine: Machine
    cuda: str | None
    smi: str
    taken: tuple[int, ...]
    clock: bool | None
    cores: int
    open_files: int
    busy: float
    hub: str = ""


def look(image: str, folder: Path, model: Model | None) -> Seen:
    """Looks at everything; takes seconds. `model`: asked for at the hub, if its licence must be accepted."""
    cuda, complaint = nvidia_smi()
    return Seen(
        machine=probe(image, folder.absolute()),
        cuda=cuda,
        smi=complaint,
        taken=tuple(port for port in PORTS if in_use(port)),
        clock=clock_is_kept(),
        cores=cores(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        busy=busy_share(),
        hub=hub_refusal(model) if model and model.gated else "",
    )


def nvidia_smi() -> tuple[str | None, str]:
    """(CUDA version that the driver knows, what nvidia-smi complains of)."""
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=SMI_S, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        return None, "nvidia-smi is not installed"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"nvidia-smi does not answer ({type(error).__name__})"
    text = " ".join((done.stdout + done.stderr).split())
    found = CUDA.search(text)
    return (found[1] if found else None), "" if done.returncode == 0 else text[:160] or f"exit code {done.returncode}"


def in_use(port: int) -> bool:
    """Whether somebody listens on it, on any address of this machine."""
    with socket.socket() as probe_socket:
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what just ended is not in use
        try:
            probe_socket.bind(("", port))
        except OSError:
            return True
    return False


def clock_is_kept() -> bool | None:
    """Whether NTP or PTP keeps the kernel's clock (adjtimex); None where the kernel does not say."""
    with contextlib.suppress(OSError, AttributeError):
        timex = ctypes.create_string_buffer(TIMEX_BYTES)  # modes = 0: only asks
        if ctypes.CDLL(None).adjtimex(timex) >= 0:
            return not int.from_bytes(timex.raw[STATUS_AT : STATUS_AT + 4], "little") & STA_UNSYNC
    return None


def hub_refusal(model: Model) -> str:
    """Why the hub does not give this user `model`; empty where it does. Its own client asks, with its own token."""
    try:
        from huggingface_hub import HfApi

        HfApi().auth_check(str(model.hub_id))
    except ImportError:
        return "huggingface_hub is not installed, so it was not asked"
    except Exception as error:  # a refusal, a proxy, no network: each in its own words
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return ""
