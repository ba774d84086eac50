"""The steps from weights to an engine and its repository, each one command as a list of arguments. Pure.

Everything that TensorRT-LLM does runs in the pinned container; no command goes through a shell. Flags are those of
TensorRT-LLM 1.0 to 1.2: `convert_checkpoint.py`, `quantize.py`, `trtllm-build`.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.errors import UserError
from exporters.registry import Order
from exporters.trtllm_images import Image, table
from exporters.trtllm_repository import PARTS
from exporters.weights import HUB, SYNTHETIC

EXAMPLES = "/app/tensorrt_llm/examples"
ALL_MODELS = "/app/all_models/inflight_batcher_llm"
MAX_CONTEXT = 8192  # tokens of prompt and answer that an engine is built for, where the model could take more
MAX_NUM_TOKENS = 8192  # tokens of one step
SAFE_PATH = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-/+@=")


@dataclass(frozen=True)
class Step:
    """One command. `makes` are paths below the work folder that exist once it is done; `reads` a folder of the user's
    whose change makes it stale."""

    name: str
    command: tuple[str, ...]
    makes: tuple[str, ...]
    reads: Path | None = None


def context(order: Order) -> int:
    """Tokens of prompt and answer together that the engine is built for."""
    return min(order.model.max_context, MAX_CONTEXT)


def check_parallel(order: Order) -> None:
    """A UserError for numbers of GPUs that this architecture cannot be spread over."""
    known, config, build = table("models")[order.model.model_class], order.model.config, order.build
    if build.pp > 1 and not known["pipeline"]:
        raise UserError(f"--pp {build.pp}: {order.model.name} has no pipeline parallelism in TensorRT-LLM; use --tp")
    if build.ep > 1 and not known["experts"]:
        raise UserError(f"--ep {build.ep}: {order.model.name} has no experts to spread; use --tp")
    if order.tp % build.ep:
        raise UserError(f"--ep {build.ep} must divide --tp {order.tp}")
    if build.ep > 1 and order.weights != SYNTHETIC and table("precisions")[order.precision]["script"] == "quantize":
        raise UserError(f"--ep {build.ep}: quantize.py has no flag for it; leave it out, or choose bf16, fp16 or int8")
    for what in ("num_attention_heads", "num_key_value_heads"):
        if max(config[what], order.tp) % min(config[what], order.tp):
            raise UserError(f"--tp {order.tp} does not fit {order.model.name}, whose {what} is {config[what]}")
    if config["num_hidden_layers"] % build.pp:
        raise UserError(f"--pp {build.pp} must divide the {config['num_hidden_layers']} layers of {order.model.name}")


def steps(order: Order, image: Image, work: Path, user: str) -> list[Step]:
    """All steps in order. `work` is the folder on this machine that the container sees as /work; `user` is
    `uid:gid`, to whom the files are handed over at the end."""
    check_parallel(order)
    made = table("precisions")[order.precision]
    local = None if order.weights in (HUB, SYNTHETIC) else check_mount(Path(order.weights).expanduser().resolve())
    docker = Docker(image, check_mount(work), local)
    todo: list[Step] = []
    if order.weights == HUB:
        fetch = ("download", order.model.hub_id, "--revision", order.model.revision or "main", "--local-dir")
        todo.append(Step("fetch", (str(Path(sys.executable).with_name("hf")), *fetch, str(work / "hf")), ("hf",)))
    if order.weights != SYNTHETIC:
        source = "/hf" if local else "/work/hf"
        todo.append(
            Step("checkpoint", docker.run(*_checkpoint(order, made, source)), ("checkpoint/config.json",), local)
        )
    todo.append(Step("engine", docker.run(*_engine(order)), ("engine/config.json", *_rank_files(order))))
    copy = ("cp", "-r", *(f"{ALL_MODELS}/{part}" for part in PARTS), "/work/parts")
    todo.append(Step("parts", docker.run(*copy), tuple(f"parts/{part}/config.pbtxt" for part in PARTS)))
    todo.append(Step("hand-over", docker.run("chown", "-R", user, "/work"), ()))
    return todo


def max_batch_size(order: Order) -> int:
    """Sequences that the engine may run at once."""
    return int(order.model.runtime["max_sequences"])


@dataclass(frozen=True)
class Docker:
    """`docker run` of one image on one work folder."""

    image: Image
    work: Path
    weights: Path | None = None

    def run(self, *command: str) -> tuple[str, ...]:
        """The whole argument list for `command` inside the container."""
        mounts = ["-v", f"{self.work}:/work"]
        if self.weights:
            mounts += ["-v", f"{self.weights}:/hf:ro"]
        limits = ("--ipc=host", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864")
        return ("docker", "run", "--rm", "--init", "--gpus", "all", *limits, *mounts, self.image.name, *command)


def serve_command(order: Order, image: Image, out: Path, launch: list[str]) -> tuple[str, ...]:
    """`docker run` that serves the repository `out` with what `launch` starts."""
    ports = [word for port in (8000, 8001, 8002) for word in ("-p", f"{port}:{port}")]
    limits = ("--shm-size=4g", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864")
    mount = f"{out.resolve()}:{order.build.served_from}:ro"
    return ("docker", "run", "--rm", "--init", "--gpus", "all", *limits, *ports, "-v", mount, image.name, *launch)


def show(step: Step) -> str:
    """The step as one line that a shell would run just so."""
    return f"{step.name}: {shlex.join(step.command)}"


def check_mount(path: Path) -> Path:
    """`path` if docker's `-v` and a config file can name it as it is."""
    if set(str(path)) - SAFE_PATH or not path.is_absolute():
        raise UserError(
            f"bad path {str(path)!r}: use one of letters, digits and '._-/+@=' for what goes into a container"
        )
    return path


def _checkpoint(order: Order, made: Mapping[str, Any], source: str) -> tuple[str, ...]:
    common = ("--model_dir", source, "--output_dir", "/work/checkpoint", "--dtype", made["dtype"])
    spread: tuple[str, ...] = ("--tp_size", str(order.tp), "--pp_size", str(order.build.pp))
    if made["script"] == "quantize":
        return ("python3", f"{EXAMPLES}/quantization/quantize.py", *common, *spread, *made["flags"])
    known = table("models")[order.model.model_class]
    if known["experts"] and order.build.ep > 1:
        spread += ("--moe_tp_size", str(order.tp // order.build.ep), "--moe_ep_size", str(order.build.ep))
    script = f"{EXAMPLES}/models/core/{known['examples']}/convert_checkpoint.py"
    return ("python3", script, *common, *spread, *made["flags"])


def _engine(order: Order) -> tuple[str, ...]:
    world = order.tp * order.build.pp
    source = (
        ("--model_config", "/work/model.json")
        if order.weights == SYNTHETIC
        else ("--checkpoint_dir", "/work/checkpoint")
    )
    sizes = {
        "--max_batch_size": max_batch_size(order), "--max_input_len": context(order) - 1,
        "--max_seq_len": context(order), "--max_num_tokens": MAX_NUM_TOKENS, "--max_beam_width": 1, "--workers": world,
    }  # fmt: skip
    flags = tuple(word for flag, value in sizes.items() for word in (flag, str(value)))
    return (
        "trtllm-build", *source, "--output_dir", "/work/engine", "--gemm_plugin", "auto", "--kv_cache_type", "paged",
        *flags,
    )  # fmt: skip


def _rank_files(order: Order) -> tuple[str, ...]:
    return tuple(f"engine/rank{rank}.engine" for rank in range(order.tp * order.build.pp))
