"""Scenario files and overrides: what they resolve to, and what they refuse."""

import json

import pytest

from loadgen.core.scenario import Kind, Scenario
from loadgen.edge import scenarios
from loadgen.edge.errors import UserError
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
    assert scenarios.resolve("offline", "phi-2", "mlperf", {"target_qps": 3}).minimums.queries == 24576
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
