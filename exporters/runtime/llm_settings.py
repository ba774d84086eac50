"""What the export fixed and the operator may change. Runs inside Triton; imports nothing of this project."""

from __future__ import annotations

import json
from pathlib import Path


def read_settings(folder: Path, overrides: dict[str, str]) -> dict:
    """`settings.json` beside model.py; `overrides`, the parameters of config.pbtxt, win where the name is known."""
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    for name, text in overrides.items():
        if name in settings:
            kind = type(settings[name])
            try:
                settings[name] = text if kind is str else kind(json.loads(text))
            except (ValueError, TypeError):
                raise ValueError(f"config.pbtxt: parameter {name} is {text!r}, not a {kind.__name__}") from None
    if settings["kv_tokens"] and settings["kv_tokens"] < settings["max_context"] + settings["page_size"]:
        raise ValueError(
            f"config.pbtxt: parameter kv_tokens is {settings['kv_tokens']}; one sequence may need"
            f" {settings['max_context'] + settings['page_size']}"
        )
    return settings
