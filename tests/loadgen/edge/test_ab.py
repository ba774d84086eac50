"""A/B experiments: order, stopping, and two real models on one embedded Triton."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from grid import one

from loadgen.cli import cli
from loadgen.edge import probe_gpu
from loadgen.edge.ab import Experiment
from loadgen.edge.errors import UserError
from loadgen.edge.store import load


def experiment(tmp_path, speeds, *, budget=1e9, blocks=4, figure="throughput", **options):
    sides = []

    def start(side, number):
        sides.append(side)
        return one(tmp_path / str(len(sides)), "H100", "vllm", number, speed=speeds[side], **options)

    return Experiment(start, figure, budget, blocks, lambda text: None), sides


def test_it_stops_when_the_two_are_told_apart(tmp_path):
    task, sides = experiment(tmp_path, {"A": 1.0, "B": 1.3})
    seen = task.run()
    assert seen.decided and 1.2 < seen.gain.ratio < 1.4
    assert "".join(sides)[:8] == "ABBABAAB" and seen.blocks <= 4
    assert len(task.runs["A"]) == len(task.runs["B"]) == len(sides) // 2


def test_equals_are_not_told_apart_within_the_blocks(tmp_path):
    task, sides = experiment(tmp_path, {"A": 1.0, "B": 1.0}, blocks=3, scatter=0.03)
    seen = task.run()
    assert not seen.decided and len(sides) == 12 and "not told apart in 3 blocks" in task.why


def test_a_spent_budget_ends_it_after_two_blocks(tmp_path):
    task, sides = experiment(tmp_path, {"A": 1.0, "B": 1.0}, budget=0.001, blocks=9, scatter=0.03)
    task.run()
    assert len(sides) == 8 and "budget" in task.why


def test_a_latency_is_better_when_it_is_lower(tmp_path):
    task, _ = experiment(tmp_path, {"A": 1.0, "B": 1.5}, figure="e2e_p50", blocks=5)
    assert task.run().gain.ratio == pytest.approx(1.5, rel=0.1)


def test_an_invalid_run_ends_it_by_name(tmp_path):
    task, _ = experiment(tmp_path, {"A": 1.0, "B": 1.0}, failed=3)
    with pytest.raises(UserError, match=r"run 1 \(A\) is INVALID twice"):
        task.run()


def test_one_invalid_run_is_made_again(tmp_path):
    task, sides = experiment(tmp_path, {"A": 1.0, "B": 1.5}, blocks=2)
    whole, task.start = task.start, lambda side, number: one(tmp_path / "bad", "H100", "vllm", failed=3)
    bad = task.start
    task.start = lambda side, number: whole(side, number) if (tmp_path / "bad").exists() else bad(side, number)
    task.run()
    assert "".join(sides) == "ABBABAAB" and [len(r) for r in task.runs.values()] == [4, 4]


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [(["offline", "--model", "a"], "the same host and model"), (["offline"], "give --model"),
     (["server", "--model", "a", "--model", "b"], "set by --target-qps"),
     (["offline", "--model", "a", "--model", "b", "--model", "c"], "given 3 times"),
     (["offline", "--model", "a", "--model", "b", "--budget", "soon"], "--budget is 'soon'")],
)  # fmt: skip
def test_bad_input_is_one_line(arguments, wrong):
    done = CliRunner().invoke(cli, ["ab", *arguments])
    assert isinstance(done.exception, UserError) and wrong in str(done.exception)


def test_the_probe_measures_a_cpu():
    pytest.importorskip("torch")
    found = probe_gpu.measure("cpu")
    assert found["kind"] == "cpu" and found["copy_bytes_s"] > 1e8 and found["matmul_flops_s"]["fp32"] > 1e8


@pytest.mark.live
@pytest.mark.slow
def test_ab_of_two_real_models_on_one_server(tmp_path):
    from exporters.export import export_model
    from exporters.server import TritonServer

    repository = tmp_path / "models"
    export_model("phi-2-tiny", "torch-eager", "synthetic", repository)
    export_model("llama-3-70b-tiny", "torch-eager", "synthetic", repository)
    probe = tmp_path / "probe.json"
    made = subprocess.run(
        [sys.executable, "-m", "tritonmark", "probe-gpu", "--device", "cpu", "--out", str(probe)], check=False
    )
    assert made.returncode == 0
    with TritonServer(repository, models=["phi-2-tiny", "llama-3-70b-tiny"], log_path=tmp_path / "log") as server:
        command = [sys.executable, "-m", "tritonmark", "ab", "single_stream", "--host", server.http_url, "--model", "phi-2-tiny",
                   "--model", "llama-3-70b-tiny", "--run-time", "2s", "--max-blocks", "2", "--results", str(tmp_path / "r"),
                   "--gpu-probe", str(probe), "--output-tokens", "32", "--format", "json"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [len(found["runs"][side]) for side in "ab".upper()] == [4, 4] and found["ratio"] > 0
    runs = [load(tmp_path / folder) for side in "AB" for folder in found["runs"][side]]
    assert {r.scenario.salt_seed for r in runs} == {1}
    assert runs[0].document["hardware"]["measured"]["copy_bytes_s"] > 0
