"""A stand-in for nvidia-ml-py that plays GPUs by a plan, and knows what energy it really gave.

It shares no code with the project. Put its folder first on PYTHONPATH and `import pynvml` finds it. The plan is JSON in
PYNVML_FAKE_PLAN, a list with a dict a GPU:
    watts       power: a number, or [[second, W], …] between which it is a straight line (seconds since PYNVML_FAKE_T0,
                a time of CLOCK_MONOTONIC, or since this module was imported)
    gap         [from s, to s]: calls in that time answer only when it is over
    throttle    NVML's bits, or [[second, bits], …] that hold from that second on
    lost_at     second from which every call says that the GPU fell off the bus
    counter     false: no energy counter; a number: the counter runs at that multiple of the truth
    utilisation percent
`true_joules(plan, a, b)` integrates a plan exactly: it is piecewise linear.
"""

import json
import os
import time
from itertools import pairwise

NVML_SUCCESS, NVML_ERROR_UNINITIALIZED, NVML_ERROR_NOT_SUPPORTED = 0, 1, 3
NVML_ERROR_GPU_IS_LOST, NVML_ERROR_UNKNOWN, NVML_ERROR_LIBRARY_NOT_FOUND = 15, 999, 12
NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU, NVML_FI_DEV_POWER_INSTANT = 1, 2, 0, 186
_T0 = float(os.environ.get("PYNVML_FAKE_T0") or time.monotonic())
_PLANS = json.loads(os.environ.get("PYNVML_FAKE_PLAN") or "[]")


class NVMLError(Exception):
    def __init__(self, value):
        self.value = value

    def __str__(self):
        return {3: "Not Supported", 12: "NVML Shared Library Not Found", 15: "GPU is lost"}.get(self.value, "Unknown")


class _Of:
    def __init__(self, **values):
        self.__dict__.update(values)


def _curve(watts):
    return [[0.0, watts], [1.0, watts]] if isinstance(watts, int | float) else watts


def watts_at(plan, second):
    points = _curve(plan["watts"])
    if second <= points[0][0]:
        return points[0][1]
    for (a, x), (b, y) in pairwise(points):
        if second <= b:
            return x + (y - x) * (second - a) / (b - a)
    return points[-1][1]


def true_joules(plan, start, end):
    corners = sorted({start, end, *(s for s, _ in _curve(plan["watts"]) if start < s < end)})
    return sum((watts_at(plan, a) + watts_at(plan, b)) / 2 * (b - a) for a, b in pairwise(corners))


def _now(plan):
    second = time.monotonic() - _T0
    gap = plan.get("gap")
    if gap and gap[0] <= second < gap[1]:
        time.sleep(gap[1] - second)
        second = time.monotonic() - _T0
    if second >= plan.get("lost_at", float("inf")):
        raise NVMLError(NVML_ERROR_GPU_IS_LOST)
    return second


def nvmlInit():  # noqa: N802
    if not _PLANS:
        raise NVMLError(NVML_ERROR_LIBRARY_NOT_FOUND)


def nvmlDeviceGetCount():  # noqa: N802
    return len(_PLANS)


def nvmlDeviceGetHandleByIndex(index):  # noqa: N802
    return _PLANS[index]


def nvmlDeviceGetPowerUsage(plan):  # noqa: N802
    return round(watts_at(plan, _now(plan)) * 1000)


def nvmlDeviceGetFieldValues(plan, fields):  # noqa: N802
    assert fields == [NVML_FI_DEV_POWER_INSTANT]
    return [_Of(nvmlReturn=NVML_SUCCESS, value=_Of(uiVal=nvmlDeviceGetPowerUsage(plan)))]


def nvmlDeviceGetTotalEnergyConsumption(plan):  # noqa: N802
    second, factor = _now(plan), plan.get("counter", 1.0)
    if factor is False:
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
    return round((1e6 + true_joules(plan, -100.0, second) * factor) * 1000)


def nvmlDeviceGetEnforcedPowerLimit(plan):  # noqa: N802
    return 700_000 + 0 * _now(plan)


def nvmlDeviceGetUtilizationRates(plan):  # noqa: N802
    _now(plan)
    return _Of(gpu=plan.get("utilisation", 90), memory=40)


def nvmlDeviceGetMemoryInfo(plan):  # noqa: N802
    _now(plan)
    return _Of(used=6 << 30, total=80 << 30)


def nvmlDeviceGetClockInfo(plan, which):  # noqa: N802
    _now(plan)
    return {NVML_CLOCK_SM: 1980, NVML_CLOCK_MEM: 2619}[which]


def nvmlDeviceGetTemperature(plan, which):  # noqa: N802
    _now(plan)
    raise NVMLError(NVML_ERROR_NOT_SUPPORTED)


def nvmlDeviceGetCurrentClocksThrottleReasons(plan):  # noqa: N802
    second, bits = _now(plan), plan.get("throttle", 0)
    return bits if isinstance(bits, int) else next((b for s, b in reversed(bits) if second >= s), 0)
