"""Exported models served by the real tritonserver and loaded by the real Locust, one after the other, on this machine.

    tritonmark export phi-2 --backend torch-compile
    python benchmarks/gpu/measure.py phi-2 --repository model_repository --results results

For each model: SingleStream, then fixed concurrencies, with synthetic prompts of exact length; every run is sealed
under --results. TRITONMARK_LOAD_PYTHON names another interpreter for the load, where the server's has no Locust.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from exporters.server import TritonServer  # noqa: E402


def load(server: TritonServer, name: str, repository: Path, scenario: str, *options: str) -> int:
    """One run; its own output shows. Returns its exit code."""
    interpreter = os.environ.get("TRITONMARK_LOAD_PYTHON", sys.executable)
    tokenizer = repository / name / "1" / "weights" / "tokenizer.json"
    command = [interpreter, str(ROOT / "tritonmark.py"), "run", scenario, "--host", server.http_url, "--model", name]
    command += ["--prompts", "synthetic", "--tokenizer", str(tokenizer), *options]
    print("$", " ".join(command[2:]), flush=True)
    return subprocess.run(command, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="names in the repository")
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--results", default="results")
    parser.add_argument("--concurrencies", default="256", help="such as 8,64,256")
    parser.add_argument("--tokens", default="128,128", help="prompt and answer")
    parser.add_argument("--run-time", default="15s")
    parser.add_argument("--processes", default=str(min(8, max(1, (os.cpu_count() or 2) // 4))), help="load workers")
    arguments = parser.parse_args()
    tokens_in, tokens_out = arguments.tokens.split(",")
    shared = ["--input-tokens", tokens_in, "--output-tokens", tokens_out, "--run-time", arguments.run_time]
    shared += ["--results", arguments.results, "--max-prompts", "512"]
    codes = []
    for name in arguments.models:
        started = time.monotonic()
        with TritonServer(arguments.repository, models=[name], on_progress=print) as server:
            print(f"{name}: ready after {time.monotonic() - started:.1f} s", flush=True)
            codes.append(load(server, name, arguments.repository, "single_stream", *shared))
            for concurrency in arguments.concurrencies.split(","):
                many = ["--concurrency", concurrency, "--processes", arguments.processes]
                codes.append(load(server, name, arguments.repository, "concurrency", *many, *shared))
    return 3 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
