"""What a scrape of `tritonmark history` takes, by the real server over HTTP.

    python benchmarks/history.py [RUNS]     1,000 sealed runs by default
    python benchmarks/history.py --check    fails where a scrape takes over 10 s, Prometheus' default timeout

The first scrape reads every `run.json`; later ones only look whether any has changed.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fakes")]

import grid  # noqa: E402

from loadgen.edge import store  # noqa: E402

SERVE = [sys.executable, "-c", "import tritonmark; tritonmark.main()", "history"]
LIMIT_S = 10.0


def copies(folder: Path, start: int, end: int) -> None:
    """Sealed runs numbered from `start` to `end`: one planted run under other ids."""
    with tempfile.TemporaryDirectory() as scratch:
        plain = grid.one(Path(scratch), "H100", "vllm").document
    for number in range(start, end):
        document = copy.deepcopy(plain) | {"run_id": f"run-{number:05}"}
        document["seal"] = store.digest(document)
        (folder / document["run_id"]).mkdir(parents=True)
        (folder / document["run_id"] / "run.json").write_text(json.dumps(document, indent=1))


def main() -> int:
    runs = int(next((word for word in sys.argv[1:] if word.isdigit()), 1000))
    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        server = subprocess.Popen([*SERVE, scratch, "--port", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout
            url = server.stdout.readline().rsplit(" ", 1)[1].strip()
            copies(folder, 0, runs)
            for what in (f"first, all {runs} are new", "none is new", "none is new", "one is new"):
                if what == "one is new":
                    copies(folder, runs, runs + 1)
                begun = time.monotonic()
                with urllib.request.urlopen(url, timeout=600) as answer:
                    page = answer.read()
                took = time.monotonic() - begun
                worst = max(worst, took)
                series = sum(not line.startswith(b"#") for line in page.splitlines())
                print(f"{what}: {took:.2f} s, {series:,} series, {len(page) / 1e6:.1f} MB")
        finally:
            server.terminate()
            server.wait()
    return 1 if "--check" in sys.argv and worst > LIMIT_S else 0


if __name__ == "__main__":
    sys.exit(main())
