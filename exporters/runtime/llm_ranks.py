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
from devices import memory_explained
from llm_settings import MEMORY_SETTINGS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAYERS: dict[str, Callable] = {  # transformers' names of what to do with a layer
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
}
EXPERTS: dict[str, Callable] = {  # with a weight [experts, outputs, inputs]: rank `r` of `n` keeps ...
    "packed_colwise": lambda weight, r, n: torch.cat([half.chunk(n, 1)[r] for half in weight.chunk(2, 1)], 1),
    "rowwise": lambda weight, r, n: weight.chunk(n, 2)[r].clone(),  # a view would keep the whole
}
SUMMED = "moe_tp_experts"  # experts whose answers are parts of a sum over ranks
WHOLE = ("embedding_rowwise",)  # may be shared out, and is cheap enough to keep whole
# What transformers 5.17 leaves out of PhiMoE's plan. Its attention is whole on every rank in all versions.
MISSING = {
    "PhimoeForCausalLM": {
        "model.layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "model.layers.*.mlp.experts.down_proj": "rowwise",
        "model.layers.*.mlp.experts": SUMMED,
    }
}


def lead(order: dict) -> list[subprocess.Popen]:
    """In rank 0, before the model is loaded: start the other ranks with the same `order` and watch them."""
    count = order["settings"]["tp"]
    config = json.loads((Path(order["folder"]) / "config.json").read_text(encoding="utf-8"))
    check_count(count, config, order["device"])
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


def check_count(count: int, config: dict, device: str) -> None:
    """Raise ValueError, one line, where `count` ranks cannot have equal shares or no GPU each."""
    heads = config["num_attention_heads"]
    for name in ("num_key_value_heads", "num_attention_heads", "intermediate_size"):
        size = config.get(name) or heads
        if size % count:
            raise ValueError(f"{count} ranks cannot share {name} {size} equally; export with a --tp that divides it")
    if device.startswith("cuda"):
        first, there = int(device.partition(":")[2] or 0), torch.cuda.device_count()
        if first + count > there:
            raise ValueError(f"{count} ranks from {device} on need as many GPUs, and {there} are there in all")


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
        self._plan = MISSING.get(type(model).__name__, {}) | model.tp_plan
        known = {*LAYERS, *EXPERTS, *WHOLE, SUMMED}
        unknown = sorted({style for style in self._plan.values() if style not in known})
        if unknown or not self._plan:
            raise ValueError(
                f"{type(model).__name__} cannot be shared by tensor parallelism here"
                f" (styles {', '.join(unknown) or 'none'}); export with --tp 1 or for vllm"
            )
        for path, module in model.named_modules():
            if self._style(path) == SUMMED:
                module.register_forward_hook(_sum_over_ranks)
        model._device_mesh = self._mesh  # where transformers' batch loop looks for it

    def _style(self, name: str) -> str | None:
        return self._plan.get(re.sub(r"\d+", "*", name))

    def filled(self, name: str) -> None:
        """The parameter `name` has its values."""
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        if cut := EXPERTS.get(self._style(name)):
            share = cut(getattr(module, leaf), self._mesh.get_local_rank(), self._mesh.size())
            setattr(module, leaf, torch.nn.Parameter(share, requires_grad=False))
        style = LAYERS.get(self._style(path))
        if style is not None and not any(weight.is_meta for weight in module.parameters(recurse=False)):
            # Every rank has the whole: send nothing.
            parallelize_module(module, self._mesh, style(), src_data_rank=None)


def _sum_over_ranks(module: torch.nn.Module, inputs: tuple, part: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(part)
    return part


def main() -> None:
    """Any rank but 0: load, follow until rank 0 is gone."""
    order = json.loads(sys.stdin.readline())
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    from llm_engine import Engine

    try:
        with memory_explained(MEMORY_SETTINGS):
            engine = Engine(Path(order["folder"]), order["settings"], rank_device(order["device"]))
    except Exception as error:
        sys.exit(f"rank {os.environ['RANK']}: {type(error).__name__}: {error}")
    while engine.failure() is None:
        time.sleep(0.5)


if __name__ == "__main__":
    main()
