"""Engine processes behind the real tritonserver: compiled steps, in fp8 too, two sending instances, and two ranks."""

import concurrent.futures
import json
import re
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from exporters.export import export_model
from exporters.server import TritonServer
from exporters.verify import check_served

pytestmark = [pytest.mark.live, pytest.mark.slow]


def ask(server, **fields):
    request = urllib.request.Request(
        f"{server.http_url}/v2/models/{server.models[0]}/generate_stream",
        json.dumps({"stream": True, **fields}).encode(),
    )
    try:
        body = urllib.request.urlopen(request, timeout=60).read()
    except urllib.error.HTTPError as error:
        body = error.read()
    return [json.loads(event.removeprefix(b"data:")) for event in body.split(b"\n\n") if event.strip()]


def answer(server, row):
    """The token ids that the server gives for a reference's prompt."""
    fields = {"text_input": row["prompt"], "max_tokens": len(row["token_ids"]), "ignore_eos": True}
    events = ask(server, **fields, return_token_ids=True)
    assert events[-1]["total_output_tokens"] == len(row["token_ids"])
    assert events[-1]["finish_reason"] == "length"
    assert len(events) > 1  # it streams
    parts = [event["output_ids"] for event in events if "output_ids" in event]  # one id comes as a bare number
    return [token for part in parts for token in (part if isinstance(part, list) else [part])]


def references(folder):
    return [json.loads(line) for line in (folder / "reference.jsonl").read_text().splitlines()]


def processes(server, script):
    family = psutil.Process(server.pid).children(recursive=True)
    family = [p for p in family if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in family if any(part.endswith(script) for part in p.cmdline())]


def meeting_places(pid):
    """Folders that an engine and the model's instances share while it runs, of the tritonserver `pid`."""
    return list(Path(tempfile.gettempdir()).glob(f"tritonmark-{pid}-*"))


def test_compiled_answers_equal_plain_ones_from_two_instances(tmp_path):
    folder = export_model("phi-2-tiny", "torch-compile", out=tmp_path, reference=8)
    config = folder / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", "count: 2"))
    rows = references(folder) * 3
    with TritonServer(tmp_path, ready_timeout_s=280) as server:
        cold_s = server.ready_s
        log = server.log_path.read_text()
        assert re.search(r"warming up 2 of 2: decode", log) and "run uncompiled" not in log
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda row: answer(server, row), rows))
        assert answers == [row["token_ids"] for row in rows]
        started = time.monotonic()
        sampled = [ask(server, text_input="x", max_tokens=9, temperature=1.0, seed=3)[-1] for _ in range(2)]
        assert sampled[0]["total_output_tokens"] == 9 and time.monotonic() - started < 30
        (engine,) = processes(server, "llm_link.py")
        pid = server.pid
        assert len(meeting_places(pid)) == 1
    assert not psutil.pid_exists(engine.pid) and not meeting_places(pid)
    with TritonServer(tmp_path, ready_timeout_s=280) as server:  # the compiled code was kept beside the weights
        assert ask(server, text_input="x", max_tokens=2)[-1]["total_output_tokens"] == 2
        print(f"cold start {cold_s:.1f} s, warm start {server.ready_s:.1f} s")
    assert (folder / "1" / "compile-cache").is_dir()


@pytest.mark.parametrize("name", ["phi-2-tiny", "phi-3.5-moe-tiny"])
def test_two_ranks_answer_as_one(tmp_path, name):
    folder = export_model(name, out=tmp_path, reference=4, tp=2)
    rows = references(folder)
    with TritonServer(tmp_path, ready_timeout_s=280) as server:
        assert len(processes(server, "llm_ranks.py")) == 1
        assert [answer(server, row) for row in rows] == [row["token_ids"] for row in rows]


def test_two_ranks_of_llama_answer_as_one_and_end_together(tmp_path):
    folder = export_model("llama-3-70b-tiny", out=tmp_path, reference=4, tp=2)
    rows = references(folder)
    with TritonServer(tmp_path, ready_timeout_s=280) as server:
        assert [answer(server, row) for row in rows] == [row["token_ids"] for row in rows]
        assert "greedy" in ask(server, text_input="x", max_tokens=4, temperature=1.0)[0]["error"]
        (follower,) = processes(server, "llm_ranks.py")
        follower.kill()
        deadline = time.monotonic() + 30
        while processes(server, "llm_link.py") and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not processes(server, "llm_link.py")
        assert "engine process has ended" in ask(server, text_input="x", max_tokens=4)[0]["error"]
        assert "rank 1 ended with code -9" in server.log_path.read_text()
        pid = server.pid
    assert not meeting_places(pid)


def test_compiled_fp8_agrees(tmp_path):
    """What the published figures were measured with, on the CPU: experts and plain layers (Llama: test_precisions.py)."""
    folder = export_model("phi-3.5-moe-tiny", "torch-compile", out=tmp_path, reference=16, precision="fp8")
    with TritonServer(tmp_path, ready_timeout_s=280) as server:
        assert "run uncompiled" not in server.log_path.read_text()
        outcome = check_served(folder, server.http_url)
    assert outcome.passed, outcome.line
