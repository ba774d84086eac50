"""The commands, as a user types them."""

import json

import pytest
from click.testing import CliRunner

from exporters.cli import cli
from exporters.errors import UserError


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_models_table():
    result = run("models")
    assert result.exit_code == 0
    assert "phi-2-tiny" in result.output and "torch-eager" in result.output


def test_models_json():
    entries = {entry["name"]: entry for entry in json.loads(run("models", "--json").output)}
    assert entries["phi-2"]["hub_id"] == "microsoft/phi-2"
    assert {"torch-eager", "vllm", "tensorrtllm"} <= set(entries["phi-2-tiny"]["backends"])
    assert entries["phi-2"]["max_context"] == 2048


def test_export_then_refuse_then_force(tmp_path):
    assert str(tmp_path / "phi-2-tiny") in run("export", "phi-2-tiny", "--out", tmp_path).output
    again = run("export", "phi-2-tiny", "--out", tmp_path)
    assert isinstance(again.exception, UserError) and "--force" in str(again.exception)
    assert run("export", "phi-2-tiny", "--out", tmp_path, "--force").exit_code == 0


@pytest.mark.parametrize("command", [["models"], ["export"], ["serve"]])
def test_help(command):
    assert run(*command, "--help").exit_code == 0


def test_serve_without_repository(tmp_path):
    assert "tritonmark export" in str(run("serve", "--repository", tmp_path / "none").exception)
