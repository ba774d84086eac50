"""`tritonmark init FOLDER`: the compose stack, Grafana's boards, Prometheus' files and settings, out of the package.

In a checkout they are taken from where they lie; setup.py copies them into the wheel, so there is one source. The code
that the images are built from is that of the installed package. Uses nothing but the standard library, since setup.py
runs it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

ROOTS = (
    "docker-compose.yml", ".env.example", ".dockerignore", "deploy", "docker", "grafana/dashboards",
    "grafana/provisioning", "prometheus", "pyproject.toml", "README.md", "LICENSE", "scripts/install_torch.py",
)  # fmt: skip
CODE = ("tritonmark.py", "loadgen", "exporters")  # what the Dockerfiles copy besides
PRIVATE = ("hosts.toml", ".env")  # a user's own, never a part of it
SKIP = shutil.ignore_patterns("__pycache__", "*.pyc", "stack")
PACKAGES = Path(__file__).parents[1]  # a checkout, or site-packages


def stack_files(root: Path) -> Iterator[str]:
    """Names, relative to `root`, of the files of the stack, without the code. FileNotFoundError: one is missing."""
    for name in ROOTS:
        path = root / name
        if not path.exists():
            raise FileNotFoundError(f"{path} belongs to the stack, but is not there")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            made_by_hosts = file.suffix == ".json" and file.parent.name == "targets"
            if file.is_file() and "__pycache__" not in file.parts and file.name not in PRIVATE and not made_by_hosts:
                yield file.relative_to(root).as_posix()


def write_stack(folder: Path) -> list[str]:
    """Writes all of it into `folder`, which must be empty or not exist (FileExistsError); returns the files' names."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder")
    packed = Path(__file__).with_name("data") / "stack"
    source = packed if packed.is_dir() else PACKAGES
    names = list(stack_files(source))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, folder / name)
    for name in CODE:
        if (PACKAGES / name).is_dir():
            shutil.copytree(PACKAGES / name, folder / name, ignore=SKIP)
        else:
            shutil.copy(PACKAGES / name, folder / name)
    (folder / "results").mkdir()
    return names
