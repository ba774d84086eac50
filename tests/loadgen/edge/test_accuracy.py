"""Accuracy mode: every prompt once, answers kept and compared; against the fake and, live, the real Triton."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from exporters.export import export_model
from exporters.server import TritonServer
from loadgen.core.scenario import Kind
from loadgen.edge import accuracy, report, scenarios, store
from loadgen.edge.errors import UserError

LLM = str(Path(__file__).parents[3] / "loadgen" / "llm.py")


def write_reference(path: Path, answers: list[list[int]]) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "token_ids": a}) + "\n" for i, a in enumerate(answers)))
    return path


def run(url: str, model: str, reference: Path, results: Path, *more: str) -> tuple[int, store.Run]:
    command = [sys.executable, "-m", "locust", "-f", LLM, "--headless", "--only-summary", "--host", url, "--model",
               model, "--scenario", "accuracy", "--reference", str(reference), "--results", str(results), *more]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90)
    folders = [path.parent for path in results.rglob("run.json")]
    assert len(folders) == 1, done.stdout + done.stderr
    return done.returncode, store.load(folders[0])


def test_a_reference_brings_prompts_and_length(tmp_path):
    path = str(write_reference(tmp_path / "r.jsonl", [[1, 2, 3]] * 5))
    scenario = scenarios.sized(scenarios.resolve("accuracy", "fake", overrides={"reference": path}), 5)
    assert (scenario.kind, scenario.prompts, scenario.output_tokens, scenario.salt) == (Kind.OFFLINE, path, "3", False)
    assert (scenario.minimums.queries, scenario.minimums.duration_ns) == (5, 0)


@pytest.mark.parametrize("over", [{"min_agreement": 0.5}, {"reference": "/nowhere.jsonl"}])
def test_half_a_reference_is_refused(over):
    with pytest.raises(UserError):
        scenarios.resolve("accuracy", "fake", overrides=over)


def test_answers_are_kept_and_compared(fake_triton, tmp_path):
    fake_triton.plan({"ttft_ms": 5, "itl_ms": 2, "output_ids": [7, 8, 9]})
    reference = write_reference(tmp_path / "r.jsonl", [[7, 8, 9]] * 5 + [[7, 1, 9]])
    code, sealed = run(fake_triton.url, "fake", reference, tmp_path / "results", "--min-agreement", "0.95")
    seen = sealed.summary["accuracy"]
    assert (seen["equal"], seen["samples"], seen["divergence"]["earliest"]) == (5, 6, 1)
    assert code == 3 and [r["code"] for r in sealed.document["verdict"]["reasons"]] == ["accuracy"]
    kept = pq.read_table(sealed.folder / accuracy.NAME)
    assert sorted(kept["sample"].to_pylist()) == list(range(6)) and kept["token_ids"][0].as_py() == [7, 8, 9]
    logged = json.loads((sealed.folder / "mlperf_log_accuracy.json").read_text())
    assert {entry["token_count"] for entry in logged} == {3}
    assert "5 of 6 answers equal the reference" in report.markdown([sealed])


def test_answers_without_ids_are_no_proof(fake_triton, tmp_path):
    fake_triton.plan({"ttft_ms": 5, "itl_ms": 2})
    reference = write_reference(tmp_path / "r.jsonl", [[7, 8, 9]] * 4)
    code, sealed = run(fake_triton.url, "fake", reference, tmp_path / "results", "--processes", "2")
    assert code == 3 and [r["code"] for r in sealed.document["verdict"]["reasons"]] == ["accuracy"]


@pytest.mark.live
def test_the_real_server_equals_plain_generate(tmp_path):
    folder = export_model("phi-2-tiny", out=tmp_path / "models", reference=16)
    assert "reference.jsonl" in json.loads((folder / "manifest.json").read_text())["files"]
    lines = (folder / "reference.jsonl").read_text().splitlines()
    spoiled = tmp_path / "spoiled.jsonl"
    first = json.loads(lines[0])
    first["token_ids"][3] += 1
    spoiled.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    with TritonServer(tmp_path / "models", models=["phi-2-tiny"], log_path=tmp_path / "log") as server:
        whole = ("--min-agreement", "1")
        code, good = run(server.http_url, "phi-2-tiny", folder / "reference.jsonl", tmp_path / "good", *whole)
        assert (code, good.summary["accuracy"]["equal"]) == (0, 16)
        code, bad = run(server.http_url, "phi-2-tiny", spoiled, tmp_path / "bad", *whole)
    assert code == 3 and [r["code"] for r in bad.document["verdict"]["reasons"]] == ["accuracy"]
