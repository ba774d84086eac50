"""What a GPU can do and hold, in errors of one line, and where code compiled for it is kept. Runs inside Triton;
imports nothing of this project."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import torch

COMPILER_CAPABILITY = (7, 0)  # of Triton, the compiler
BF16_CAPABILITY = (8, 0)  # torch emulates it on older GPUs, but compiles nothing: it would run eager under another name
_DEFAULT_CACHE = "torchinductor_"  # torch's own folder is <temporary folder>/torchinductor_<user>
_SIZE = r"([\d.]+ \w+)"


def check_capability(what: str, least: tuple[int, int], device: str, instead: str) -> None:
    """Raise ValueError where the GPU `device` is older than `what` needs; a CPU is not asked."""
    if device.startswith("cuda") and (found := torch.cuda.get_device_capability(device)) < least:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"{what} needs compute capability {dotted(least)}, {name} has {dotted(found)}; {instead}")


def check_compiler(dtype: torch.dtype, device: str) -> None:
    """Raise ValueError where torch.compile cannot serve `dtype` on `device`."""
    check_capability("torch-compile", COMPILER_CAPABILITY, device, "export torch-eager")
    if dtype is torch.bfloat16:
        check_capability("torch-compile in bf16", BF16_CAPABILITY, device, "export in fp16, or torch-eager")


def dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


@contextlib.contextmanager
def memory_explained(smaller: str) -> Iterator[None]:
    """Within it, running out of GPU memory is a RuntimeError of one line, which advises to make `smaller` smaller."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one, and so is a batch loop that died of it
        if "out of memory" not in str(error):
            raise
        raise RuntimeError(out_of_memory(str(error), smaller)) from None


def out_of_memory(said: str, smaller: str) -> str:
    """One line for what torch `said`."""
    asked = re.search(rf"Tried to allocate {_SIZE}", said)
    free = re.search(rf"total capacity of {_SIZE} of which {_SIZE} is free", said)
    sizes = [f"{asked[1]} more were asked for"] if asked else []
    sizes += [f"{free[2]} of {free[1]} were free"] if free else []
    detail = f" ({', '.join(sizes)})" if sizes else ""
    return (
        f"GPU memory ran out while the model was loaded and warmed up{detail}; take a smaller precision, a larger GPU,"
        f" or set a smaller {smaller} in config.pbtxt"
    )


def use_compile_cache(folder: Path, variables: MutableMapping[str, str] = os.environ) -> Path | None:
    """Let `variables` keep compiled code beside model.py in `folder`, so that a restart is fast; None where nothing can
    be written. To be called before anything is compiled. Folders that an operator has set win."""
    if not os.access(folder, os.W_OK):
        return None
    cache = folder / "compile-cache"
    if _is_default(variables.get("TORCHINDUCTOR_CACHE_DIR")):
        variables["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        if _is_default(variables.get("TRITON_CACHE_DIR")):
            variables["TRITON_CACHE_DIR"] = str(cache / "triton")
    return cache


def _is_default(path: str | None) -> bool:
    """Torch sets both variables to its own folder, in this process or in the one that started it."""
    return not path or any(part.startswith(_DEFAULT_CACHE) for part in Path(path).parts)
