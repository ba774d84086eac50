"""The wheel, installed into an environment that has only what it needs, used in an empty folder."""

import filecmp
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from bare_python import bare_python, clean_environment

from exporters import stack

ROOT = Path(stack.__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
LEAVE = shutil.ignore_patterns(
    "__pycache__", "*.egg-info", "build", ".venv", ".git", "results", "benchmarks", ".*_cache"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, with a user's own files lying in it: they must not come along."""
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, source, ignore=LEAVE)
    for name in (".env", "deploy/hosts.toml", "deploy/targets/hosts.json"):
        (source / name).write_text("private")
    command = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)]
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The `tritonmark` of an environment into which the wheel was installed."""
    python = bare_python(tmp_path_factory.mktemp("installed"))
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return python.with_name("tritonmark")


def call(program, *arguments, cwd):
    return subprocess.run(
        [str(program), *arguments], cwd=cwd, capture_output=True, text=True, timeout=100, env=clean_environment()
    )


def test_nothing_private_and_nothing_twice_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        assert not [n for n in names if files.read(n) == b"private"]
    assert len(names) == len(set(names)) and "exporters/data/stack/docker-compose.yml" in names


def test_version_and_help_work_in_an_empty_folder(installed, tmp_path):
    done = call(installed, "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"tritonmark, version {VERSION}\n"), done.stderr
    done = call(installed, "--help", cwd=tmp_path)
    assert done.returncode == 0 and all(word in done.stdout for word in ("bench", "doctor", "init")), done.stderr


def test_init_writes_what_the_repository_has(installed, tmp_path):
    done = call(installed, "init", "bench", cwd=tmp_path)
    assert done.returncode == 0 and "bench" in done.stdout, done.stderr
    written = tmp_path / "bench"
    names = list(stack.stack_files(ROOT))
    assert [n for n in names if not filecmp.cmp(ROOT / n, written / n, shallow=False)] == []
    assert sorted(stack.stack_files(written)) == sorted(names)
    assert not (written / "exporters" / "data" / "stack").exists() and not list(written.rglob("*.pyc"))
    for package in ("loadgen", "exporters"):
        ours = {p.relative_to(ROOT) for p in (ROOT / package).rglob("*.py")}
        assert {p.relative_to(written) for p in (written / package).rglob("*.py")} == ours
    done = call(installed.with_name("python"), "-m", "tritonmark", "--version", cwd=written)
    assert done.stdout == f"tritonmark, version {VERSION}\n", done.stderr
    again = call(
        installed.with_name("python"), "-m", "tritonmark", "init", str(tmp_path / "again"), cwd=written
    )  # a written folder is a source like a checkout
    assert again.returncode == 0, again.stderr


def test_compose_and_dockerfiles_find_all_their_files_in_a_written_folder(tmp_path):
    stack.write_stack(tmp_path / "new")
    written = tmp_path / "new"
    wanted = set()
    for name in ("docker-compose.yml", *(f"deploy/{p.name}" for p in (written / "deploy").glob("*.yml"))):
        document = yaml.safe_load((written / name).read_text())
        for service in (document.get("services") or {}).values():
            wanted |= {v.split(":")[0] for v in service.get("volumes", ()) if isinstance(v, str) and v.startswith("./")}
            if isinstance(service.get("build"), dict) and "dockerfile" in service["build"]:
                wanted.add(service["build"]["dockerfile"])
    for file in (written / "docker").glob("*.Dockerfile"):
        for line in re.findall(r"^COPY (?!--from)(.+)", file.read_text(), re.M):
            wanted |= set(line.split()[:-1])
    assert len(wanted) > 12 and [name for name in sorted(wanted) if not (written / name).exists()] == []


@pytest.mark.parametrize("what", ("a file in it", "is a file", "not writable"))
def test_init_refuses_in_one_line_and_changes_nothing(installed, tmp_path, what):
    target = tmp_path / "there"
    if what == "a file in it":
        target.mkdir()
        (target / ".keep").touch()
    elif what == "is a file":
        target.write_text("mine")
    else:
        target = Path("/proc/none")
    before = sorted(tmp_path.rglob("*"))
    done = call(installed, "init", str(target), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_file_of_the_stack_ends_the_build(tmp_path):
    with pytest.raises(FileNotFoundError, match="belongs to the stack"):
        list(stack.stack_files(tmp_path))
