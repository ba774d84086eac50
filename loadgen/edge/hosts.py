"""The inventory of several hosts, `hosts.toml`: what is scraped, which hardware each has, what it costs.

    currency = "USD"
    [[host]]
    name = "h100-a"           # unique; becomes the label `host` of its series
    address = "10.0.0.11"     # name or address under which the other hosts reach it
    gpu = "8x-NVIDIA H100 80GB HBM3"   # optional: shown only while the host cannot be asked
    price_per_gpu_hour = 2.5  # optional
    tritons = 1               # servers on it; more than one with deploy/per-gpu.yml

The hardware label is probed: DCGM's exporter on the host names every GPU. What the file says is the second choice.
"""

from __future__ import annotations

import ipaddress
import json
import re
import tomllib
import urllib.parse
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadgen.edge.errors import UserError
from loadgen.edge.hardware_catalogue import of_label
from loadgen.edge.telemetry_sources import Missing, scrape
from loadgen.edge.text_file import write

# as docker-compose.yml and deploy/per-gpu.yml publish them
HTTP_PORT, TRITON_PORT, TRITON_PORT_STEP, DCGM_PORT = 8000, 8002, 10, 9400
MAX_PAGE = 4 << 20  # bytes of DCGM's answer
_KEYS = {"name": str, "address": str, "gpu": str, "price_per_gpu_hour": (int, float), "tritons": int}
_GPU_LINE = re.compile(r'^DCGM_FI_\w+\{([^}]*)\}', re.M)  # fmt: skip
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Host:
    """One GPU host. `gpu` is what the inventory says, `price_per_gpu_hour` is in the inventory's currency."""

    name: str
    address: str
    gpu: str = ""
    price_per_gpu_hour: float | None = None
    tritons: int = 1


@dataclass(frozen=True)
class Inventory:
    hosts: tuple[Host, ...]
    currency: str = ""


def read(path: Path) -> Inventory:
    """The inventory in a file. Raises UserError that names the host and the key at fault."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); copy deploy/hosts.example.toml (`tritonmark init` writes it)"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from error
    entries = document.get("host")
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise UserError(f"{path} has no [[host]]; see deploy/hosts.example.toml")
    hosts = tuple(_host(path, number, entry) for number, entry in enumerate(entries, 1))
    for field in ("name", "address"):
        values = [getattr(h, field) for h in hosts]
        if twice := next((v for v in values if values.count(v) > 1), None):
            raise UserError(f"{path}: two hosts have the {field} {twice!r}; give each its own")
    return Inventory(hosts, str(document.get("currency", "")))


def _host(path: Path, number: int, entry: dict[str, Any]) -> Host:
    where = f"{path}: host {entry.get('name', number)!r}"
    for key, value in entry.items():
        if key not in _KEYS:
            raise UserError(f"{where} has the unknown key {key!r}; known are {', '.join(_KEYS)}")
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            raise UserError(f"{where}: {key} is {value!r}; see deploy/hosts.example.toml for its type")
    for key in ("name", "address"):
        if not entry.get(key):
            raise UserError(f"{where} has no {key}; add one")
    if not re.fullmatch(r"[\w.-]+", entry["name"]):
        raise UserError(f"{where}: a name is made of letters, digits, '.', '_' and '-'")
    if not re.fullmatch(r"[\w.-]+", entry["address"]) and not _is_ipv6(entry["address"]):
        raise UserError(f"{where}: address is {entry['address']!r}; give a name or an IP address without port")
    host = Host(**entry)
    if host.tritons < 1 or (host.price_per_gpu_hour or 0) < 0:
        raise UserError(f"{where}: tritons is at least 1 and price_per_gpu_hour at least 0")
    return host


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


def _at(address: str, port: int) -> str:
    return f"[{address}]:{port}" if _is_ipv6(address) else f"{address}:{port}"


def probed_label(dcgm_urls: str, timeout_s: float = 5.0) -> str | None:
    """`8x-NVIDIA H100 80GB HBM3` from DCGM's exporter at `dcgm_urls` (several with commas: of all their GPUs together);
    None where one does not answer, or none names a GPU."""
    pages = []
    for url in dcgm_urls.split(","):
        try:
            with urllib.request.urlopen(f"{url.strip().rstrip('/')}/metrics", timeout=timeout_s) as answer:
                pages.append(answer.read(MAX_PAGE).decode("utf-8", errors="replace"))
        except (OSError, ValueError):
            return None
    return label_of_pages(*pages)


def reports_gpus(triton_urls: str) -> str:
    """The first of Triton's metrics pages (two ports above HTTP) that has GPUs; empty where none answers or has any."""
    for url in triton_urls.split(","):
        try:
            parts = urllib.parse.urlsplit(url.strip())
            page = f"http://{_at(parts.hostname or '', (parts.port or HTTP_PORT) + 2)}/metrics"
            if "\nnv_gpu_" in scrape(page):
                return page
        except (Missing, ValueError):
            continue
    return ""


def label_of_pages(*pages: str) -> str | None:
    """The hardware label from DCGM's pages: count of GPUs, then their names, several joined by " + "."""
    gpus: dict[str, str] = {}
    for number, page in enumerate(pages):
        for line in _GPU_LINE.findall(page):
            labels = dict(_LABEL.findall(line))
            if labels.get("modelName"):
                gpus[labels.get("UUID") or f"{number}/{labels.get('gpu', '')}"] = labels["modelName"]
    names = sorted(gpus.values())
    return " + ".join(f"{names.count(n)}x-{n}" for n in dict.fromkeys(names)) or None


def label(host: Host) -> tuple[str, bool]:
    """Hardware label of a host, and whether it was probed; "unknown" where neither the host nor the file says it."""
    probed = probed_label(f"http://{_at(host.address, DCGM_PORT)}")
    return probed or host.gpu or "unknown", probed is not None


def urls(inventory: Inventory) -> str:
    """All Tritons as the load test's --host takes them."""
    return ",".join(f"http://{_at(host.address, HTTP_PORT + TRITON_PORT_STEP * k)}"
                    for host in inventory.hosts for k in range(host.tritons))  # fmt: skip


def targets(inventory: Inventory, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Prometheus' file_sd groups: each host's Tritons and its DCGM exporter, with labels `job`, `host` and `hardware`.

    `labels` are the hosts' hardware labels in the inventory's order.
    """
    groups = []
    for host, hardware in zip(inventory.hosts, labels, strict=True):
        common = {"host": host.name, "hardware": hardware}
        tritons = [_at(host.address, TRITON_PORT + TRITON_PORT_STEP * k) for k in range(host.tritons)]
        groups.append({"targets": tritons, "labels": {"job": "triton", **common}})
        groups.append({"targets": [_at(host.address, DCGM_PORT)], "labels": {"job": "dcgm", **common}})
    return groups


def write_targets(groups: list[dict[str, Any]], path: Path) -> None:
    """Writes the groups in one step, so that Prometheus never reads half a file. Raises UserError."""
    with suppress(OSError):  # what is wrong with the folder is wrong with the file
        path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(groups, indent=1) + "\n")


def prices(inventory: Inventory, labels: Sequence[str]) -> str:
    """A price file for `--prices`, by the GPU that each label names. Raises UserError for two prices of one GPU."""
    found: dict[str, float] = {}
    for host, hardware in zip(inventory.hosts, labels, strict=True):
        if host.price_per_gpu_hour is None:
            continue
        gpu = of_label(hardware)
        if gpu is None:
            raise UserError(f"host {host.name!r}: {hardware!r} is no GPU of the catalogue, so its price fits nothing")
        if found.setdefault(gpu.key, host.price_per_gpu_hour) != host.price_per_gpu_hour:
            raise UserError(f"host {host.name!r}: {gpu.key} has another price on another host; use one, or two files")
    lines = [f"{key} = {price:g}" for key, price in found.items()]
    return "\n".join([f"currency = {json.dumps(inventory.currency)}", "", "[per_gpu_hour]", *lines]) + "\n"
