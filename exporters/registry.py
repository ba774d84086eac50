"""Which exporter builds which family for which backend. Its one rule: one function for each pair.

    @exporter("llm", "torch-eager")
    def export_llm_torch_eager(order: Order, version: Path) -> ModelConfig: ...

An exporter fills the version folder (`1/`) with everything that Triton needs and returns the `config.pbtxt` as data.
Names, staging, hashes and the manifest are the same for all of them and live in `exporters.layout`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from exporters.catalogue import Model
from exporters.config_pbtxt import ModelConfig
from exporters.errors import UserError

# Modules whose import registers exporters.
PROVIDERS = ("exporters.llm", "exporters.video", "exporters.vllm", "exporters.tensorrtllm")


@dataclass(frozen=True)
class Build:
    """How an export that compiles outside this process goes about it; other backends ignore most of it.

    `out` is the model repository, `served_from` where the server will see it, `image` a container image instead of the
    chosen one, `cache` where finished steps of a build are kept, `check` whether the machine is looked at first.
    """

    pp: int = 1  # pipeline stages
    ep: int = 1  # groups that share the experts of a mixture
    out: Path = Path("model_repository")
    served_from: str = "/models"
    image: str = ""
    cache: Path | None = None
    check: bool = True
    tell: Callable[[str], None] = print


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
    build: Build = field(default_factory=Build, compare=False)


Exporter = Callable[[Order, Path], ModelConfig]
_exporters: dict[tuple[str, str], Exporter] = {}
_precisions: dict[tuple[str, str], Callable[[Model], tuple[str, ...]]] = {}
_planners: dict[tuple[str, str], Callable[[Order], list[str]]] = {}
_reasons: dict[tuple[str, str], Callable[[Model], str]] = {}


def _title(function: Exporter) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def exporter(
    family: str,
    backend: str,
    *,
    precisions: Callable[[Model], tuple[str, ...]] | None = None,
    plan: Callable[[Order], list[str]] | None = None,
    no_path: Callable[[Model], str] | None = None,
) -> Callable[[Exporter], Exporter]:
    """Register the decorated function for (family, backend). A second one for the same pair is a ValueError that
    names both, because otherwise the import order would decide which of them is used.

    `precisions` says what this backend can do with a model, the default first; without it, what the catalogue says.
    `plan` gives the steps of an export as lines of text, without doing any. `no_path` says why there are no precisions
    of a model, and what to do instead."""

    def register(function: Exporter) -> Exporter:
        key = (family, backend)
        known = _exporters.get(key)
        if known is not None and _title(known) != _title(function):
            raise ValueError(
                f"two exporters for family {family!r} and backend {backend!r}: {_title(known)} and {_title(function)}"
            )
        _exporters[key] = function
        if precisions:
            _precisions[key] = precisions
        if plan:
            _planners[key] = plan
        if no_path:
            _reasons[key] = no_path
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


def precisions_of(model: Model, backend: str) -> tuple[str, ...]:
    """What `model` may be exported in for `backend`, the default first; empty where the backend has no path for it."""
    find_exporter(model.family, backend)
    choose = _precisions.get((model.family, backend))
    return choose(model) if choose else model.precisions


def no_path(model: Model, backend: str) -> str:
    """Why `model` has no precisions for `backend`."""
    tell = _reasons.get((model.family, backend))
    return tell(model) if tell else f"{backend} has no path for {model.name}; choose another backend"


def plan_of(order: Order) -> list[str]:
    """The steps that exporting `order` would take, or a UserError where it is a single step."""
    find_exporter(order.model.family, order.backend)
    planner = _planners.get((order.model.family, order.backend))
    if planner is None:
        with_plan = sorted(backend for family, backend in _planners if family == order.model.family)
        raise UserError(f"--dry-run has nothing to show for {order.backend}; it is for {', '.join(with_plan)}")
    return planner(order)
