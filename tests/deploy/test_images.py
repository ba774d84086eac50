"""Rules for the Dockerfiles and their scripts, as linters have them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def instructions(path):
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.M).replace("\\\n", " ")
    return [(w[0].upper(), w[1]) for line in text.splitlines() if len(w := line.split(None, 1)) == 2]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_dockerfile_rules(path):
    lines = instructions(path)
    names = [name for name, _ in lines]
    assert "ADD" not in names and "MAINTAINER" not in names
    users = [rest for name, rest in lines if name == "USER"]
    assert users and users[-1].split(":")[0] not in ("0", "root")
    assert names.count("HEALTHCHECK") == 1
    base = next(rest for name, rest in lines if name == "ARG")
    assert re.fullmatch(r"BASE_IMAGE=\S+:\S*\d\S*", base)
    assert all(rest.split()[0] == "${BASE_IMAGE}" for name, rest in lines if name == "FROM")
    for name, rest in lines:
        assert not (name in ("ENV", "ARG") and re.search(r"TOKEN|PASSWORD|SECRET", rest, re.I)), rest
        if name == "RUN":
            assert "sudo" not in rest and not re.search(r"curl[^|]*\|\s*(ba)?sh", rest)
            if "pip install" in rest and "--no-deps" not in rest:
                assert "--constraint" in rest
        if name == "COPY" and "--from" not in rest:
            assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest


def test_the_lock_pins_every_dependency():
    lines = [x for x in (ROOT / "docker/constraints.txt").read_text().splitlines() if x and x[0] != "#"]
    pinned = {}
    for line in lines:
        match = re.fullmatch(r"([a-z0-9.-]+)==([^ ;]+)( ; .*)?", line)
        assert match, line
        pinned[match[1]] = match[2]
    done = subprocess.run(
        ["python3", "docker/requirements.py", "embedded"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wanted = [re.match(r"[\w.-]+", line)[0].lower() for line in done.stdout.split("\n") if line]
    assert "torch" not in wanted
    assert set(wanted) <= set(pinned)
    assert pinned["numpy"].startswith("1.")  # what Triton's python stub reads


def test_nothing_private_reaches_the_build():
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    assert ignored[1] == "*"
    assert not {"!.env", "!results", "!model_repository", "!."} & set(ignored)


@pytest.mark.parametrize("path", [*sorted((ROOT / "docker").glob("*.sh")), ROOT / "scripts/compose_test.sh"],
                         ids=lambda p: p.name)  # fmt: skip
def test_shell_scripts_stop_at_errors_and_parse(path):
    shell = "bash" if "bash" in path.read_text().splitlines()[0] else "sh"
    assert re.search(r"^set -eu", path.read_text(), re.M)
    subprocess.run([shutil.which(shell), "-n", str(path)], check=True)
