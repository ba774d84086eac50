"""What the first step finds out of an image: here a folder with programs whose --help is argparse's own."""

import json
import os
import sys

import pytest

from exporters.trtllm_probe import EXAMPLES, probe

PROGRAM = """#!{python}
import argparse
parser = argparse.ArgumentParser()
for flag in {flags!r}:
    parser.add_argument(flag)
parser.parse_args()
"""
WANTED = {
    "all_models": "/app/all_models", "parts": ["preprocessing", "tensorrt_llm"],
    "programs": {"trtllm-build": ["--output_dir", "--kv_cache_type"]},
    "scripts": {"quantization/quantize.py": ["--model_dir", "--tp_size"]},
}  # fmt: skip


def program(path, flags):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PROGRAM.format(python=sys.executable, flags=sorted(flags)))
    path.chmod(0o755)


@pytest.fixture(params=EXAMPLES)
def image(request, tmp_path, monkeypatch):
    """An image that has all that is wanted, with its examples in one of the two known places."""
    root = tmp_path / "image"
    for part in WANTED["parts"]:
        (root / "app/all_models" / part).mkdir(parents=True)
        (root / "app/all_models" / part / "config.pbtxt").touch()
    program(root / "bin/trtllm-build", ["--output_dir", "--kv_cache_type", "--other"])
    program(root / request.param / "quantization/quantize.py", ["--model_dir", "--tp_size"])
    monkeypatch.setenv("PATH", f"{root / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "work").mkdir()
    return root


def test_an_image_that_has_all_is_linked_and_noted(image, tmp_path):
    work = tmp_path / "work"
    for _ in range(2):  # a second build in the same folder
        assert probe(image, work, WANTED) == []
    assert (work / "examples/quantization/quantize.py").is_file()
    assert "torch" in json.loads((work / "image.json").read_text())["versions"]


def test_random_weights_need_no_examples(image, tmp_path):
    assert probe(image, tmp_path / "work", {**WANTED, "scripts": {}}) == []


def test_what_is_missing_is_named_all_at_once(image, tmp_path):
    (image / "app/all_models/tensorrt_llm/config.pbtxt").unlink()
    program(image / "bin/trtllm-build", ["--output_dir", "--kv_cache_types"])
    (script,) = image.rglob("quantize.py")
    script.unlink()
    wrong = probe(image, tmp_path / "work", WANTED)
    assert len(wrong) == 3
    assert wrong[0] == "no /app/all_models/tensorrt_llm/config.pbtxt"
    assert "app/examples/quantization/quantize.py or " in wrong[1]
    assert wrong[2] == "trtllm-build has no --kv_cache_type"
    assert not (tmp_path / "work/image.json").exists()


def test_a_program_that_cannot_start_says_why(image, tmp_path):
    (script,) = image.rglob("quantize.py")
    script.write_text("import no_such_library")
    (wrong,) = probe(image, tmp_path / "work", WANTED)
    assert wrong == "quantize.py --help fails: ModuleNotFoundError: No module named 'no_such_library'"
    (image / "bin/trtllm-build").unlink()
    assert probe(image, tmp_path / "work", WANTED)[0] == "trtllm-build --help cannot run (FileNotFoundError)"
