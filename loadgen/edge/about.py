"""Which Tritonmark this is."""

from __future__ import annotations

import functools
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

NAME = "tritonmark"
PROJECT = Path(__file__).parents[2] / "pyproject.toml"


@functools.cache
def tool_version() -> str:
    """The version of the code that runs: of the checkout it lies in, else of the installed package.

    The checkout comes first: it need not be installed, and what is installed may be another one.
    """
    try:
        project = tomllib.loads(PROJECT.read_text(encoding="utf-8")).get("project", {})
    except (OSError, tomllib.TOMLDecodeError):
        project = {}
    return str(project["version"]) if project.get("name") == NAME else package_version(NAME)


def package_version(name: str) -> str:
    """The version of a distribution, or "unknown" where it is used without being installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
