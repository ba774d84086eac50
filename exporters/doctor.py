"""`tritonmark doctor`: will this machine do it? One line a check: ok, warn or fail, what was seen, what to do.

`diagnose` decides and is pure: it can be asked about any machine. doctor_probe.py looks.
"""

from __future__ import annotations

import fnmatch
import functools
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from exporters import trtllm_images
from exporters.catalogue import Model, find_model, model_names
from exporters.doctor_probe import PORTS, Seen, look
from exporters.errors import UserError
from exporters.trtllm_images import version

OK, WARN, FAIL = "ok", "warn", "fail"
REPOSITORY = "nvcr.io/nvidia/tritonserver"
GB = 1e9
ROOM_BYTES, LEAST_BYTES = 60 * GB, 5 * GB  # an image, its layers and a model of 7 B; a tiny model and its results
OPEN_FILES = 4096  # a file a request in flight, and Locust's own
BUSY = 0.25  # of all cores; above it measured latencies are other programs' too
OLDEST_GPU = 7.5  # that Triton's images since 25.03 know
DRIVERS = Path(__file__).with_name("data") / "drivers.toml"


@dataclass(frozen=True)
class Check:
    """One line: its state, what was looked at, what was seen, what to do about it (empty when it is ok)."""

    state: str
    name: str
    seen: str
    advice: str = ""

    def line(self) -> str:
        seen = " ".join(self.seen.split())  # text of others may have lines
        return f"{self.state:<5}{self.name}: {seen}" + (f" → {self.advice}" if self.advice else "")


@functools.cache
def driver_table() -> tuple[Mapping[str, Any], ...]:
    """Rows (tag, cuda, driver) of data/drivers.toml, then of TensorRT-LLM's images."""
    own = tomllib.loads(DRIVERS.read_text(encoding="utf-8"))["image"]
    engines = [
        {"tag": image.name.partition(":")[2], "cuda": image.cuda, "driver": image.driver}
        for image in trtllm_images.images()
    ]
    return (*own, *engines)


def diagnose(seen: Seen, tag: str = "", model: Model | None = None) -> list[Check]:
    """All checks, in the order in which a user meets what they are about."""
    wanted = bool(tag)  # with an image named, what it needs is needed; without, a GPU is one way to use this
    checks = [_driver(seen, wanted), *([_image(seen, tag)] if tag else []), *_gpus(seen, wanted), _docker(seen, wanted)]
    checks += [_disk(seen), _ports(seen), _clock(seen), _cores(seen), _pressure(seen), _open_files(seen)]
    return [*checks, *([_hub(seen, model)] if model else [])]


def _driver(seen: Seen, wanted: bool) -> Check:
    driver = seen.machine.driver
    if driver and not seen.smi:
        return Check(OK, "driver", f"{driver}, CUDA {seen.cuda or 'version not said'}")
    if "mismatch" in seen.smi:
        return Check(FAIL, "driver", seen.smi, "it was updated while in use: restart this machine")
    if "not installed" in seen.smi:
        advice = "install NVIDIA's driver, or use the CPU: tiny models only"
        return Check(FAIL if wanted else WARN, "driver", seen.smi, advice)
    return Check(FAIL, "driver", seen.smi or "nvidia-smi names no driver", "mend or reinstall NVIDIA's driver")


def _image(seen: Seen, tag: str) -> Check:
    row = next((row for row in driver_table() if fnmatch.fnmatchcase(tag, row["tag"])), None)
    if row is None:
        advice = "compare NVIDIA's compatibility table of Triton with the driver"
        return Check(WARN, "image", f"{tag}: its driver is not in our table", advice)
    driver, least = seen.machine.driver, trtllm_images.table("images")["least_driver"][row["cuda"].split(".")[0]]
    needs = f"{tag}: CUDA {row['cuda']}, driver {row['driver']}"
    if driver is None:
        return Check(FAIL, "image", f"{needs}; no driver answers", "mend the driver first")
    if version(driver) >= version(row["driver"]):
        return Check(OK, "image", f"{needs}; {driver} is here")
    if version(driver) >= version(least):
        advice = f"data center GPUs run it by CUDA's minor version compatibility; if not, update to {row['driver']}"
        return Check(WARN, "image", f"{needs}; {driver} is older", advice)
    return Check(FAIL, "image", f"{needs}; {driver} is too old", f"update the driver to {least} at least")


def _gpus(seen: Seen, wanted: bool) -> list[Check]:
    if not seen.machine.gpus:
        return [
            Check(FAIL if wanted else WARN, "gpu", "none", "only tiny models run on the CPU; GPU images do not start")
        ]
    checks = []
    for index, gpu in enumerate(seen.machine.gpus):
        text = f"{gpu.name}, compute capability {gpu.capability}"
        text += f", {gpu.free_bytes / GB:.0f} of {gpu.memory_bytes / GB:.0f} GB free"
        if gpu.capability < OLDEST_GPU:
            advice = f"Triton's images since 25.03 need {OLDEST_GPU}: take another GPU"
            checks.append(Check(FAIL if wanted else WARN, f"gpu {index}", text, advice))
        elif gpu.free_bytes < 0.9 * gpu.memory_bytes:
            advice = "`nvidia-smi` names who uses the rest: end it, it would also slow what is measured"
            checks.append(Check(WARN, f"gpu {index}", text, advice))
        else:
            checks.append(Check(OK, f"gpu {index}", text))
    return checks


def _docker(seen: Seen, wanted: bool) -> Check:
    why = seen.machine.docker
    if not why:
        return Check(OK, "docker", "answers, with the nvidia runtime")
    needed = wanted or (bool(seen.machine.gpus) and "runtime" in why)
    advice = "install Docker and NVIDIA's container toolkit, then `sudo nvidia-ctk runtime configure --runtime=docker`"
    if not needed:
        advice += "; bench, serve and run do without"
    return Check(FAIL if needed else WARN, "docker", why, advice)


def _disk(seen: Seen) -> Check:
    free = seen.machine.free_bytes
    text = f"{free / GB:.0f} GB free here"
    if free < LEAST_BYTES:
        return Check(FAIL, "disk", text, f"free {LEAST_BYTES / GB:.0f} GB at least")
    if free < ROOM_BYTES:
        return Check(
            WARN, "disk", text, "enough for tiny models; an image takes 10 to 17 GB, weights 2 GB per 1 B in bf16"
        )
    return Check(OK, "disk", text)


def _ports(seen: Seen) -> Check:
    if not seen.taken:
        return Check(OK, "ports", f"{', '.join(map(str, PORTS))} are free")
    names = ", ".join(f"{port} ({PORTS[port]})" for port in seen.taken)
    return Check(WARN, "ports", f"{names} in use", "fine if it is ours; else end who listens (`ss -ltnp`)")


def _clock(seen: Seen) -> Check:
    if seen.clock:
        return Check(OK, "clock", "synchronised")
    text = "not synchronised" if seen.clock is False else "the kernel does not say whether it is synchronised"
    return Check(WARN, "clock", text, "run chrony or systemd-timesyncd: load workers on several hosts need one time")


def _cores(seen: Seen) -> Check:
    text = f"{seen.cores} usable"
    if seen.cores < 4:
        return Check(
            WARN, "cores", text, "load, server and report share them: keep to low rates, or load from another host"
        )
    return Check(OK, "cores", text)


def _pressure(seen: Seen) -> Check:
    text = f"{seen.busy:.0%} of all cores in use now"
    if seen.busy > BUSY:
        return Check(WARN, "load", text, "end other programs before a run, else it may be INVALID (client_lag)")
    return Check(OK, "load", text)


def _open_files(seen: Seen) -> Check:
    text = "no limit" if seen.open_files < 0 else f"{seen.open_files} at most"
    if 0 <= seen.open_files < OPEN_FILES:
        return Check(WARN, "open files", text, "`ulimit -n 65535` in this shell: each request in flight takes one")
    return Check(OK, "open files", text)


def _hub(seen: Seen, model: Model) -> Check:
    if not model.gated:
        return Check(OK, "hub", f"{model.name} is not gated")
    if not seen.machine.hub_token:
        advice = f"accept the licence at https://huggingface.co/{model.hub_id}, then `hf auth login` or set HF_TOKEN"
        return Check(FAIL, "hub", f"{model.name} is gated and no token was found", advice)
    if "not installed" in seen.hub:
        return Check(WARN, "hub", seen.hub, "pip install huggingface_hub")
    if seen.hub:
        advice = f"accept the licence at https://huggingface.co/{model.hub_id}; check token, proxy and HF_ENDPOINT"
        return Check(FAIL, "hub", f"{model.name} is gated; {seen.hub}", advice)
    return Check(OK, "hub", f"{model.name} is gated, and this token may have it")


def tag_of(image: str) -> str:
    """The tag of an image's full name. Raises UserError where it has none."""
    name, _, tag = image.rpartition(":")
    if not name or "/" in tag or not tag:
        raise UserError(f"--image {image!r}: no tag in it; write for example {REPOSITORY}:26.07-py3")
    return tag


@click.command()
@click.option("--tag", default="", help="Of Triton's image, e.g. 26.07-py3: is the driver new enough for it?")
@click.option("--image", default="", help="The same, by the image's full name.")
@click.option(
    "--model",
    shell_complete=model_names,
    help="Catalogue name; of a gated one, token and licence are checked at the hub.",
)
@click.option(
    "--folder", default=".", show_default=True, type=click.Path(path_type=Path), help="Whose disk is looked at."
)
def doctor(tag: str, image: str, model: str | None, folder: Path) -> None:
    """Check driver, GPUs, Docker, disk, ports, clock, cores: a line each, and what to do.

    Exit code: 0 nothing stands in the way (warnings may), 3 something will not work, 2 bad input.
    """
    if tag and image:
        raise UserError("--tag and --image are the same: give one of them")
    wanted, asked = (tag_of(image) if image else tag), find_model(model) if model else None
    seen = look(image or f"{REPOSITORY}:{wanted or '26.07-py3'}", folder, asked)
    checks = diagnose(seen, wanted, asked)
    for check in checks:
        click.echo(check.line())
    sys.exit(3 if any(check.state == FAIL for check in checks) else 0)
