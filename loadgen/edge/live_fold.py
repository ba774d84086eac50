"""Rows → the counts that Prometheus scrapes, a batch at a time: one numpy pass a family, no Python object a request."""

from __future__ import annotations

from typing import Any

import numpy as np

from loadgen.core.metrics import Context, within_limits
from loadgen.core.percentiles import percentile_name
from loadgen.core.record import OUTCOMES, Int64, Outcome, Rows
from loadgen.core.scenario import Kind, Limits, Scenario
from loadgen.core.verdict import lag_limit_ns, lateness_limit_ns, limited
from loadgen.edge import live_names as names

POOLED = ("itl_ns", "step_ns")  # over responses: a failed request has no share in them, as in the sealed summary


class Histogram:
    """Counts a bucket (Prometheus' `le`: an edge belongs to the bucket below it), and the sum, of values in ns."""

    def __init__(self, buckets_s: tuple[float, ...]) -> None:
        self.edges = np.array([round(s * 1e9) for s in buckets_s], dtype=np.int64)
        self.counts = np.zeros(len(self.edges) + 1, dtype=np.int64)
        self.sum_ns = 0

    def add(self, values: Int64, failed: int = 0) -> None:
        """`failed` more values count as slower than any: they go to the last bucket, and have no share in the sum."""
        if len(values):
            self.counts += np.bincount(np.searchsorted(self.edges, values, "left"), minlength=len(self.counts))
            self.sum_ns += int(values.sum())
        self.counts[-1] += failed

    def sample(self, *labels: str) -> list[Any]:
        return [list(labels), self.counts.tolist(), self.sum_ns / 1e9]


class RunFigures:
    """Everything about requests that a running test shows: add measured rows, take `families`."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario, self.context = scenario, Context(scenario.kind, scenario.limits)
        lines = names.of_requests(scenario.family)
        self.histograms = [(m, f, Histogram(f.buckets)) for m, f in lines if m.live == "histogram"]
        self.counters = [(m, f) for m, f in lines if m.live == "counter"]
        self.totals = dict.fromkeys((m.name for m, _ in self.counters), 0)
        self.outcomes = np.zeros(len(OUTCOMES), dtype=np.int64)
        self.limits = limited(scenario.limits)
        self.over = dict.fromkeys((name for name, _ in self.limits), 0)

    def add(self, rows: Rows) -> None:
        """Counts `rows`, which are measured ones (no warm-up)."""
        failed = int((~rows.ok).sum())
        for metric, _, histogram in self.histograms:
            values = np.asarray(metric.formula(rows, self.context))
            histogram.add(values, 0 if metric.name in POOLED else failed)
        for metric, _ in self.counters:
            self.totals[metric.name] += int(metric.formula(rows, self.context))  # type: ignore[arg-type]
        self.outcomes += np.bincount(rows.outcome, minlength=len(OUTCOMES))
        for name, limit in self.limits:
            self.over[name] += int((~within_limits(rows, Limits(**{name: limit}))).sum())

    @property
    def fine(self) -> bool:
        """Does nothing seen so far make the run INVALID: no failure, and each limit met at its percentile?"""
        seen = int(self.outcomes.sum())
        if seen > self.outcomes[OUTCOMES.index(Outcome.OK)]:
            return False
        # LoadGen's percentile is sorted[floor(n p)]: it is over the limit when at most floor(n p) values are within.
        return all(seen - over > int(seen * self.scenario.percentile) for over in self.over.values() if seen)

    def _health_limits(self) -> list[list[Any]]:
        limits = self.scenario.limits
        late = [[["dispatch_lateness"], lateness_limit_ns(limits) / 1e9]] if self.scenario.kind is Kind.SERVER else []
        return [*late, [["loop_lag"], lag_limit_ns(limits) / 1e9]]

    def families(self, labels: tuple[str, ...]) -> list[dict[str, Any]]:
        """All families with their samples; `labels` are the values of RUN_LABELS."""
        outcomes = [[[o.value], int(n)] for o, n in zip(OUTCOMES, self.outcomes, strict=True)]
        at = percentile_name(self.scenario.percentile)
        short = [(name.removesuffix("_ns"), name, ns) for name, ns in self.limits]
        return [
            *(f.with_samples([h.sample()], labels) for _, f, h in self.histograms),
            *(f.with_samples([[[], self.totals[m.name]]], labels) for m, f in self.counters),
            names.REQUESTS.with_samples(outcomes, labels),
            names.OVER_LIMIT.with_samples([[[label], self.over[name]] for label, name, _ in short], labels),
            names.LIMIT.with_samples([[[label, at], ns / 1e9] for label, _, ns in short], labels),
            names.HEALTH_LIMIT.with_samples(self._health_limits(), labels),
        ]
