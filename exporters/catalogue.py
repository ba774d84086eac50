"""The catalogue of models: `models.toml` read once and checked, so that the rest of the package can trust it."""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporters.errors import UserError
from exporters.layout import import_path

CATALOGUE_FILE = Path(__file__).with_name("models.toml")


@dataclass(frozen=True)
class Model:
    """One entry of the catalogue.

    `config` are the arguments of `config_class` in transformers, `runtime` the defaults of the served model (units are
    in models.toml), `precisions` what it may be exported in, the default first. `hub_id` is empty for a model which
    exists only with synthetic weights; without a `revision` the hub's main branch is taken, which moves. `mlperf` names
    the MLPerf model whose limits are nearest. `served_context` is set where less than the architecture's is served.
    """

    name: str
    family: str
    hub_id: str
    revision: str
    licence: str
    gated: bool
    config_class: str
    model_class: str
    parameters: int
    precisions: tuple[str, ...]
    synthetic_on_disk: bool
    mlperf: str
    config: Mapping[str, Any]
    runtime: Mapping[str, Any]
    tiny_of: str = ""
    served_context: int = 0
    parts: Mapping[str, Any] = field(default_factory=dict)  # of a pipeline: {part: class, config, parameters}

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together that are served."""
        return self.served_context or int(self.config["max_position_embeddings"])

    @property
    def kv_bytes_per_token(self) -> int:
        """KV cache of one token of a language model in 16 bit, which all precisions but fp32 keep it in; else 0.

        2 (key and value) x layers x KV heads x head size x 2 bytes.
        """
        if self.family != "llm":
            return 0
        config = self.config
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * 2


@functools.cache
def load_catalogue(path: Path = CATALOGUE_FILE) -> dict[str, Model]:
    """Every model by name. A broken file is a bug of this package, so its exceptions are left as they are."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))
    return {
        name: Model(name=name, **{**entry, "precisions": tuple(entry["precisions"])}) for name, entry in entries.items()
    }


def find_model(name: str) -> Model:
    """The entry called `name`, or a UserError that lists the names there are."""
    catalogue = load_catalogue()
    if name not in catalogue:
        raise UserError(f"unknown model {name!r}; choose one of: {', '.join(catalogue)}")
    return catalogue[name]


def model_names(_context: Any, _parameter: Any, start: str) -> list[str]:
    """What a shell offers for a model's name that begins with `start`."""
    return [name for name in load_catalogue() if name.startswith(start)]


def check_parameters(model: Model, config: Any = None) -> None:
    """A UserError unless the installed classes make exactly the parameters that the catalogue says, of each part of a
    pipeline too: otherwise the architecture is not the model's. `config` is that of real weights, else the catalogue's.
    Counted on the meta device: no memory, a second or two."""
    why = (
        "the installed transformers or diffusers builds another architecture: install the versions of the extra, pip"
        " install 'tritonmark[embedded]', or correct models.toml"
    )
    why = "these weights are of another architecture; export the model that they are of" if config else why
    for name, needed, count in _counts(model, config):
        if count != needed:
            raise UserError(f"{name} has {count:,} parameters here, {needed:,} in the catalogue; {why}")


def _counts(model: Model, config: Any) -> Iterator[tuple[str, int, int]]:
    """(name, parameters of the catalogue, parameters here) of each network."""
    if model.parts:
        with import_path():
            from video_weights import count_parameters
        for name, part in model.parts.items():
            if "parameters" in part:
                yield f"{model.name}: its {name}", part["parameters"], count_parameters(name, part)
        return
    import torch
    import transformers

    config = config or getattr(transformers, model.config_class)(**model.config)
    with torch.device("meta"):
        network = getattr(transformers, model.model_class)(config)
    yield model.name, model.parameters, sum(weight.numel() for weight in network.parameters())


def first_difference(needed: Any, found: Any, name: str = "") -> str:
    """`hidden_size 64 and not 2560` of the first value that differs, or nothing. What `found` lacks, or has as None, is
    its class's own default and no difference; of a mapping only what is needed is compared."""
    if found is None:
        return ""
    if isinstance(needed, Mapping) and isinstance(found, Mapping):
        pairs = [(f"{name}.{key}".lstrip("."), value, found.get(key)) for key, value in needed.items()]
    elif isinstance(needed, list | tuple) and isinstance(found, list | tuple):
        if len(needed) != len(found):
            return f"{name} of {len(found)} values and not {len(needed)}"
        pairs = [(f"{name}[{k}]", *both) for k, both in enumerate(zip(needed, found, strict=True))]
    else:
        return "" if _equal(needed, found) else f"{name} {found} and not {needed}"
    return next(filter(None, (first_difference(value, other, key) for key, value, other in pairs)), "")


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)  # some were written in 32 bit
    return bool(one == other)
