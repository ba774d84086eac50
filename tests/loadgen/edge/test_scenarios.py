"""Scenario files and overrides: what they resolve to, and what they refuse."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loadgen.core.lengths import draw, parse
from loadgen.core.scenario import Kind, Scenario
from loadgen.edge import scenarios
from loadgen.edge.errors import UserError
from loadgen.edge.samples import sample_indices
from loadgen.edge.worker import due_times


@pytest.mark.parametrize("name", scenarios.names())
@pytest.mark.parametrize("preset", scenarios.PRESETS)
def test_every_scenario_resolves_and_survives_json(name, preset):
    scenario = scenarios.resolve(name, "phi-2", preset, {"target_qps": 3})
    assert Scenario.from_json(json.loads(json.dumps(scenario.to_json()))) == scenario


def test_mlperf_preset_has_the_rules_of_v6_1():
    server = scenarios.resolve("server", "phi-2", "mlperf", {"target_qps": 3})
    assert server.minimums.duration_ns == 600 * 10**9
    assert server.minimums.early_stopping
    assert (server.limits.ttft_ns, server.limits.tpot_ns) == (2000 * 10**6, 100 * 10**6)
    assert server.seeds.schedule == 16159082839903944936
    assert server.minimums.queries == 100  # LoadGen's default: its sample order depends on it
    assert scenarios.resolve("offline", "phi-2", "mlperf", {"target_qps": 3}).minimums.queries == 13368
    assert scenarios.resolve("offline", "llama-3-70b", "mlperf", {"target_qps": 3}).minimums.queries == 24576
    assert scenarios.resolve("multi_stream", "phi-2", "mlperf").minimums.queries == 662
    interactive = scenarios.resolve("interactive", "phi-2", "mlperf", {"target_qps": 3})
    assert (interactive.kind, interactive.limits.ttft_ns, interactive.limits.tpot_ns) == (
        Kind.SERVER,
        5 * 10**8,
        3 * 10**7,
    )


def test_overrides_arrive_and_text_from_a_web_form_is_read():
    scenario = scenarios.resolve("server", "phi-2-tiny", "smoke", {"target_qps": "4.5", "duration_s": 30, "warmup": "0",
                                                                  "ttft_ms": 250, "concurrency": "", "e2e_ms": None})  # fmt: skip
    assert scenario.target_qps == 4.5
    assert scenario.minimums.duration_ns == 30 * 10**9
    assert scenario.warmup == 0
    assert scenario.limits.ttft_ns == 250_000_000
    assert scenario.limits.tpot_ns == 100_000_000
    assert scenario.limits.e2e_ns is None


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "fast", "nan"])
def test_a_rate_that_is_no_rate_is_refused(value):
    with pytest.raises(UserError, match=r"--target-qps is .*; it must be a number above 0"):
        scenarios.resolve("server", "phi-2", "smoke", {"target_qps": value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serverr", "phi-2", "smoke", {}), "unknown scenario 'serverr'; choose one of: "),
        (("server", "phi-2", "quick", {}), "unknown preset 'quick'"),
        (("server", "phi-2", "smoke", {}), "scenario server needs --target-qps"),
        (("offline", "phi-2", "smoke", {}), "scenario offline needs --target-qps"),
        (("server", "phi-2", "smoke", {"target_qps": 1, "arrivals": "bursty"}), "unknown arrivals"),
        (("server", "phi-2", "mlperf", {"target_qps": 1e9}), "over 50,000,000 requests"),
        (("concurrency", "phi-2", "smoke", {"concurrency": 0}), "--concurrency is 0; it must be a whole number"),
        (("concurrency", "phi-2", "smoke", {"concurrency": 1.5}), "--concurrency is 1.5"),
        (("server", "phi-2", "smoke", {"target_qps": 1, "duration_s": -3}), "--run-time is -3"),
        (("server", "phi-2", "smoke", {"target_qps": 1, "rules": "v4.0"}), "unknown rules 'v4.0'; choose one of: v6.1"),
        (("single_stream", "phi-2", "smoke", {"benchmark": "gptj"}), "unknown benchmark 'gptj'"),
        (("single_stream", "phi-2", "smoke", {"sample_order": "random"}), "unknown sample order"),
        (("multi_stream", "phi-2", "smoke", {"sample_order": "equal-issue"}), "does not change MultiStream's samples"),
        (("single_stream", "phi-2", "smoke", {"salt": "maybe"}), "unknown salt 'maybe'"),
        (("single_stream", "phi-2", "smoke", {"salt_seed": -1}), "--salt-seed is -1"),
        (("single_stream", "phi-2", "smoke", {"max_prompts": 0}), "--max-prompts is 0"),
        (("single_stream", "phi-2", "smoke", {"prompts": "synthetic"}), "--prompts synthetic needs --input-tokens"),
        (("single_stream", "phi-2", "smoke", {"input_tokens": "64"}), "--input-tokens needs --prompts synthetic"),
        (("single_stream", "phi-2", "smoke", {"output_tokens": "many"}), "--output-tokens 'many' is no length"),
        (("single_stream", "phi-2", "smoke", {"output_tokens": "0"}), "lengths must be from 1"),
        (("single_stream", "phi-2", "smoke", {"output_tokens": "dist:gptj"}), "no published lengths of 'gptj'"),
        (("single_stream", "cogvideox-5b", "smoke", {"rules": "v5.1"}), "MLPerf v5.1 has no benchmark wan-2.2-t2v"),
        (
            ("interactive", "phi-3.5-moe", "smoke", {"target_qps": 1}),
            "no interactive rules for mixtral-8x7b (it has them",
        ),
        (("interactive", "cogvideox-5b", "smoke", {"target_qps": 1}), "no interactive rules for wan-2.2-t2v"),
    ],
)
def test_nonsense_is_refused_by_name(arguments, message):
    with pytest.raises(UserError) as caught:
        scenarios.resolve(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_slots_follow_loadgens_rules():
    server = scenarios.resolve("server", "phi-2", "smoke", {"target_qps": 50, "duration_s": 2})
    due = due_times(server)
    assert due[0] == 0
    assert due[-1] >= 2 * 10**9 > due[-2]
    offline = scenarios.resolve("offline", "phi-2", "smoke", {"target_qps": 50, "duration_s": 2})
    assert due_times(offline).tolist() == [0] * 110
    constant = scenarios.resolve(
        "server", "phi-2", "smoke", {"target_qps": 50, "duration_s": 2, "arrivals": "constant"}
    )
    assert due_times(constant)[:3].tolist() == [0, 20_000_000, 40_000_000]
    assert due_times(constant)[-1] >= 2 * 10**9
    assert len(due_times(scenarios.resolve("single_stream", "phi-2"))) == 0


def test_rounds_differ_in_seeds_and_benchmarks():
    seeds = {
        r: scenarios.resolve("server", "phi-2", "mlperf", {"target_qps": 1, "rules": r}).seeds for r in scenarios.RULES
    }
    assert {r: s.schedule for r, s in seeds.items()} == {
        "v6.1": 16159082839903944936, "v6.0": 3936089224930324775, "v5.1": 18209322760996052031}  # fmt: skip
    assert seeds["v6.0"].qsl == 2465351861681999779
    assert seeds["v5.1"].sample == 14771362308971278857
    assert scenarios.resolve("offline", "phi-2", overrides={"target_qps": 1}).rules == "v6.1"
    for name, entry in scenarios.benchmarks().items():
        for rules in scenarios.RULES:
            over = {"target_qps": 1, "rules": rules, "benchmark": name}
            if rules in entry["rounds"]:
                offline = scenarios.resolve("offline", "phi-2", "mlperf", over)
                assert (offline.benchmark, offline.minimums.queries) == (name, entry["library"])
            else:
                with pytest.raises(UserError, match=f"MLPerf {rules} has no benchmark {name}; it is in v6.0"):
                    scenarios.resolve("offline", "phi-2", "mlperf", over)


LIMITS = {
    ("server", "phi-2"): (2000, 100, None), ("interactive", "phi-2-tiny"): (500, 30, None),
    ("server", "phi-3.5-moe"): (2000, 200, None), ("server", "phi-3.5-moe-tiny"): (2000, 200, None),
    ("server", "llama-3-70b"): (2000, 200, None), ("interactive", "llama-3-70b-tiny"): (450, 40, None),
    ("server", "cogvideox-5b"): (None, None, 20_000), ("offline", "cogvideox-5b-tiny"): (None, None, None),
    ("server", "phi-2-fp16-copy"): (2000, 100, None), ("server", "unheard-of"): (2000, 100, None),
}  # fmt: skip


@pytest.mark.parametrize(("name", "model"), LIMITS)
def test_each_model_has_the_limits_of_its_benchmark(name, model):
    limits = scenarios.resolve(name, model, "smoke", {"target_qps": 1}).limits
    expected = LIMITS[name, model]
    assert [limits.ttft_ns, limits.tpot_ns, limits.e2e_ns] == [None if x is None else x * 10**6 for x in expected]


def test_a_longer_name_finds_its_own_entry_before_a_shorter_one():
    assert scenarios.binding("phi-2-tiny-copy") == scenarios.binding("phi-2-tiny")
    assert scenarios.binding("phi-2-tiny-copy") != scenarios.binding("phi-2")
    assert scenarios.resolve("server", "cogvideox-5b", overrides={"target_qps": 1}).benchmark == "stable-diffusion-xl"


def test_interactive_without_rules_takes_the_users_limits():
    over = {"target_qps": 1, "ttft_ms": 600, "tpot_ms": 50}
    limits = scenarios.resolve("interactive", "phi-3.5-moe", "smoke", over).limits
    assert (limits.ttft_ns, limits.tpot_ns) == (600 * 10**6, 50 * 10**6)


def test_equal_issue_is_mlperfs_for_language_models_and_the_users_choice_elsewhere():
    def order(name, preset, model="phi-2", **over):
        return scenarios.resolve(name, model, preset, {"target_qps": 1, **over}).sample_order

    assert {order(name, "mlperf") for name in ("server", "interactive", "offline", "single_stream")} == {"equal-issue"}
    assert {order(name, "mlperf") for name in ("multi_stream", "concurrency")} == {"uniform"}
    assert {order(name, "smoke") for name in scenarios.names()} == {"uniform"}
    assert order("offline", "mlperf", "cogvideox-5b") == "uniform"
    assert order("server", "smoke", sample_order="equal-issue") == "equal-issue"
    assert order("server", "mlperf", sample_order="uniform") == "uniform"


@pytest.mark.parametrize("library", [7, 60, 256])
def test_equal_issue_sends_whole_passes(library):
    over = {"target_qps": 50, "duration_s": 2, "sample_order": "equal-issue"}
    for name in ("server", "offline"):
        scenario = scenarios.sized(scenarios.resolve(name, "phi-2", "smoke", over), library)
        plain = due_times(scenarios.resolve(name, "phi-2", "smoke", {**over, "sample_order": "uniform"}))
        due = due_times(scenario)
        assert len(due) == -(-len(plain) // library) * library
        assert due[: len(plain)].tolist() == plain.tolist()
        counts = np.bincount(sample_indices(scenario, library, len(due)), minlength=library)
        assert set(counts.tolist()) == {len(due) // library}


def test_single_stream_equal_issue_has_loadgens_minimum():
    def minimum(**over):
        return scenarios.sized(scenarios.resolve("single_stream", "phi-2", "mlperf", over), 256).minimums.queries

    assert minimum() == 256
    assert minimum(target_qps=10) == 12032  # 2 x 600 s x 10/s, up to the next whole pass
    assert scenarios.sized(scenarios.resolve("single_stream", "phi-2"), 256).minimums.queries == 0


def test_lengths_follow_their_spec():
    def drawn(spec, side="output"):
        return draw(parse(spec, scenarios.length_statistics(side)), 20_000, seed=3)

    assert set(drawn("64").tolist()) == set(drawn("fixed:64").tolist()) == {64}
    assert (drawn("uniform:8-16").min(), drawn("uniform:8-16").max()) == (8, 16)
    normal = drawn("normal:256,64")
    assert normal.mean() == pytest.approx(256, abs=2) and normal.std() == pytest.approx(64, abs=2)
    assert drawn("normal:2,9").min() == 1
    for name, mean, maximum in (
        ("llama2-70b", 294.45, 1024),
        ("mixtral-8x7b", 144.84, 1024),
        ("llama3.1-8b", 128, 128),
    ):
        values = drawn(f"dist:{name}")
        assert values.mean() == pytest.approx(mean, rel=0.02)
        assert values.min() >= 1 and values.max() <= maximum
    assert drawn("dist:llama2-70b", "input").max() <= 1024
    assert drawn("uniform:8-16").tolist() == drawn("uniform:8-16").tolist()


PARITY = [
    (name, order, qps, rules)
    for name, qps in (("server", 80), ("offline", 130), ("single_stream", 40))
    for order in ("uniform", "equal-issue")
    for rules in scenarios.RULES
]


def test_resolved_scenarios_send_what_the_real_loadgen_sends(tmp_path):
    """Due times, counts and samples of whole scenarios, minimums and rounds included, from LoadGen's own trace."""
    pytest.importorskip("mlperf_loadgen", reason="the real LoadGen (pip install mlcommons-loadgen) is not installed")
    library, resolved, cases = 60, [], []
    for name, order, qps, rules in PARITY:
        over = {"target_qps": qps, "duration_s": 1, "sample_order": order, "rules": rules, "min_queries": 100}
        scenario = scenarios.sized(scenarios.resolve(name, "phi-2", "mlperf", over), library)
        resolved.append(scenario)
        cases.append({
            "scenario": scenario.kind.value, "target_qps": qps, "expected_latency_ns": round(1e9 / qps),
            "min_duration_ms": 1000, "min_queries": 100, "total": library, "equal_issue": order == "equal-issue",
            "seeds": [scenario.seeds.qsl, scenario.seeds.sample, scenario.seeds.schedule],
        })  # fmt: skip
    driver = Path(__file__).parents[2] / "fakes" / "loadgen_run.py"
    done = subprocess.run([sys.executable, str(driver), "-", str(tmp_path)], input=json.dumps(cases), text=True,
                          capture_output=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for scenario, answer in zip(resolved, json.loads(done.stdout), strict=True):
        seen = sorted(answer["samples"], key=lambda sample: sample["seq"])
        if scenario.kind is not Kind.SINGLE_STREAM:
            assert [s["due_ns"] for s in seen] == due_times(scenario).tolist()
        assert [s["sample"] for s in seen] == sample_indices(scenario, library, len(seen)).tolist()
        if scenario.kind is Kind.SINGLE_STREAM:
            assert answer["detail"]["effective_min_query_count"] == scenario.minimums.queries
