"""Which container image can build and serve what: the table in `data/trtllm`, looked up. Pure but for reading it."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exporters.errors import UserError

DATA = Path(__file__).with_name("data") / "trtllm"
IMAGE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*(:[0-9]+)?(/[a-z0-9][a-z0-9._-]*)*(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?")
TAG = re.compile(r":(\d\d\.\d\d)-trtllm-python-py3$")
ENGINES, LLMAPI = "engines", "llmapi"


@functools.cache
def table(name: str) -> Mapping[str, Any]:
    """One of the data files, e.g. `models`."""
    return tomllib.loads((DATA / f"{name}.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Image:
    """One image: its full name, what is in it, what it needs. `driver` and `cuda` are version numbers."""

    name: str
    tag: str
    trtllm: str
    tensorrt: str
    cuda: str
    driver: str
    size_gb: float
    engines: bool
    llmapi: bool


@functools.cache
def images() -> tuple[Image, ...]:
    """All images of the table, the newest first."""
    data = table("images")
    rows = []
    for entry in data["image"]:
        facts = {key: value for key, value in entry.items() if key != "tags"}
        rows += [Image(name=data["name"].format(tag=tag), tag=tag, **facts) for tag in entry["tags"]]
    return tuple(rows)


def version(text: str) -> tuple[int, ...]:
    """The numbers of a version, comparable: `590.44.01` is (590, 44, 1)."""
    return tuple(int(part) for part in re.findall(r"\d+", text))


def least_driver(image: Image) -> str:
    """The oldest driver that runs the image, by CUDA's minor version compatibility."""
    return str(table("images")["least_driver"][image.cuda.split(".")[0]])


def why_not(path: str, model_class: str) -> str:
    """Why TensorRT-LLM has no `path` for `model_class`; empty where it has one."""
    known = table("models").get(model_class)
    if known is None:
        return f"TensorRT-LLM has no {model_class}; choose another backend"
    if path == LLMAPI and not known["llmapi"]:
        return (
            f"{known['architecture']} is not in TensorRT-LLM's PyTorch LLM API; use --backend tensorrtllm"
            f" (engines, in images up to {_having(ENGINES)[0].tag})"
        )
    return ""


def pick(path: str, model_class: str, driver: str | None, wanted: str = "") -> Image:
    """The newest image for `path` (`engines` or `llmapi`) and `model_class` that `driver` runs; `wanted` names one
    instead. Without a driver (none was found) the newest. A UserError says why there is none."""
    if reason := why_not(path, model_class):
        raise UserError(reason)
    if wanted:
        return _wanted(path, wanted, model_class)
    for image in _having(path):
        if driver is None or version(driver) >= version(least_driver(image)):
            return image
    oldest = _having(path)[-1]
    raise UserError(
        f"driver {driver} is too old for every image with TensorRT-LLM {path}: the oldest, {oldest.tag}, needs"
        f" {least_driver(oldest)}; update the driver"
    )


def _having(path: str) -> list[Image]:
    return [image for image in images() if getattr(image, path)]


def _wanted(path: str, wanted: str, model_class: str) -> Image:
    """The row of the table with the tag of `wanted`, under that name: a site may have its own registry. The tag alone,
    such as 26.03, is NVIDIA's."""
    if not IMAGE_NAME.fullmatch(wanted):
        raise UserError(f"bad --image {wanted!r}; give one like {images()[0].name}")
    match = TAG.search(wanted)
    tag = match[1] if match else wanted
    image = next((image for image in images() if image.tag == tag), None)
    choice = f"choose one of: {', '.join(image.tag for image in _having(path))}"
    if image is None:
        other = " or use --backend tensorrtllm-llmapi" if path == ENGINES and not why_not(LLMAPI, model_class) else ""
        raise UserError(
            f"--image {wanted} is not in the table, so what it holds is not known"
            f" (engines end at {_having(ENGINES)[0].tag}); {choice}{other}"
        )
    if not getattr(image, path):
        raise UserError(
            f"--image {image.tag} has TensorRT-LLM {image.trtllm}, whose {path} this exporter cannot use; {choice}"
        )
    return replace(image, name=wanted) if match else image
