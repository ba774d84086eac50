"""Exported models served by the real tritonserver and loaded by the real Locust, one after the other, on this machine.

    tritonmark export phi-2 --backend torch-compile --out model_repository/torch-compile
    python benchmarks/gpu/measure.py benchmarks/gpu/plan.toml --repository model_repository --results results

The plan names models, backends and scenarios; a model lies in a repository of its backend's name, since its own name
is the same for all backends. Each run is sealed under --results. Prompts of language models are synthetic, of exact
length, and the same for every backend. RESULTS/measured.json tells how long each model took to load and what memory it
held; with --smi, nvidia-smi is sampled beside the runs into RESULTS/nvidia-smi.csv for telemetry_check.py, and with
--probe the GPU is measured first (`tritonmark probe-gpu`) and the figures sealed with every run. A model that does not
load is noted, and the next one follows. --verify compares a model's answers with its reference before the runs. --gpu 1
uses that GPU alone, so that several of these programs, each with --results of its own, can share a host.
TRITONMARK_LOAD_PYTHON names another interpreter for the load, where the server's has no Locust.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from exporters.errors import UserError  # noqa: E402
from exporters.server import TritonServer  # noqa: E402
from exporters.verify import check_served  # noqa: E402

SMI = ["nvidia-smi", "--query-gpu=timestamp,index,power.draw.instant,clocks.sm,clocks.mem,memory.used",
       "--format=csv,noheader,nounits", "-lms", "100"]  # fmt: skip


class Campaign:
    """Runs of one plan. `options.until_s`: no run begins later than that many seconds after the start."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.started = options, time.monotonic()
        self.plan = tomllib.loads(options.plan.read_text(encoding="utf-8"))
        self.results = Path(options.results)
        self.results.mkdir(parents=True, exist_ok=True)
        self.facts = self.results / "measured.json"
        self.noted: list[dict[str, Any]] = json.loads(self.facts.read_text()) if self.facts.is_file() else []

    @property
    def late(self) -> bool:
        return time.monotonic() - self.started > self.options.until_s

    @property
    def tritonmark(self) -> list[str]:
        return [os.environ.get("TRITONMARK_LOAD_PYTHON", sys.executable), str(ROOT / "tritonmark.py")]

    @property
    def probe(self) -> Path:
        return self.results / "gpu-probe.json"

    def note(self, **facts: Any) -> None:
        """Written at once: what is measured survives a machine that is taken away."""
        self.noted.append(facts | {"at_s": round(time.monotonic() - self.started, 1)})
        self.facts.write_text(json.dumps(self.noted, indent=1) + "\n", encoding="utf-8")
        print(self.noted[-1], flush=True)

    def run(self) -> int:
        """0 when every run was VALID, else 3: also when there was none."""
        codes = []
        if self.options.probe:
            subprocess.run([*self.tritonmark, "probe-gpu", "--out", str(self.probe)], check=True)
        for model in self.plan["model"]:
            title = f"{model['name']}/{model['backend']}"
            if not self.late and (not self.options.only or title in self.options.only.split(",")):
                codes += self._model(self.plan.get("defaults", {}) | model)
        return 3 if any(codes) or not codes else 0

    def _model(self, model: dict[str, Any]) -> list[int]:
        started, titles = time.monotonic(), {name: model[name] for name in ("name", "backend")}
        repeats = model["repeats"] if self.options.repeats is None else self.options.repeats
        try:
            with TritonServer(self.options.repository / model["backend"], models=[model["name"]], on_progress=print,
                              ready_timeout_s=model["load_s"]) as server:  # fmt: skip
                self.note(**titles, load_s=round(time.monotonic() - started, 1), memory_mib=memory())
                if self.options.verify:
                    self.note(**titles, verified=check_served(server.repository / model["name"], server.http_url).line)
                codes = [
                    self._load(server, model, words.split())
                    for _ in range(repeats) for words in model["runs"] if not self.late
                ]  # fmt: skip
                self.note(**titles, memory_mib=memory(), codes=codes)
        except UserError as error:
            self.note(**titles, error=str(error))
            return [1]
        return codes

    def _load(self, server: TritonServer, model: dict[str, Any], words: list[str]) -> int:
        """One run; its own output shows."""
        command = [*self.tritonmark, "run", *words, "--host", server.http_url, "--model", model["name"],
                   "--results", str(self.results), "--server-metrics", server.metrics_url,
                   *model["options"].split()]  # fmt: skip
        if self.options.gpu is not None:
            command += ["--gpus", str(self.options.gpu)]
        if self.probe.is_file():
            command += ["--gpu-probe", str(self.probe)]
        if model["prompts"] == "synthetic":
            tokenizer = server.repository / model["name"] / "1" / "weights" / "tokenizer.json"
            command += ["--prompts", "synthetic", "--tokenizer", str(tokenizer)]
        print("$", " ".join(command[2:]), flush=True)
        return subprocess.run(command, check=False).returncode


def memory() -> list[int]:
    """MiB in use on each GPU; nothing without NVIDIA's driver."""
    if not shutil.which("nvidia-smi"):
        return []
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [int(line) for line in subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()]


@contextmanager
def sampled(path: Path | None) -> Iterator[None]:
    """nvidia-smi's own samples into `path` while the block runs; its times are this host's local time."""
    if path is None:
        yield
        return
    with path.open("a") as out:
        smi = subprocess.Popen(SMI, stdout=out)
        try:
            yield
        finally:
            smi.terminate()
            smi.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--results", default="results")
    parser.add_argument("--only", default="", help="of the plan, such as phi-2/torch-eager,phi-2/torch-compile")
    parser.add_argument("--repeats", type=int, help="instead of the plan's; 0 only loads the models")
    parser.add_argument("--until-s", type=float, default=1e9, help="begin no run later than that after the start")
    parser.add_argument("--probe", action="store_true", help="measure the GPU's bandwidth and products first")
    parser.add_argument("--smi", action="store_true", help="sample nvidia-smi beside the runs")
    parser.add_argument("--verify", action="store_true", help="compare answers with the references of the exports")
    parser.add_argument("--gpu", type=int, help="use this GPU alone; without it all that CUDA shows")
    options = parser.parse_args()
    if options.gpu is not None:  # CUDA's own order is by speed; NVML and nvidia-smi count by bus
        os.environ |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": str(options.gpu)}
    campaign = Campaign(options)
    with sampled(campaign.results / "nvidia-smi.csv" if options.smi else None):
        return campaign.run()


if __name__ == "__main__":
    sys.exit(main())
