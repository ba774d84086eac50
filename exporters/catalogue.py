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
    exists only with synthetic weights. `mlperf` names the MLPerf model whose limits are nearest.
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
    parts: Mapping[str, Any] = field(default_factory=dict)  # of a pipeline: {part: class, config, parameters}

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together that the position embedding allows."""
        return int(self.config["max_position_embeddings"])


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
