"""The catalogue of models: `models.toml` read once and checked, so that the rest of the package can trust it."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporters.errors import UserError

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


def check_parameters(model: Model) -> None:
    """A UserError unless the classes of the installed transformers have exactly the parameters that the catalogue says:
    otherwise the architecture is not the model's. Counted on the meta device: no memory, a second or two."""
    import torch
    import transformers

    with torch.device("meta"):
        network = getattr(transformers, model.model_class)(getattr(transformers, model.config_class)(**model.config))
    found = sum(weight.numel() for weight in network.parameters())
    if found != model.parameters:
        raise UserError(
            f"{model.name} has {found:,} parameters here, {model.parameters:,} in the catalogue; transformers"
            f" {transformers.__version__} builds another architecture, or its entry in models.toml is wrong"
        )
