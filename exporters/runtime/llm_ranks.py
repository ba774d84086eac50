"""Tensor parallelism for torch-eager: one process a GPU, each with its share of every layer. Runs inside the engine
process (llm_link.py); imports nothing of this project.

Rank 0 is the engine process. It starts the others, which load their shares and then follow: transformers' batch loop
hands them each step's requests. Every rank reads or draws each weight whole, one at a time, and keeps its share, so the
model is the same for any number of ranks. If one rank ends, all do.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
STYLES: dict[str, Callable] = {  # transformers' names of what to do with a layer
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
}
WHOLE = ("embedding_rowwise",)  # may be shared out, and is cheap enough to keep whole


def lead(order: dict) -> list[subprocess.Popen]:
    """In rank 0, before the model is loaded: start the other ranks with the same `order` and watch them."""
    count = order["settings"]["tp"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {**shared, "RANK": "0", "LOCAL_RANK": "0"}
    others = []
    for rank in range(1, count):
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())], stdin=subprocess.PIPE, stdout=sys.stderr, text=True,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )  # fmt: skip
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.close()
        others.append(process)
    threading.Thread(target=_watch, args=(others,), daemon=True).start()
    return others


def _watch(others: list[subprocess.Popen]) -> None:
    while not name_ended(others, 0.5):
        pass
    os._exit(1)  # the group would wait for it for minutes


def name_ended(others: list[subprocess.Popen], timeout_s: float) -> bool:
    """Say which rank has ended, if one does within `timeout_s`: a broken group is only what follows from that."""
    deadline = time.monotonic() + timeout_s
    while True:
        ended = [(rank, process) for rank, process in enumerate(others, 1) if process.poll() is not None]
        for rank, process in ended:
            print(f"rank {rank} ended with code {process.returncode}; see the log above", file=sys.stderr, flush=True)
        if ended or time.monotonic() > deadline:
            return bool(ended)
        time.sleep(0.05)


def rank_device(device: str) -> str:
    """The device of this rank, where `device` is that of rank 0."""
    if not device.startswith("cuda"):
        return device
    return f"cuda:{int(device.partition(':')[2] or 0) + int(os.environ.get('LOCAL_RANK', 0))}"


class Sharder:
    """Keeps this rank's share of each layer of `model` as soon as the layer is filled."""

    def __init__(self, model: torch.nn.Module, device: str) -> None:
        kind = torch.device(device).type
        if kind == "cuda":
            torch.cuda.set_device(device)
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
        self._mesh = init_device_mesh(kind, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("tp",))
        self._model = model
        self._plan = model.tp_plan
        unknown = sorted({style for style in self._plan.values() if style not in STYLES and style not in WHOLE})
        if unknown or not self._plan:
            raise ValueError(
                f"{type(model).__name__} cannot be shared by tensor parallelism here"
                f" (styles {', '.join(unknown) or 'none'}); export with --tp 1 or for vllm"
            )
        model._device_mesh = self._mesh  # where transformers' batch loop looks for it

    def filled(self, name: str) -> None:
        """The parameter `name` has its values."""
        path = name.rpartition(".")[0]
        style = STYLES.get(self._plan.get(re.sub(r"\d+", "*", path)))
        module = self._model.get_submodule(path)
        if style is not None and not any(weight.is_meta for weight in module.parameters(recurse=False)):
            parallelize_module(
                module, self._mesh, style(), src_data_rank=None
            )  # every rank has the whole: send nothing


def main() -> None:
    """Any rank but 0: load, follow until rank 0 is gone."""
    order = json.loads(sys.stdin.readline())
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    from llm_engine import Engine

    engine = Engine(Path(order["folder"]), order["settings"], rank_device(order["device"]))
    while engine.failure() is None:
        time.sleep(0.5)


if __name__ == "__main__":
    main()
