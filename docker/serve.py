"""Starts Triton: with the command that the export of $MODEL wrote, where it wrote one, else with the arguments.

An engine of TensorRT-LLM has its parts in a second model repository, and one process for each GPU; how to start that is
in its `1/launch.json`.    python3 serve.py tritonserver --model-repository=/models …
"""

import json
import os
import sys
from pathlib import Path

command = sys.argv[1:]
repository = next(word for word in command if word.startswith("--model-repository="))
root = Path(repository.partition("=")[2])
launch = root / os.environ["MODEL"] / "1" / "launch.json"
if launch.is_file():
    written = json.loads(launch.read_text(encoding="utf-8"))
    command = written["command"]
    if repository not in command:
        sys.exit(f"error: {launch} was exported for another folder; export it again with --served-from {root}")
    print(f"starting as {launch} says; built in {written['image']}", flush=True)
os.execvp(command[0], command)
