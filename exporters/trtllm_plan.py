"""The steps from weights to an engine and its repository, each one command as a list of arguments. Pure.

Everything that TensorRT-LLM does runs in the pinned container; no command goes through a shell. Flags are those of
TensorRT-LLM 1.0 to 1.2: `convert_checkpoint.py`, `quantize.py`, `trtllm-build`.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.errors import UserError
from exporters.registry import Order
from exporters.trtllm_images import ENGINES, Image, table
from exporters.trtllm_repository import PARTS
from exporters.weights import HUB, SYNTHETIC

EXAMPLES = "/work/examples"  # a link, which the first step sets to where this image has them
PROBE = Path(__file__).with_name("trtllm_probe.py")
# Handed to a container that downloads, by name: docker reads the value, which so stands in no list of processes or log.
HANDED_ON = ("HF_TOKEN", "HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
ALL_MODELS = "/app/all_models/inflight_batcher_llm"
MAX_CONTEXT = 8192  # tokens of prompt and answer that an engine is built for, where the model could take more
MAX_NUM_TOKENS = 8192  # tokens of one step


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


def check_parallel(order: Order, path: str = ENGINES) -> None:
    """A UserError for numbers of GPUs that this architecture cannot be spread over. Grouped KV heads are copied where
    there are more GPUs than heads; the LLM API, unlike an engine, takes stages of unequal size."""
    name, config = order.model.name, order.model.config
    known, tp, pp, ep = table("models")[order.model.model_class], order.tp, order.build.pp, order.build.ep
    heads, kv_heads, layers = (
        config[what] for what in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    )
    if not _spreads(heads, kv_heads, tp):
        raise UserError(
            f"--tp {tp} does not fit {name}, which has {heads} attention heads and {kv_heads} KV heads;"
            f" choose one of: {', '.join(str(n) for n in range(1, heads + 1) if _spreads(heads, kv_heads, n))}"
        )
    if pp > 1 and not known["pipeline"]:
        raise UserError(f"--pp {pp}: {name} has no pipeline parallelism in TensorRT-LLM; use --tp")
    if pp > layers or (path == ENGINES and layers % pp):
        must = "must divide" if path == ENGINES else "is more than"
        raise UserError(f"--pp {pp} {must} the {layers} layers of {name}; choose another")
    if ep > 1:
        _check_experts(order, known["experts"])


def _check_experts(order: Order, has_experts: bool) -> None:
    name, tp, ep = order.model.name, order.tp, order.build.ep
    if not has_experts:
        raise UserError(f"--ep {ep}: {name} has no experts to spread; use --tp")
    experts = order.model.config["num_local_experts"]
    if tp % ep or experts % ep:
        raise UserError(f"--ep {ep} must divide --tp {tp} and the {experts} experts of {name}")
    if order.weights != SYNTHETIC and table("precisions")[order.precision]["script"] == "quantize":
        raise UserError(f"--ep {ep}: quantize.py has no flag for it; leave it out, or choose bf16, fp16 or int8")


def _spreads(heads: int, kv_heads: int, tp: int) -> bool:
    return heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)


def steps(order: Order, image: Image, work: Path, user: str) -> list[Step]:
    """All steps in order. `work` is the folder on this machine that the container sees as /work; `user` is
    `uid:gid`, to whom the files are handed over at the end."""
    check_parallel(order)
    made = table("precisions")[order.precision]
    local = local_weights(order)
    docker = Docker(image, check_mount("--build-cache", work), local)
    todo = [Step("probe", docker.run(*_probe(order, made), mounts=((PROBE, "/probe.py"),)), ("image.json",))]
    copy = ("cp", "-r", *(f"{ALL_MODELS}/{part}" for part in PARTS), "/work/parts")
    todo.append(Step("parts", docker.run(*copy), tuple(f"parts/{part}/config.pbtxt" for part in PARTS)))
    if order.weights == HUB:
        fetch = ("download", order.model.hub_id, "--revision", order.model.revision or "main", "--local-dir")
        todo.append(Step("fetch", (str(Path(sys.executable).with_name("hf")), *fetch, str(work / "hf")), ("hf",)))
    if order.weights != SYNTHETIC:
        source = "/hf" if local else "/work/hf"
        handed = HANDED_ON if made["script"] == "quantize" else ()  # it fetches what it calibrates with
        command = docker.run(*_checkpoint(order, made, source), environment=handed)
        todo.append(Step("checkpoint", command, ("checkpoint/config.json",), local))
    todo.append(Step("engine", docker.run(*_engine(order)), ("engine/config.json", *_rank_files(order))))
    todo.append(Step("hand-over", docker.run("chown", "-R", user, "/work"), ()))
    return todo


def local_weights(order: Order) -> Path | None:
    """The user's folder of weights, or None where they come from elsewhere."""
    if order.weights in (HUB, SYNTHETIC):
        return None
    return check_mount("--weights", Path(order.weights).expanduser().resolve())


def max_batch_size(order: Order) -> int:
    """Sequences that the engine may run at once."""
    return int(order.model.runtime["max_sequences"])


@dataclass(frozen=True)
class Docker:
    """`docker run` of one image on one work folder."""

    image: Image
    work: Path
    weights: Path | None = None

    def run(
        self, *command: str, mounts: tuple[tuple[Path, str], ...] = (), environment: tuple[str, ...] = ()
    ) -> tuple[str, ...]:
        """The whole argument list for `command` inside the container."""
        more = [word for path, seen in mounts for word in ("-v", f"{path}:{seen}:ro")]
        more += [word for name in environment for word in ("-e", name)]
        mounted = ["-v", f"{self.work}:/work"]
        if self.weights:
            mounted += ["-v", f"{self.weights}:/hf:ro"]
        limits = ("--ipc=host", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864")
        return ("docker", "run", "--rm", "--init", "--gpus", "all", *limits, *mounted, *more, self.image.name, *command)


def serve_command(order: Order, image: Image, launch: list[str], more: tuple[str, ...] = ()) -> tuple[str, ...]:
    """`docker run` that serves the model repository with what `launch` starts; `more` are options of docker."""
    ports = [word for port in (8000, 8001, 8002) for word in ("-p", f"{port}:{port}")]
    limits = ("--shm-size=4g", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864")
    mount = f"{check_mount('--out', order.build.out)}:{order.build.served_from}:ro"
    options = (*limits, *ports, "-v", mount, *more)
    return ("docker", "run", "--rm", "--init", "--gpus", "all", *options, image.name, *launch)


def show(step: Step) -> str:
    """The step as one line that a shell would run just so."""
    return f"{step.name}: {shlex.join(step.command)}"


def check_mount(option: str, path: Path) -> Path:
    """`path`, which `option` named, made absolute, if docker's `-v` can name it: spaces are fine, no shell sees it."""
    absolute = path.expanduser().absolute()
    if ":" in str(absolute) or not str(absolute).isprintable():
        raise UserError(
            f"{option}: docker cannot mount {str(absolute)!r}, since a ':' ends a path there; choose another folder"
        )
    return absolute


def _probe(order: Order, made: Mapping[str, Any]) -> tuple[str, ...]:
    """What the later steps call, with every option that they pass."""

    def options(command: tuple[str, ...]) -> list[str]:
        return [word for word in command if word.startswith("--")]

    scripts = {}
    if order.weights != SYNTHETIC:
        checkpoint = _checkpoint(order, made, "/hf")
        scripts[checkpoint[1].removeprefix(f"{EXAMPLES}/")] = options(checkpoint)
    engine = _engine(order)
    wanted = {"all_models": ALL_MODELS, "parts": PARTS, "scripts": scripts, "programs": {engine[0]: options(engine)}}
    return ("python3", "/probe.py", json.dumps(wanted))


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
