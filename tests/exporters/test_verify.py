"""The correctness gate: what counts as agreement, and the real server asked its reference."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from exporters import cli as cli_module
from exporters.errors import UserError
from exporters.export import export_model
from exporters.server import TritonServer
from exporters.verify import TOLERANCES, Outcome, check_served, compare, is_likely, read_reference, verify_export


def row(tokens, margins, others=None):
    others = others or [900 + k for k in range(len(tokens))]
    alternatives = [[[o, m], [o + 50, m + 0.1]] for o, m in zip(others, margins, strict=True)]
    return {"prompt": "p", "token_ids": tokens, "margins": margins, "alternatives": alternatives}


def test_equal_answers_agree():
    found = compare([row([1, 2, 3], [1.0, 1.0, 1.0])] * 2, [[1, 2, 3]] * 2, 0.5)
    assert (found.compared, found.equal, found.ties, found.diverging, found.share) == (6, 6, 0, 0, 1.0)


def test_a_near_second_choice_is_a_tie_and_ends_the_comparison():
    found = compare([row([1, 2, 3], [1.0, 0.2, 1.0])], [[1, 901, 7]], 0.5)
    assert (found.compared, found.equal, found.ties, found.diverging) == (1, 1, 1, 0)


@pytest.mark.parametrize(
    ("answer", "margin", "says"),
    [
        ([1, 901, 3], 0.1, "answer 1 at token 2: 901 instead of 2, which led by 0.20"),  # near, but not near enough
        ([1, 555, 3], 0.5, "answer 1 at token 2: 555 instead of 2"),  # none of the next choices
        ([1], 0.5, "answer 1 has 1 tokens instead of 3"),
        ([1, 2, 3, 4], 0.5, "answer 1 has 4 tokens instead of 3"),
        ([], 0.5, "answer 1 has 0 tokens instead of 3"),
    ],
)
def test_everything_else_diverges(answer, margin, says):
    found = compare([row([1, 2, 3], [1.0, 0.2, 1.0])], [answer], margin)
    assert found.diverging == 1 and found.ties == 0 and says in found.worst


def test_the_clearest_difference_is_named():
    rows = [row([1, 2], [3.0, 0.6]), row([1, 2], [2.0, 5.0])]
    assert "answer 2 at token 2: 9 instead of 2, which led by 5.1" in compare(rows, [[1, 901], [1, 9]], 0.5).worst


def test_unequal_counts_are_a_bug():
    with pytest.raises(ValueError):
        compare([row([1], [1.0])], [], 0.5)


def test_tolerances_widen_with_precision():
    order = [TOLERANCES[name] for name in ("fp32", "fp16", "bf16", "int8", "fp8")]
    assert [t.margin for t in order] == sorted(t.margin for t in order)
    assert TOLERANCES["fp32"].wrong == 0 and all(t.wrong <= t.wrong_routed <= 0.15 for t in order)


@pytest.mark.parametrize(
    ("wrong", "compared", "allowed", "likely"),
    [(0, 300, 0.0, True), (1, 300, 0.0, False), (1, 369, 0.002, True), (5, 369, 0.002, False),
     (3, 7, 0.15, True), (5, 7, 0.15, False), (20, 60, 0.15, False), (8, 8, 0.15, False),
     (1500, 2048, 0.15, False), (300, 2048, 0.15, True)],
)  # fmt: skip
def test_few_tokens_prove_little_and_many_much(wrong, compared, allowed, likely):
    assert is_likely(wrong, compared, allowed) == likely


def test_chance_is_as_often_as_the_rate_says():
    draws = np.random.default_rng(0).binomial(40, 0.15, 20_000)
    refused = np.mean([not is_likely(int(wrong), 40, 0.15) for wrong in draws])
    assert 0.003 < refused <= 0.0105


def test_a_reference_has_what_the_gate_needs(tmp_path):
    folder = export_model("llama-3-70b-tiny", out=tmp_path, reference=2, precision="fp8")
    rows = read_reference(folder)
    assert len(rows) == 2 and rows[0]["precision"] == "bf16"
    for one in rows:
        assert len(one["token_ids"]) == len(one["margins"]) == len(one["alternatives"]) == 32
        assert max(one["token_ids"]) < 2048  # ids beyond cannot be spelt
        for token, margin, nearest in zip(one["token_ids"], one["margins"], one["alternatives"], strict=True):
            lower = [less for _, less in nearest]
            assert margin == lower[0] >= 0 and lower == sorted(lower) and token not in dict(nearest)


def test_without_a_reference(tmp_path):
    (tmp_path / "reference.jsonl").write_text('{"prompt": "a", "token_ids": [1]}\n')
    with pytest.raises(UserError, match="older version"):
        read_reference(tmp_path)
    (tmp_path / "reference.jsonl").unlink()
    with pytest.raises(UserError, match="--reference 16"):
        read_reference(tmp_path)


def test_backends_of_other_servers_are_refused(tmp_path):
    folder = export_model("phi-2", "vllm", out=tmp_path)
    with pytest.raises(UserError, match="vllm runs in its own container"):
        verify_export(folder)


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 3)])
def test_the_command_s_exit_code(tmp_path, monkeypatch, passed, code):
    monkeypatch.setattr(cli_module, "verify_export", lambda folder, tell: Outcome(passed, "the one line"))
    result = CliRunner().invoke(cli_module.cli, ["export", "phi-2-tiny", "--out", str(tmp_path), "--verify"])
    assert result.exit_code == code and "the one line" in result.output
    assert len((tmp_path / "phi-2-tiny/reference.jsonl").read_text().splitlines()) == 16
    again = CliRunner().invoke(cli_module.cli, ["verify", str(tmp_path / "phi-2-tiny")])
    assert again.exit_code == code and "the one line" in again.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["phi-2-tiny", "--backend", "vllm"], "vllm runs in its own container, .*phi-2-tiny cannot be verified here"),
        (["phi-2", "--backend", "vllm-python"], "phi-2 cannot be verified here"),
        (["phi-2", "--backend", "tensorrtllm"], "tensorrtllm runs in its own container"),
        (["phi-2-tiny", "--reference", "0"], "--reference 0 stores none"),
        (["cogvideox-5b-tiny", "--reference", "0"], "--reference 0 stores none"),
    ],
)
def test_what_cannot_be_verified_is_not_exported(tmp_path, words, message):
    result = CliRunner().invoke(cli_module.cli, ["export", *words, "--out", str(tmp_path / "out"), "--verify"])
    assert isinstance(result.exception, UserError) and re.search(message, str(result.exception))
    assert "\n" not in str(result.exception) and not (tmp_path / "out").exists()


@pytest.mark.live
def test_the_served_model_agrees(tmp_path):
    told = []
    outcome = verify_export(export_model("phi-2-tiny", out=tmp_path, reference=6), told.append)
    assert outcome.passed and "0 of 192 tokens wrong (0.0% accepted in fp32), 0 ties in 6 answers" in outcome.line
    assert any("ready at" in line for line in told)


@pytest.mark.live
def test_wrong_weights_are_found_out(tmp_path):
    """The gate must be able to fail: the same export with the weights of another seed under it."""
    folder = export_model("phi-2-tiny", out=tmp_path, reference=6, precision="bf16")
    other = export_model("phi-2-tiny", out=tmp_path, name="other", seed=1, precision="bf16")
    shutil.copyfile(other / "1/weights/model.safetensors", folder / "1/weights/model.safetensors")
    outcome = verify_export(folder)
    assert not outcome.passed and "does not agree with its bf16 reference" in outcome.line
    wrong, compared = map(int, re.search(r"(\d+) of (\d+) tokens wrong", outcome.line).groups())
    assert wrong / compared > 0.5 and "\n" not in outcome.line


@pytest.mark.live
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-3-70b-tiny", "phi-3.5-moe-tiny"])
@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
def test_every_precision_agrees(tmp_path, name, precision):
    outcome = verify_export(export_model(name, out=tmp_path, reference=16, precision=precision))
    assert outcome.passed, outcome.line


@pytest.mark.live
@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi-2-tiny", "llama-3-70b-tiny", "phi-3.5-moe-tiny", "cogvideox-5b-tiny"])
@pytest.mark.parametrize("backend", ["torch-eager", "torch-compile"])
def test_every_model_is_served_verified_and_loaded(tmp_path, name, backend):
    """Export, serve, compare with the plain model, load with the real Locust, seal. A busy machine may make the run
    INVALID; what was counted is right anyway."""
    folder = export_model(name, backend, out=tmp_path / "models", reference=4)
    with TritonServer(tmp_path / "models", ready_timeout_s=250) as server:
        outcome = check_served(folder, server.http_url)
        assert outcome.passed, outcome.line
        command = [sys.executable, "-m", "tritonmark", "run", "single_stream", "--model", name, "--host", server.http_url,
                   "--run-time", "3s", "--results", str(tmp_path / "results")]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 3), done.stdout + done.stderr
    (document,) = [json.loads(path.read_text()) for path in (tmp_path / "results").rglob("run.json")]
    assert (document["model"], document["backend"], document["weights"]) == (name, backend, "synthetic")
    summary = document["summary"]
    assert summary["failed"] == 0 and summary["completed"] > 0
    if "cogvideox" not in name:
        assert summary["tokens_out"] == 64 * summary["completed"]
