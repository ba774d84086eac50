"""An export from order to files: tokenizer, weights, settings, manifest, and what goes wrong."""

import hashlib
import json

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from exporters import export as export_module
from exporters import layout
from exporters.errors import UserError
from exporters.export import export_model, plan_export
from exporters.registry import Build


@pytest.fixture(scope="session")
def tokenizer(repository):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(repository / "phi-2-tiny/1/weights/tokenizer.json"))


def test_manifest_is_true(tmp_path):
    folder = export_model("phi-2-tiny", out=tmp_path)
    manifest = layout.read_manifest(folder)
    on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == on_disk - {"manifest.json"}
    for name, facts in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == facts["sha256"]
    assert manifest["weights"] == "synthetic" and manifest["seed"] == 0 and manifest["revision"] is None
    assert manifest["family"] == "llm" and manifest["backend"] == "torch-eager" and manifest["precision"] == "fp32"
    assert manifest["tools"]["transformers"] and manifest["tools"]["torch"]


def test_config_is_triton_s(repository):
    model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text = (repository / "phi-2-tiny/config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert config.name == "phi-2-tiny" and config.model_transaction_policy.decoupled
    assert all(tensor.optional for tensor in config.input)
    assert config.parameters["threads"].string_value == "1"


def test_other_code_that_triton_runs_has_another_hash(repository, tmp_path):
    version = repository / "phi-2-tiny" / "1"
    known = layout.read_manifest(version.parent)["code"]
    assert known == export_module._code(version) and f'"{known}"' in (version.parent / "config.pbtxt").read_text()
    for path in version.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert export_module._code(tmp_path) == known
    (tmp_path / "model.py").write_text("# other")
    assert export_module._code(tmp_path) != known
    assert export_module._code(tmp_path / "nowhere") == "none"


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_tokenizer_round_trip(tokenizer, text):
    text = text.replace("<|endoftext|>", "")
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_is_real(tokenizer):
    ids = tokenizer.encode("The measurement of latency is a distribution.").ids
    assert len(ids) < 15 and max(ids) < 2048
    assert tokenizer.token_to_id("<|endoftext|>") == 0


def test_equal_orders_give_equal_files(repository, tmp_path):
    export_model("phi-2-tiny", out=tmp_path)
    first, second = (layout.read_manifest(out / "phi-2-tiny")["files"] for out in (repository, tmp_path))
    assert first == second


def test_seed_name_and_precision(tmp_path):
    folder = export_model("phi-2-tiny", out=tmp_path, name="other", seed=7, precision="bf16", device="cpu")
    assert folder.name == "other"
    assert 'name: "other"' in (folder / "config.pbtxt").read_text()
    assert "KIND_CPU" in (folder / "config.pbtxt").read_text()
    assert json.loads((folder / "1/weights/config.json").read_text())["dtype"] == "bfloat16"
    assert layout.read_manifest(folder)["seed"] == 7


def test_full_size_synthetic_writes_no_weights(tmp_path):
    folder = export_model("phi-2", out=tmp_path)
    settings = json.loads((folder / "1/settings.json").read_text())
    assert settings["draw_on_load"] and settings["decodable_tokens"] <= 51200
    assert not list(folder.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1_000_000


def test_logits_are_spread(repository):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(repository / "phi-2-tiny/1/weights")
    with torch.no_grad():
        logits = model(torch.arange(1, 33)[None]).logits[0]
    assert 2 < logits.std() < 4
    assert len(set(logits.argmax(-1).tolist())) > 20


def test_local_folder(repository, tmp_path):
    source = repository / "phi-2-tiny/1/weights"
    folder = export_model("phi-2-tiny", weights=str(source), out=tmp_path)
    assert layout.read_manifest(folder)["weights"] == "local"
    assert json.loads((folder / "1/settings.json").read_text())["end_token_ids"] == [0]
    assert (folder / "1/weights/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "phi-9"}, "unknown model"),
        ({"backend": "abacus"}, "no backend 'abacus'"),
        ({"weights": "/nowhere"}, "no config.json there"),
        ({"weights": "hub"}, "not on the hub"),
        ({"precision": "nvfp4"}, "choose one of: fp32, bf16, fp8, int8"),
        ({"name": "../up"}, "bad model name"),
        ({"seed": -1}, "out of range"),
        ({"device": "tpu"}, "unknown device"),
    ],
)
def test_bad_orders_leave_nothing(tmp_path, options, message):
    with pytest.raises(UserError, match=message) as caught:
        export_model(**{"model": "phi-2-tiny", "out": tmp_path / "out", **options})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("config.pbtxt"))


def test_hub_gets_the_pinned_revision(tmp_path, monkeypatch):
    seen = {}

    def record(where, file, **options):
        seen.update(options, where=where, file=file)
        raise OSError("stop here")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", record)
    with pytest.raises(UserError, match="cannot fetch microsoft/phi-2 from the hub: stop here; or use"):
        export_model("phi-2", weights="hub", out=tmp_path)
    revision = "ef382358ec9e382308935a992d908de099b64c23"
    assert seen == {"where": "microsoft/phi-2", "file": "config.json", "revision": revision}


def test_wrong_architecture(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w/config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=r"GPT2Config.*PhiConfig"):
        export_model("phi-2-tiny", weights=str(tmp_path / "w"), out=tmp_path / "out")


def test_missing_torch_names_the_extra(tmp_path, monkeypatch):
    def build(order, version):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(export_module, "find_exporter", lambda family, backend: build)
    with pytest.raises(UserError, match=r"needs torch; install"):
        export_model("phi-2-tiny", out=tmp_path)


@pytest.mark.parametrize(
    ("model", "backend", "options", "message"),
    [
        ("phi-2", "torch-eager", {"tp": 3}, "--tp 3 does not divide phi-2's num_attention_heads of 32"),
        ("phi-2", "vllm", {"tp": 1_000_000}, "--tp 1000000 does not divide"),
        ("phi-2", "vllm-python", {"tp": 3}, "--tp 3 does not divide"),
        ("llama-3-70b", "torch-eager", {"tp": 16}, "--tp 16 does not divide llama-3-70b's num_key_value_heads of 8"),
        ("phi-2", "torch-eager", {"tp": 0}, "choose 1 or more"),
        ("phi-2", "vllm", {"tp": -1}, "choose 1 or more"),
        ("phi-2", "torch-eager", {"build": Build(pp=2)}, "--pp 2: torch-eager does not do that with phi-2; .* it has --tp"),
        ("phi-3.5-moe", "vllm", {"build": Build(ep=2)}, "--ep 2: vllm does not do that"),
        ("llama-3-70b", "tensorrtllm-llmapi", {"build": Build(ep=2)}, "--ep"),
        ("cogvideox-5b", "torch-eager", {"tp": 2}, "--tp 2: torch-eager does not do that with cogvideox-5b; leave it out"),
        ("cogvideox-5b", "torch-compile", {"build": Build(pp=2)}, "--pp 2: torch-compile does not do that"),
    ],
)  # fmt: skip
def test_gpus_that_cannot_share_the_model(tmp_path, model, backend, options, message):
    with pytest.raises(UserError, match=message) as caught:
        export_model(model, backend, out=tmp_path, **options)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_gpus_that_can(tmp_path):
    """vLLM repeats KV heads where there are more GPUs than heads."""
    for backend, tp in (("torch-eager", 8), ("vllm", 16)):
        folder = export_model("llama-3-70b", backend, out=tmp_path, name=backend, tp=tp)
        assert layout.read_manifest(folder)["tp"] == tp


@pytest.mark.parametrize(
    ("model", "weights", "message"), [("phi-2-tiny", "hub", "not on the hub"), ("phi-2", "/nowhere", "no config.json there")]
)  # fmt: skip
def test_a_plan_of_weights_that_are_not_there(model, weights, message):
    with pytest.raises(UserError, match=message):
        plan_export(model, "tensorrtllm", weights)
