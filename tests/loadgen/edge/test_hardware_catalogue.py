"""GPUs are recognised from what nvidia-smi says; what is unknown stays unknown."""

import pytest
from fabricated import fabricate
from grid import one

from loadgen.edge import hardware, hardware_catalogue, physics, report, report_html
from loadgen.edge.errors import UserError
from loadgen.edge.hardware_catalogue import catalogue, of_label, of_run, prices, recognise


@pytest.mark.parametrize(
    ("name", "mib", "key"),
    [("NVIDIA H100 80GB HBM3", "81559", "h100-sxm"), ("NVIDIA H200", "143771", "h200-sxm"), ("NVIDIA H100 PCIe", "81559", "h100-pcie"),
     ("NVIDIA A100-SXM4-40GB", 40960, "a100-sxm-40"), ("Tesla T4", "15360", "t4"), ("NVIDIA GeForce GTX 1080", 8192, "gtx-1080"),
     ("NVIDIA GeForce GTX 1080 Ti", 11264, "gtx-1080-ti"), ("NVIDIA L4", 23034, "l4"), ("NVIDIA L40S", 46068, "l40s"),
     ("NVIDIA GH200 480GB", 97871, "gh200-96"), ("NVIDIA B200", 183359, "b200"), ("NVIDIA H100 80GB HBM3", None, "h100-sxm")],
)  # fmt: skip
def test_known_gpus(name, mib, key):
    assert recognise(name, mib).key == key


@pytest.mark.parametrize(
    ("name", "mib"),
    [
        ("NVIDIA H200 NVL", 143771),
        ("NVIDIA RTX 6000 Ada", 49140),
        ("NVIDIA H100 80GB HBM3", 40000),
        ("", None),
        ("H100", "n/a"),
    ],
)
def test_unknown_stays_unknown(name, mib):
    assert recognise(name, mib) is None


def test_figures_are_dense_and_unknown_ones_are_absent():
    known = catalogue()
    assert len(known) >= 22
    assert known["h100-sxm"].peaks["fp8"] == 1979 and known["h200-sxm"].bandwidth_gbs == 4800
    assert "bf16" not in known["v100-sxm2-16"].peaks and known["gh200-96"].power_w is None
    assert known["v100-sxm2-16"].peak_flops("bf16") is None and known["t4"].peak_flops("int8") == 65e12
    assert known["gtx-1080"].supports() == [] and "fp8" in known["l4"].supports()
    for gpu in known.values():
        assert gpu.year >= 2016 and gpu.bandwidth_gbs > 0 and set(gpu.peaks) <= set(hardware_catalogue.PEAKS)


def test_a_label_of_the_user_is_understood():
    assert of_label("1x-NVIDIA H100 80GB HBM3").key == "h100-sxm"
    assert of_label("h200-sxm").key == "h200-sxm" and of_label("H100 SXM").key == "h100-sxm"
    assert of_label("cpu-x-2-cores") is None


def test_gpus_of_several_kinds_are_unknown():
    gpus = [{"name": "NVIDIA H200", "memory_mib": "143771"}, {"name": "NVIDIA L4", "memory_mib": "23034"}]
    assert of_run({"hardware": {"label": "mixed", "gpus": gpus}}).gpu is None
    two = {"hardware": {"label": "x", "gpus": gpus[:1] * 2}, "exported": {"tp": "2"}}
    assert of_run(two).name == "2x H200 SXM"
    assert of_run(two).machine("bf16").bandwidth_bytes_s == pytest.approx(9600e9)
    servers = {"hardware": {"label": "2x-NVIDIA H200"}, "servers": [{"url": "a", "share": 1}, {"url": "b", "share": 1}]}
    assert of_run(servers).count == 2, "each server has GPUs of its own"
    assert of_run(servers | {"hardware": {"label": "x", "gpus": two["hardware"]["gpus"][:1]}}).count == 1, (
        "or shares one"
    )


def test_copies_of_the_model_share_the_streams(tmp_path):
    """Four GPUs that each hold the whole model read the weights four times; two that share one copy, once."""
    gpu = {"name": "NVIDIA H100 80GB HBM3", "memory_mib": "81559"}
    document = {"hardware": {"label": "x", "gpus": [gpu] * 8},
                "telemetry": {"energy_of": "gpu", "devices": [{"device": f"gpu{n}"} for n in range(4)]}}  # fmt: skip
    runs = [one(tmp_path / tp, "H100", "torch-eager", name="concurrency", concurrency=16, count=64, scatter=0,
                document=document | {"exported": {"tp": tp}}) for tp in ("1", "2")]  # fmt: skip
    whole, shared = (physics.works(run)[0] for run in runs)
    assert [(of_run(r.document).count, of_run(r.document).copies) for r in runs] == [(4, 4), (4, 2)]
    tpot = runs[0].summary["tpot_ns"]["mean"] / 1e9
    streams = round(whole.per_s * tpot)
    weights, kv = 2 * 2_648_611_840, (7 + 32 / 2) * 327_680
    assert 4 < streams <= 16 and streams == round(shared.per_s * tpot)
    assert whole.limit.seconds == pytest.approx((weights + whole.per_s * tpot / 4 * kv) / 3350e9)
    assert shared.limit.seconds == pytest.approx((weights + shared.per_s * tpot / 2 * kv) / 6700e9)
    assert "by data sheet (H100 SXM)" in whole.assumed, "the roof of one copy, not of all four GPUs"
    probed = of_run(document | {"hardware": document["hardware"] | {"measured": {"copy_bytes_s": 3.0e12}}})
    assert (probed.name, probed.machine("bf16").name) == ("4x H100 SXM", "H100 SXM")
    assert "spread evenly over 4 copies" in whole.assumed and "of 2 GPUs together" in shared.assumed


def test_prices_are_the_users_and_checked(tmp_path):
    example = hardware_catalogue.DATA / "prices.example.toml"
    assert prices(example) == ({}, "") and prices(None) == ({}, "")
    for gpu in catalogue():
        assert f"\n{gpu} = " in example.read_text()
    file = tmp_path / "p.toml"
    file.write_text('currency = "EUR"\n[per_gpu_hour]\nh100-sxm = 2.5\nh200-sxm = ""\n')
    assert prices(file) == ({"h100-sxm": 2.5}, "EUR")
    for text, wrong in (("[per_gpu_hour]\nh900 = 1", "no GPU 'h900'"), ("[per_gpu_hour]\nl4 = -1", "above 0"),
                        ("x = ", "not TOML"), ("a = 1", "no table"), ("[per_gpu_hour]\nl4 = true", "above 0")):  # fmt: skip
        file.write_text(text)
        with pytest.raises(UserError, match=wrong):
            prices(file)
    with pytest.raises(UserError, match="cannot read"):
        prices(tmp_path / "none")


def test_a_roofline_stands_in_every_report_with_its_assumption(tmp_path):
    run = one(tmp_path, "H100", "torch-eager", scatter=0)
    works = physics.works(run)
    assert [w.name for w in works] == ["decode", "prefill"]
    decode = works[0]
    tpot = run.summary["tpot_ns"]["mean"] / 1e9
    context = 7 + 32 / 2
    assert decode.share == pytest.approx((2 * 2_648_611_840 + context * 327_680) / 3350e9 / tpot)
    line = physics.lines(run)[0]
    assert (
        "one pass over 5.30 GB of weights per token; KV of 23 tokens mean (7.54 MB a stream); 3,350 GB/s by data sheet"
        in line
    )
    assert line in report.markdown([run]).replace("\\", "") and "KV of 23 tokens mean" in report_html.html([run])
    assert report.as_json([run])["runs"][0]["roofline"][0]["share"] == pytest.approx(decode.share)


def test_unknown_hardware_has_no_roofline(tmp_path):
    run = fabricate(tmp_path)
    assert physics.lines(run) == [] and "oofline" not in report.markdown([run])


def test_a_measured_bandwidth_takes_the_place_of_the_data_sheet(tmp_path):
    probe = tmp_path / "probe.json"
    probe.write_text('{"copy_bytes_s": 3.0e12, "matmul_flops_s": {"bf16": 7e14}}')
    document = hardware.describe("http://10.0.0.1:8000", "h100-sxm", str(probe))
    machine = of_run({"hardware": document}).machine("bf16")
    assert (machine.bandwidth_bytes_s, machine.flops_s, machine.source) == (3.0e12, 7e14, "as measured by the probe")
    fp8 = of_run({"hardware": document}).machine("fp8")
    assert (fp8.bandwidth_bytes_s, fp8.flops_s) == (3.0e12, 1979e12) and "fp8 peak by data sheet" in fp8.source
    probe.write_text('{"copy_bytes_s": 0}')
    with pytest.raises(UserError, match="is not what"):
        hardware.describe("http://10.0.0.1:8000", None, str(probe))


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    """An nvidia-smi of a host with two different GPUs."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 580.1, 700.00, 1980, 2619, GPU-a'\n"
        "echo 'NVIDIA H200, 143771, 580.1, 700.00, 1980, 3201, GPU-b'\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("serving", "label", "names"),
    [(None, "2x-NVIDIA H100 80GB HBM3", ["GPU-a", "GPU-b"]), ("1", "1x-NVIDIA H200", ["GPU-b"]),
     ("1,0,1", "2x-NVIDIA H100 80GB HBM3", ["GPU-a", "GPU-b"])],
)  # fmt: skip
def test_only_the_gpus_that_serve_are_described(two_gpus, serving, label, names):
    found = hardware.describe("http://127.0.0.1:8000", serving=serving)
    assert found["label"] == label and found["host_gpus"] == 2
    assert [gpu["uuid"] for gpu in found["gpus"]] == names


def test_a_gpu_that_is_not_there_is_refused(two_gpus):
    with pytest.raises(UserError, match="--gpus is 0,2, but this host's GPUs are 0 to 1"):
        hardware.describe("http://127.0.0.1:8000", serving="0,2")
