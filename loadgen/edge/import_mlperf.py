"""MLCommons' published results (`summary_results.json` of v4.1, v5.1, v6.0) per accelerator, marked *published*.

What the files get wrong or leave to the reader is handled here and nowhere else:
- `a#` is accelerators per node: times `Nodes`. v6.0 has `Total Accelerators`; its 87 GPUs of a platform `87x…` are 88
  there, so a count in the platform's name wins over the product.
- the case of scenarios varies; v5.1 labels llama3.1-8b Interactive Queries/s, which are tokens/s;
- llama2-70b-99 and -99.9 (and the like) often are one run: then the second is marked `repeats`;
- latencies (ms, v6.0 also s) are not divided by accelerators; a system without accelerators has no figure per one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from loadgen.edge.errors import UserError

NEEDED = ("ID", "Submitter", "Category", "Suite", "Model", "Scenario", "Nodes", "Accelerator", "a#",
          "Performance_Result", "Performance_Units")  # fmt: skip
SCENARIOS = {s.lower(): s for s in ("Offline", "Server", "Interactive", "SingleStream", "MultiStream")}
MISLABELLED = {("v5.1", "llama3.1-8b", "Interactive"): ("Queries/s", "Tokens/s")}
AT_MOST = 8  # accelerators of a system that counts for a median: larger ones pay for their network


@dataclass(frozen=True)
class Published:
    """One published result. `value` is in `unit`; `per_accelerator` is None for a latency, or without accelerators."""

    round: str
    id: str
    submitter: str
    availability: str
    division: str
    suite: str
    system: str
    platform: str
    model: str
    scenario: str
    accelerator: str
    nodes: int
    per_node: int
    accelerators: int
    value: float
    unit: str
    per_accelerator: float | None
    precision: str
    software: str
    accuracy: str
    power: float | None
    power_unit: str
    corrected: str  # what the file says, where it was read differently
    source: str
    repeats: str = ""  # the model name under which the same run is listed too
    kind: str = "published"


def read(path: Path) -> list[Published]:
    """All rows of one file, in its order. Raises UserError naming file and row for anything that isn't such a file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); give MLCommons' summary_results.json") from None
    if not isinstance(document, list) or not document:
        raise UserError(f"{path} is not a list of results; give MLCommons' summary_results.json")
    rows = []
    for number, entry in enumerate(document, 1):
        missing = [k for k in NEEDED if not isinstance(entry, dict) or k not in entry]
        if missing:
            raise UserError(f"{path}, result {number}: has no {missing[0]!r}; give MLCommons' summary_results.json")
        try:
            rows.append(_row(entry, path.name))
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}, result {number} ({entry['ID']}): {error}") from None
    first = {_same(r): r.model for r in rows if r.model.endswith("-99")}
    return [replace(r, repeats=first.get(_same(r), "")) if r.model.endswith("-99.9") else r for r in rows]


def _same(r: Published) -> tuple[Any, ...]:
    """What the rows of one run under two model names share."""
    base = re.sub(r"-99(\.9)?$", "", r.model)
    return (r.round, r.id, r.platform, r.division, r.suite, base, r.scenario, r.value, r.unit)


def _row(e: dict[str, Any], source: str) -> Published:
    model, scenario = str(e["Model"]), SCENARIOS.get(str(e["Scenario"]).lower(), str(e["Scenario"]))
    round_ = str(e.get("version") or str(e["ID"]).rpartition("-")[0])
    unit, corrected = str(e["Performance_Units"]), ""
    if (round_, model, scenario) in MISLABELLED and unit == MISLABELLED[round_, model, scenario][0]:
        unit, corrected = MISLABELLED[round_, model, scenario][1], f"unit was {unit}"
    value = float(e["Performance_Result"])
    nodes, per_node = int(e["Nodes"]), int(float(e["a#"] or 0))
    total, counted = _accelerators(e, nodes * per_node)
    each = value / total if total and not unit.startswith("Latency") else None
    power = e.get("Power_Result")
    return Published(
        round=round_, id=str(e["ID"]), submitter=str(e["Submitter"]),
        availability=str(e.get("Availability", "")), division=str(e["Category"]).lower(), suite=str(e["Suite"]),
        system=str(e.get("System", "")), platform=str(e.get("Platform", "")), model=model, scenario=scenario,
        accelerator=str(e["Accelerator"] or "none"), nodes=nodes, per_node=per_node, accelerators=total, value=value,
        unit=unit, per_accelerator=each, precision=str(e.get("weight_data_types", "")).lower(),
        software=str(e.get("Software", "")), accuracy=str(e.get("Accuracy", "")),
        power=float(power) if power not in (None, "") else None, power_unit=str(e.get("Power_Units") or ""),
        corrected="; ".join(x for x in (corrected, counted) if x),
        source=source,
    )  # fmt: skip


def _accelerators(e: dict[str, Any], product: int) -> tuple[int, str]:
    """How many there were. A platform named `87x…` has as many, where the product over nodes is a little more."""
    named = re.match(r"(\d+)x", str(e.get("Platform", "")))
    listed = int(e.get("Total Accelerators") or product)
    if named and product and 0 < listed - int(named[1]) < int(float(e["a#"] or 0)):
        return int(named[1]), f"listed as {listed} accelerators"
    return listed, ""


def medians(rows: Sequence[Published], at_most: int = AT_MOST) -> list[dict[str, Any]]:
    """Median per accelerator by round, model, scenario and accelerator: closed datacenter systems of up to `at_most`.

    Results that repeat another's run under a second model name, and latencies, are left out.
    """
    groups: dict[tuple[str, ...], list[float]] = {}
    for r in rows:
        datacenter = r.division == "closed" and "datacenter" in r.suite
        if datacenter and not r.repeats and r.per_accelerator is not None and 0 < r.accelerators <= at_most:
            key = (r.round, r.model, r.scenario, r.accelerator, r.unit)
            groups.setdefault(key, []).append(r.per_accelerator)
    return [{"kind": "published", "round": key[0], "model": key[1], "scenario": key[2], "accelerator": key[3],
             "unit": key[4], "results": len(values), "min": min(values), "median": median(values), "max": max(values)}
            for key, values in sorted(groups.items())]  # fmt: skip


def plain(rows: Sequence[Published]) -> list[dict[str, Any]]:
    """Rows as plain types."""
    return [asdict(r) for r in rows]
