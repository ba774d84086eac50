"""Asks a TensorRT-LLM image what the plan assumes of it, in seconds and before any download or build.

Runs inside the container, with its Python and nothing else: `python3 trtllm_probe.py '{"scripts": …, …}'`. Writes
<work>/image.json, and <work>/examples, a link to where this image keeps its example scripts (two places are known:
Triton's images have /app/examples, TensorRT-LLM's own /app/tensorrt_llm/examples). Ends with 1 and one line that says
what is missing.
"""

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

EXAMPLES = ("app/examples", "app/tensorrt_llm/examples")
HELP_S = 300.0  # a first `import tensorrt_llm` from a cold disk is slow


def lacks(program: list[str], flags: list[str]) -> str:
    """What is wrong with a program, by its own --help: it cannot run, or it has no such option. Empty: nothing."""
    name = Path(program[-1]).name
    try:
        done = subprocess.run([*program, "--help"], capture_output=True, text=True, timeout=HELP_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{name} --help cannot run ({type(error).__name__})"
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        return f"{name} --help fails: {last[:200]}"
    known = set(re.findall(r"--[\w-]+", done.stdout + done.stderr))
    missing = [flag for flag in flags if flag not in known]
    return f"{name} has no {', '.join(missing)}" if missing else ""


def probe(root: Path, work: Path, wanted: dict) -> list[str]:
    """Everything that is wrong; when nothing is, what was found lies in `work`."""
    wrong = [f"no {wanted['all_models']}/{part}/config.pbtxt" for part in wanted["parts"]
             if not (root / wanted["all_models"].lstrip("/") / part / "config.pbtxt").is_file()]  # fmt: skip
    places = [root / place for place in EXAMPLES]
    scripts = list(wanted["scripts"])
    found = next((p for p in places if all((p / script).is_file() for script in scripts)), None)
    if scripts and found is None:
        wrong.append(f"no {' or '.join(str(p / scripts[0]) for p in places)}")
    programs = [([name], flags) for name, flags in wanted["programs"].items()]
    if found:
        programs += [([sys.executable, str(found / script)], flags) for script, flags in wanted["scripts"].items()]
    wrong += filter(None, (lacks(program, flags) for program, flags in programs))
    if wrong:
        return wrong
    link = work / "examples"
    link.unlink(missing_ok=True)
    if found:
        link.symlink_to(found)
    versions = {}
    for name in ("tensorrt_llm", "tensorrt", "torch", "transformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    (work / "image.json").write_text(json.dumps({"examples": str(found), "versions": versions}) + "\n")
    return []


if __name__ == "__main__":
    problems = probe(Path("/"), Path("/work"), json.loads(sys.argv[1]))
    if problems:
        sys.exit(f"this image is not what the plan needs: {'; '.join(problems)}")
