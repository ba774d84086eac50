"""Reference answers: whose prompts they answer."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from exporters.cli import cli
from exporters.errors import UserError
from exporters.export import export_model
from exporters.reference import prompts, read_prompts


def test_prompts_of_a_file_and_of_the_corpus(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one\u2028line"}\n\n{"text": "two", "prompt": "no"}\n{"prompt": "three"}\n', "utf-8")
    assert prompts(2, path) == ["one\u2028line", "two"]
    assert read_prompts(path) == ["one\u2028line", "two", "three"]
    assert len(set(prompts(16))) == 16


def test_fewer_prompts_than_asked_for(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    said = rf"--reference 16 asks for more prompts than the 2 in {path}; give --reference 2, or more"
    for model in ("phi-2-tiny", "cogvideox-5b-tiny"):
        with pytest.raises(UserError, match=said.replace("16", "(16|8)")):
            export_model(model, out=tmp_path / "out", reference=16, reference_prompts=path)
    with pytest.raises(UserError, match=r"--reference 9999 .* in the corpus"):
        prompts(9999)
    assert not (tmp_path / "out").exists()


def test_a_file_of_prompts_says_how_many(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    words = ["export", "phi-2-tiny", "--out", str(tmp_path), "--reference-prompts", str(path)]
    assert CliRunner().invoke(cli, words).exit_code == 0
    assert len((tmp_path / "phi-2-tiny/reference.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("model", "message"),
    [("phi-2-tiny", r"prompt 2 \('word word .*has \d+ tokens; 1 to 2016 leave"),
     ("cogvideox-5b-tiny", r"prompt 2 \('word word .*has \d+ tokens, a clip's at most 226")],
)  # fmt: skip
def test_a_prompt_beyond_the_context(tmp_path, model, message):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "short"}}\n{{"prompt": "{"word " * 3000}"}}\n')
    with pytest.raises(UserError, match=message) as caught:
        export_model(model, out=tmp_path / "out", reference=2, reference_prompts=path)
    assert "\n" not in str(caught.value) and list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("model", ["phi-2-tiny", "phi-3.5-moe-tiny"])
def test_reference_answers_come_without_warnings(tmp_path, model):
    words = [sys.executable, "-m", "tritonmark", "export", model, "--out", str(tmp_path), "--reference", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""


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
