"""What Prometheus' file_sd_configs find: a file a process, below the results folder, while that process lives."""

from __future__ import annotations

import json
import logging
import os
import platform
from pathlib import Path
from typing import Any

from loadgen.edge.errors import UserError
from loadgen.edge.text_file import write

log = logging.getLogger("tritonmark")
TARGETS = Path(".prometheus", "targets")  # inside the results folder


class Discovery:
    """The file of this process: `<results>/.prometheus/targets/<host>-<pid>.json`."""

    def __init__(self, results: Path) -> None:
        self.folder, self._host = results / TARGETS, platform.node() or "host"

    @property
    def file(self) -> Path:
        return self.folder / f"{self._host}-{os.getpid()}.json"

    def write(self, groups: list[dict[str, Any]]) -> None:
        """Replaces the file as a whole, and removes those of processes of this host that are gone. A disk that takes
        nothing is a warning, and no reason to end a test."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for other in self.folder.glob(f"{self._host}-*.json"):
                if not Path("/proc", other.stem.rpartition("-")[2]).exists():
                    other.unlink(missing_ok=True)
            write(self.file, json.dumps(groups, indent=1) + "\n", "look at the results folder")
        except (OSError, UserError) as error:
            log.warning("Prometheus will not find this test: %s", error)

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)
