"""Preflight: a pure decision about given machines, and a probe that never fails."""

import dataclasses

import pytest

from exporters import preflight
from exporters.catalogue import find_model
from exporters.errors import UserError
from exporters.gpus import Gpu, weights_bytes
from exporters.preflight import Machine, Needs, problems

GIB = 1 << 30
GTX_1080 = Gpu("NVIDIA GeForce GTX 1080", 6.1, 8 * GIB)
V100 = Gpu("Tesla V100-SXM2-16GB", 7.0, 16 * GIB)
A100 = Gpu("NVIDIA A100-SXM4-80GB", 8.0, 80 * GIB)
L4 = Gpu("NVIDIA L4", 8.9, 23034 << 20)
H100 = Gpu("NVIDIA H100 80GB HBM3", 9.0, 81559 << 20)
B200 = Gpu("NVIDIA B200", 10.0, 180 * GIB)


def machine(*gpus, **facts):
    return Machine(**{"gpus": gpus, "driver": "590.44.01", "docker": "", "image_present": True,
                      "free_bytes": 10**12, "hub_token": True, **facts})  # fmt: skip


def needs(**facts):
    return Needs(**{"what": "phi-2 in fp8", "capability": 8.9, "capability_for": "fp8", "gpus": 1,
                    "weight_bytes": 3e9, "disk_bytes": 20e9, "image_gb": 14.2, "least_driver": "580.65",
                    "gated": False, **facts})  # fmt: skip


@pytest.mark.parametrize("gpu", [L4, H100, B200])
def test_nothing_stands_in_the_way(gpu):
    assert problems(needs(), machine(gpu)) == []


@pytest.mark.parametrize("gpu", [GTX_1080, V100, A100])
def test_old_gpus_are_named(gpu):
    (line,) = problems(needs(), machine(gpu))
    assert gpu.name in line and str(gpu.capability) in line and "8.9" in line


@pytest.mark.parametrize(
    ("facts", "there", "message"),
    [
        ({}, machine(), "no NVIDIA GPU"),
        ({"gpus": 2}, machine(H100), "spread over 2 GPUs, but there are 1"),
        ({"weight_bytes": 141e9}, machine(H100), "152 GB on each of 1 GPU"),
        ({"weight_bytes": 141e9, "gpus": 2}, machine(H100, L4), "has 24 GB"),
        ({}, machine(H100, driver="535.1"), "driver 535.1 is too old: the image needs 580.65"),
        ({}, machine(H100, docker="it is not installed"), "docker cannot be used .it is not installed"),
        ({}, machine(H100, free_bytes=19 * 10**9), "19 GB free.*needs 20 GB"),
        ({}, machine(H100, free_bytes=30 * 10**9, image_present=False), "needs 34 GB"),
        ({"gated": True}, machine(H100, hub_token=False), "gated.*hf auth login"),
    ],
)
def test_each_problem_is_one_line(facts, there, message):
    (line,) = problems(needs(**facts), there)
    assert "\n" not in line
    with pytest.raises(UserError, match=message):
        preflight.require(needs(**facts), there)


def test_all_problems_at_once():
    there = machine(GTX_1080, driver="470.1", docker="it is not installed", free_bytes=0)
    assert len(problems(needs(), there)) == 4


def test_two_gpus_share_the_weights():
    assert problems(needs(weight_bytes=141e9, gpus=2), machine(H100, H100)) == []


def test_weights_are_counted_as_the_catalogue_counts():
    phi = find_model("phi-2")
    assert weights_bytes(phi, "bf16") == 2 * phi.parameters
    ends = 2 * 51200 * 2560
    assert weights_bytes(phi, "fp8") == (phi.parameters - ends) + 2 * ends


def test_the_probe_asks_for_gpus_and_driver(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "find_gpus", lambda: [H100, L4])
    said = {"nvidia-smi": "580.95.05\n580.95.05"}
    monkeypatch.setattr(preflight, "_answer", lambda *command: said.get(command[0], ""))
    monkeypatch.setattr(preflight.shutil, "which", lambda name: None)
    found = preflight.probe("image", tmp_path / "not" / "yet")
    assert found.gpus == (H100, L4) and found.driver == "580.95.05"
    assert found.docker == "it is not installed" and found.free_bytes > 0 and not found.image_present


def test_the_probe_survives_nonsense(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "_answer", lambda *command: "No devices were found")
    assert preflight.probe("image", tmp_path).driver is None


def test_the_probe_runs_here(tmp_path):
    found = preflight.probe("no-such-image", tmp_path)
    assert isinstance(found, Machine) and dataclasses.asdict(found)["image_present"] is False


def test_a_token_is_noticed_but_not_read(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert not preflight._has_token()
    (tmp_path / "token").write_text("x")
    (tmp_path / "token").chmod(0)
    assert preflight._has_token()
