"""Tensor parallelism without a server: what each of two ranks keeps, and counts that are refused before any starts."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import exporters

RUNTIME = Path(exporters.__file__).parent / "runtime"
RANK = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, transformers
from llm_ranks import Sharder
from llm_weights import draw_weights

config = transformers.PhimoeConfig(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, num_local_experts=4, pad_token_id=0)
if sys.argv[2] == "without experts":  # as transformers 5.17 has it
    config.base_model_tp_plan = type(config).base_model_tp_plan = None
model = transformers.PhimoeForCausalLM(config).eval()
draw_weights(model, 1, 128)
ids = torch.arange(40)[None]
with torch.inference_mode():
    whole = model(ids).logits
sharder = Sharder(model, "cpu")
for name, _ in sorted(model.named_parameters()):
    sharder.filled(name)
experts, layer = model.model.layers[1].mlp.experts, model.model.layers[1]
assert experts.gate_up_proj.shape == (4, 48, 32) and experts.down_proj.shape == (4, 32, 24), experts.gate_up_proj.shape
assert experts.down_proj.untyped_storage().nbytes() == 4 * 32 * 24 * 4
assert layer.mlp.router.weight.shape == (4, 32) and layer.self_attn.q_proj.weight.shape == (32, 32)
assert model.lm_head.weight.to_local().shape == (64, 32)
with torch.inference_mode():
    shared = model(ids).logits
torch.testing.assert_close(shared, whole, atol=1e-4, rtol=1e-4)
"""


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["installed", "without experts"])
def test_two_ranks_keep_half_of_every_expert_and_answer_as_one(plan):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(RUNTIME), plan], stderr=subprocess.PIPE, text=True,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors


@pytest.mark.parametrize(
    ("count", "device", "message"),
    [
        (3, "cpu", "3 ranks cannot share num_key_value_heads 8 equally"),
        (1_000_000, "cuda", "1000000 ranks cannot share num_key_value_heads 8"),
        (8, "cuda", "8 ranks from cuda on need as many GPUs, and 2 are there"),
        (2, "cuda:1", "2 ranks from cuda:1 on need as many GPUs, and 2 are there"),
        (2, "cuda:0", None),
        (8, "cpu", None),
    ],
)
def test_counts_that_cannot_work_are_refused(runtime, monkeypatch, count, device, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = {"num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672}
    check = runtime("llm_ranks").check_count
    if message is None:
        return check(count, config, device)
    with pytest.raises(ValueError, match=message):
        check(count, config, device)
    return None


def test_no_process_starts_for_a_count_that_cannot_work(runtime, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4, "intermediate_size": 64}')
    ranks = runtime("llm_ranks")
    monkeypatch.setattr(ranks.subprocess, "Popen", lambda *_, **__: pytest.fail("a rank was started"))
    with pytest.raises(ValueError, match="num_key_value_heads 4 equally"):
        ranks.lead({"settings": {"tp": 1_000_000}, "folder": str(tmp_path), "device": "cpu"})
