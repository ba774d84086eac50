"""The catalogue's numbers, and the decision of what fits on which GPUs."""

import dataclasses
import re
import sys
import types

import pytest
from example_gpus import A100, GIB, GTX_1080, H100, H200, V100

from exporters import gpus as gpus_module
from exporters.catalogue import check_parameters, find_model, load_catalogue
from exporters.errors import UserError
from exporters.gpus import find_gpus, fit, fits, needed_bytes, weights_bytes

LLMS = [model for model in load_catalogue().values() if model.family == "llm"]


@pytest.mark.parametrize("model", LLMS, ids=lambda model: model.name)
def test_transformers_builds_exactly_these_parameters(model):
    check_parameters(model)


@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes"),
    [
        ("phi-2", 2_779_683_840, 327_680),
        ("phi-3.5-moe", 41_873_153_344, 131_072),
        ("llama-3-70b", 70_553_706_496, 327_680),
    ],
)
def test_sizes_of_the_real_models(name, parameters, kv_bytes):
    model = find_model(name)
    assert (model.parameters, model.kv_bytes_per_token) == (parameters, kv_bytes)
    assert weights_bytes(model, "bf16") == 2 * parameters


def test_another_architecture_is_refused():
    model = dataclasses.replace(find_model("llama-3-70b-tiny"), parameters=1)
    with pytest.raises(UserError, match="has 381,248 parameters here, 1 in the catalogue"):
        check_parameters(model)


def test_fp8_of_llama_is_what_one_gpu_of_80_gb_holds():
    assert weights_bytes(find_model("llama-3-70b"), "fp8") == pytest.approx(72.7e9, rel=0.002)


@pytest.mark.parametrize("model", load_catalogue().values(), ids=lambda model: model.name)
def test_every_entry_is_whole(model):
    assert model.licence and model.precisions and model.mlperf and set(model.runtime) >= {"threads"}
    assert not model.hub_id or len(model.revision) == 40
    assert model.tiny_of in load_catalogue() if model.name.endswith("-tiny") else not model.tiny_of
    if model.tiny_of:
        whole = find_model(model.tiny_of)
        assert (model.model_class, model.family, model.mlperf) == (whole.model_class, whole.family, whole.mlperf)
        assert set(model.config) == set(whole.config) and set(model.runtime) == set(whole.runtime)


def test_phi_moe_is_served_within_its_short_factors():
    model = find_model("phi-3.5-moe")
    rope = model.config["rope_parameters"]
    assert model.max_context == rope["original_max_position_embeddings"] == 4096
    assert len(rope["short_factor"]) == len(rope["long_factor"]) == 64


@pytest.mark.parametrize(("name", "head"), [("phi-3.5-moe", 128), ("phi-3.5-moe-tiny", 16)])
def test_rope_factors_reach_the_model(name, head, runtime):
    """They are the model's own, one for each pair of a head's channels, sorted as the model's are."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = find_model(name).config
    factors = torch.tensor(config["rope_parameters"]["short_factor"])
    assert (factors.diff() >= 0).all() and factors[0] == 1 and factors[-1] > 1
    made = transformers.PhimoeConfig(**dict(config, num_hidden_layers=0))
    with torch.device("cpu"):
        rotary = transformers.models.phimoe.modeling_phimoe.PhimoeRotaryEmbedding(made)
    short = runtime("llm_weights").ShortRotary(rotary)
    plain = 10000.0 ** -(torch.arange(0, head, 2) / head)
    assert torch.allclose(short.inv_freq, plain / factors, rtol=1e-5) and short.mscale == 1.243163121016122


@pytest.mark.parametrize(
    ("name", "precision", "tp", "there", "answer"),
    [
        ("phi-2", "fp16", 1, [GTX_1080], "needs 10.2 GB, NVIDIA GeForce GTX 1080 has 8.6 GB free"),
        ("phi-2", "int8", 1, [GTX_1080], ""),
        ("phi-2", "fp8", 1, [GTX_1080], "fp8 needs compute capability 8.9, NVIDIA GeForce GTX 1080 has 6.1"),
        ("phi-2", "bf16", 1, [V100], ""),
        ("phi-2", "fp32", 1, [V100], "needs 18.5 GB"),
        ("phi-2", "fp8", 1, [A100], "fp8 needs compute capability 8.9"),
        ("phi-2", "fp8", 1, [H100], ""),
        ("phi-3.5-moe", "bf16", 1, [A100], "needs 86.8 GB, .* has 85.9 GB free; 2 of these would do"),
        ("phi-3.5-moe", "int8", 1, [A100], ""),
        ("phi-3.5-moe", "bf16", 1, [H100], "2 of these would do"),
        ("phi-3.5-moe", "bf16", 1, [H200], ""),
        ("phi-3.5-moe", "fp8", 1, [H100], ""),
        ("llama-3-70b", "bf16", 1, [H200], "needs 145.8 GB, NVIDIA H200 has 149.9 GB free"),
        ("llama-3-70b", "fp8", 1, [H100], ""),
        ("llama-3-70b", "int8", 1, [A100], ""),
        ("llama-3-70b", "fp8", 1, [V100, V100], "fp8 needs"),
        ("llama-3-70b", "bf16", 2, [H100, H100], ""),
        ("llama-3-70b", "bf16", 2, [H100], "2 GPUs are needed, 1 are there"),
        ("llama-3-70b", "bf16", 4, [V100] * 4, "on each of 4, .*has 17.2 GB free"),
        ("cogvideox-5b", "bf16", 1, [V100], "needs 33.1 GB"),
        ("cogvideox-5b", "bf16", 1, [A100], ""),
        ("phi-2", "bf16", 1, [], "there is no GPU; --device cpu runs it slowly, its weights take 5.6 GB"),
        ("phi-2-tiny", "bf16", 1, [], ""),
    ],
)
def test_what_fits_where(name, precision, tp, there, answer):
    found = fit(find_model(name), precision, tp, there)
    if (name, precision, there) == ("llama-3-70b", "bf16", [H200]):  # 141.1 + 2.7 + 2.0 GB: just
        assert found.fits and found.needed_bytes == pytest.approx(145.8e9, rel=0.001)
        return
    assert found.fits == (not answer) and "\n" not in found.reason
    if answer:
        assert re.search(answer, found.reason), found.reason


def test_what_others_use_does_not_count():
    busy = dataclasses.replace(H100, free_bytes=5 * GIB)
    assert not fit(find_model("phi-2"), "bf16", 1, [busy]).fits
    assert fit(find_model("phi-2"), "bf16", 1, [busy, H100]).fits


def test_emulated_types_are_said():
    assert "take fp16" in fit(find_model("phi-2"), "bf16", 1, [V100]).note
    assert fit(find_model("phi-2"), "bf16", 1, [A100]).note == ""
    big = dataclasses.replace(GTX_1080, free_bytes=12 * GIB)
    assert "slower than fp32" in fit(find_model("phi-2"), "fp16", 1, [big]).note


def test_the_fewest_gpus_are_chosen():
    found = {one.precision: one for one in fits(find_model("llama-3-70b"), ("bf16", "fp8"), [H100, H100])}
    assert (found["bf16"].tp, found["fp8"].tp) == (2, 1) and found["bf16"].fits and found["fp8"].fits
    assert fits(find_model("cogvideox-5b"), ("bf16",), [V100, V100])[0].tp == 1  # a pipeline is not shared


def test_a_share_is_smaller():
    model = find_model("llama-3-70b")
    assert needed_bytes(model, "bf16", 2) == pytest.approx((needed_bytes(model, "bf16", 1) + 2e9) / 2)


def test_nvidia_smi_is_read(monkeypatch):
    monkeypatch.setattr(gpus_module, "_by_nvml", lambda: 1 / 0)
    said = "NVIDIA H100 80GB HBM3, 9.0, 81559, 81000\nNVIDIA odd, [N/A], [N/A], 1\n"
    monkeypatch.setattr(gpus_module.subprocess, "run", lambda *a, **k: types.SimpleNamespace(stdout=said))
    assert find_gpus() == [H100]


def test_no_driver_is_no_gpu(monkeypatch):
    monkeypatch.setattr(gpus_module, "_by_nvml", lambda: 1 / 0)
    monkeypatch.setattr(gpus_module, "QUERY", ("no-such-program-here",))
    assert find_gpus() == []


def test_nvml_is_read(monkeypatch):
    memory = types.SimpleNamespace(total=81559 << 20, free=81000 << 20)
    fake = types.SimpleNamespace(
        nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetName=lambda handle: b"NVIDIA H100 80GB HBM3",
        nvmlDeviceGetCudaComputeCapability=lambda handle: (9, 0), nvmlDeviceGetMemoryInfo=lambda handle: memory,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert find_gpus() == [H100]
