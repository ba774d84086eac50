"""Prints the dependencies in pyproject.toml, and those of the named extras: `python requirements.py embedded`.

An image installs them in a layer of their own, before the project's files, without torch, which has its own step.
"""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
wanted = list(project["dependencies"])
for extra in sys.argv[1:]:
    wanted += project["optional-dependencies"][extra]
print("\n".join(line for line in wanted if re.match(r"[\w.-]+", line)[0] != "torch"))
