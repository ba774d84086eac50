"""A checkout that is not installed works: `python -m tritonmark`, and Locust with our files."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from bare_python import bare_python, clean_environment

from loadgen.edge import about

ROOT = Path(about.__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return bare_python(tmp_path_factory.mktemp("bare"))


def call(python, *arguments, cwd=ROOT):
    return subprocess.run(
        [str(python), *arguments], cwd=cwd, capture_output=True, text=True, timeout=100, env=clean_environment()
    )


def test_the_environment_lacks_tritonmark(python, tmp_path):
    found = call(python, "-c", "import click, locust; import tritonmark", cwd=tmp_path)
    assert "No module named 'tritonmark'" in found.stderr


def test_the_module_says_version_and_its_own_name(python):
    done = call(python, "-m", "tritonmark", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"tritonmark, version {VERSION}"), done.stderr
    assert re.search(r"^Usage: tritonmark ", call(python, "-m", "tritonmark", "--help").stdout, re.M)


def test_the_file_works_from_another_folder(python, tmp_path):
    done = call(python, str(ROOT / "tritonmark.py"), "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, f"tritonmark, version {VERSION}"), done.stderr


@pytest.mark.parametrize("elsewhere", (False, True))
@pytest.mark.parametrize("name", ("llm", "video"))
def test_locust_takes_the_locust_files(python, tmp_path, name, elsewhere):
    program = "import sys; sys.argv[0] = 'locust'; sys.path.pop(0); from locust.main import main; main()"
    path = str(ROOT / "loadgen" / f"{name}.py") if elsewhere else f"loadgen/{name}.py"
    done = call(
        python, "-c", program, "-f", path, "--target-qps", "4", "--list", cwd=tmp_path if elsewhere else ROOT
    )  # as its script does
    assert done.returncode == 0 and "User" in done.stdout.split(":", 1)[1], done.stderr


def test_a_run_can_be_sealed_and_shown_without_a_package(python, tmp_path):
    """What asks for versions: the record of the client, LoadGen's files, reports."""
    program = (
        "from loadgen.edge.conductor import client_facts; from loadgen.edge.mlperf_log import notice;"
        "import loadgen.edge.compare_report_html, loadgen.edge.report_html;"
        "print(client_facts(1)['versions']['tritonmark'], notice())"
    )
    done = call(python, "-c", program)
    assert done.stdout.split()[0] == VERSION and VERSION in done.stdout.split("by")[1], done.stderr


def test_an_installed_package_says_its_own_version(monkeypatch, tmp_path):
    monkeypatch.setattr(about, "PROJECT", tmp_path / "pyproject.toml")
    about.tool_version.cache_clear()
    assert about.tool_version() == VERSION
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "of-another"\nversion = "9"\n')
    about.tool_version.cache_clear()
    assert about.tool_version() == VERSION
    about.tool_version.cache_clear()
    assert about.package_version("no-such-distribution") == "unknown"


def test_nothing_else_asks_the_package_for_its_version():
    """It need not be installed; only about.py knows what then."""
    asks = re.compile(r"""version\(\s*["']tritonmark["']|package_name=["']tritonmark""")
    sources = [ROOT / "tritonmark.py", *(ROOT / "loadgen").rglob("*.py"), *(ROOT / "exporters").rglob("*.py")]
    assert [str(path) for path in sources if asks.search(path.read_text())] == []
