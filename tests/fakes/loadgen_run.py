"""Runs the real MLPerf LoadGen against a scripted system under test, and prints what it saw as JSON.

    python tests/fakes/loadgen_run.py CASES.json OUTDIR > results.json

CASES.json (or `-` for stdin) holds a list of cases; each case is one test, and the answer is one object per case, in
order. A case is an object with these keys, all but `scenario` optional:

    scenario            "Server" | "SingleStream" | "MultiStream" | "Offline"
    target_qps          Server rate, or Offline expected rate (1000)
    expected_latency_ns Single/MultiStream (1_000_000)
    min_duration_ms, min_queries, max_queries        (0, 100, 0)
    percentile, limit_ns                             target percentile (0.99), Server latency limit (100 ms)
    total, performance  size of the data set and of its loaded part (8, total)
    seeds               [qsl, sample_index, schedule] ([1, 2, 3])
    equal_issue         sample_concatenate_permutation (false)
    samples_per_query   MultiStream (8)
    latency_ns          a number, or a list used in turn by order of issue (0). 0 completes inside IssueQuery
    tokens              {"first_ns": number | list, "count": number | list, "ttft_limit_ns": n, "tpot_limit_ns": n}:
                        token-latency mode; a sample's first token comes first_ns after issue

The answer: {"samples": [...], "detail": {key: last value}, "errors": [...], "summary": text}. A sample has seq,
query, sample, due_ns (from the first due time of the run), issue_delay_ns, latency_ns (from due), in token mode also
first_ns (from due) and tokens. All times are LoadGen's own, read back from its trace, so a comparison with them does
not depend on how punctual this script was.

LoadGen is one per process and may hang or crash it: callers start this file as a subprocess with a timeout.
"""

from __future__ import annotations

import heapq
import json
import re
import sys
import threading
import time
from collections import defaultdict
from itertools import count
from pathlib import Path
from typing import Any

import mlperf_loadgen as lg

Case = dict[str, Any]
SCENARIOS = {
    "Server": lg.TestScenario.Server,
    "SingleStream": lg.TestScenario.SingleStream,
    "MultiStream": lg.TestScenario.MultiStream,
    "Offline": lg.TestScenario.Offline,
}


def in_turn(script: Any, seq: int) -> int:
    return int(script[seq % len(script)] if isinstance(script, list) else script)


class ScriptedSut:
    """Completes every sample at the time its script says; a thread with a heap of deadlines does the waiting."""

    def __init__(self, case: Case) -> None:
        self.latency = case.get("latency_ns", 0)
        self.tokens = case.get("tokens")
        self.issued = 0
        self.order = count()
        self.heap: list[tuple[int, int, int, int, bool]] = []
        self.wake = threading.Condition()
        self.stopped = False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def issue(self, samples: list[Any]) -> None:
        now = time.perf_counter_ns()
        later = []
        for sample in samples:
            seq, self.issued = self.issued, self.issued + 1
            done = in_turn(self.latency, seq)
            n_tokens = in_turn(self.tokens["count"], seq) if self.tokens else 0
            if self.tokens:
                first = in_turn(self.tokens["first_ns"], seq)
                later.append((now + first, next(self.order), sample.id, n_tokens, True))
                done = max(done, first)
            if done == 0 and not self.tokens:
                self.complete(sample.id, 0)
            else:
                later.append((now + done, next(self.order), sample.id, n_tokens, False))
        if later:
            with self.wake:
                for event in later:
                    heapq.heappush(self.heap, event)
                self.wake.notify()

    def run(self) -> None:
        while True:
            with self.wake:
                while not self.stopped and (wait := self.until_next()) != 0:
                    self.wake.wait(wait)
                if self.stopped:
                    return
                _, _, sample_id, n_tokens, first = heapq.heappop(self.heap)
            if first:
                lg.FirstTokenComplete([lg.QuerySampleResponse(sample_id, 0, 0)])
            else:
                self.complete(sample_id, n_tokens)

    def until_next(self) -> float | None:
        """Seconds until the next event, 0 when it is due, None when there is none."""
        if not self.heap:
            return None
        return max(0, self.heap[0][0] - time.perf_counter_ns()) / 1e9

    @staticmethod
    def complete(sample_id: int, n_tokens: int) -> None:
        lg.QuerySamplesComplete([lg.QuerySampleResponse(sample_id, 0, 0, n_tokens)])

    def stop(self) -> None:
        with self.wake:
            self.stopped = True
            self.wake.notify()
        self.thread.join()


def settings_of(case: Case) -> Any:
    settings = lg.TestSettings()
    settings.scenario = SCENARIOS[case["scenario"]]
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms = case.get("min_duration_ms", 0)
    settings.min_query_count = case.get("min_queries", 100)
    settings.max_query_count = case.get("max_queries", 0)
    settings.qsl_rng_seed, settings.sample_index_rng_seed, settings.schedule_rng_seed = case.get("seeds", [1, 2, 3])
    settings.sample_concatenate_permutation = case.get("equal_issue", False)
    settings.server_target_qps = settings.offline_expected_qps = case.get("target_qps", 1000.0)
    settings.server_target_latency_ns = case.get("limit_ns", 100_000_000)
    expected_ns, percentile = case.get("expected_latency_ns", 1_000_000), case.get("percentile", 0.99)
    settings.single_stream_expected_latency_ns = settings.multi_stream_expected_latency_ns = expected_ns
    settings.server_target_latency_percentile = percentile
    settings.single_stream_target_latency_percentile = percentile
    settings.multi_stream_target_latency_percentile = percentile
    settings.multi_stream_samples_per_query = case.get("samples_per_query", 8)
    if tokens := case.get("tokens"):
        settings.use_token_latencies = True
        settings.ttft_latency = tokens.get("ttft_limit_ns", 100_000_000)
        settings.tpot_latency = tokens.get("tpot_limit_ns", 100_000_000)
    return settings


def run(case: Case, out: Path) -> dict[str, Any]:
    """One LoadGen test; its logs stay in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    log = lg.LogSettings()
    log.log_output.outdir = str(out)
    log.log_output.copy_summary_to_stdout = log.log_output.copy_detail_to_stdout = False
    log.enable_trace = True
    total = case.get("total", 8)
    sut = ScriptedSut(case)
    handles = (
        lg.ConstructSUT(sut.issue, lambda: None),
        lg.ConstructQSL(total, case.get("performance", total), lambda _: None, lambda _: None),
    )
    lg.StartTestWithLogSettings(*handles, settings_of(case), log, "no-audit.config")
    lg.DestroyQSL(handles[1])
    lg.DestroySUT(handles[0])
    sut.stop()
    return read_logs(out, case)


def read_logs(out: Path, case: Case) -> dict[str, Any]:
    detail, errors = {}, []
    for line in (out / "mlperf_log_detail.txt").read_text().splitlines():
        # C++ writes 0/0 and 1/0 its own way; Python's json knows NaN and Infinity.
        text = re.sub(r'"value": -?nan', '"value": NaN', line.removeprefix(":::MLLOG "))
        entry = json.loads(re.sub(r'"value": (-?)inf', r'"value": \1Infinity', text))
        detail[entry["key"]] = entry["value"]
        if entry["metadata"]["is_error"]:
            errors.append(entry["value"])
    return {
        "samples": read_trace(out / "mlperf_log_trace.json", case),
        "detail": detail,
        "errors": errors,
        "summary": (out / "mlperf_log_summary.txt").read_text(),
    }


def read_trace(path: Path, case: Case) -> list[dict[str, int]]:
    """One dict per sample in issue order. The trace's `ts` is in microseconds with three decimals, so whole ns."""
    begun: list[tuple[int, dict[str, int]]] = []
    # By sequence number, or by due time where LoadGen's counter event has only that (equal due times may swap).
    first: dict[int, list[int]] = defaultdict(list)
    server = case["scenario"] == "Server"
    for line in path.read_text().splitlines():
        if '"Sample"' in line and '"b"' in line:
            event = json.loads(line.rstrip(","))
            begun.append((round(event["ts"] * 1000), event["args"]))
        elif '"Token_Latency"' in line or ('"Token"' in line and '"b"' in line):
            event = json.loads(line.rstrip(","))
            args = event["args"]
            if server:
                first[round(event["ts"] * 1000)].append(args["issue_delay"] + args["issue_to_done"])
            else:
                first[args["sample_seq"]].append(args["complete_ns"])
    begun.sort(key=lambda pair: pair[1]["sample_seq"])
    start, offset = begun[0][0], begun[0][1]["sample_seq"]
    samples = []
    for due, args in begun:
        row = {"seq": args["sample_seq"] - offset, "query": args["query_seq"], "sample": args["sample_idx"]}
        row |= {"due_ns": due - start, "issue_delay_ns": args["issue_start_ns"], "latency_ns": args["complete_ns"]}
        if case.get("tokens"):
            row["first_ns"] = first[due if server else args["sample_seq"]].pop(0)
            row["tokens"] = in_turn(case["tokens"]["count"], row["seq"])
        samples.append(row)
    return samples


def main() -> None:
    source, out = sys.argv[1], Path(sys.argv[2])
    cases = json.loads(sys.stdin.read() if source == "-" else Path(source).read_text())
    print(json.dumps([run(case, out / f"case-{i:04d}") for i, case in enumerate(cases)]))  # dump() is the slow one


if __name__ == "__main__":
    main()
