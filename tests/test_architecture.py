"""Rules of the layout that no reviewer should have to check by eye."""

import ast
import sys
from pathlib import Path

import pytest

import exporters
import loadgen

LOADGEN, EXPORTERS = Path(loadgen.__file__).parent, Path(exporters.__file__).parent
SOURCES = sorted([*LOADGEN.rglob("*.py"), *EXPORTERS.rglob("*.py")])
MAX_LINES = 350


def imports(path: Path) -> set[str]:
    """Full names of the modules a file imports."""
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("path", sorted((LOADGEN / "core").glob("*.py")), ids=lambda p: p.name)
def test_the_core_is_pure(path):
    allowed = {"__future__", "numpy", "scipy", *sys.stdlib_module_names} - {
        "time",
        "socket",
        "threading",
        "subprocess",
        "os",
    }
    others = {n for n in imports(path) if n.split(".")[0] not in allowed and not n.startswith("loadgen.core")}
    assert others == set()


@pytest.mark.parametrize("path", sorted((EXPORTERS / "runtime").glob("*.py")), ids=lambda p: p.name)
def test_the_runtime_is_foreign_code(path):
    assert not {n for n in imports(path) if n.split(".")[0] in ("exporters", "loadgen", "tritonmark")}


def test_exporters_and_loadgen_do_not_know_each_other():
    for path in SOURCES:
        other = "exporters" if LOADGEN in path.parents else "loadgen"
        assert not {n for n in imports(path) if n.split(".")[0] == other}, path


def test_only_the_locust_part_imports_locust():
    users = {p.relative_to(LOADGEN).as_posix() for p in SOURCES if any(n.split(".")[0] == "locust" for n in imports(p))}
    assert users <= {"edge/openloop.py", "edge/web_form.py", "llm.py", "video.py"}


def test_nothing_in_loadgen_shadows_another_module():
    """Locust puts loadgen/ first on sys.path, so a module of that folder must not be named like anybody else's."""
    names = {p.stem for p in LOADGEN.iterdir() if p.suffix == ".py" or p.is_dir()} - {"__init__", "__pycache__"}
    assert not names & set(sys.stdlib_module_names)
    assert names <= {"core", "edge", "data", "llm", "video", "cli"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_files_are_small(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES
