"""What the export fixed and the operator may change. Runs inside Triton; imports nothing of this project."""

from __future__ import annotations

import json
from pathlib import Path


def read_file(folder: Path, overrides: dict[str, str]) -> dict:
    """`settings.json` beside model.py; `overrides`, the parameters of config.pbtxt, win where the name is known.

    Raises ValueError in one line for a value of another type.
    """
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    for name, text in overrides.items():
        if name in settings:
            kind = type(settings[name])
            try:
                settings[name] = text if kind is str else kind(json.loads(text.lower() if kind is bool else text))
            except (ValueError, TypeError):
                raise ValueError(f"config.pbtxt: parameter {name} is {text!r}, not a {kind.__name__}") from None
    return settings
