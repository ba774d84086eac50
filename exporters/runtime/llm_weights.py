"""A language model's weights on its device: loaded, or drawn from a seed. Runs inside Triton and at export; imports
nothing of this project.

The model is made without memory first (on torch's meta device) and gets its parameters one at a time, each straight in
its place: nothing is ever held twice, and with 8-bit precisions the 16-bit weights never exist all at once.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from devices import check_capability, check_compiler
from llm_quantised import FP8_CAPABILITY, GROUPED_CAPABILITY, STORAGE, hold
from safetensors import safe_open

# What is computed in; the 8-bit precisions of llm_quantised keep activations, embeddings and output layer in bf16.
DTYPES = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16, "int8": torch.bfloat16,
}  # fmt: skip
UNREACHABLE = -1e4  # logit, or about, of the tokens that the tokenizer cannot spell; finite in fp16 too
LOGITS = 3.0  # deviation of a token's logits, about that of a trained model
RESIDUAL_WRITERS = ("dense.weight", "fc2.weight", "o_proj.weight", "down_proj.weight", "experts.down_proj")
GB = 1e9


class Drawer:
    """Fills the parameters of one model with seeded random weights whose logits are spread like a trained model's.

    Weights get a deviation of 1/sqrt(inputs), those that write into the residual stream are divided by sqrt(2 layers),
    and the output layer gets 3/sqrt(inputs), so logits have a deviation of about 3. Parameters must be filled in
    sorted order; equal seeds then give equal weights on one kind of device and in one type, not across them.

    Ids from `decodable` on can never be chosen: the output layer's bias is very negative there. Where it has none,
    channel 0 of the residual stream takes its place: every embedding is 1 there, no layer writes to it, and only the
    output rows of those ids read it.
    """

    def __init__(self, model: torch.nn.Module, seed: int, decodable: int, device: torch.device | str) -> None:
        if model.config.tie_word_embeddings:
            raise ValueError("weights cannot be drawn for a model whose output layer is its embedding")
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._depth = math.sqrt(2 * model.config.num_hidden_layers)
        self._decodable = decodable
        self._by_channel = model.lm_head.bias is None

    def fill(self, name: str, weight: torch.Tensor) -> None:
        """Set all of `weight`, which is the parameter `name`."""
        if name.endswith("bias"):
            weight.zero_()
            if name == "lm_head.bias":
                weight[self._decodable :] = UNREACHABLE
            return
        if weight.ndim < 2:
            weight.fill_(1.0)
            return
        writes = name.endswith(RESIDUAL_WRITERS)
        spread = 1.0 if "embed" in name else 1 / math.sqrt(weight.shape[-1])
        spread /= self._depth if writes else 1
        spread *= LOGITS if name.startswith("lm_head") else 1
        weight.normal_(0.0, spread, generator=self._generator)
        if self._by_channel:
            self._keep_channel(name, weight, writes)

    def _keep_channel(self, name: str, weight: torch.Tensor, writes: bool) -> None:
        if "embed" in name:
            weight[:, 0] = 1.0
        elif writes:
            weight[..., 0, :] = 0.0
        elif name.startswith("lm_head"):
            weight[self._decodable :] = 0.0
            weight[:, 0] = 0.0
            weight[self._decodable :, 0] = UNREACHABLE


def draw_weights(model: torch.nn.Module, seed: int, decodable: int) -> None:
    """Fill a whole `model` that is on its device already; see Drawer."""
    drawer = Drawer(model, seed, decodable, next(model.parameters()).device)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            drawer.fill(name, weight)


class Checkpoint:
    """Parameters in the safetensors files of a folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self._files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            with safe_open(folder / "model.safetensors", "pt") as file:
                self._files = dict.fromkeys(file.keys(), "model.safetensors")

    def read(self, name: str, shape: torch.Size) -> torch.Tensor:
        """The parameter `name` on the host, in the type it is stored in. Raises KeyError where it is not there."""
        if name in self._files:
            return self._tensor(name)
        block, _, part = name.partition(".mlp.")
        old = f"{block}.block_sparse_moe"  # as the hub's checkpoints of PhiMoE have it: experts apart
        if part == "router.weight":
            return self._tensor(f"{old}.gate.weight")
        if part == "experts.down_proj":
            return torch.stack([self._tensor(f"{old}.experts.{expert}.w2.weight") for expert in range(shape[0])])
        if part == "experts.gate_up_proj":
            pairs = ((f"{old}.experts.{e}.w1.weight", f"{old}.experts.{e}.w3.weight") for e in range(shape[0]))
            return torch.stack([torch.cat([self._tensor(gate), self._tensor(up)]) for gate, up in pairs])
        raise KeyError(f"{name} is not in {self._folder}")

    def holds(self, name: str) -> bool:
        """Whether `read` would find the parameter."""
        block, _, part = name.partition(".mlp.")
        old = {"router.weight": "gate.weight", "experts.down_proj": "experts.0.w2.weight"}
        old["experts.gate_up_proj"] = "experts.0.w1.weight"
        return name in self._files or f"{block}.block_sparse_moe.{old.get(part)}" in self._files

    def _tensor(self, name: str) -> torch.Tensor:
        with safe_open(self._folder / self._files[name], "pt") as file:
            return file.get_tensor(name)


class ShortRotary(torch.nn.Module):
    """The rotary embedding of a longrope model within its original context, where the short factors hold: constants.
    transformers' own chooses between short and long at each step, which makes the host wait for the device."""

    def __init__(self, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.config = rotary.config
        inverse, _ = rotary.rope_init_fn(self.config)
        self.inv_freq = torch.nn.Buffer(inverse, persistent=False)
        self.mscale = self.config.rope_parameters["short_mscale"]

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.mscale).to(x.dtype), (angles.sin() * self.mscale).to(x.dtype)


def load_model(folder: Path, settings: dict, device: str) -> torch.nn.Module:
    """The model on `device`: from safetensors in `folder`, or drawn there from the seed when there are none.

    Settings read: model_class, precision, draw_on_load, max_context; with draw_on_load seed and decodable_tokens.
    Raises ValueError, one line, when the device cannot hold it or lacks the precision.
    """
    precision = settings["precision"]
    dtype, storage = DTYPES[precision], STORAGE.get(precision)
    compiled = settings.get("engine") == "slots"
    _check_capability(precision, device, compiled)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with _default_dtype(dtype), torch.device("meta"):
        model = getattr(transformers, settings["model_class"])(config)
    if compiled:
        _check_experts(model, precision, device)
    ranks = settings.get("tp", 1)
    _check_room(model, precision, device, ranks)
    sharder = None
    if ranks > 1:
        from llm_ranks import Sharder

        sharder = Sharder(model, device)
    if settings["draw_on_load"]:
        source = _drawn(model, settings, dtype, device)
    else:
        checkpoint = Checkpoint(folder)
        source = lambda name, shape: checkpoint.read(name, shape).to(device, dtype)  # noqa: E731
    with torch.no_grad():
        for name, shape in sorted((name, weight.shape) for name, weight in model.named_parameters()):
            weight = source(name, shape)
            if storage is None or not hold(model, name, weight, storage):
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(weight, requires_grad=False))
            if sharder is not None:
                sharder.filled(name)
    model.tie_weights()
    _make_rotary(model, settings["max_context"], device)
    missing = [name for name, held in (*model.named_parameters(), *model.named_buffers()) if held.is_meta]
    if missing:
        raise RuntimeError(f"{missing[0]} was not initialised")
    return model.eval()


def _drawn(model: torch.nn.Module, settings: dict, dtype: torch.dtype, device: str) -> Callable:
    drawer = Drawer(model, settings["seed"], settings["decodable_tokens"], device)

    def draw(name: str, shape: torch.Size) -> torch.Tensor:
        weight = torch.empty(shape, dtype=dtype, device=device)
        drawer.fill(name, weight)
        return weight

    return draw


def _make_rotary(model: torch.nn.Module, max_context: int, device: str) -> None:
    """The rotary embedding has no parameters, only numbers computed when it is made: so it is made again, on the device
    and in fp32."""
    config = model.config
    with _default_dtype(torch.float32), torch.device(device):
        rotary = type(model.model.rotary_emb)(config=config)
        rope = config.rope_parameters
        if rope["rope_type"] == "longrope" and max_context <= rope.get("original_max_position_embeddings", 0):
            rotary = ShortRotary(rotary)
    model.model.rotary_emb = rotary


def _check_capability(precision: str, device: str, compiled: bool = False) -> None:
    if precision == "fp8":
        check_capability("fp8", FP8_CAPABILITY, device, "export in bf16, fp16 or int8")
    if compiled:
        check_compiler(DTYPES[precision], device)


def _check_experts(model: torch.nn.Module, precision: str, device: str) -> None:
    """On a GPU steps are captured, so the host may not ask how many tokens each expert has, as everything but torch's
    own grouped products does; and below their capability those do as well (ATen, _grouped_mm_fallback)."""
    if not device.startswith("cuda") or all(weight.ndim < 3 for weight in model.parameters()):
        return
    if precision not in ("bf16", "fp8"):
        raise ValueError(
            f"torch-compile cannot capture experts in {precision} on a GPU; export in bf16 or fp8, or torch-eager"
        )
    check_capability("torch-compile of experts", GROUPED_CAPABILITY, device, "export torch-eager")


def needed_bytes(model: torch.nn.Module, precision: str) -> int:
    """Memory that the weights of `model` take in `precision`."""
    wide = DTYPES[precision].itemsize
    small = [w for name, w in model.named_parameters() if precision in STORAGE and w.ndim > 1 and ".layers." in name]
    narrow = sum(weight.numel() for weight in small)
    return narrow + (sum(weight.numel() for weight in model.parameters()) - narrow) * wide


def _check_room(model: torch.nn.Module, precision: str, device: str, ranks: int) -> None:
    """Refuse what cannot fit, before minutes are spent or the host is out of memory."""
    needed = needed_bytes(model, precision) / ranks
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(torch.device(device))
    else:
        table = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(table["MemAvailable"].split()[0]) * 1024
    if needed > free:
        raise ValueError(
            f"the weights take {needed / GB:.1f} GB in {precision}, but {device} has {free / GB:.1f} GB free; choose a"
            " smaller precision, a larger GPU or a -tiny model"
        )


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)
