"""Where telemetry comes from: NVML, a Prometheus exposition (DCGM exporter, Triton), and this host's own CPU.

A source has `sample()`, which returns rows (dicts with "device" and what is known of it), and raises `Missing` when it
has nothing to give for good. A value that a device does not tell is left out of its row, and is never 0.

Columns: power_w, energy_j (a counter), power_limit_w, utilisation (0 to 1), memory_used_bytes, sm_clock_hz,
memory_clock_hz, temperature_c, throttle (NVML's bits), sm_active, dram_active, tensor_active, cpu_utilisation,
host_memory_used_bytes. A row {"device", "lost"} says that the device will give no more.
"""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

Row = dict[str, Any]
SCRAPE_TIMEOUT_S = 2.0
MEBI = 1 << 20
POWERCAP = Path("/sys/class/powercap")


class Missing(Exception):  # noqa: N818 (a fact about the machine, not a fault)
    """This source has nothing to give; the text says why."""


class Nvml:
    """GPUs of this machine through NVIDIA's management library; `library` is the module `pynvml` or one like it."""

    def __init__(self, library: Any) -> None:
        self.library, self.gpus = library, {}  # type: Any, dict[str, Any]
        try:
            library.nvmlInit()
            for index in range(library.nvmlDeviceGetCount()):
                self.gpus[f"gpu{index}"] = library.nvmlDeviceGetHandleByIndex(index)
        except library.NVMLError as error:
            raise Missing(f"NVML: {error}") from None
        if not self.gpus:
            raise Missing("NVML: no GPU")

    def sample(self) -> list[Row]:
        rows = []
        for device, handle in list(self.gpus.items()):
            try:
                rows.append({"device": device, **self._read(handle)})
            except self.library.NVMLError as error:
                rows.append({"device": device, "lost": str(error)})
                del self.gpus[device]
        if not rows:
            raise Missing("NVML: every GPU was lost")
        return rows

    def _read(self, handle: Any) -> Row:
        """One GPU now. Raises NVMLError when the GPU itself is gone; what it merely does not support is left out."""
        nvml, gone = self.library, (self.library.NVML_ERROR_GPU_IS_LOST, self.library.NVML_ERROR_UNINITIALIZED,
                                    self.library.NVML_ERROR_UNKNOWN)  # fmt: skip
        row: Row = {}

        def take(column: str, read: Callable[[], Any], scale: float) -> None:
            try:
                row[column] = read() * scale
            except nvml.NVMLError as error:
                if error.value in gone:
                    raise

        take("power_w", lambda: self._milliwatts(handle), 1e-3)
        take("energy_j", lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle), 1e-3)
        take("power_limit_w", lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle), 1e-3)
        take("utilisation", lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu, 0.01)
        take("memory_used_bytes", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used, 1)
        take("sm_clock_hz", lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM), 1e6)
        take("memory_clock_hz", lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM), 1e6)
        take("temperature_c", lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU), 1)
        take("throttle", lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle), 1)
        return row

    def _milliwatts(self, handle: Any) -> int:
        """Power now. From Ampere on nvmlDeviceGetPowerUsage is a mean over a second, which blurs the window's edges."""
        nvml = self.library
        with suppress(nvml.NVMLError, AttributeError, IndexError):
            (value,) = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_POWER_INSTANT])
            if value.nvmlReturn == nvml.NVML_SUCCESS and value.value.uiVal:
                return int(value.value.uiVal)
        return int(nvml.nvmlDeviceGetPowerUsage(handle))


# family of an exposition → column and factor. DCGM's energy is in mJ, its memory in MiB, its clocks in MHz.
EXPORTED: dict[str, tuple[str, float]] = {
    "nv_gpu_power_usage": ("power_w", 1.0),
    "nv_energy_consumption": ("energy_j", 1.0),
    "nv_gpu_power_limit": ("power_limit_w", 1.0),
    "nv_gpu_utilization": ("utilisation", 1.0),
    "nv_gpu_memory_used_bytes": ("memory_used_bytes", 1.0),
    "DCGM_FI_DEV_POWER_USAGE": ("power_w", 1.0),
    "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": ("energy_j", 1e-3),
    "DCGM_FI_DEV_GPU_UTIL": ("utilisation", 0.01),
    "DCGM_FI_DEV_FB_USED": ("memory_used_bytes", MEBI),
    "DCGM_FI_DEV_SM_CLOCK": ("sm_clock_hz", 1e6),
    "DCGM_FI_DEV_MEM_CLOCK": ("memory_clock_hz", 1e6),
    "DCGM_FI_DEV_GPU_TEMP": ("temperature_c", 1.0),
    "DCGM_FI_DEV_ENFORCED_POWER_LIMIT": ("power_limit_w", 1.0),
    "DCGM_FI_DEV_POWER_MGMT_LIMIT": ("power_limit_w", 1.0),
    "DCGM_FI_DEV_CLOCK_THROTTLE_REASONS": ("throttle", 1.0),
    "DCGM_FI_DEV_CLOCKS_EVENT_REASONS": ("throttle", 1.0),
    "DCGM_FI_PROF_SM_ACTIVE": ("sm_active", 1.0),
    "DCGM_FI_PROF_DRAM_ACTIVE": ("dram_active", 1.0),
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": ("tensor_active", 1.0),
}


class Exported:
    """GPUs that an exporter tells of at `url`: DCGM's, or Triton's own `nv_gpu_*`.

    An exporter answers from its last collection, which can be 30 s old. A page whose energy counters have not moved is
    not a new sample, and gives no rows; so a slow exporter shows as gaps and not as steady power.
    """

    def __init__(self, url: str) -> None:
        self.url, self._counters = url, {}  # type: str, dict[str, float]
        if not self.sample():
            raise Missing(f"{url} tells of no GPU's power (DCGM_FI_DEV_POWER_USAGE or nv_gpu_power_usage)")

    def sample(self) -> list[Row]:
        rows = parsed(scrape(self.url))
        counters = {r["device"]: r["energy_j"] for r in rows if "energy_j" in r}
        stale = counters and counters == self._counters
        self._counters = counters
        return [] if stale else rows


def parsed(page: str) -> list[Row]:
    """The GPUs of an exposition, ordered by index where it tells one (`gpu`), else by `gpu_uuid`."""
    found: dict[str, Row] = {}
    for name, labels, value in exposed(page):
        if name in EXPORTED:
            column, scale = EXPORTED[name]
            key = labels.get("gpu") or labels.get("gpu_uuid") or labels.get("UUID") or "0"
            found.setdefault(key, {})[column] = value * scale
    names = {key: f"gpu{key if key.isdigit() else index}" for index, key in enumerate(sorted(found))}
    return [{"device": names[key], **found[key]} for key in sorted(found) if "power_w" in found[key]]


def exposed(page: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, labels and value of every sample of a page, NaN left out.

    Names are those of the page: the parser gives every counter the suffix "_total", which NVIDIA's do not have.
    """
    written = set(re.findall(r"^[A-Za-z_:][\w:]*", page, re.M))
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            name = sample.name if sample.name in written else sample.name.removesuffix("_total")
            if sample.value == sample.value:
                yield name, sample.labels, float(sample.value)


def scrape(url: str) -> str:
    """The text of a metrics page. Raises Missing."""
    try:
        with urllib.request.urlopen(url, timeout=SCRAPE_TIMEOUT_S) as response:
            return str(response.read(16 << 20).decode("utf-8", "replace"))
    except (OSError, ValueError) as error:
        raise Missing(f"{url} did not answer: {getattr(error, 'reason', None) or error}") from None


class Host:
    """CPU and memory of this machine, and the power of its CPU packages where Linux lets us read it (RAPL)."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        import psutil

        self._psutil = psutil
        psutil.cpu_percent()  # the first call has nothing to compare with
        self.packages = [p for p in sorted(powercap.glob("intel-rapl:*")) if p.name.count(":") == 1 and _energy(p)]
        self._last: dict[str, tuple[float, int, float]] = {}

    def sample(self) -> list[Row]:
        host = {"device": "host", "cpu_utilisation": self._psutil.cpu_percent() / 100,
                "host_memory_used_bytes": self._psutil.virtual_memory().used}  # fmt: skip
        return [host, *(row for index, package in enumerate(self.packages) if (row := self._package(index, package)))]

    def _package(self, index: int, package: Path) -> Row | None:
        """Power since the sample before, and a counter that does not wrap as the kernel's does."""
        device, now, counter = f"cpu{index}", time.monotonic(), _energy(package)
        if counter is None:
            return None
        then, before, joules = self._last.get(device, (now, counter, 0.0))
        moved = counter - before
        if moved < 0:
            moved += int((package / "max_energy_range_uj").read_text())
        joules += moved / 1e6
        self._last[device] = (now, counter, joules)
        row = {"device": device, "energy_j": joules}
        return row | {"power_w": moved / 1e6 / (now - then)} if now > then else row


def _energy(package: Path) -> int | None:
    """The counter of a package in µJ; None where it may not be read, as for most users since 2020."""
    with suppress(OSError, ValueError):
        return int((package / "energy_uj").read_text())
    return None
