"""What `tritonmark models` and docs/models.md show: the catalogue, and what fits on given GPUs and why not."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

from exporters.catalogue import Model, load_catalogue
from exporters.gpus import GB, Fit, Gpu, fits, needed_bytes, weights_bytes
from exporters.registry import backends_of, no_path, precisions_of

ROW = "{:<17} {:<6} {:>10}  {}"
WIDTH, LABEL = 120, 30
WITHOUT_GPU = "no GPU: the -tiny models run; larger ones only by `export --device cpu`, slowly, where memory holds them"


def offered(model: Model) -> dict[str, tuple[str, ...]]:
    """{backend: precisions} of a model, without backends that have no path for it."""
    every = {backend: precisions_of(model, backend) for backend in backends_of(model.family)}
    return {backend: precisions for backend, precisions in every.items() if precisions}


def offered_fits(model: Model, gpus: Sequence[Gpu]) -> dict[str, list[Fit]]:
    """{backend: what fits} of each precision that the backend has for a model."""
    return {backend: fits(model, precisions, gpus, backend) for backend, precisions in offered(model).items()}


def model_entry(model: Model, gpus: Sequence[Gpu]) -> dict[str, Any]:
    """One model as data: its entry in the catalogue, computed sizes in bytes, the fit of each backend's precisions, and
    why other backends have no path."""
    backends = offered(model)
    every = dict.fromkeys(precision for precisions in backends.values() for precision in precisions)
    return {
        **dataclasses.asdict(model),
        "max_context": model.max_context,
        "backends": list(backends),
        "backend_precisions": backends,
        "no_path": {name: no_path(model, name) for name in backends_of(model.family) if name not in backends},
        "weights_bytes": {precision: weights_bytes(model, precision) for precision in every},
        "kv_bytes_per_token": model.kv_bytes_per_token,
        "fits": [dataclasses.asdict(one) for found in offered_fits(model, gpus).values() for one in found],
    }


def models_table(models: Sequence[Model], gpus: Sequence[Gpu]) -> list[str]:
    """The catalogue as lines of text, each model followed by what each backend can run here, and why not the rest."""
    lines = [f"GPU {gpu.name}: {gpu.free_bytes / GB:.1f} of {gpu.memory_bytes / GB:.1f} GB free" for gpu in gpus]
    lines = lines or [WITHOUT_GPU]
    lines += ["", ROW.format("model", "family", "parameters", "licence")]
    for model in models:
        licence = f"{model.licence}, gated" if model.gated else model.licence
        lines.append(ROW.format(model.name, model.family, _count(model.parameters), licence))
        lines += _backend_lines(model, gpus)
    return lines


def _backend_lines(model: Model, gpus: Sequence[Gpu]) -> list[str]:
    """Backends with the same answers share lines."""
    same: dict[tuple[str, ...], list[str]] = {}
    found = offered_fits(model, gpus)
    for backend in backends_of(model.family):
        answers = _merged(model, found[backend]) if backend in found else [f"no, {no_path(model, backend)}"]
        same.setdefault(tuple(answers), []).append(backend)
    return [line for answers, backends in same.items() for line in _paragraph(", ".join(backends), answers)]


def _paragraph(label: str, answers: Sequence[str]) -> list[str]:
    """`label` beside the answers, or above them where it is too long."""
    blank = " " * LABEL
    lines = [line for answer in answers for line in textwrap.wrap(answer, WIDTH - LABEL, break_on_hyphens=False)]
    above = [f"  {label}"] if len(label) > LABEL - 4 else []
    first = blank if above else f"  {label}".ljust(LABEL)
    return [*above, first + lines[0], *(blank + line for line in lines[1:])]


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.2f} M"


def _merged(model: Model, found: list[Fit]) -> list[str]:
    """Precisions with the same answer in one line, those that fit first."""
    same: dict[str, list[str]] = {}
    for one in sorted(found, key=lambda one: not one.fits):
        same.setdefault(_told(model, one), []).append(one.precision)
    return [f"{', '.join(precisions)}: {answer}" for answer, precisions in same.items()]


def _told(model: Model, one: Fit) -> str:
    if not one.fits:
        return f"no, {one.reason}"
    shared = f" on each of {one.tp} GPUs (--tp {one.tp})" if one.tp > 1 else ""
    detail = [] if model.tiny_of else [f"{one.needed_bytes / GB:.1f} GB{shared}"]
    return "; ".join([*detail, one.note] if one.note else detail) or "fits"


def catalogue_document() -> str:
    """The table of all models in docs/models.md."""
    head = "| model | architecture | parameters | context served | torch precisions | nearest MLPerf rules | licence |"
    rows = [
        f"| `{m.name}` | {m.model_class} | {m.parameters:,} | {m.max_context} | {', '.join(m.precisions)} | {m.mlperf}"
        f" | {m.licence}{', gated' if m.gated else ''} |"
        for m in load_catalogue().values()
    ]
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows])


def memory_document() -> str:
    """The table of memory in docs/models.md."""
    head = "| model | precision | weights | KV per token | needed on 1 GPU | on each of 2 | on each of 4 |"
    rows = []
    for model in load_catalogue().values():
        for precision in () if model.tiny_of else model.precisions:
            sizes = (1, 2, 4) if model.family == "llm" else (1,)
            needs = [f"{needed_bytes(model, precision, size) / GB:.1f} GB" for size in sizes]
            kept = model.kv_bytes_per_token * (2 if precision == "fp32" else 1)
            cells = [f"{weights_bytes(model, precision) / GB:.1f} GB", f"{kept // 1024} KiB" if kept else "–"]
            cells += [*needs, *["–"] * (3 - len(needs))]
            rows.append(f"| `{model.name}` | {precision} | {' | '.join(cells)} |")
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows])
