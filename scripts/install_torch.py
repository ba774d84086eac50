"""Installs torch: a CUDA build where there is an NVIDIA GPU, a CPU build elsewhere.

On Linux plain `pip install torch` brings gigabytes of CUDA wheels. Without a GPU this script first asks pip, without
downloading, what it would install: a CPU build (as some mirrors carry) is taken; else PyTorch's own CPU index is used.
Choose yourself with TORCH=cpu or TORCH=cuda, and another index with TORCH_INDEX_URL.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys

TORCH = "torch>=2.9"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CPU_KNOWN_GOOD = "torch==2.13.0"  # a mirror may carry a CPU build of exactly this one under its plain name


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "install", *arguments]
    return subprocess.run(command, capture_output="--dry-run" in arguments, text=True, check=False)


def is_cpu_build(requirement: str) -> bool:
    """Would plain pip install a build of this requirement that needs no CUDA packages?"""
    plan = pip("--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--report", "-", requirement)
    if plan.returncode:
        return False
    metadata = json.loads(plan.stdout)["install"][0]["metadata"]
    needs = metadata.get("requires_dist", [])
    return not any(need.startswith(("nvidia-", "cuda-", "triton")) for need in needs)


def main() -> int:
    if importlib.util.find_spec("torch"):
        return 0
    kind = os.environ.get("TORCH") or ("cuda" if shutil.which("nvidia-smi") else "cpu")
    index = os.environ.get("TORCH_INDEX_URL")
    if kind not in ("cpu", "cuda"):
        print(f"error: TORCH is {kind!r}; set it to cpu or cuda", file=sys.stderr)
        return 2
    print(f"installing torch for {kind} (choose with TORCH=cpu or TORCH=cuda)")
    if index:
        return pip("--quiet", TORCH, "--index-url", index).returncode
    if kind == "cuda":
        return pip("--quiet", TORCH).returncode
    if is_cpu_build(CPU_KNOWN_GOOD):
        return pip("--quiet", CPU_KNOWN_GOOD).returncode
    return pip("--quiet", TORCH, "--index-url", CPU_INDEX).returncode


if __name__ == "__main__":
    sys.exit(main())
