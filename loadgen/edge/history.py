"""Sealed runs as Prometheus metrics: what `results/` holds, for as long as it is there, whatever Prometheus forgets.

A scrape looks for `run.json` files and reads those that are new or have changed. Published results may stand beside the
measured ones; they are marked by `source`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily

from loadgen.core.cost import cost_per
from loadgen.core.metrics import METRICS
from loadgen.edge import history_names as names
from loadgen.edge import physics, store
from loadgen.edge.fingerprint import hardware, load_of
from loadgen.edge.hardware_catalogue import Gpu, catalogue, of_label
from loadgen.edge.history_names import Family
from loadgen.edge.import_mlperf import Published, medians
from loadgen.edge.live_names import LABEL_CHARS, run_labels

Sample = tuple[Family, tuple[str, ...], float]  # family, values of its own labels, value
PUBLISHED_UNITS = {"Tokens/s": "tokens_per_s", "Samples/s": "qps", "Queries/s": "qps"}
PUBLISHED_SCENARIOS = {"SingleStream": "single_stream", "MultiStream": "multi_stream"}
METRIC = {metric.name: metric for metric in METRICS}


@dataclass(frozen=True)
class Shown:
    """One run's series: its values of LABELS, its samples, and when it ended (Unix s; None for published ones)."""

    labels: tuple[str, ...]
    samples: tuple[Sample, ...]
    end_s: float | None = None


Entry = tuple[tuple[int, int], Shown | str]  # (modified ns, bytes) of a run.json; what it holds, or why it does not


@dataclass(eq=False)
class History:
    """All runs below `results`. `prices` are per GPU and hour by catalogue key; `published` are shown as they are."""

    results: Path
    prices: Mapping[str, float] = field(default_factory=dict)
    currency: str = ""
    published: Sequence[Shown] = ()
    _read: dict[Path, Entry] = field(default_factory=dict)
    _copies: dict[Path, str] = field(default_factory=dict)

    def scan(self) -> list[tuple[Path, str]]:
        """Looks at the folder again; what could not be read just now, with the reason."""
        found, news = {}, []
        for path in sorted(self.results.rglob("run.json")):
            try:
                stat = path.stat()
            except OSError:
                continue  # removed meanwhile
            key = (stat.st_mtime_ns, stat.st_size)
            known = self._read.get(path)
            if known is None or known[0] != key:
                known = key, self._shown(path)
                if isinstance(known[1], str):
                    news.append((path, known[1]))
            found[path] = known
        copies = self._copied(found)
        news += [(path, reason) for path, reason in copies.items() if path not in self._copies]
        self._read, self._copies = found, copies
        return news

    def _copied(self, found: Mapping[Path, Entry]) -> dict[Path, str]:
        """A run that lies there twice would be two series of one name, for which Prometheus refuses the whole page."""
        first: dict[tuple[str, ...], Path] = {}
        return {
            path: f"is a copy of {first[run.labels]}"
            for path, (_, run) in found.items()
            if isinstance(run, Shown) and first.setdefault(run.labels, path) != path
        }

    def _shown(self, path: Path) -> Shown | str:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["schema"] != store.SCHEMA_VERSION:
                return f"has schema {document['schema']}"
            if "seal" in document and store.digest(document) != document["seal"]:
                return "was changed after it was sealed"
            return shown(store.Run(path.parent, document), self.prices, self.currency)
        except Exception as error:  # one broken file may not hide the other runs, whatever is wrong with it
            return f"is not a sealed run ({' '.join(f'{type(error).__name__}: {error}'.split())})"

    def runs(self) -> list[Shown]:
        return [run for path, (_, run) in self._read.items() if isinstance(run, Shown) and path not in self._copies]

    def folder(self, run_id: str) -> Path | None:
        """Where the run with that id lies."""
        at = names.LABELS.index("run")
        for path, (_, run) in self._read.items():
            if isinstance(run, Shown) and path not in self._copies and run.labels[at] == run_id:
                return path.parent
        return None

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """prometheus_client's protocol: families as of the last scan."""
        yield from metrics([*self.runs(), *self.published])
        unreadable = len(self._copies) + sum(isinstance(run, str) for _, run in self._read.values())
        yield GaugeMetricFamily(names.UNREADABLE.name, names.UNREADABLE.help, value=unreadable)


def metrics(runs: Iterable[Shown], timed: bool = False) -> Iterator[GaugeMetricFamily]:
    """The families of `runs`; `timed` gives each sample the time when its run ended."""
    of: dict[Family, list[tuple[Shown, tuple[str, ...], float]]] = {}
    for run in runs:
        for family, own, value in run.samples:
            of.setdefault(family, []).append((run, own, value))
    for family in names.families():
        if found := of.get(family):
            gauge = GaugeMetricFamily(family.name, family.help, labels=[*names.LABELS, *family.labels])
            for run, own, value in found:
                gauge.add_metric([*run.labels, *own], value, timestamp=run.end_s if timed else None)
            yield gauge


def shown(run: store.Run, prices: Mapping[str, float], currency: str) -> Shown:
    """The series of a sealed run. Raises ValueError or whatever else comes of a document that is not one."""
    document, summary, scenario = run.document, run.summary, run.scenario
    where = hardware(run)
    start_s = _start_s(document)
    end_s = start_s + (summary.get("duration_s") or 0.0)
    name = document["run_id"]
    about = ("measured", str(document.get("weights") or "unknown"), scenario.preset, load_of(run))
    labels = (*run_labels(document, scenario.name), *about)
    gpu = where.gpu
    facts = (*_generation(gpu, where.label), f"/report/{name}")
    samples: list[Sample] = [
        (names.INFO, facts, 1.0), (names.VALID, (), float(run.valid)), (names.START, (), start_s),
        (names.END, (), end_s), (names.GPUS, (), float(where.count)),
    ]  # fmt: skip
    for metric in METRICS:
        samples += _figures(metric.name, summary.get(metric.name), where.count)
    percentile = names.percentile_name(scenario.percentile)
    for limit in ("ttft", "tpot", "e2e"):
        bound = getattr(scenario.limits, f"{limit}_ns")
        if bound is not None:
            samples.append((names.LIMIT, (limit, percentile), bound / 1e9))
    for work in physics.works(run):
        samples += [(names.SHARE, (work.name,), work.share), (names.MBU, (work.name,), work.mbu)]
        samples += [(names.MFU, (work.name,), work.mfu)] if work.mfu is not None else []
    price = prices.get(gpu.key) if gpu else None
    video = scenario.clip is not None
    per_s = summary.get("qps" if video else "tokens_per_s") or 0.0
    cost = cost_per(1.0 if video else 1e6, per_s, price, where.count)
    if cost is not None:
        samples.append((names.VIDEO_COST if video else names.TOKEN_COST, (currency,), cost))
    for family, own, value in samples:
        "".join(own).encode()  # half a character, which JSON can hold, would spoil the page of all runs
        if not math.isfinite(value):
            raise ValueError(f"{family.name} would be {value}")
    "".join(labels).encode()
    return Shown(tuple(text[:LABEL_CHARS] for text in labels), tuple(samples), end_s)


def _figures(name: str, value: object, gpus: int) -> list[Sample]:
    """A line of the summary; what a run does not have is absent. A failed request's latency has no number."""
    metric = METRIC[name]
    if isinstance(value, dict):
        stats = [(stat, value.get(stat)) for stat in names.STATS]
        return [(names.of_metric(metric), (stat,), x / 1e9) for stat, x in stats if x is not None]
    if not isinstance(value, int | float):
        return []
    scaled = [(names.per_gpu(metric), (), value / gpus)] if name in names.SCALED else []
    return [(names.of_metric(metric), (), float(value)), *scaled]


def _start_s(document: dict[str, object]) -> float:
    t0 = document.get("t0_wall_ns")
    return float(t0) / 1e9 if t0 else datetime.fromisoformat(str(document["started_utc"])).timestamp()  # type: ignore[arg-type]


def of_published(rows: Sequence[Published]) -> list[Shown]:
    """Medians per accelerator of closed datacenter systems, as `tritonmark import mlperf` shows them."""
    figures: dict[tuple[str, ...], list[Sample]] = {}
    for m in medians(rows):
        if name := PUBLISHED_UNITS.get(m["unit"]):
            scenario = PUBLISHED_SCENARIOS.get(m["scenario"], m["scenario"].lower())
            labels = (scenario, m["model"], "published", "", m["accelerator"], f"MLPerf {m['round']}", "published",
                      "trained", "mlperf", scenario)  # fmt: skip
            figures.setdefault(labels, []).append((names.per_gpu(METRIC[name]), (), float(m["median"])))
    at = names.LABELS.index("hardware")
    return [
        Shown(of, ((names.INFO, (*_generation(_named(of[at]), of[at]), ""), 1.0), (names.VALID, (), 1.0),
                   (names.GPUS, (), 1.0), *dict.fromkeys(samples)))
        for of, samples in figures.items()
    ]  # fmt: skip


def _named(accelerator: str) -> Gpu | None:
    """The catalogue's GPU behind MLCommons' name of it: "NVIDIA H200-SXM-141GB" is the H200 SXM."""
    plain = store.slug(accelerator).removeprefix("nvidia-").replace("grace-hopper-superchip-", "") + "-"
    plain = re.sub(r"(?<=\d)gb-", "-", plain)  # "gh200-144gb-" → "gh200-144-", the catalogue's key
    found = [(len(name), gpu) for gpu in catalogue().values() for name in (gpu.key, store.slug(gpu.name))
             if plain.startswith(f"{name}-")]  # fmt: skip
    return max(found, key=lambda f: f[0])[1] if found else of_label(accelerator)


def _generation(gpu: Gpu | None, otherwise: str) -> tuple[str, str, str]:
    """Name, generation and year of a GPU; `otherwise` stands for one that the catalogue does not know."""
    return (gpu.name, gpu.generation, str(gpu.year)) if gpu else (otherwise, "unknown", "unknown")
