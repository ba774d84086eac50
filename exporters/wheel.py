"""The real tritonserver inside the `nvidia-pytriton` wheel, found without importing it. Its one rule: check first.

Only the python backend is in the wheel. Its stub must match the running Python, stands in another folder than the
backend, needs libpython, and needs numpy < 2 in the `python3` that is first on PATH.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from exporters.errors import UserError

WHEEL = "nvidia-pytriton"
INSTALL = "pip install 'tritonmark[embedded]'"


@dataclass(frozen=True)
class Binary:
    """What is needed to start the server: the executable, the backend folder, and its environment."""

    executable: Path
    backends: Path
    environment: dict[str, str]


def find_binary() -> Binary:
    """The embedded tritonserver, made ready; or a UserError that says how to install what is missing."""
    package = _package_folder()
    _check_numpy()
    server = package / "tritonserver"
    executable = server / "bin" / "tritonserver"
    stub = server / "python_backend_stubs" / f"3.{sys.version_info.minor}" / "triton_python_backend_stub"
    if not executable.is_file():
        raise UserError(f"{executable} is missing; reinstall it with: pip install --force-reinstall {WHEEL}")
    if not stub.is_file():
        raise UserError(
            f"{WHEEL} has no stub for Python 3.{sys.version_info.minor}; use a Python from 3.8 to 3.13 that it has"
        )
    backends = _private_backends(server / "backends" / "python", stub)
    return Binary(executable, backends, _environment(package.parent / "nvidia_pytriton.libs"))


def _package_folder() -> Path:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the embedded Triton is not installed (package {WHEEL}); install it with: {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))


def _check_numpy() -> None:
    version = importlib.metadata.version("numpy")
    if int(version.split(".")[0]) >= 2:
        raise UserError(
            f"numpy {version} in {sys.prefix} breaks Triton's python stub; fix it with: pip install 'numpy<2'"
        )


def _private_backends(backend: Path, stub: Path) -> Path:
    """A folder with `python/`: the backend and the matching stub side by side, made once for each wheel and Python."""
    version = importlib.metadata.version(WHEEL)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tritonmark"
    target = cache / f"triton-{version}-py3.{sys.version_info.minor}"
    if (target / "python" / stub.name).is_file():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=cache))
        shutil.copytree(backend, staging / "python", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy2(stub, staging / "python" / stub.name)
    except OSError as error:
        raise UserError(
            f"cannot write {cache} ({error.strerror}); set XDG_CACHE_HOME to a folder you may write"
        ) from None
    try:
        staging.rename(target)
    except OSError:  # another process was faster
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _environment(libraries: Path) -> dict[str, str]:
    """The server's environment: its libraries, libpython, and this interpreter first on PATH for the stub."""
    environment = dict(os.environ)
    paths = [str(libraries), sysconfig.get_config_var("LIBDIR") or "", environment.get("LD_LIBRARY_PATH", "")]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(path for path in paths if path)
    environment["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), environment.get("PATH", "")])
    environment.pop("PYTHONHOME", None)
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment.setdefault("PYTHONNOUSERSITE", "True")
    # The backend's own threads gain nothing from OpenMP; torch's number is set by the model (settings.json).
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return environment
