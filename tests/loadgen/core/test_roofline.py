"""Limits against figures that were worked out independently (weights, KV and operations of the real architectures)."""

import pytest

from loadgen.core import roofline
from loadgen.core.roofline import Machine
from loadgen.edge.physics import facts_of

H100 = Machine("H100 SXM", 3350e9, 989e12, "by data sheet")


@pytest.mark.parametrize(
    ("model", "gb", "gflop"), [("phi-2", 5.297, 5.30), ("phi-3.5-moe", 13.019, 13.02), ("llama-3-70b", 139.01, 139.0)]
)
def test_bytes_and_operations_of_one_token(model, gb, gflop):
    facts = facts_of(model)
    assert facts.weights_read(1) * 2 / 1e9 == pytest.approx(gb, rel=1e-3)
    assert facts.token_flops(0) / 1e9 == pytest.approx(gflop, rel=1e-3)


@pytest.mark.parametrize(("batch", "gb"), [(1, 13.0), (2, 21.8), (4, 36.3), (8, 55.8), (16, 74.0), (32, 82.4)])
def test_a_mixture_of_experts_reads_those_that_a_batch_is_expected_to_touch(batch, gb):
    assert facts_of("phi-3.5-moe").weights_read(batch) * 2 / 1e9 == pytest.approx(gb, abs=0.06)


@pytest.mark.parametrize(("model", "kv"), [("phi-2", 327_680), ("phi-3.5-moe", 131_072), ("llama-3-70b", 327_680)])
def test_kv_bytes(model, kv):
    assert facts_of(model).kv_values_per_token * 2 == kv


@pytest.mark.parametrize(
    ("model", "bytes_", "per_s"),
    [("phi-2", 2, 632.4), ("phi-2", 1, 1264.8), ("phi-3.5-moe", 2, 257.3), ("llama-3-70b", 2, 24.1)],
)
def test_one_stream_without_context_is_bandwidth_over_weights(model, bytes_, per_s):
    found = roofline.decode_step(facts_of(model), H100, 1, 0, bytes_)
    assert found.bound == "memory" and 1 / found.seconds == pytest.approx(per_s, rel=2e-3)


def test_context_and_streams_add_kv():
    found = roofline.decode_step(facts_of("phi-2"), H100, 4, 1000, 2)
    assert found.bytes == pytest.approx(2 * 2_648_611_840 + 4 * 1000 * 327_680)


def test_decoding_turns_compute_bound_at_the_balance():
    assert roofline.balance(H100, 2) == pytest.approx(295, rel=2e-3)
    facts = facts_of("llama-3-70b")
    assert roofline.decode_step(facts, H100, 290, 0, 2).bound == "memory"
    assert roofline.decode_step(facts, H100, 300, 0, 2).bound == "compute"


def test_prefill_needs_logits_for_one_token_only():
    facts = facts_of("phi-2")
    assert facts.head_parameters == 51200 * 2560
    long = roofline.prefill(facts, H100, 2000, 2)
    assert long.bound == "compute"
    assert long.flops == pytest.approx(2000 * (2 * (2_648_611_840 - 131_072_000) + 327_680 * 1000) + 2 * 131_072_000)


def test_a_video_takes_the_published_amount_of_work():
    facts = facts_of("cogvideox-5b")
    assert facts.tokens(49, 480, 720) == 17_776
    assert facts.step_flops(17_776, guided=False) == pytest.approx(332e12, rel=2e-3)
    assert 50 * facts.step_flops(17_776) == pytest.approx(33.2e15, rel=2e-3)
    step = roofline.denoising_step(facts, H100, 49, 480, 720, 2)
    assert 50 * step.seconds == pytest.approx(33.6, rel=2e-3) and step.bound == "compute"


def test_utilisation():
    assert roofline.mbu(3350e9, 2, H100) == pytest.approx(0.5)
    assert roofline.mfu(989e12, 4, H100) == pytest.approx(0.25)
    assert roofline.mfu(1, 1, Machine("x", 1.0, None, "y")) is None
