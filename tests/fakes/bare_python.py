"""A Python that has all that Tritonmark needs, but not Tritonmark: what somebody has who only cloned it."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

SITE = Path(sysconfig.get_path("purelib"))


def bare_python(folder: Path) -> Path:
    """Makes an environment in `folder`; returns its `python`. Packages are linked to, so it takes a second."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    links = folder / "packages"
    links.mkdir()
    for entry in SITE.iterdir():
        if "tritonmark" not in entry.name and entry.suffix != ".pth":
            (links / entry.name).symlink_to(entry)
    own = next((folder / "venv" / "lib").glob("python3.*")) / "site-packages"
    (own / "packages.pth").write_text(f"{links}\n")
    return python


def clean_environment() -> dict[str, str]:
    """This process's environment without what would lead Python to the checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
