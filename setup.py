"""Builds the wheel: what pyproject.toml says, and the files that `tritonmark init` writes, from where they lie."""

import runpy
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildPy(build_py):
    """Copies the stack into exporters/data/stack of what is built; one source of truth in the repository."""

    def run(self):
        super().run()
        if self.editable_mode or not (ROOT / "docker-compose.yml").is_file():
            return  # the checkout has them; images are built from a part of it and write no stack
        stack = runpy.run_path(str(ROOT / "exporters" / "stack.py"))
        for name in stack["stack_files"](ROOT):
            target = Path(self.build_lib, "exporters", "data", "stack", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
            shutil.copymode(ROOT / name, target)


setup(cmdclass={"build_py": BuildPy})
