"""What a shell offers after TAB, asked as a shell asks: through the command's environment."""

import os
import subprocess
import sys

import pytest

import tritonmark


def offered(*words):
    asked = {"_TRITONMARK_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", "from tritonmark import main; main()"],
        capture_output=True, text=True, timeout=60, env=os.environ | asked,
    )  # fmt: skip
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "words, among",
    [(("tritonmark", "do"), "doctor"), (("tritonmark", "export", "phi-3"), "phi-3.5-moe"), (("tritonmark", "run", "off"), "offline"),
     (("tritonmark", "doctor", "--model", "ll"), "llama-3-70b"), (("tritonmark", "doctor", "--t"), "--tag")],
)  # fmt: skip
def test_a_shell_is_offered(words, among):
    found = offered(*words)
    assert among in found and all(name.startswith(words[-1]) for name in found)


def test_every_scenario_argument_is_completed():
    """Also of commands that come later."""
    with_scenario = [
        parameter for command in tritonmark.cli.commands.values() for parameter in command.params
        if parameter.name == "scenario" and parameter.param_type_name == "argument"
    ]  # fmt: skip
    assert len(with_scenario) >= 4
    assert all(p.shell_complete(None, "off")[0].value == "offline" for p in with_scenario)
