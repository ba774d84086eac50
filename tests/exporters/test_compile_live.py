"""torch-compile on the real tritonserver: compiled steps, two sending instances, one engine process."""

import concurrent.futures
import json
import re
import time
import urllib.request

import psutil
import pytest

from exporters.export import export_model
from exporters.server import TritonServer

pytestmark = [pytest.mark.live, pytest.mark.slow]


def ask(server, **fields):
    request = urllib.request.Request(
        f"{server.http_url}/v2/models/phi-2-tiny/generate_stream", json.dumps({"stream": True, **fields}).encode()
    )
    body = urllib.request.urlopen(request, timeout=60).read()
    return [json.loads(event.removeprefix(b"data:")) for event in body.split(b"\n\n") if event.strip()]


def engines(server):
    family = psutil.Process(server.pid).children(recursive=True)
    return [p for p in family if any(part.endswith("llm_link.py") for part in p.cmdline())]


def test_compiled_answers_equal_plain_ones_from_two_instances(tmp_path):
    folder = export_model("phi-2-tiny", "torch-compile", out=tmp_path, reference=8)
    config = folder / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", "count: 2"))
    references = [json.loads(line) for line in (folder / "reference.jsonl").read_text().splitlines()]
    with TritonServer(tmp_path, ready_timeout_s=280) as server:
        assert len(engines(server)) == 1
        cold_s = server.ready_s
        log = server.log_path.read_text()
        assert re.search(r"warming up 2 of 2: decode", log) and "run uncompiled" not in log

        def answer(row):
            fields = {"text_input": row["prompt"], "max_tokens": len(row["token_ids"]), "ignore_eos": True}
            return ask(server, **fields, return_token_ids=True)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(answer, references * 3))
        for row, events in zip(references * 3, answers, strict=True):
            parts = [event["output_ids"] for event in events if "output_ids" in event]  # one id comes as a bare number
            ids = [token for part in parts for token in (part if isinstance(part, list) else [part])]
            assert ids == row["token_ids"]
            assert events[-1]["total_output_tokens"] == len(row["token_ids"])
            assert events[-1]["finish_reason"] == "length"
            assert len(events) > 1  # it streams
        started = time.monotonic()
        sampled = [ask(server, text_input="x", max_tokens=9, temperature=1.0, seed=3)[-1] for _ in range(2)]
        assert sampled[0]["total_output_tokens"] == 9 and time.monotonic() - started < 30
        (engine,) = engines(server)
    assert not psutil.pid_exists(engine.pid)
    with TritonServer(tmp_path, ready_timeout_s=280) as server:  # the compiled code was kept beside the weights
        assert ask(server, text_input="x", max_tokens=2)[-1]["total_output_tokens"] == 2
        print(f"cold start {cold_s:.1f} s, warm start {server.ready_s:.1f} s")
    assert (folder / "1" / "compile-cache").is_dir()
