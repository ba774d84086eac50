"""Weights on their device: drawn, loaded one parameter at a time, in 8 bit; and real ones that cannot be had."""

import dataclasses
import json
import logging
import pathlib
import re
import shutil
import types

import pytest

from exporters import disk
from exporters import weights as weights_module
from exporters.catalogue import find_model
from exporters.errors import UserError
from exporters.export import export_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
SafetensorError = pytest.importorskip("safetensors").SafetensorError
TINY = ("phi-2-tiny", "phi-3.5-moe-tiny", "llama-3-70b-tiny")
DECODABLE = 1900


@pytest.fixture(scope="module")
def modules(runtime):
    return types.SimpleNamespace(weights=runtime("llm_weights"), quantised=runtime("llm_quantised"))


@pytest.fixture(scope="module")
def drawn(modules, tmp_path_factory):
    """{name: (folder of save_pretrained, the model that was saved)}, in fp32 on the CPU."""
    made = {}
    for name in TINY:
        model, folder = find_model(name), tmp_path_factory.mktemp(name)
        config = getattr(transformers, model.config_class)(**model.config)
        network = getattr(transformers, model.model_class)(config)
        modules.weights.draw_weights(network, 0, DECODABLE)
        network.save_pretrained(folder)
        made[name] = folder, network.eval()
    return made


def settings(name, precision="fp32", **more):
    model = find_model(name)
    return {"model_class": model.model_class, "precision": precision, "draw_on_load": True, "seed": 0,
            "decodable_tokens": DECODABLE, "max_context": model.max_context, **more}  # fmt: skip


def logits(network, seed=1, length=48):
    ids = torch.randint(0, DECODABLE, (2, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return network(ids).logits.float()


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("draw", [False, True])
def test_loading_equals_what_was_saved(modules, drawn, name, draw):
    folder, network = drawn[name]
    loaded = modules.weights.load_model(folder, settings(name, draw_on_load=draw), "cpu")
    assert torch.equal(logits(loaded), logits(network))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded), logits(theirs))


@pytest.mark.parametrize("name", TINY)
def test_logits_are_like_a_trained_model_s(drawn, name):
    found = logits(drawn[name][1])[..., :DECODABLE]
    assert 2.5 < found.std() < 3.5
    shares = found.softmax(-1)
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum(-1)
    assert 2 < entropy.mean() < 6  # of a possible 7.5: neither flat nor certain
    assert len(set(found.argmax(-1).flatten().tolist())) > 60


@pytest.mark.parametrize("name", TINY)
def test_answers_to_different_prompts_differ(drawn, name):
    network = drawn[name][1]
    plain = transformers.GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    ids = torch.arange(1, 33).view(4, 8)
    answers = network.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)[:, 8:]
    assert len({tuple(answer) for answer in answers.tolist()}) == 4
    assert all(len(set(answer)) > 3 for answer in answers.tolist())


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8", "int8"])
def test_ids_that_cannot_be_spelt_are_never_chosen(modules, drawn, name, precision):
    network = modules.weights.load_model(drawn[name][0], settings(name, precision), "cpu")
    for seed in range(4):
        found = logits(network, seed, 64)
        assert found.isfinite().all()
        # Far below every other one, so that sampling at any sane temperature does not choose them either.
        assert found[..., DECODABLE:].max() < found[..., :DECODABLE].min() - 1000


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("precision", "error"), [("bf16", 0.03), ("int8", 0.06), ("fp8", 0.12)])
def test_8_bit_is_near(modules, drawn, name, precision, error):
    """The median, since a mixture's outliers come from another expert where two nearly tie."""
    exact = logits(drawn[name][1])[..., :DECODABLE]
    near = logits(modules.weights.load_model(drawn[name][0], settings(name, precision), "cpu"))[..., :DECODABLE]
    assert 0 < (near - exact).abs().median() < error


def test_8_bit_weights_are_held_in_8_bit(modules, drawn):
    network = modules.weights.load_model(drawn["phi-3.5-moe-tiny"][0], settings("phi-3.5-moe-tiny", "fp8"), "cpu")
    layer = network.model.layers[1]
    assert layer.mlp.experts.gate_up_proj.dtype is layer.self_attn.q_proj.weight.dtype is torch.float8_e4m3fn
    assert layer.mlp.experts.gate_up_proj_scale.shape == (8, 192, 1)
    wide = (
        network.lm_head.weight,
        network.model.embed_tokens.weight,
        layer.mlp.router.weight,
        layer.self_attn.q_proj.bias,
    )
    assert {weight.dtype for weight in wide} == {torch.bfloat16}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_memory_is_counted_before_it_is_taken(modules, drawn, name, precision):
    network = modules.weights.load_model(drawn[name][0], settings(name, precision), "cpu")
    held = sum(weight.nbytes for weight in network.parameters())
    config = transformers.AutoConfig.from_pretrained(drawn[name][0])
    with torch.device("meta"):
        outline = getattr(transformers, find_model(name).model_class)(config)
    assert modules.weights.needed_bytes(outline, precision) == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.int8])
def test_rows_are_scaled_apart(modules, storage):
    weight = torch.randn(3, 64) * torch.tensor([[1e-3], [1.0], [0.0]])
    held, scale = modules.quantised.quantise(weight, storage)
    error, largest = (held.float() * scale - weight).abs().amax(1), weight.abs().amax(1)
    assert (error[:2] / largest[:2]).max() < 0.04 and error[2] == 0  # small rows are as exact as large ones


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.int8])
def test_scaling_is_done_in_fp32_and_leaves_the_weight_alone(modules, storage):
    weight = torch.randn(5, 64).bfloat16()
    before, (held, scale) = weight.clone(), modules.quantised.quantise(weight, storage)
    wanted = weight.float() / scale
    wanted = wanted.round() if storage is torch.int8 else wanted
    assert torch.equal(held.float(), wanted.to(storage).float()) and scale.dtype is torch.float32
    assert torch.equal(weight, before)


def test_short_rotary_is_transformers_own(modules, drawn):
    network = drawn["phi-3.5-moe-tiny"][1]
    short = modules.weights.ShortRotary(network.model.rotary_emb)
    positions = torch.tensor([[0, 5, 2047], [3, 1, 4095]])
    hidden = torch.zeros(2, 3, 64)
    ours, theirs = short(hidden, positions), network.model.rotary_emb(hidden, positions)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_rotary_numbers_are_never_what_memory_held(modules, drawn):
    for name in TINY:
        network = modules.weights.load_model(drawn[name][0], settings(name, "bf16"), "cpu")
        inverse = network.model.rotary_emb.inv_freq
        assert inverse.dtype is torch.float32 and torch.equal(inverse, drawn[name][1].model.rotary_emb.inv_freq)


def test_a_parameter_that_is_missing_is_named(modules, drawn, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(drawn["llama-3-70b-tiny"][0], tmp_path / "w")
    held = load_file(tmp_path / "w/model.safetensors")
    del held["model.layers.1.mlp.up_proj.weight"]
    save_file(held, tmp_path / "w/model.safetensors", {"format": "pt"})
    with pytest.raises(KeyError, match=r"layers\.1\.mlp\.up_proj\.weight is not in"):
        modules.weights.load_model(tmp_path / "w", settings("llama-3-70b-tiny", draw_on_load=False), "cpu")


def test_a_model_that_is_too_large_is_refused_before_it_is_drawn(modules, drawn, tmp_path):
    model = find_model("llama-3-70b")
    transformers.LlamaConfig(**model.config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the weights take 141\.1 GB in bf16, but cpu has .* GB free") as caught:
        modules.weights.load_model(tmp_path, settings("llama-3-70b", "bf16"), "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("capability", "refused"), [((7, 0), True), ((8, 0), True), ((8, 9), False), ((9, 0), False)])
def test_fp8_on_an_older_gpu(modules, monkeypatch, capability, refused):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    if not refused:
        modules.weights._check_capability("fp8", "cuda:0")
        return
    with pytest.raises(ValueError, match=r"fp8 needs compute capability 8\.9, Some GPU has .*; export in bf16"):
        modules.weights._check_capability("fp8", "cuda:0")
    modules.weights._check_capability("int8", "cuda:0")


def test_tied_embeddings_are_refused(modules):
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    ))  # fmt: skip
    with pytest.raises(ValueError, match="output layer is its embedding"):
        modules.weights.draw_weights(network, 0, 64)


def test_real_weights_are_linked_not_loaded(repository, tmp_path, monkeypatch):
    source = shutil.copytree(repository / "phi-2-tiny/1/weights", tmp_path / "source")

    def refuse(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    folder = export_model("phi-2-tiny", weights=str(source), out=tmp_path / "out", precision="bf16")
    linked = folder / "1/weights/model.safetensors"
    assert linked.samefile(source / "model.safetensors")
    assert json.loads((folder / "1/weights/config.json").read_text())["dtype"] == "bfloat16"


def test_files_of_others_are_copied(repository, tmp_path):
    source = shutil.copytree(repository / "phi-2-tiny/1/weights", tmp_path / "source")
    (source / "model.safetensors").chmod(0o600)
    folder = export_model("phi-2-tiny", weights=str(source), out=tmp_path / "out")
    assert not (folder / "1/weights/model.safetensors").samefile(source / "model.safetensors")
    assert (source / "model.safetensors").stat().st_mode & 0o777 == 0o600


def test_other_formats_are_converted(repository, tmp_path):
    source = shutil.copytree(repository / "phi-2-tiny/1/weights", tmp_path / "source")
    network = transformers.AutoModelForCausalLM.from_pretrained(source)
    torch.save(network.state_dict(), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    folder = export_model("phi-2-tiny", weights=str(source), out=tmp_path / "out", reference=1)
    same = (folder / "reference.jsonl").read_text(), (repository_reference(repository, tmp_path))
    assert same[0] == same[1]


def repository_reference(repository, tmp_path):
    source = repository / "phi-2-tiny/1/weights"
    folder = export_model("phi-2-tiny", weights=str(source), out=tmp_path / "again", reference=1)
    return (folder / "reference.jsonl").read_text()


def test_no_space(repository, tmp_path, monkeypatch):
    source = shutil.copytree(repository / "phi-2-tiny/1/weights", tmp_path / "source")
    (source / "model.safetensors").chmod(0o600)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=900e3))
    said = r"a copy of the weights needs 1\.5 MB, the disk of --out has 900\.0 kB free; .* another --out"
    with pytest.raises(UserError, match=said) as caught:
        export_model("phi-2-tiny", weights=str(source), out=tmp_path / "out")
    assert "\n" not in str(caught.value) and list((tmp_path / "out").iterdir()) == []


def test_no_space_for_a_conversion(repository, tmp_path, monkeypatch):
    source = shutil.copytree(repository / "phi-2-tiny/1/weights", tmp_path / "source")
    (source / "model.safetensors").rename(source / "other.safetensors")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=900e3))
    with pytest.raises(UserError, match=r"phi-2-tiny in fp32 needs 1\.5 MB, the disk of --out"):
        export_model("phi-2-tiny", weights=str(source), out=tmp_path / "out")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), Exception("No space left on device (os error 28)"),
              OSError(122, "Disk quota exceeded"), SafetensorError("Error while serializing: I/O error: No space left")],
)  # fmt: skip
@pytest.mark.parametrize("call", ["save_pretrained", "write_text"])
def test_a_disk_that_fills_up(monkeypatch, tmp_path, error, call):
    """Whatever type the library that writes raises."""

    def fill(*args, **kwargs):
        raise error

    owner = transformers.PreTrainedModel if call == "save_pretrained" else pathlib.Path
    monkeypatch.setattr(owner, call, fill)
    with pytest.raises(UserError, match=r"the disk is full, nothing was exported to .*another --out$") as caught:
        export_model("phi-2-tiny", out=tmp_path)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def changed(repository, folder, **values):
    """A copy of phi-2-tiny's weights whose configuration says `values`; None takes a name out."""
    shutil.copytree(repository / "phi-2-tiny/1/weights", folder)
    config = json.loads((folder / "config.json").read_text()) | values
    text = json.dumps({name: value for name, value in config.items() if value is not None})
    (folder / "config.json").write_text(text)
    return str(folder)


@pytest.mark.parametrize("backend", ["torch-eager", "torch-compile", "vllm", "vllm-python"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 128}, "has hidden_size 128 and not 64 as phi-2-tiny needs"),
        ({"num_hidden_layers": 3}, "has num_hidden_layers 3 and not 2"),
        ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5, "rope_type": "default"}},
         "has rope_parameters.rope_theta 500000.0 and not 10000.0"),
    ],
)  # fmt: skip
def test_weights_of_another_size_are_refused(repository, tmp_path, backend, values, message):
    source = changed(repository, tmp_path / "source", **values)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        export_model("phi-2-tiny", backend, weights=source, out=tmp_path / "out")
    assert "\n" not in str(caught.value) and list((tmp_path / "out").iterdir()) == []


def test_a_size_that_the_catalogue_does_not_have_is_counted(drawn, tmp_path):
    source = shutil.copytree(drawn["llama-3-70b-tiny"][0], tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"head_dim": 32}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"has .* here, 381,248 in the catalogue; these weights are of"):
        export_model("llama-3-70b-tiny", "vllm", weights=str(source), out=tmp_path / "out")


def test_a_small_model_is_not_a_large_one(repository, tmp_path):
    for backend in ("torch-eager", "vllm"):
        with pytest.raises(UserError, match="has vocab_size 2048 and not 51200 as phi-2 needs; export the model"):
            export_model("phi-2", backend, weights=str(repository / "phi-2-tiny/1/weights"), out=tmp_path)


def test_configurations_of_other_versions_are_accepted(repository, tmp_path):
    """As transformers 4 wrote them, with names of later ones too, without what is the default, and with other ids."""
    old = {"rope_parameters": None, "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_scaling": None}
    older = {"qk_layernorm": None, "num_key_value_heads": None, "transformers_version": "4.36.2", "dtype": None}
    newer = {"a_name_of_tomorrow": 7, "use_cache": False, "eos_token_id": [0, 5], "resid_pdrop": 0.1}
    source = changed(repository, tmp_path / "source", **old, **older, **newer)
    folder = export_model("phi-2-tiny", weights=source, out=tmp_path / "out")
    assert json.loads((folder / "1/settings.json").read_text())["source"] == {"kind": "local", "folder": "source"}


def test_parameters_that_are_missing_are_not_made_up(repository, tmp_path):
    source = pathlib.Path(changed(repository, tmp_path / "source"))
    network = transformers.AutoModelForCausalLM.from_pretrained(source)
    held = {name: weight for name, weight in network.state_dict().items() if not name.startswith("lm_head")}
    torch.save(held, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no lm_head.bias, so it is no whole PhiForCausalLM"):
        export_model("phi-2-tiny", weights=str(source), out=tmp_path / "out")


def test_a_shard_that_is_missing_is_named(repository, tmp_path):
    source = pathlib.Path(changed(repository, tmp_path / "source"))
    network = transformers.AutoModelForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()
    network.save_pretrained(source, max_shard_size="600KB")
    export_model("phi-2-tiny", weights=str(source), out=tmp_path / "whole")
    last = max(source.glob("*.safetensors"))
    last.unlink()
    with pytest.raises(UserError, match=f"has no {last.name}, which its model.safetensors.index.json lists"):
        export_model("phi-2-tiny", weights=str(source), out=tmp_path / "out")


def test_a_rope_warning_is_hushed_and_no_other(caplog):
    weights_module.hush_rope_keys()
    log = logging.getLogger("transformers.modeling_rope_utils")
    log.addHandler(caplog.handler)
    log.warning("Unrecognized keys in `rope_parameters` for 'rope_type'='longrope': {'short_mscale'}")
    log.warning("`short_factor` must have length 8")
    log.removeHandler(caplog.handler)
    assert set(caplog.messages) == {"`short_factor` must have length 8"}


def test_a_broken_file(repository, tmp_path):
    source = shutil.copytree(repository / "phi-2-tiny/1/weights", tmp_path / "source")
    (source / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="cannot load weights from") as caught:
        export_model("phi-2-tiny", weights=str(source), out=tmp_path / "out")
    assert "\n" not in str(caught.value) and list((tmp_path / "out").iterdir()) == []


def test_a_synthetic_export_counts_parameters(monkeypatch, tmp_path):
    from exporters import export as export_module

    wrong = dataclasses.replace(find_model("phi-2-tiny"), parameters=7)
    monkeypatch.setattr(export_module, "find_model", lambda name: wrong)
    with pytest.raises(UserError, match="364,032 parameters here, 7 in the catalogue"):
        export_model("phi-2-tiny", out=tmp_path)


@pytest.mark.parametrize("backend", ["vllm", "vllm-python"])
def test_an_outline_counts_parameters(monkeypatch, tmp_path, backend):
    from exporters import export as export_module

    wrong = dataclasses.replace(find_model("phi-2"), parameters=7)
    monkeypatch.setattr(export_module, "find_model", lambda name: wrong)
    with pytest.raises(UserError, match="2,779,683,840 parameters here, 7 in the catalogue"):
        export_model("phi-2", backend, out=tmp_path)
