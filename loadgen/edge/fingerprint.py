"""What a sealed run was, as short texts: which runs are one cell, which may stand beside each other, what differs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from loadgen.core.scenario import Kind
from loadgen.core.verdict import limited
from loadgen.edge.hardware_catalogue import Hardware, of_run
from loadgen.edge.store import Run

# From no compiler to most.
BACKENDS = ("torch-eager", "torch-compile", "vllm-python", "vllm", "tensorrt", "tensorrtllm")


def fingerprint(run: Run) -> dict[str, str]:
    """Facts of a run by the names in `core/compare.py`."""
    document, scenario = run.document, run.scenario
    prompts, exported = document.get("prompts") or {}, document.get("exported") or {}
    server, client = document.get("server") or {}, document.get("client") or {}
    machine = document.get("hardware") or {}
    gpus = machine.get("gpus") or [{}]
    open_loop = scenario.kind is Kind.SERVER
    salt = "off" if not scenario.salt else "run" if scenario.salt_seed is None else f"seed {scenario.salt_seed}"
    facts: dict[str, Any] = {
        "hardware": hardware(run).name, "backend": document.get("backend"), "precision": document.get("precision"),
        "tp": exported.get("tp", "1"),
        "weights": f"{document.get('weights')} (seed {exported.get('seed', 'unknown')})",
        "prompts": f"{prompts.get('source')} {str(prompts.get('sha256'))[:12]}",
        "input tokens": scenario.input_tokens, "output tokens": scenario.output_tokens,
        "seeds": _flat(asdict(scenario.seeds)), "clip": _flat(asdict(scenario.clip)) if scenario.clip else None,
        "limits": ", ".join(f"{name} {ns / 1e6:g} ms" for name, ns in limited(scenario.limits)) or "none",
        "arrivals": f"{scenario.arrivals} {scenario.target_qps:g} /s" if open_loop and scenario.target_qps else None,
        "duration": f"{scenario.minimums.duration_ns / 1e9:g} s, {scenario.minimums.queries} queries",
        "in flight": scenario.concurrency if scenario.kind is Kind.CONCURRENCY else scenario.max_in_flight,
        "sample order": scenario.sample_order, "preset": scenario.preset, "salt": salt,
        "servers": "shares " + ", ".join(str(s["share"]) for s in document.get("servers") or [{"share": 1}]),
        "server": f"{server.get('name')} {server.get('version')}", "driver": gpus[0].get("driver"),
        "host": _host(machine), "power limit": gpus[0].get("power_limit_w"),
        "clocks": f"{gpus[0].get('max_sm_mhz')} / {gpus[0].get('max_memory_mhz')} MHz" if gpus[0] else None,
        "client": _flat(client.get("versions") or {}), "client host": client.get("host"),
        "tool versions": _tools(exported.get("tools")), "code": exported.get("code"), "workers": client.get("workers"),
        "warmup": scenario.warmup,
    }  # fmt: skip
    return {name: "none" if value is None else str(value) for name, value in facts.items()}


def hardware(run: Run) -> Hardware:
    """As the catalogue has it."""
    return of_run(run.document)


def model_of(run: Run) -> str:
    """The exported model, whatever name it is served under."""
    return str((run.document.get("exported") or {}).get("model") or run.document.get("model") or "unknown model")


def load_of(run: Run) -> str:
    """Scenario and load: runs with another load belong to other lines of a comparison, not to other cells."""
    scenario = run.scenario
    name = scenario.name.replace("_", " ")
    if scenario.kind is Kind.CONCURRENCY:
        return f"{name} {scenario.concurrency}"
    if scenario.kind is Kind.SERVER and scenario.target_qps:
        return f"{name} {scenario.target_qps:g} /s"
    return name


def cell_of(facts: dict[str, str]) -> str:
    """Everything that is compared, as one label: "H100 SXM · torch-compile bf16"."""
    tp = f" tp{facts['tp']}" if facts["tp"] not in ("1", "none") else ""
    return f"{facts['hardware']} · {facts['backend']} {facts['precision']}{tp}"


def rank(run: Run) -> tuple[Any, ...]:
    """Order of cells: older hardware first, then less compiled backends; the first is the default baseline."""
    where, backend = hardware(run), str(run.document.get("backend"))
    speed = where.gpu.bandwidth_gbs if where.gpu else 0.0
    place = BACKENDS.index(backend) if backend in BACKENDS else len(BACKENDS)
    return (where.year, speed, where.name, place, backend, str(run.document.get("precision")))


def _host(machine: dict[str, Any]) -> str | None:
    """What works beside the GPU: eager backends are often as fast as this."""
    cpu, gpus = machine.get("cpu") or {}, machine.get("host_gpus", len(machine.get("gpus") or []))
    return f"{cpu['model']}, {cpu['cores']} cores, {gpus} GPU{'s' * (gpus != 1)}" if cpu else None


def _flat(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items())


def _tools(text: Any) -> str:
    """The exporter's tool versions, sealed as JSON text."""
    try:
        return _flat(json.loads(text))
    except (TypeError, ValueError):
        return str(text)
