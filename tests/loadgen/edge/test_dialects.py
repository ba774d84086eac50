"""One request in the words of each kind of server, and a real run against what behaves like Triton's vLLM backend."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loadgen.core.record import Outcome, Phase, Record
from loadgen.edge import store
from loadgen.edge.clients.dialects import DIALECTS, NATIVE, TENSORRTLLM, VLLM, dialect_of, request_fields
from loadgen.edge.clients.triton_http import TritonHttp

LLM = str(Path(__file__).parents[3] / "loadgen" / "llm.py")


def test_the_model_says_what_it_speaks():
    assert dialect_of("python", {}) == NATIVE
    assert dialect_of("vllm", {}) == VLLM
    assert dialect_of("ensemble", {"tritonmark.dialect": "tensorrtllm"}) == TENSORRTLLM
    assert dialect_of("vllm", {"tritonmark.dialect": "unheard of"}) == VLLM


@pytest.mark.parametrize("dialect", DIALECTS)
def test_all_ask_for_the_same_work(dialect):
    fields = request_fields(dialect, 7, token_ids=False)
    asked = fields | json.loads(fields.get("sampling_parameters", "{}"))
    assert (asked["max_tokens"], asked["min_tokens"], asked["stream"]) == (7, 7, True)
    assert asked.get("temperature") == 0.0 or asked.get("top_k") == 1
    assert dialect == NATIVE or (fields["return_num_output_tokens"] and fields["return_num_input_tokens"])


def test_ids_are_asked_for_where_they_can_be():
    assert request_fields(NATIVE, 7, token_ids=True)["return_token_ids"] is True
    assert "return_token_ids" not in request_fields(VLLM, 7, token_ids=True)


def stream(fake_triton, fields):
    record = Record(seq=0, query=0, sample=0, worker=0, phase=Phase.MEASURE, due_ns=0, asked_out=8)
    client = TritonHttp(fake_triton.url, "fake", clock=__import__("time").monotonic_ns, timeout_s=10)
    client.stream(json.dumps({"id": "0", "text_input": "hi", **fields}).encode(), record)
    return record


def test_vllm_counts_tokens_of_both_sides(fake_triton):
    fake_triton.plan({"backend": "vllm", "num_input_tokens": 9})
    record = stream(fake_triton, request_fields(VLLM, 8, token_ids=False))
    assert (record.outcome, record.tokens_out, record.tokens_in, record.usage_out) == (Outcome.OK, 8, 9, None)


def test_the_native_words_would_not_do_for_vllm(fake_triton):
    fake_triton.plan({"backend": "vllm"})
    record = stream(fake_triton, request_fields(NATIVE, 8, token_ids=False))
    assert record.tokens_out == 0, "no counts and another length: the run would be INVALID"


def test_a_run_against_vllm_is_whole(fake_triton, tmp_path):
    fake_triton.plan({"backend": "vllm", "ttft_ms": 5, "itl_ms": 2, "parameters": {
        "tritonmark.backend": {"string_value": "vllm"}, "tritonmark.dialect": {"string_value": "vllm"}}})  # fmt: skip
    command = [sys.executable, "-m", "locust", "-f", LLM, "--host", fake_triton.url, "--model", "fake", "--headless",
               "--only-summary", "--results", str(tmp_path), "--output-tokens", "6", "--warmup", "2",
               "--scenario", "single_stream", "--run-time", "1s"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    (folder,) = {path.parent for path in tmp_path.rglob("run.json")}
    run = store.load(folder)
    codes = {reason["code"] for reason in run.document["verdict"]["reasons"]}
    assert not {code for code in codes if not code.startswith("client_")}, done.stdout
    (rows,) = run.rows()
    assert set(rows.tokens_out.tolist()) == {6}
    assert (run.document["backend"], run.document["dialect"]) == ("vllm", "vllm")
