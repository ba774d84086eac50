"""`config.pbtxt` as data: a dataclass in, protobuf text out. Pure: no file, no clock, no other module.

The fields are those of Triton's `ModelConfig` message (model_config.proto) that the exporters use. The text is stable,
so that two exports of the same order are equal byte by byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_NUMBERS = {f"{kind}{bits}" for kind in ("UINT", "INT") for bits in (8, 16, 32, 64)} | {"FP16", "FP32", "FP64", "BF16"}
DATA_TYPES = frozenset(f"TYPE_{name}" for name in _NUMBERS | {"BOOL", "STRING"})
INSTANCE_KINDS = frozenset({"KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"})
_SHORT_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


@dataclass(frozen=True)
class Tensor:
    """One input or output. `dims` without the batch dimension, -1 for a variable one."""

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)
    optional: bool = False

    def __post_init__(self) -> None:
        if self.data_type not in DATA_TYPES:
            raise ValueError(f"tensor {self.name!r}: unknown data type {self.data_type!r}")
        if not self.dims or any(size == 0 or size < -1 for size in self.dims):
            raise ValueError(f"tensor {self.name!r}: bad dims {self.dims!r}")


@dataclass(frozen=True)
class Step:
    """One model of an ensemble. `inputs` and `outputs` map its own tensor names to the ensemble's."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class ModelConfig:
    """One model. `parameters` are Triton's free string parameters, written sorted by key. With `steps` it is an
    ensemble, which has no backend and no instances of its own."""

    name: str
    backend: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    max_batch_size: int = 0
    decoupled: bool = False
    instance_kind: str = "KIND_AUTO"
    instance_count: int = 1
    parameters: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.steps) == bool(self.backend):
            raise ValueError(f"model {self.name!r}: give it a backend, or steps and no backend")
        if self.instance_kind not in INSTANCE_KINDS:
            raise ValueError(f"model {self.name!r}: unknown instance kind {self.instance_kind!r}")


def quote(text: str) -> str:
    """A protobuf text-format string literal. Control characters become octal escapes, everything else stays UTF-8.

    A lone surrogate has no UTF-8 form and raises UnicodeEncodeError.
    """
    text.encode("utf-8")
    return '"' + "".join(_SHORT_ESCAPES.get(char) or _printable(char) for char in text) + '"'


def _printable(char: str) -> str:
    if ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0:
        return "".join(f"\\{byte:03o}" for byte in char.encode("utf-8"))
    return char


def _tensor_lines(field_name: str, tensor: Tensor) -> list[str]:
    lines = [
        f"{field_name} {{",
        f"  name: {quote(tensor.name)}",
        f"  data_type: {tensor.data_type}",
        f"  dims: [ {', '.join(str(size) for size in tensor.dims)} ]",
    ]
    if tensor.optional:
        lines.append("  optional: true")
    return [*lines, "}"]


def _step_lines(step: Step) -> list[str]:
    lines = ["  step {", f"    model_name: {quote(step.model)}", "    model_version: -1"]
    for field_name, names in (("input_map", step.inputs), ("output_map", step.outputs)):
        for own, outer in names.items():
            lines.append(f"    {field_name} {{ key: {quote(own)} value: {quote(outer)} }}")
    return [*lines, "  }"]


def render(config: ModelConfig) -> str:
    """The text of `config.pbtxt`, ending in a newline."""
    lines = [
        f"name: {quote(config.name)}",
        'platform: "ensemble"' if config.steps else f"backend: {quote(config.backend)}",
        f"max_batch_size: {config.max_batch_size}",
    ]
    for tensor in config.inputs:
        lines += _tensor_lines("input", tensor)
    for tensor in config.outputs:
        lines += _tensor_lines("output", tensor)
    if config.steps:
        lines += ["ensemble_scheduling {", *(line for step in config.steps for line in _step_lines(step)), "}"]
    else:
        lines += ["instance_group {", f"  count: {config.instance_count}", f"  kind: {config.instance_kind}", "}"]
    if config.decoupled:
        lines += ["model_transaction_policy {", "  decoupled: true", "}"]
    for key in sorted(config.parameters):
        value = quote(config.parameters[key])
        lines += ["parameters {", f"  key: {quote(key)}", f"  value {{ string_value: {value} }}", "}"]
    return "\n".join(lines) + "\n"
