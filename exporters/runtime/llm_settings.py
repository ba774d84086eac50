"""The settings of a language model. Runs inside Triton; imports nothing of this project."""

from __future__ import annotations

from pathlib import Path

from settings_file import read_file

MEMORY_SETTINGS = "max_context, max_batch_tokens, max_sequences or kv_memory_share"  # smaller ones take less


def read_settings(folder: Path, overrides: dict[str, str]) -> dict:
    """As settings_file.read_file; also refuses a cache that is too small for one sequence."""
    settings = read_file(folder, overrides)
    if settings["kv_tokens"] and settings["kv_tokens"] < settings["max_context"] + settings["page_size"]:
        raise ValueError(
            f"config.pbtxt: parameter kv_tokens is {settings['kv_tokens']}; one sequence may need"
            f" {settings['max_context'] + settings['page_size']}"
        )
    return settings
