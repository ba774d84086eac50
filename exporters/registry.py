"""Which exporter builds which family for which backend. Its one rule: one function for each pair.

    @exporter("llm", "torch-eager")
    def export_llm_torch_eager(order: Order, version: Path) -> ModelConfig: ...

An exporter fills the version folder (`1/`) with everything that Triton needs and returns the `config.pbtxt` as data.
Names, staging, hashes and the manifest are the same for all of them and live in `exporters.layout`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from exporters.catalogue import Model
from exporters.config_pbtxt import ModelConfig
from exporters.errors import UserError

PROVIDERS = ("exporters.llm",)  # modules whose import registers exporters


@dataclass(frozen=True)
class Order:
    """What was asked for, checked: `name` is the Triton model name, `weights` is `hub`, `synthetic` or a folder."""

    model: Model
    backend: str
    precision: str
    weights: str
    seed: int
    name: str
    device: str = "auto"
    tp: int = 1  # GPUs that share the model by tensor parallelism


Exporter = Callable[[Order, Path], ModelConfig]
_exporters: dict[tuple[str, str], Exporter] = {}


def _title(function: Exporter) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def exporter(family: str, backend: str) -> Callable[[Exporter], Exporter]:
    """Register the decorated function for (family, backend). A second one for the same pair is a ValueError that
    names both, because otherwise the import order would decide which of them is used."""

    def register(function: Exporter) -> Exporter:
        key = (family, backend)
        known = _exporters.get(key)
        if known is not None and _title(known) != _title(function):
            raise ValueError(
                f"two exporters for family {family!r} and backend {backend!r}: {_title(known)} and {_title(function)}"
            )
        _exporters[key] = function
        return function

    return register


def backends_of(family: str) -> list[str]:
    """The backends that `family` can be exported for, sorted."""
    for module in PROVIDERS:
        importlib.import_module(module)
    return sorted(backend for known_family, backend in _exporters if known_family == family)


def find_exporter(family: str, backend: str) -> Exporter:
    """The function for the pair, or a UserError that lists the backends there are."""
    backends = backends_of(family)
    if backend not in backends:
        raise UserError(f"no backend {backend!r} for family {family!r}; choose one of: {', '.join(backends)}")
    return _exporters[family, backend]
