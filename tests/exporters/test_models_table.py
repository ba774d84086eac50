"""`tritonmark models`: for each model and backend what runs on given GPUs, and why not the rest."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from example_gpus import A100, GIB, GTX_1080, H100, L40S, V100

from exporters import cli as cli_module
from exporters.catalogue import find_model, load_catalogue
from exporters.errors import UserError
from exporters.export import export_model
from exporters.gpus import Gpu, can_share, fit, fits, least_capability, needs_table
from exporters.models_table import model_entry, models_table, offered, offered_fits
from exporters.registry import backends_of

BACKENDS = Path(__file__).parents[2] / "docs" / "backends.md"
MACHINES = {"none": [], "gtx": [GTX_1080], "v100": [V100] * 2, "l40s": [L40S] * 2, "h100": [H100]}
CATALOGUE = list(load_catalogue().values())


def answers(name, gpus, backend):
    """{precision: how it fits, as GPUs, or why not}."""
    found = offered_fits(find_model(name), gpus)[backend]
    return {one.precision: one.tp if one.fits else one.reason for one in found}


def table(gpus, monkeypatch):
    monkeypatch.setattr(cli_module, "find_gpus", lambda: gpus)
    return CliRunner().invoke(cli_module.cli, ["models"]).output


def of(name, said):
    return said[said.index(f"\n{name} ") :].split("\n\n")[0].split(f"\n{name}-tiny ")[0]


@pytest.mark.parametrize("gpus", MACHINES.values(), ids=MACHINES)
def test_every_backend_and_precision_has_an_answer_within_120_columns(gpus):
    for model in CATALOGUE:
        lines = models_table([model], gpus)
        assert max(map(len, lines)) <= 120
        text = " ".join(" ".join(lines).split())
        for backend in backends_of(model.family):
            assert re.search(rf"[ ,]{re.escape(backend)}[ ,]", text)
        for one in (one for found in offered_fits(model, gpus).values() for one in found):
            assert one.fits or f"no, {one.reason}" in text
            assert re.search(rf"[ ,]{re.escape(one.precision)}[,:]", text)


def test_old_gpus_are_refused_by_backends_that_do_not_know_them():
    for backend, least in (("vllm", 7.5), ("vllm-python", 7.5), ("tensorrtllm", 8.0)):
        reasons = set(answers("phi-2", [V100], backend).values())
        assert reasons == {f"needs compute capability {least}, Tesla V100-SXM2-16GB has 7.0"}
    reasons = set(answers("phi-2", [GTX_1080], "torch-compile").values())
    assert reasons == {"needs compute capability 7.0, NVIDIA GeForce GTX 1080 has 6.1"}
    assert answers("phi-2", [GTX_1080], "torch-eager")["int8"] == 1
    assert answers("phi-2-tiny", [V100], "vllm")["fp32"].startswith("needs compute capability 7.5")


def test_turing_has_no_bf16_for_vllm():
    t4 = Gpu("Tesla T4", 7.5, 15 * GIB, 15 * GIB)
    found = answers("phi-2", [t4], "vllm")
    assert found["fp16"] == 1 and found["bf16"] == "bf16 needs compute capability 8.0, Tesla T4 has 7.5"


def test_gpus_share_only_what_a_backend_can_share():
    eager, compiled = (answers("llama-3-70b", [L40S] * 2, f"torch-{kind}") for kind in ("eager", "compile"))
    assert eager["fp8"] == "needs 77.3 GB, NVIDIA L40S has 47.7 GB free; several cannot share it"
    assert "73.9 GB on each of 2" in eager["bf16"] and eager["bf16"].endswith("4 of these would do")
    assert compiled["bf16"].startswith("needs 145.8 GB,") and compiled["bf16"].endswith("several cannot share it")
    assert answers("llama-3-70b", [L40S] * 2, "vllm")["fp8"] == 2
    assert answers("llama-3-70b", [L40S] * 2, "tensorrtllm")["int4"] == 1


@pytest.mark.parametrize("backend", ["torch-eager", "torch-compile"])
@pytest.mark.parametrize("precision", find_model("llama-3-70b-tiny").precisions)
def test_the_table_shares_what_the_export_shares(tmp_path, backend, precision):
    """Llama's tiny sibling is exported for two GPUs exactly where the table says that two can share it."""
    try:
        export_model("llama-3-70b-tiny", backend, precision=precision, tp=2, out=tmp_path)
        exported = True
    except UserError as error:
        assert "--tp" in str(error)
        exported = False
    assert can_share(find_model("llama-3-70b"), backend, precision) == exported


def test_one_h100_runs_llama_in_fp8(monkeypatch):
    llama = of("llama-3-70b", table([H100], monkeypatch))
    assert re.search(r"torch-compile +fp8, int8: 77\.3 GB\n", llama) and "Community License" in llama
    told = " ".join(llama.split())
    assert "bf16, fp16: no, needs 145.8 GB, NVIDIA H100 80GB HBM3 has 84.9 GB free; 2 of these would do" in told
    assert "nvfp4: no, nvfp4 needs compute capability 10.0" in llama
    assert "fp8: no, needs 77.3 GB, NVIDIA H100 80GB HBM3 has 77.0 GB (90% of all)" in told, "vLLM takes 90 %"


def test_the_table_names_gpus_and_backends_without_a_path(monkeypatch):
    said = table([H100], monkeypatch)
    assert said.startswith("GPU NVIDIA H100 80GB HBM3: 84.9 of 85.5 GB free\n")
    phi = " ".join(of("phi-2", said).split())
    assert "tensorrtllm-llmapi no, PhiForCausalLM is not in TensorRT-LLM's PyTorch LLM API; use --backend" in phi
    assert "tensorrtllm fp16, bf16: 10.2 GB int8: 7.7 GB int4: 6.5 GB" in phi


def test_without_gpus_the_cpu_is_named_where_it_computes(monkeypatch):
    said = table([], monkeypatch)
    assert said.startswith("no GPU: the -tiny models run; larger ones only by `export --device cpu`, slowly")
    video = " ".join(of("cogvideox-5b", said).split())
    assert "bf16, fp16: no, there is no GPU; --device cpu runs it slowly, its weights take 21.1 GB" in video
    assert "tensorrt bf16, fp16, fp32: no, needs an NVIDIA GPU" in video
    assert "needs no GPU" in said and "vllm, vllm-python" in said


def test_other_gpus_of_a_machine_do_not_spoil_it():
    found = fit(find_model("phi-2"), "fp8", 1, [V100, L40S])
    assert found.fits
    assert fits(find_model("llama-3-70b"), ("fp8",), [A100, L40S], "vllm")[0].tp == 1, "only one of them knows fp8"


def test_json_has_all_of_it(monkeypatch):
    monkeypatch.setattr(cli_module, "find_gpus", lambda: [A100])
    entries = {e["name"]: e for e in json.loads(CliRunner().invoke(cli_module.cli, ["models", "--json"]).output)}
    moe = entries["phi-3.5-moe"]
    assert moe["kv_bytes_per_token"] == 131072 and moe["weights_bytes"]["bf16"] == 2 * 41_873_153_344
    fitting = {(one["backend"], one["precision"]) for one in moe["fits"] if one["fits"]}
    assert fitting == {("torch-eager", "int8"), ("tensorrtllm", "int8")}
    assert all(one["fits"] or one["reason"] for one in moe["fits"])
    assert {one["backend"] for one in moe["fits"]} == set(moe["backends"])
    assert moe["backend_precisions"]["torch-eager"] == ["bf16", "fp16", "fp8", "int8"]
    assert "LLM API" in moe["no_path"]["tensorrtllm-llmapi"]
    assert "int4-awq" in entries["llama-3-70b"]["weights_bytes"]


def test_backends_without_a_path_are_left_out():
    assert "tensorrtllm-llmapi" in offered(find_model("llama-3-70b"))
    assert "tensorrtllm-llmapi" not in offered(find_model("phi-2"))


def test_the_data_knows_every_backend_and_precision():
    data = needs_table()
    for model in CATALOGUE:
        for backend, precisions in offered(model).items():
            assert set(precisions) <= set(data["precision"])
            assert set(data["backend"][backend]["shared"]) <= set(data["precision"])
        json.dumps(model_entry(model, [H100]))


def test_the_served_model_refuses_what_the_table_refuses(runtime):
    pytest.importorskip("torch")
    devices, fp8 = runtime("devices"), runtime("llm_quantised").FP8_CAPABILITY
    for backend, precision, least in (
        ("torch-eager", "fp8", fp8),
        ("torch-compile", "fp8", fp8),
        ("torch-compile", "fp16", devices.COMPILER_CAPABILITY),
        ("torch-compile", "bf16", devices.BF16_CAPABILITY),
        ("torch-compile", "int8", devices.BF16_CAPABILITY),
        ("vllm-python", "fp16", runtime("vllm_engine").CAPABILITY),
    ):
        assert least_capability(backend, precision) == float(devices.dotted(least)), (backend, precision)


def test_a_mixture_is_compiled_where_its_experts_can_be_captured(runtime):
    pytest.importorskip("torch")
    grouped = float(runtime("devices").dotted(runtime("llm_quantised").GROUPED_CAPABILITY))
    assert set(needs_table()["backend"]["torch-compile"]["experts"].values()) == {grouped}
    big = [Gpu("A100", 8.0, 200 * GIB, 200 * GIB)], [Gpu("H200", 9.0, 141 * GIB, 141 * GIB)]
    old, new = (answers("phi-3.5-moe", gpus, "torch-compile") for gpus in big)
    assert old["bf16"] == "bf16 needs compute capability 9.0, A100 has 8.0"
    assert new == {"bf16": 1, "fp8": 1} | dict.fromkeys(
        set(new) - {"bf16", "fp8"}, "torch-compile cannot capture experts in int8"
    ) | {"fp16": "torch-compile cannot capture experts in fp16"}
    assert answers("llama-3-70b", big[1], "torch-compile")["int8"] == 1


def test_the_document_names_the_capabilities_of_the_data():
    rows = re.findall(r"^\| `([\w-]+)` \|[^|]*\|[^|]*\| ([^|]*) \|[^|]*\|$", BACKENDS.read_text(), re.M)
    told = {}
    for backend, least in rows:
        told.setdefault(backend, least)
    assert set(told) == set(needs_table()["backend"])
    for backend, least in told.items():
        least = told["vllm"] if least == "the same" else least
        capability = needs_table()["backend"][backend]["capability"]
        assert least.startswith(str(capability) if capability else "any"), backend
        for precision, text in re.findall(r"([a-z]+\d+)[^():;]*: ([\d.]+)", least.replace(", int8", "")):
            assert least_capability(backend, precision) == float(text), (backend, precision)
