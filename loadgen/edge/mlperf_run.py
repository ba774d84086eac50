"""A sealed run seen through LoadGen's eyes: its settings and samples, as `core/loadgen_verdict.py` wants them.

LoadGen has no failed requests (it would wait for ever), so a failed row gets the latency `FAILED_NS`: later than any
limit, never fast. Only the columns that verdicts need are read, about 100 bytes a row, never the lists of chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from loadgen.core.loadgen_settings import UNLIMITED_NS, Samples, Settings, effective
from loadgen.core.loadgen_verdict import FAILED_NS, Facts, LoadGenResult, judge_loadgen
from loadgen.core.record import NEVER, Int64, Outcome, Phase
from loadgen.core.scenario import Kind, Scenario
from loadgen.edge.store import Run

COLUMNS = ("seq", "query", "sample", "due_ns", "sent_ns", "first_ns", "done_ns", "tokens_out")


@dataclass(frozen=True)
class LoadGenView:
    """What LoadGen would have known of a run: `sample` are library indices, all arrays are in order of issue.

    `failed` counts rows without an answer (or without a token, in token mode), `one_token` answers of one token,
    which LoadGen logs as an error each. `end_ns` is the last response, from T0.
    """

    settings: Settings
    samples: Samples
    sample: Int64
    failed: int
    one_token: int
    end_ns: int

    def judge(self, run: Run) -> LoadGenResult:
        """LoadGen's verdict, made INVALID where LoadGen could not have finished or our own audit failed the run."""
        result = judge_loadgen(self.settings, self.samples)
        if run.valid and not self.failed:
            return result
        facts: Facts = dict(result.facts)
        if self.failed:
            facts["early_stopping_met"] = False  # MLCommons' checker reads this one and not result_validity
        codes = ", ".join(reason["code"] for reason in run.document["verdict"]["reasons"])
        told = str(facts.get("result_invalid_reason", ""))
        facts |= {
            "result_validity": "INVALID",
            "result_invalid_reason": f"{told}Tritonmark: {codes or 'failed requests'}",
        }
        return replace(result, facts=facts)


def view(run: Run) -> LoadGenView | None:
    """None for a run without measured rows, and for Concurrency, which is no scenario of LoadGen's."""
    scenario = run.scenario
    if scenario.kind is Kind.CONCURRENCY:
        return None
    column = _columns(run)
    if not len(column["seq"]):
        return None
    ok = column.pop("ok") & (column["done_ns"] != NEVER)
    tokens = column["tokens_out"]
    token_mode = bool(tokens[ok].any()) or scenario.limits.ttft_ns is not None or scenario.limits.tpot_ns is not None
    token_mode = token_mode and scenario.clip is None  # a video's frames are no tokens: MLPerf counts samples
    if token_mode:
        ok &= (column["first_ns"] != NEVER) & (tokens > 0)
    due = column["due_ns"]
    latency = np.where(ok, column["done_ns"] - due, FAILED_NS)
    first = np.where(ok, column["first_ns"] - due, FAILED_NS)
    last = int(column["sent_ns"][-1])
    samples = Samples(due, latency, max(last, int(due[-1])), first, np.where(ok, tokens, 2))
    settings = settings_of(scenario, token_mode, len(due))
    if scenario.kind is Kind.MULTI_STREAM:
        samples = _whole_queries(samples, column["query"], settings.samples_per_query)
    one_token = int((tokens[ok] == 1).sum()) if token_mode else 0
    missing = int((~ok).sum()) + len(samples) - len(due)
    return LoadGenView(
        settings, samples, column["sample"], missing, one_token, int(column["done_ns"][ok].max(initial=0))
    )


def settings_of(scenario: Scenario, tokens: bool, count: int) -> Settings:
    """LoadGen's effective settings for a scenario of ours; its minimums are those the verdict was made with."""
    limits, minimums = scenario.limits, scenario.minimums
    settings = effective(
        scenario.kind,
        percentile=scenario.percentile,
        min_duration_ns=minimums.duration_ns,
        min_queries=minimums.queries,
        target_qps=scenario.target_qps or 1.0,
        samples_per_query=scenario.samples_per_query,
        latency_limit_ns=limits.e2e_ns if limits.e2e_ns is not None else 0 if tokens else UNLIMITED_NS,
        ttft_limit_ns=limits.ttft_ns if limits.ttft_ns is not None else UNLIMITED_NS,
        tpot_limit_ns=limits.tpot_ns if limits.tpot_ns is not None else UNLIMITED_NS,
        tokens=tokens,
    )
    if scenario.kind is Kind.OFFLINE:  # our samples are rounded, LoadGen's are cut: what was asked for is what counts
        asked = max(minimums.queries, 1, round(1.1 * minimums.duration_ns / 1e9 * (scenario.target_qps or 0)))
        settings = replace(settings, samples_per_query=asked, min_samples=asked)
    return settings


def _columns(run: Run) -> dict[str, npt.NDArray[Any]]:
    """Measured rows in order of issue, batch by batch so that only these columns are ever in memory."""
    parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in (*COLUMNS, "ok")}
    file = pq.ParquetFile(run.folder / "records.parquet")
    for batch in file.iter_batches(columns=[*COLUMNS, "phase", "outcome"]):
        keep = batch["phase"].to_numpy(zero_copy_only=False) == Phase.MEASURE.value
        parts["ok"].append((batch["outcome"].to_numpy(zero_copy_only=False) == Outcome.OK.value)[keep])
        for name in COLUMNS:
            parts[name].append(batch[name].cast(pa.int64()).fill_null(NEVER).to_numpy(zero_copy_only=False)[keep])
    whole: dict[str, npt.NDArray[Any]] = {}
    for name in list(parts):  # one column after the other, so that no two copies of all of them exist
        values = parts.pop(name)
        whole[name] = np.concatenate(values) if values else np.empty(0, np.int64)
    order = np.lexsort((whole["seq"], whole["query"]))
    for name in whole:
        whole[name] = whole[name][order]
    return whole


def _whole_queries(samples: Samples, query: Int64, width: int) -> Samples:
    """MultiStream: a sample that has no row counts as one that never completed, so that every query is whole."""
    ids, start, counts = np.unique(query, return_index=True, return_counts=True)
    if (counts == width).all():
        return samples
    assert samples.first_ns is not None and samples.tokens is not None
    place = np.repeat(np.arange(len(ids)) * width - start, counts) + np.arange(len(query))
    late, tokens = np.full((2, len(ids) * width), FAILED_NS), np.full(len(ids) * width, 2)
    late[0, place], late[1, place], tokens[place] = samples.latency_ns, samples.first_ns, samples.tokens
    return Samples(np.repeat(samples.due_ns[start], width), late[0], samples.issued_last_ns, late[1], tokens)
