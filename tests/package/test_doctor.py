"""What the doctor says of machines that this one is not (nvidia-smi's text in its own format), and of this one."""

import dataclasses
import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from example_gpus import GTX_1080, H100, H200

from exporters import doctor as doctor_module
from exporters import doctor_probe, machine
from exporters.catalogue import find_model
from exporters.doctor import FAIL, OK, WARN, diagnose, driver_table, tag_of
from exporters.doctor_probe import Seen
from exporters.errors import UserError
from exporters.preflight import Machine

ROOT = Path(doctor_module.__file__).parents[1]
SMI = """Fri Nov 27 17:31:09 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI {driver:<22} Driver Version: {driver:<14} CUDA Version: {cuda:<8} |
+-----------------------------------------+------------------------+----------------------+
| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |
|   0  NVIDIA H200                    On  |   00000000:00:06.0 Off |                    0 |
| N/A   37C    P0             79W /  700W |       0MiB / 143771MiB |      0%      Default |
+-----------------------------------------+------------------------+----------------------+
"""
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.159"
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
    "driver is installed and running.\n"
)
GOOD = Seen(Machine((H200,), "610.43.02", "", True, 500_000_000_000, True), "13.3", "", (), True, 16, 65535, 0.02)


def changed(machine_changes=None, **changes):
    return dataclasses.replace(GOOD, machine=dataclasses.replace(GOOD.machine, **machine_changes or {}), **changes)


def states(checks):
    return {check.name: check.state for check in checks if check.state != OK}


def test_a_good_machine_has_nothing_to_do():
    checks = diagnose(GOOD, "26.07-vllm-python-py3", find_model("llama-3-70b"))
    assert states(checks) == {} and not any(check.advice for check in checks)
    assert all(re.match(r"ok   [a-z 0-9]+: \S", check.line()) for check in checks)


FAULTS = {
    "no driver": (changed({"driver": None, "gpus": ()}, smi="nvidia-smi is not installed"), {"driver": FAIL, "image": FAIL, "gpu": FAIL}),
    "broken driver": (changed({"driver": None, "gpus": ()}, smi=NO_DRIVER), {"driver": FAIL, "image": FAIL, "gpu": FAIL}),
    "mismatch": (changed({"driver": None}, smi=MISMATCH), {"driver": FAIL, "image": FAIL}),
    "old driver": (changed({"driver": "535.129.03"}), {"image": FAIL}),
    "older, same CUDA": (changed({"driver": "580.159.04"}), {"image": WARN}),
    "old gpu": (changed({"gpus": (GTX_1080,)}), {"gpu 0": FAIL}),
    "used gpu": (changed({"gpus": (H100, dataclasses.replace(H200, free_bytes=1 << 30))}), {"gpu 1": WARN}),
    "no toolkit": (changed({"docker": "it has no nvidia runtime"}), {"docker": FAIL}),
    "small disk": (changed({"free_bytes": 30_000_000_000}), {"disk": WARN}),
    "full disk": (changed({"free_bytes": 1_000_000_000}), {"disk": FAIL}),
    "ports": (changed(taken=(8000, 3000)), {"ports": WARN}),
    "clock": (changed(clock=False), {"clock": WARN}),
    "clock unknown": (changed(clock=None), {"clock": WARN}),
    "cores": (changed(cores=2), {"cores": WARN}),
    "busy": (changed(busy=0.9), {"load": WARN}),
    "files": (changed(open_files=1024), {"open files": WARN}),
    "no files limit": (changed(open_files=-1), {}),
    "no token": (changed({"hub_token": False}), {"hub": FAIL}),
    "refused": (changed(hub="GatedRepoError: 403"), {"hub": FAIL}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_one_line_that_says_what_to_do(name):
    seen, expected = FAULTS[name]
    checks = diagnose(seen, "26.07-vllm-python-py3", find_model("llama-3-70b"))
    assert states(checks) == expected
    for check in checks:
        assert (check.state == OK) == (not check.advice) and "\n" not in check.line()


def test_without_an_image_a_machine_without_gpu_is_only_warned():
    seen = changed({"driver": None, "gpus": (), "docker": "it is not installed"}, smi="nvidia-smi is not installed")
    assert set(states(diagnose(seen)).values()) == {WARN}


def test_a_model_that_is_not_gated_needs_no_token():
    assert states(diagnose(changed({"hub_token": False}), "", find_model("phi-2"))) == {}


@pytest.mark.parametrize(
    "tag, driver, state",
    [("26.07-py3", "580.65.06", OK), ("25.03-py3", "570.124.06", FAIL), ("26.07-trtllm-python-py3", "590.44.01", OK),
     ("26.07-trtllm-python-py3", "580.95.05", WARN), ("26.07-vllm-python-py3", "610.43.02", OK), ("26.07-vllm-python-py3", "575.57.08", FAIL),
     ("25.08-trtllm-python-py3", "575.51.03", OK), ("26.06-vllm-python-py3", "610.43.02", WARN), ("mine", "610.43.02", WARN)],
)  # fmt: skip
def test_a_tag_is_held_against_the_driver(tag, driver, state):
    [check] = [check for check in diagnose(changed({"driver": driver}), tag) if check.name == "image"]
    assert check.state == state, check.line()


def test_the_drivers_table_says_where_it_is_from_and_covers_our_tag():
    table = tomllib.loads(doctor_module.DRIVERS.read_text())["image"]
    assert all(set(row) == {"tag", "cuda", "driver", "source"} for row in table) and len(driver_table()) > len(table)
    default = re.search(r"TRITON_TAG:-([^}]+)", (ROOT / "docker-compose.yml").read_text())[1]
    assert states(diagnose(GOOD, default)) == {}


def test_a_tag_is_read_from_an_image():
    assert tag_of("host:5000/tritonserver:26.07-py3") == "26.07-py3"
    for bad in ("tritonserver", "host:5000/tritonserver", "x:"):
        with pytest.raises(UserError, match="no tag"):
            tag_of(bad)


@pytest.mark.parametrize(
    "text, code, cuda, complaint",
    [(SMI.format(driver="580.159.04", cuda="13.0"), 0, "13.0", ""), (SMI.format(driver="535.129.03", cuda="12.2"), 0, "12.2", ""),
     (NO_DRIVER, 9, None, "couldn't communicate"), (MISMATCH, 18, None, "mismatch"), ("", 1, None, "exit code 1")],
)  # fmt: skip
def test_nvidia_smi_is_read_and_its_complaint_is_one_line(tmp_path, monkeypatch, text, code, cuda, complaint):
    (tmp_path / "text").write_text(text)
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n/bin/cat '{tmp_path}/text'\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found, said = doctor_probe.nvidia_smi()
    assert found == cuda and complaint in said and "\n" not in said
    program.unlink()
    assert doctor_probe.nvidia_smi() == (None, "nvidia-smi is not installed")


@pytest.mark.parametrize("address", ("127.0.0.1", "0.0.0.0"))
def test_a_port_with_a_listener_is_in_use(address):
    with socket.create_server((address, 0)) as server:
        port = server.getsockname()[1]
        assert doctor_probe.in_use(port)
    assert not doctor_probe.in_use(port)


def test_the_ports_are_those_of_the_stack():
    text = "".join((ROOT / name).read_text() for name in ("docker-compose.yml", "loadgen/edge/options.py"))
    assert [port for port in doctor_probe.PORTS if str(port) not in text] == []


def test_load_of_others_is_seen():
    burn = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        assert machine.busy_share(1.0) > 0.5
    finally:
        for process in burn:
            process.kill()
            process.wait()


def test_this_machine_is_looked_at(tmp_path):
    """Every line is one, and the exit code is that of the worst."""
    done = subprocess.run(
        [sys.executable, "-m", "tritonmark", "doctor", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    lines = done.stdout.splitlines()
    assert all(re.match(r"(ok|warn|fail) +[a-z ]+[0-9]*: ", line) for line in lines) and len(lines) >= 9, done.stderr
    assert done.returncode == (3 if any(line.startswith("fail") for line in lines) else 0)


@pytest.mark.parametrize("bad", (["--tag", "a", "--image", "b:c"], ["--image", "b"], ["--model", "nope"]))
def test_bad_input_is_one_line(bad):
    done = subprocess.run(
        [sys.executable, "-m", "tritonmark", "doctor", *bad], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
