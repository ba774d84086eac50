"""Every option that our own texts name can be typed: messages, advice, docstrings, comments."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import click
import pytest

import tritonmark
from loadgen.edge.options import OPTIONS

ROOT = Path(__file__).parents[1]
OPTION = re.compile(r"(?<![\w-])(?<!var\()--[a-z][a-z0-9_-]*[a-z0-9]")
# Options of programs that a sentence names, beside our own and Locust's.
OTHERS = {
    "--force-reinstall": "pip",
    "--runtime": "nvidia-ctk",
    "--build": "docker compose up",
    "--model_config": "trtllm-build",
    "--dtype": "MLCommons' accuracy scripts",
    "--server": "loadgen.edge.telemetry_sampler, which only we start",
}


def ours() -> set[str]:
    """Options of every command of the front door, of the locust files, and of the scripts beside them."""

    def of(command: click.Command) -> set[str]:
        found = {o for p in command.params if isinstance(p, click.Option) for o in (*p.opts, *p.secondary_opts)}
        return found.union(*(of(c) for c in getattr(command, "commands", {}).values()))

    return of(tritonmark.cli) | {o.flag for o in OPTIONS} | {"--help"}


@cache
def locusts() -> set[str]:
    """By Locust's own --help, in a process of its own: importing it here would patch the threads of the test run."""
    done = subprocess.run([sys.executable, "-m", "locust", "--help"], capture_output=True, text=True, check=True)
    return set(OPTION.findall(done.stdout))


def named(text: str) -> set[str]:
    """Options in the sentences of a Python source; a string without a blank is an argument of a program we start."""
    constants = (n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant))
    sentences = (c for c in constants if isinstance(c, str) and re.search(r"[a-z] | [(]", c))
    return {option for sentence in sentences for option in OPTION.findall(sentence)}


def test_every_option_in_a_message_advice_or_docstring_exists():
    known = ours() | locusts() | set(OTHERS)
    faults = []
    for path in (p for folder in ("loadgen", "exporters") for p in sorted((ROOT / folder).rglob("*.py"))):
        unknown = named(path.read_text(encoding="utf-8")) - known
        faults += [f"{path.relative_to(ROOT)}: no command has {option}" for option in sorted(unknown)]
    assert not faults


@pytest.mark.parametrize(
    "source", ['x = "raise --drain-timeout"', 'f"use {n} (--no-such)"', '"""Give --else-where."""']
)
def test_an_option_that_no_command_has_is_found(source):
    assert named(source) - ours() - locusts()
