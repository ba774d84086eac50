"""What `tritonmark models` and docs/models.md show: the catalogue, and what fits on given GPUs and why not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from exporters.catalogue import Model, load_catalogue
from exporters.gpus import GB, Fit, LocalGpu, fits, needed_bytes, weights_bytes
from exporters.registry import backends_of, precisions_of

ROW = "{:<17} {:<6} {:>10}  {}"


def offered(model: Model) -> dict[str, tuple[str, ...]]:
    """{backend: precisions} of a model, without backends that have no path for it."""
    every = {backend: precisions_of(model, backend) for backend in backends_of(model.family)}
    return {backend: precisions for backend, precisions in every.items() if precisions}


def model_entry(model: Model, gpus: Sequence[LocalGpu]) -> dict[str, Any]:
    """One model as data: its entry in the catalogue, computed sizes in bytes, and the fit of each precision."""
    return {
        **dataclasses.asdict(model),
        "max_context": model.max_context,
        "backends": list(offered(model)),
        "backend_precisions": offered(model),
        "weights_bytes": {precision: weights_bytes(model, precision) for precision in model.precisions},
        "kv_bytes_per_token": model.kv_bytes_per_token,
        "fits": [dataclasses.asdict(one) for one in fits(model, model.precisions, gpus)],
    }


def models_table(models: Sequence[Model], gpus: Sequence[LocalGpu]) -> list[str]:
    """The catalogue as lines of text, each model followed by what fits here."""
    lines = [f"GPU {gpu.name}: {gpu.free_bytes / GB:.1f} of {gpu.memory_bytes / GB:.1f} GB free" for gpu in gpus]
    lines = lines or ["no GPU: only the -tiny models run here"]
    lines += ["", ROW.format("model", "family", "parameters", "licence")]
    for model in models:
        licence = f"{model.licence}, gated" if model.gated else model.licence
        lines.append(ROW.format(model.name, model.family, _count(model.parameters), licence))
        lines.append(f"    backends: {', '.join(offered(model))}")
        lines += [f"    {_told(model, one)}" for one in _merged(fits(model, model.precisions, gpus))]
    return lines


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.2f} M"


def _merged(found: list[Fit]) -> list[Fit]:
    """Precisions with the same answer in one: on a machine without GPUs, or for tiny models."""
    same = {(one.fits, one.reason, one.note) for one in found}
    if len(same) == 1 and (found[0].note or found[0].reason) and len(found) > 1:
        return [dataclasses.replace(found[0], precision=", ".join(one.precision for one in found))]
    return found


def _told(model: Model, one: Fit) -> str:
    if not one.fits:
        return f"{one.precision}: no ({one.reason})"
    detail = [one.note] if one.note else []
    if not model.tiny_of:
        detail.insert(0, f"{one.needed_bytes / GB:.1f} GB" + (f" on each of {one.tp} GPUs" if one.tp > 1 else ""))
    return f"{one.precision}: fits ({'; '.join(detail)})"


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
