"""Reference answers: whose prompts they answer."""

import json

import pytest
from click.testing import CliRunner

from exporters.cli import cli
from exporters.errors import UserError
from exporters.reference import prompts


def test_prompts_of_a_file_and_of_the_corpus(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one\u2028line"}\n\n{"text": "two", "prompt": "no"}\n{"prompt": "three"}\n', "utf-8")
    assert prompts(2, path) == ["one\u2028line", "two"]
    assert prompts(9, path) == ["one\u2028line", "two", "three"]
    assert len(set(prompts(16))) == 16


@pytest.mark.parametrize(
    "text", ["", "\n", "no json\n", "[1]\n", '{"output": "x"}\n', '{"prompt": 5}\n', '{"prompt": ""}\n']
)
def test_broken_prompts_are_refused(tmp_path, text):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="expected JSONL with `prompt`"):
        prompts(4, path)
    with pytest.raises(UserError, match="No such file"):
        prompts(4, tmp_path / "none.jsonl")


def test_reference_prompts_are_answered(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "A clock."}\n{"prompt": "Second."}\n{"prompt": "Third."}\n')
    words = ["export", "phi-2-tiny", "--out", str(tmp_path / "models"), "--reference", "2", "--reference-prompts"]
    done = CliRunner().invoke(cli, [*words, str(path)])
    assert done.exit_code == 0, done.output
    lines = (tmp_path / "models" / "phi-2-tiny" / "reference.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["prompt"] for row in rows] == ["A clock.", "Second."]
    assert all(len(row["token_ids"]) == 32 and row["output"] for row in rows)
