"""The scripts that make and start what is served, outside of a container: `/models` is a temporary folder here, and
`tritonmark` and Triton are programs that say how they were called."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from exporters.trtllm_repository import launch_command

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(tmp_path):
    """A folder of models, and programs that write their arguments to `called`."""
    for name in ("tritonmark", "tritonserver", "mpirun"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" > {tmp_path}/called\n')
        program.chmod(0o755)
    (tmp_path / "models").mkdir()
    return tmp_path


def engine(bench, command):
    """What `tritonmark export phi-2 --backend tensorrtllm` leaves on the host, as far as the scripts look at it."""
    version = bench / "models" / "phi-2" / "1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text('name: "phi-2"\n')
    (version / "launch.json").write_text(json.dumps({"image": "an-image", "command": command}))


def run(bench, command, **settings):
    env = {"PATH": f"{bench}/bin:{os.environ['PATH']}", "MODEL": "phi-2", "WEIGHTS": "synthetic", **settings}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    called = bench / "called"
    return done, called.read_text().splitlines() if called.exists() else []


def export(bench, **settings):
    script = (ROOT / "docker/export.sh").read_text().replace("/models", f"{bench}/models")
    return run(bench, ["sh", "-c", script], **settings)


def serve(bench):
    program = [sys.executable, str(ROOT / "docker/serve.py")]
    return run(bench, [*program, "tritonserver", f"--model-repository={bench}/models", "--load-model=phi-2"])


def test_an_engine_of_the_host_is_left_alone(bench):
    engine(bench, ["x"])
    done, called = export(bench, BACKEND="tensorrtllm")
    assert done.returncode == 0 and "used as it is" in done.stdout and called == []


def test_a_missing_engine_is_said_with_the_command_that_makes_it(bench):
    done, called = export(bench, BACKEND="tensorrtllm")
    assert done.returncode == 2 and called == []
    assert "tritonmark export phi-2 --backend tensorrtllm --out" in done.stderr and done.stderr.count("\n") == 1


def test_an_engine_is_not_replaced_by_another_backend(bench):
    engine(bench, ["x"])
    done, called = export(bench, BACKEND="torch-eager")
    assert done.returncode == 2 and called == [] and "set BACKEND=tensorrtllm" in done.stderr
    assert (bench / "models/phi-2/1/launch.json").exists()


def test_other_backends_are_exported_once(bench):
    done, called = export(bench, BACKEND="torch-eager", EXPORT_ARGS="--precision fp16")
    assert done.returncode == 0 and called[:5] == ["tritonmark", "export", "phi-2", "--backend", "torch-eager"]
    assert called[-2:] == ["--precision", "fp16"]
    (bench / "models/phi-2").mkdir()
    (bench / "models/phi-2/config.pbtxt").touch()
    (bench / "called").unlink()
    assert export(bench, BACKEND="torch-eager", EXPORT_ARGS="--precision fp16")[1] == []


@pytest.mark.parametrize("world", [1, 2])
def test_an_engine_is_started_as_its_export_says(bench, world):
    command = launch_command("phi-2", f"{bench}/models", world)
    engine(bench, command)
    done, called = serve(bench)
    assert done.returncode == 0 and called == command and "an-image" in done.stdout
    assert f"--model-repository={bench}/models/phi-2/1/parts" in called


def test_other_models_are_started_with_the_given_words(bench):
    assert serve(bench)[1] == ["tritonserver", f"--model-repository={bench}/models", "--load-model=phi-2"]


def test_an_engine_for_another_folder_is_refused(bench):
    engine(bench, launch_command("phi-2", "/elsewhere", 1))
    done, called = serve(bench)
    assert done.returncode == 1 and called == []
    assert f"export it again with --served-from {bench}/models" in done.stderr


def test_a_backend_without_an_image_is_refused_before_anything_is_exported(bench):
    done, called = export(bench, BACKEND="tensorrt")
    assert done.returncode == 2 and "BACKEND=tensorrt has no image" in done.stderr and called == []
