"""Serves Phi-2's real shape by the `vllm-python` backend through a real tritonserver and asks it things, on one GPU.

    TRITONSERVER=$X/triton/tritonserver/bin/tritonserver TRITON_LIBS=$X/triton/libs \
    TRITON_BACKENDS=$X/triton/tritonserver/backends STUB_ENV=$ENV VLLM_SITE=$S python3 benchmarks/gpu/vllm_smoke.py

Nothing is unpacked or installed here; every path comes from the environment:
    TRITONSERVER, TRITON_LIBS, TRITON_BACKENDS   the server, its libraries, its backends
    STUB_ENV       a virtual environment for the python stub: numpy < 2, tokenizers and torch
    VLLM_SITE      a folder with vllm and what it imports beyond the engine's python; empty where that has it
    ENGINE_PYTHON  the interpreter that runs vllm (default: the one that runs this script)
    BACKEND, MODEL, PRECISION   (vllm-python, phi-2, bf16)
Other variables (VLLM_CACHE_ROOT, VLLM_USE_FLASHINFER_SAMPLER, …) reach vllm as they are. Prints a JSON object at the
end; exit code 1 when an answer was wrong. It is a smoke test with a simple client: figures for a report come from
`tritonmark run`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from exporters.export import export_model

READY_S = 420
PROMPT = "The measurement of latency is a distribution and not a number. " * 12  # about 128 tokens of the own tokenizer
TOKENS = re.compile(rb'"num_output_tokens":(\d+)')
NUMBA = "jit = njit = lambda *a, **k: a[0] if a and callable(a[0]) else (lambda f: f)\nprange = range\n"
NUMBA += "get_num_threads = lambda: 1\nset_num_threads = lambda n: None\n"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def environment(folder: Path) -> dict[str, str]:
    """Of the server: the stub finds its packages by PATH, the engine its own by PYTHONPATH."""
    python = os.environ.get("ENGINE_PYTHON", sys.executable)
    site = os.environ.get("VLLM_SITE", "")
    if subprocess.run([python, "-c", "import numba"], env={**os.environ, "PYTHONPATH": site}).returncode:
        (folder / "numba").mkdir()  # vllm imports it for a kind of speculation that is not used
        (folder / "numba" / "__init__.py").write_text(NUMBA)
        site = f"{folder}:{site}"
    known = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    known |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    return {
        **known,
        **os.environ,
        "LD_LIBRARY_PATH": f"{os.environ['TRITON_LIBS']}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "PATH": f"{os.environ['STUB_ENV']}/bin:{os.environ['PATH']}",
        "PYTHONPATH": site,
        "TRITONMARK_ENGINE_PYTHON": python,
    }


def await_ready(server: subprocess.Popen, url: str, log: Path) -> float:
    """Seconds until the server is ready; ends the script with the end of the log when it isn't."""
    started = time.monotonic()
    while time.monotonic() - started < READY_S:
        try:
            urllib.request.urlopen(f"{url}/v2/health/ready", timeout=2)
            return time.monotonic() - started
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.5)
    sys.exit("\n".join(["the server did not become ready", *log.read_text(errors="replace").splitlines()[-60:]]))


def ask(port: int, model: str, **fields) -> list[tuple[float, bytes]]:
    """All reads of one stream, with their times since it was sent."""
    body = json.dumps({"text_input": PROMPT, "stream": True, "ignore_eos": True, **fields}).encode()
    head = f"POST /v2/models/{model}/generate_stream HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    reads = []
    with socket.create_connection(("127.0.0.1", port), 120) as connection:
        started = time.monotonic()
        connection.sendall(head.encode() + body)
        while data := connection.recv(1 << 16):
            reads.append((time.monotonic() - started, data))
    return reads


def count(reads: list[tuple[float, bytes]]) -> int:
    return sum(map(int, TOKENS.findall(b"".join(data for _, data in reads))))


def load(port: int, model: str, streams: int, tokens: int) -> dict:
    """`streams` at once; output tokens a second from the first request to the last answer."""
    answers: list[list[tuple[float, bytes]]] = [[] for _ in range(streams)]

    def one(number: int) -> None:
        answers[number] = ask(port, model, max_tokens=tokens, text_input=f"{number} {PROMPT}")

    threads = [threading.Thread(target=one, args=(number,)) for number in range(streams)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.monotonic() - started
    counts = [count(reads) for reads in answers]
    whole = sum(counted == tokens for counted in counts)
    return {"streams": streams, "whole": whole, "tokens_per_s": round(sum(counts) / wall, 1), "wall_s": round(wall, 2)}


def cancelled(port: int, metrics: str, model: str) -> bool:
    """A client that goes away in mid-stream frees its place."""
    body = json.dumps({"text_input": "x", "stream": True, "ignore_eos": True, "max_tokens": 2000}).encode()
    connection = socket.create_connection(("127.0.0.1", port), 60)
    head = f"POST /v2/models/{model}/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    connection.recv(1 << 10)
    connection.close()
    for _ in range(20):
        time.sleep(0.5)
        text = urllib.request.urlopen(metrics, timeout=5).read().decode()
        gone = re.search(r"tritonmark_requests_cancelled_total\{[^}]*\} (\d+)", text)
        if gone and int(gone[1]) >= 1:
            return True
    return False


def main() -> int:
    backend, model = os.environ.get("BACKEND", "vllm-python"), os.environ.get("MODEL", "phi-2")
    folder = Path(tempfile.mkdtemp(prefix="vllm-smoke-"))
    export_model(model, backend, out=folder / "models", precision=os.environ.get("PRECISION", "bf16"))
    port, grpc, metrics = free_port(), free_port(), free_port()
    log = folder / "triton.log"
    command = [
        os.environ["TRITONSERVER"], f"--model-repository={folder / 'models'}", f"--http-port={port}",
        f"--backend-directory={os.environ['TRITON_BACKENDS']}", f"--grpc-port={grpc}", f"--metrics-port={metrics}",
        "--http-thread-count=32", f"--backend-config=python,stub-timeout-seconds={READY_S}",
    ]  # fmt: skip
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment(folder), start_new_session=True
        )
    said: dict = {"backend": backend, "model": model}
    try:
        said["ready_s"] = round(await_ready(server, f"http://127.0.0.1:{port}", log), 1)
        first = ask(port, model, max_tokens=16, return_token_ids=True)
        said["sixteen"] = count(first)
        said["last_event"] = first[-1][1].decode(errors="replace")[-300:]
        same = [b"".join(data for _, data in ask(port, model, max_tokens=16)) for _ in range(2)]
        said["greedy_repeats"] = re.findall(rb'"text_output":"[^"]*"', same[0]) == re.findall(
            rb'"text_output":"[^"]*"', same[1]
        )
        alone = [ask(port, model, max_tokens=257) for _ in range(3)][-1]
        said["ttft_ms"] = round(alone[0][0] * 1e3, 1)
        said["decode_tokens_per_s"] = round(256 / (alone[-1][0] - alone[0][0]), 1)
        said["loads"] = [load(port, model, streams, 128) for streams in (8, 64, 256, 256)]
        said["cancelled"] = cancelled(port, f"http://127.0.0.1:{metrics}/metrics", model)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            said["stopped"] = server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            said["stopped"] = "killed"
        if out := os.environ.get("OUT"):
            Path(out, "triton.log").write_bytes(log.read_bytes())
    print(json.dumps(said, indent=1))
    whole = all(row["whole"] == row["streams"] for row in said["loads"])
    return 0 if whole and said["sixteen"] == 16 and said["cancelled"] else 1


if __name__ == "__main__":
    sys.exit(main())
