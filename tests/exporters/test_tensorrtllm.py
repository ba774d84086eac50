"""TensorRT-LLM exports: the table, the steps, the repository, resuming. Docker is replaced by a script that makes files;
nothing here shows that NVIDIA's container does what the sources say."""

import dataclasses
import itertools
import json
import os
import shlex
import stat
import subprocess
from pathlib import Path

import pytest
from google.protobuf import text_format

from exporters import layout, preflight, trtllm_plan
from exporters.catalogue import find_model
from exporters.config_pbtxt import render
from exporters.errors import UserError
from exporters.export import export_model, plan_export
from exporters.gpus import Gpu, needs_table
from exporters.preflight import Machine
from exporters.registry import Build, Order, precisions_of
from exporters.tensorrtllm import llmapi_arguments
from exporters.trtllm_config import checkpoint_config
from exporters.trtllm_images import ENGINES, LLMAPI, images, pick, table, version
from exporters.trtllm_repository import PARTS, fill, fillings, front, launch_command

# Facts of TensorRT-LLM 1.2's sources: the flags of each program, the placeholders of each template, and which of those
# must be filled.
FLAGS = {
    "trtllm-build": {
        "--checkpoint_dir", "--model_config", "--build_config", "--output_dir", "--max_batch_size", "--max_input_len",
        "--max_seq_len", "--max_beam_width", "--max_num_tokens", "--opt_num_tokens", "--kv_cache_type", "--workers",
        "--gemm_plugin", "--log_level", "--logits_dtype",
    },
    "phi/convert_checkpoint.py": {
        "--model_dir", "--tp_size", "--pp_size", "--dtype", "--use_weight_only", "--weight_only_precision",
        "--moe_tp_size", "--moe_ep_size", "--output_dir", "--workers",
    },
    "llama/convert_checkpoint.py": {
        "--model_dir", "--tp_size", "--pp_size", "--dtype", "--use_weight_only", "--weight_only_precision",
        "--moe_tp_size", "--moe_ep_size", "--output_dir", "--workers", "--use_parallel_embedding",
    },
    "quantize.py": {
        "--model_dir", "--output_dir", "--dtype", "--qformat", "--kv_cache_dtype", "--tp_size", "--pp_size",
        "--calib_dataset", "--calib_size", "--batch_size",
    },
}  # fmt: skip
CHOICES = {
    "--dtype": {"auto", "float16", "bfloat16", "float32"},
    "--weight_only_precision": {"int8", "int4"},
    "--qformat": {"nvfp4", "fp8", "int8_sq", "int4_awq", "w4a8_awq", "int8_wo", "int4_wo", "full_prec"},
    "--kv_cache_dtype": {"int8", "fp8"},
    "--kv_cache_type": {"continuous", "paged", "disabled"},
}
QUEUE = {"max_queue_delay_microseconds", "max_queue_size"}
MANDATORY = {
    "preprocessing": {"triton_max_batch_size", "tokenizer_dir", "preprocessing_instance_count", *QUEUE},
    "postprocessing": {"triton_max_batch_size", "tokenizer_dir", "postprocessing_instance_count"},
    "tensorrt_llm": {
        "triton_backend", "triton_max_batch_size", "decoupled_mode", "engine_dir", "batching_strategy",
        "encoder_input_features_data_type", "logits_datatype", "prompt_embedding_table_data_type", *QUEUE,
    },
    "tensorrt_llm_bls": {"triton_max_batch_size", "decoupled_mode", "bls_instance_count", "logits_datatype"},
}  # fmt: skip
OPTIONAL = {
    "preprocessing": {"add_special_tokens", "multimodal_model_path", "engine_dir"},
    "postprocessing": {"skip_special_tokens"},
    "tensorrt_llm": {
        "max_beam_width", "kv_cache_free_gpu_mem_fraction", "enable_kv_cache_reuse", "batch_scheduler_policy",
        "exclude_input_in_output", "enable_chunked_context", "max_tokens_in_paged_kv_cache", "gpu_device_ids",
    },
    "tensorrt_llm_bls": {"accumulate_tokens", "tensorrt_llm_model_name", "tensorrt_llm_draft_model_name"},
}  # fmt: skip
H100 = Gpu("NVIDIA H100 80GB HBM3", 9.0, 81559 << 20)
PHI, PHIMOE, LLAMA = (find_model(name) for name in ("phi-2", "phi-3.5-moe", "llama-3-70b"))
TRITON = "nvcr.io/nvidia/tritonserver"
MODELS = {"phi": PHI, "phimoe": PHIMOE, "llama": LLAMA}


def order(model=PHI, precision="fp16", weights="synthetic", tp=1, **build):
    return Order(model, "tensorrtllm", precision, weights, 0, "m", tp=tp, build=Build(**build))


def steps_of(wanted, work=Path("/w")):
    return trtllm_plan.steps(wanted, images()[0], work, "1000:1000")


def container_command(step):
    return step.command[step.command.index(images()[0].name) + 1 :]


# The table.


def test_the_table_is_sound():
    rows = images()
    assert [row.tag for row in rows] == sorted((row.tag for row in rows), key=version, reverse=True)
    assert len({row.tag for row in rows}) == len(rows) == 22
    newest = rows[0]
    assert newest.name == "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3" and newest.trtllm == "1.2.1"
    for row in rows:
        assert row.engines == row.llmapi == (version(row.trtllm) >= (1, 0)), row.tag


@pytest.mark.parametrize(
    ("driver", "tag"),
    [(None, "26.07"), ("590.44.01", "26.07"), ("580.95.05", "26.07"), ("575.57.08", "25.10"), ("535.183", "25.10")],
)
def test_the_newest_image_that_the_driver_runs(driver, tag):
    assert pick(ENGINES, "PhiForCausalLM", driver).tag == tag


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ENGINES, "PhiForCausalLM", "470.10"), "driver 470.10 is too old.*525.60"),
        ((LLMAPI, "PhiForCausalLM", None), "PhiForCausalLM is not in TensorRT-LLM's PyTorch LLM API"),
        ((LLMAPI, "PhimoeForCausalLM", None), "PhiMoEForCausalLM is not in"),
        ((ENGINES, "CogVideoX", None), "TensorRT-LLM has no CogVideoX"),
        (
            (ENGINES, "PhiForCausalLM", None, "nvcr.io/nvidia/tritonserver:26.09-trtllm-python-py3"),
            "engines end at 26.07",
        ),
        (
            (ENGINES, "LlamaForCausalLM", None, "nvcr.io/nvidia/tritonserver:26.09-trtllm-python-py3"),
            "tensorrtllm-llmapi",
        ),
        (
            (ENGINES, "PhiForCausalLM", None, "nvcr.io/nvidia/tritonserver:24.10-trtllm-python-py3"),
            "24.10 has .*0.14.0",
        ),
        ((ENGINES, "PhiForCausalLM", None, "image; rm -rf /"), "bad --image"),
        ((ENGINES, "PhiForCausalLM", None, "--privileged"), "bad --image"),
        ((LLMAPI, "LlamaForCausalLM", None, "--privileged; rm -rf /"), "bad --image"),
        ((LLMAPI, "LlamaForCausalLM", None, f"{TRITON}:24.10-trtllm-python-py3"), "24.10 has .*whose llmapi"),
        ((LLMAPI, "LlamaForCausalLM", None, "24.10"), "24.10 has .*whose llmapi"),
        ((LLMAPI, "LlamaForCausalLM", None, f"{TRITON}:26.07-py3"), "not in the table"),
        ((ENGINES, "PhiForCausalLM", None, "a b"), "bad --image"),
    ],
)
def test_why_there_is_no_image(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        pick(*arguments)
    assert "\n" not in str(caught.value)


def test_an_image_of_another_registry_is_used_under_its_own_name():
    image = pick(LLMAPI, "LlamaForCausalLM", None, "registry.site:5000/triton:26.03-trtllm-python-py3")
    assert (image.name, image.trtllm) == ("registry.site:5000/triton:26.03-trtllm-python-py3", "1.2.0")
    assert pick(LLMAPI, "LlamaForCausalLM", None, "26.03").name == f"{TRITON}:26.03-trtllm-python-py3", "a tag alone"


@pytest.mark.parametrize("model", ["phi-2", "phi-2-tiny", "phi-3.5-moe"])
def test_the_reason_for_no_path_is_what_the_user_sees(tmp_path, model):
    with pytest.raises(UserError, match=r"is not in .*LLM API; use --backend tensorrtllm .*up to 26\.07"):
        export_model(model, "tensorrtllm-llmapi", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_precisions_by_model():
    assert precisions_of(PHI, "tensorrtllm") == ("fp16", "bf16", "int8", "int4")
    assert precisions_of(PHIMOE, "tensorrtllm") == ("bf16", "fp16", "fp8", "int8")
    assert "nvfp4" in precisions_of(LLAMA, "tensorrtllm") and "int4-awq" in precisions_of(LLAMA, "tensorrtllm")
    assert precisions_of(PHI, "tensorrtllm-llmapi") == () and precisions_of(LLAMA, "tensorrtllm-llmapi")
    for entry in table("models").values():
        assert set(entry["engine"]) <= set(table("precisions")) & set(needs_table()["precision"])
        assert set(entry["unlisted"]) <= set(entry["engine"])


# The steps.


@pytest.mark.parametrize("weights", ["synthetic", "hub", "local"])
@pytest.mark.parametrize(
    ("name", "precision"), [(n, p) for n, m in MODELS.items() for p in precisions_of(m, "tensorrtllm")]
)
def test_only_flags_that_the_programs_know(tmp_path, name, precision, weights):
    where = str(tmp_path) if weights == "local" else weights
    seen = 0
    for step in steps_of(order(MODELS[name], precision, where)):
        if step.command[0] != "docker":
            continue
        command = container_command(step)
        program = next((program for program in FLAGS if any(word.endswith(program) for word in command[:2])), None)
        if program is None:
            assert command[0] in ("cp", "chown") or command[:2] == ("python3", "/probe.py")
            continue
        flags = [word for word in command if word.startswith("--")]
        assert set(flags) <= FLAGS[program] and len(set(flags)) == len(flags)
        for flag, value in itertools.pairwise(command):
            assert value in CHOICES.get(flag, {value}), flag
        seen += 1
    assert seen == (1 if weights == "synthetic" else 2)


def test_random_weights_need_no_download_and_no_checkpoint():
    assert [step.name for step in steps_of(order())] == ["probe", "parts", "engine", "hand-over"]
    command = container_command(steps_of(order(tp=2))[2])
    assert command[:3] == ("trtllm-build", "--model_config", "/work/model.json")
    assert steps_of(order(tp=2))[2].makes == ("engine/config.json", "engine/rank0.engine", "engine/rank1.engine")


def test_hub_weights_are_fetched_by_revision():
    fetch = steps_of(order(weights="hub"))[2]
    assert fetch.command[1:5] == ("download", "microsoft/phi-2", "--revision", PHI.revision)


def test_local_weights_are_mounted_read_only(tmp_path):
    checkpoint = steps_of(order(weights=str(tmp_path)))[2]
    assert f"{tmp_path}:/hf:ro" in checkpoint.command
    assert container_command(checkpoint)[2:4] == ("--model_dir", "/hf")


def test_experts_and_stages():
    command = container_command(steps_of(order(PHIMOE, "bf16", "hub", tp=4, ep=2))[3])
    assert command[-4:] == ("--moe_tp_size", "2", "--moe_ep_size", "2")
    assert checkpoint_config(PHIMOE, "bf16", tp=4, ep=2)["mapping"] == {
        "world_size": 4, "tp_size": 4, "pp_size": 1, "moe_tp_size": 2, "moe_ep_size": 2}  # fmt: skip
    assert len(steps_of(order(LLAMA, "bf16", tp=2, pp=2))[2].makes) == 5


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (order(pp=2), "no pipeline parallelism"),
        (order(ep=2, tp=2), "no experts"),
        (order(PHIMOE, "bf16", tp=2, ep=4), "must divide --tp"),
        (order(PHIMOE, "fp8", "hub", tp=2, ep=2), "quantize.py has no flag"),
        (order(PHIMOE, "bf16", tp=32, ep=32), "the 16 experts"),
        (order(tp=3), "32 attention heads and 32 KV heads; choose one of: 1, 2, 4, 8, 16, 32$"),
        (order(tp=64), "--tp 64 does not fit phi-2, which has 32 attention heads"),
        (order(dataclasses.replace(LLAMA, config={**LLAMA.config, "num_key_value_heads": 6}), "bf16", tp=4), "6 KV"),
        (order(LLAMA, "bf16", pp=3), "must divide the 80 layers"),
        (order(weights="/a:/etc"), "--weights: docker cannot mount '/a:/etc'"),
        (order(weights="/a\nb"), "--weights: docker cannot mount"),
    ],
)
def test_what_cannot_be_spread_or_mounted(wanted, message):
    with pytest.raises(UserError, match=message) as caught:
        steps_of(wanted)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tp", [1, 2, 8, 16, 64])
def test_more_gpus_than_kv_heads_copy_them(tp):
    trtllm_plan.check_parallel(order(LLAMA, "bf16", tp=tp))


def test_the_llm_api_takes_stages_of_unequal_size():
    trtllm_plan.check_parallel(order(LLAMA, "bf16", pp=3), LLMAPI)
    with pytest.raises(UserError, match="--pp 81 is more than the 80 layers"):
        trtllm_plan.check_parallel(order(LLAMA, "bf16", pp=81), LLMAPI)


def test_an_option_that_cannot_be_mounted_is_named(tmp_path):
    with pytest.raises(UserError, match="--build-cache: docker cannot mount '/c:d/"):
        plan_export("phi-2", "tensorrtllm", build=Build(cache=Path("/c:d")))
    with pytest.raises(UserError, match="--out: docker cannot mount '/o:p'"):
        plan_export("phi-2", "tensorrtllm", build=Build(cache=tmp_path, out=Path("/o:p")))


# Random-weight engines.


def test_checkpoint_config_of_phi():
    config = checkpoint_config(PHI, "fp16")
    assert config == {
        "architecture": "PhiForCausalLM", "dtype": "float16", "logits_dtype": "float32", "vocab_size": 51200,
        "max_position_embeddings": 2048, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "norm_epsilon": 1e-5, "hidden_act": "gelu_new",
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1}, "quantization": {},
        "position_embedding_type": "rope_gpt_neox", "rotary_base": 10000.0, "rotary_pct": 0.4, "rotary_scaling": None,
    }  # fmt: skip


def test_checkpoint_config_of_phimoe_and_llama():
    config = checkpoint_config(PHIMOE, "fp8")
    assert config["architecture"] == "PhiMoEForCausalLM" and config["position_embedding_type"] == "long_rope"
    assert config["moe"] == {"num_experts": 16, "top_k": 2, "normalization_mode": 2, "sparse_mixer_epsilon": 0.01}
    assert config["quantization"] == {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    assert len(config["longrope_scaling_short_factors"]) == 64 and config["longrope_long_mscale"] == 1.243163121016122
    llama = checkpoint_config(LLAMA, "int4-awq", tp=2)
    assert llama["rotary_base"] == 500000.0 and llama["head_size"] == 128
    assert llama["quantization"] == {"quant_algo": "W4A16_AWQ", "group_size": 128, "has_zero_point": False,
                                     "pre_quant_scale": True}  # fmt: skip
    json.dumps([config, llama])


# The repository.


def parse(text):
    model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_the_front_is_an_ensemble():
    config = parse(render(front("phi-2", 64)))
    assert (config.platform, config.backend, config.max_batch_size) == ("ensemble", "", 64)
    assert not config.instance_group
    steps = {step.model_name: step for step in config.ensemble_scheduling.step}
    assert list(steps) == ["preprocessing", "tensorrt_llm", "postprocessing"]
    inputs, outputs = {tensor.name for tensor in config.input}, {tensor.name for tensor in config.output}
    made = inputs | {name for step in steps.values() for name in step.output_map.values()}
    for step in steps.values():
        assert set(step.input_map.values()) <= made, "every tensor comes from somewhere"
    assert outputs <= made
    assert {tensor.name for tensor in config.input if not tensor.optional} == {"text_input", "max_tokens"}
    assert steps["tensorrt_llm"].input_map["min_tokens"] == "min_tokens"


@pytest.mark.parametrize("part", PARTS)
def test_templates_are_filled_whole(part):
    values = fillings("/models/m/1/engine", "/models/m/1/weights", 64)[part]
    assert set(values) >= MANDATORY[part]
    asked = set().union(*MANDATORY.values(), *OPTIONAL.values())
    assert set(values) <= asked, "every part is offered the types, sizes and queues that any part asks for"


TEMPLATE = """\
name: "x"
backend: "${triton_backend}"
max_batch_size: ${triton_max_batch_size}
model_transaction_policy { decoupled: ${decoupled_mode} }
parameters { key: "gpt_model_path" value { string_value: "${engine_dir}" } }
parameters { key: "decoding_mode" value { string_value: "${decoding_mode}" } }
"""
VALUES = {"triton_backend": "tensorrtllm", "triton_max_batch_size": "64", "decoupled_mode": "True", "engine_dir": "/e"}


def test_a_key_that_a_template_does_not_ask_for_is_left_out():
    assert fill("x", TEMPLATE, {**VALUES, "max_queue_size": "0"}) == fill("x", TEMPLATE, VALUES)


def test_fill():
    config = parse(fill("x", TEMPLATE, VALUES))
    assert (config.backend, config.max_batch_size, config.model_transaction_policy.decoupled) == (
        "tensorrtllm",
        64,
        True,
    )
    assert config.parameters["gpt_model_path"].string_value == "/e"
    assert config.parameters["decoding_mode"].string_value == "${decoding_mode}", "unset stays, as the parts expect"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({k: v for k, v in VALUES.items() if k != "triton_max_batch_size"}, r"needs \$\{triton_max_batch_size\}"),
        *[({**VALUES, "engine_dir": bad}, "cannot be written") for bad in ("/a,b:c", "/a b", "$x", '"', "a\nb", "")],
    ],
)
def test_fill_refuses(values, message):
    with pytest.raises(UserError, match=message):
        fill("x", TEMPLATE, values)


def test_launch():
    one = launch_command("phi-2", "/models", 1)
    assert one[0] == "tritonserver" and "--load-model=phi-2" in one
    assert one[1:3] == ["--model-repository=/models", "--model-repository=/models/phi-2/1/parts"]
    two = launch_command("phi-2", "/models", 2)
    assert "--backend-config=python,stub-timeout-seconds=1800" in one, "eight stubs that import transformers"
    assert two[:4] == ["mpirun", "--allow-run-as-root", "-n", "1"] and two.count(":") == 1
    rank1 = two[two.index(":") + 1 :]
    assert rank1[:2] == ["-n", "1"] and "--load-model=tensorrt_llm" in rank1
    assert "--backend-config=python,shm-region-prefix-name=prefix1_" in rank1


def test_llmapi_of_llama(tmp_path):
    arguments = llmapi_arguments(dataclasses.replace(order(LLAMA, "bf16", tp=2), backend="tensorrtllm-llmapi"), 8192)
    assert arguments["load_format"] == "dummy" and arguments["tensor_parallel_size"] == 2 and arguments["model"] == ""
    assert arguments["kv_cache_config"] == {"free_gpu_memory_fraction": 0.9, "enable_block_reuse": False}


@pytest.fixture
def h100(monkeypatch):
    """A machine with one, docker and a driver that runs every image."""
    there = Machine((H100,), "590.44.01", "", True, 10**12, True)
    monkeypatch.setattr(preflight, "probe", lambda image, folder: there)


def llmapi(out, told, **options):
    build = Build(**options)
    return export_model("llama-3-70b-tiny", "tensorrtllm-llmapi", out=out, build=build, on_progress=told.append)


def test_llmapi_chooses_and_records_the_image_and_says_how_to_serve(h100, tmp_path):
    told = []
    folder = llmapi(tmp_path / "a b", told)
    image = images()[0].name
    assert layout.read_manifest(folder)["image"] == image
    assert json.loads((folder / "1/settings.json").read_text())["image"] == image
    (serve,) = (line.removeprefix("serve: ") for line in told if line.startswith("serve: "))
    words = shlex.split(serve)
    assert words[:2] == ["docker", "run"] and f"{tmp_path}/a b:/models:ro" in words
    command = words[words.index(image) + 1 :]
    assert command[0] == "tritonserver" and "--load-model=llama-3-70b-tiny" in command
    assert "--disable-auto-complete-config" not in command
    assert not any("not on this machine" in line for line in told)
    build = Build(out=tmp_path / "a b")
    assert plan_export("llama-3-70b-tiny", "tensorrtllm-llmapi", build=build)[-1] == f"serve: {serve}"


@pytest.mark.parametrize("image", ["--privileged; rm -rf /", f"{TRITON}:24.10-trtllm-python-py3"])
def test_llmapi_refuses_an_image_that_it_cannot_use(h100, tmp_path, image):
    with pytest.raises(UserError, match="--image"):
        llmapi(tmp_path / "out", [], image=image)
    assert not list(tmp_path.glob("out/*"))


def test_llmapi_takes_an_image_of_the_table(h100, tmp_path):
    wanted = f"{TRITON}:25.12-trtllm-python-py3"
    folder = llmapi(tmp_path / "out", told := [], image=wanted)
    assert layout.read_manifest(folder)["image"] == wanted and wanted in told[-2]


def test_llmapi_tells_what_stands_in_the_way_here_but_exports(tmp_path, monkeypatch):
    gtx = Machine((Gpu("NVIDIA GeForce GTX 1080", 6.1, 8 << 30),), "590.44.01", "", True, 0, True)
    monkeypatch.setattr(preflight, "probe", lambda image, folder: gtx)
    told = []
    llmapi(tmp_path / "out", told)
    (line,) = (line for line in told if line.startswith("not on this machine"))
    assert "GTX 1080 has compute capability 6.1" in line and "needs 8.0" in line
    monkeypatch.setattr(preflight, "probe", None)
    assert llmapi(tmp_path / "other", [], check=False).is_dir(), "--no-check does not look"


def test_llmapi_serves_weights_where_the_library_finds_them(h100, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    serve = plan_export("llama-3-70b", "tensorrtllm-llmapi", "hub")[-1]
    assert f"-v {tmp_path}/hub:/hub -e HF_HOME=/hub -e HF_TOKEN" in serve
    (tmp_path / "config.json").write_text("{}")
    serve = plan_export("llama-3-70b", "tensorrtllm-llmapi", str(tmp_path))[-1]
    assert f"-v {tmp_path}:{tmp_path}:ro" in serve


# The whole export, with docker replaced.

FAKE_DOCKER = r"""#!/bin/sh
echo "$@" >> "$LOG"
for word in "$@"; do case "$word" in *:/work) work="${word%:/work}";; esac; done
case "$*" in
  *" /probe.py "*) [ -n "$LACKS" ] && echo "this image is not what the plan needs: $LACKS" && exit 1
    echo '{}' > "$work/image.json";;
  *trtllm-build*)
    [ "$BREAK" = 125 ] && printf "docker: no daemon here.\n\nRun 'docker run --help' for more information\n" && exit 125
    [ -n "$BREAK" ] && echo "out of memory" && exit 3
    mkdir -p "$work/engine"; echo '{}' > "$work/engine/config.json"; echo engine > "$work/engine/rank0.engine";;
  *all_models*) cp -r "$TEMPLATES"/* "$work/parts/";;
esac
exit 0
"""


@pytest.fixture
def docker(tmp_path, monkeypatch):
    """A `docker` that makes the files, and a machine that can run it."""
    binary = tmp_path / "bin" / "docker"
    binary.parent.mkdir()
    binary.write_text(FAKE_DOCKER)
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    for part, keys in MANDATORY.items():
        folder = tmp_path / "templates" / part
        (folder / "1").mkdir(parents=True)
        (folder / "1" / "model.py").write_text("# NVIDIA's\n")
        lines = [
            f'parameters {{ key: "{key}" value {{ string_value: "${{{key}}}" }} }}' for key in keys | OPTIONAL[part]
        ]
        (folder / "config.pbtxt").write_text("\n".join(lines) + "\n")
    for key, value in {"PATH": f"{binary.parent}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"), "BREAK": "", "LACKS": "",
                       "TEMPLATES": str(tmp_path / "templates")}.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    there = Machine((H100,), "590.44.01", "", True, 10**12, True)
    monkeypatch.setattr(preflight, "probe", lambda image, folder: there)
    return tmp_path


def build(tmp_path, **options):
    return export_model("phi-2", "tensorrtllm", out=tmp_path / "out", build=Build(cache=tmp_path / "cache"), **options)


def test_export_and_resume(docker):
    told = []
    folder = build(docker, on_progress=told.append)
    assert (folder / "1/engine/rank0.engine").read_text() == "engine\n"
    filled = parse((folder / "1/parts/tensorrt_llm/config.pbtxt").read_text())
    assert filled.parameters["engine_dir"].string_value == "/models/phi-2/1/engine"
    assert parse((folder / "config.pbtxt").read_text()).platform == "ensemble"
    launch = json.loads((folder / "1/launch.json").read_text())
    assert launch["image"] == images()[0].name and launch["command"][0] == "tritonserver"
    manifest = layout.read_manifest(folder)
    assert (manifest["image"], manifest["precision"], manifest["weights"]) == (images()[0].name, "fp16", "synthetic")
    assert any("step 3/4 engine" in line for line in told)
    runs = (docker / "log").read_text().count("\n")
    told.clear()
    build(docker, force=True, on_progress=told.append)
    assert (docker / "log").read_text().count("\n") == runs, "finished steps are not run again"
    assert sum("done before" in line for line in told) == 4


def test_a_failed_step_leaves_nothing_in_the_repository_and_goes_on_later(docker, monkeypatch):
    monkeypatch.setenv("BREAK", "1")
    with pytest.raises(
        UserError, match=r"step 3/4 engine failed with code 3: out of memory.*goes on from here"
    ) as caught:
        build(docker)
    assert "\n" not in str(caught.value) and not list((docker / "out").iterdir())
    monkeypatch.setenv("BREAK", "")
    assert build(docker).is_dir()


def test_docker_itself_failing_is_said_in_its_own_words(docker, monkeypatch):
    monkeypatch.setenv("BREAK", "125")
    with pytest.raises(UserError, match=r"engine: docker could not start the container: no daemon here\. \(log"):
        build(docker)


def test_a_folder_with_a_space_is_fine(docker):
    build = Build(cache=docker / "a cache")
    assert export_model("phi-2", "tensorrtllm", out=docker / "an out", build=build).is_dir()


def test_the_other_front_tells_a_load_test_how_to_ask(docker):
    told = parse((build(docker) / "1/parts/tensorrt_llm_bls/config.pbtxt").read_text()).parameters
    assert told["tritonmark.dialect"].string_value == "tensorrtllm"
    assert (told["tritonmark.model"].string_value, told["tritonmark.precision"].string_value) == ("phi-2", "fp16")


def test_a_lost_output_is_made_again_with_all_after_it(docker):
    build(docker)
    next((docker / "cache").rglob("rank0.engine")).unlink()
    before = (docker / "log").read_text().count("\n")
    build(docker, force=True)
    assert (docker / "log").read_text().count("\n") == before + 2, "the engine and the handing over"


@pytest.mark.parametrize("part", PARTS)
def test_a_template_that_cannot_be_filled_costs_no_engine_and_the_other_front_none_at_all(docker, part):
    """NVIDIA adds keys: tensorrt_llm_bls once got ${prompt_embedding_table_data_type}, unquoted."""
    template = docker / "templates" / part / "config.pbtxt"
    template.write_text(template.read_text() + 'input { name: "x" data_type: ${a_new_type} dims: [ 1 ] }\n')
    told = []
    if part == "tensorrt_llm_bls":
        folder = build(docker, on_progress=told.append)
        assert (folder / "1/engine/rank0.engine").is_file() and not (folder / "1/parts" / part).exists()
        assert any("tensorrt_llm_bls is left out" in line and "a_new_type" in line for line in told)
    else:
        with pytest.raises(UserError, match=rf"template of {part} needs \$\{{a_new_type\}}.*fillings"):
            build(docker)
        assert "trtllm-build --model_config" not in (docker / "log").read_text(), "no engine was built"


def test_every_known_key_is_filled_wherever_a_template_asks_for_it(docker):
    """As of r25.12 in tensorrt_llm_bls; the same in any part, quoted or not."""
    keys = ("prompt_embedding_table_data_type", "encoder_input_features_data_type", "logits_datatype")
    for part in PARTS:
        template = docker / "templates" / part / "config.pbtxt"
        inputs = [f'input {{ name: "{key}" data_type: ${{{key}}} dims: [ 1 ] }}' for key in keys]
        template.write_text(template.read_text() + "\n".join(inputs) + "\n")
    folder = build(docker)
    for part in PARTS:
        made = parse((folder / "1/parts" / part / "config.pbtxt").read_text())
        assert {tensor.name for tensor in made.input} == set(keys)


def test_an_image_that_lacks_something_is_refused_before_anything_is_fetched_or_built(docker, monkeypatch):
    monkeypatch.setenv("LACKS", "trtllm-build has no --kv_cache_type")
    with pytest.raises(UserError, match=r"step 1/4 probe failed .*trtllm-build has no --kv_cache_type"):
        build(docker)
    assert (docker / "log").read_text().count("\n") == 1


def test_a_token_reaches_the_container_that_downloads_by_name_only(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    steps = {step.name: shlex.join(step.command) for step in steps_of(order(precision="fp8", weights="hub"))}
    assert "-e HF_TOKEN" in steps["checkpoint"] and "-e HTTPS_PROXY" in steps["checkpoint"]
    assert not any("hf_secret" in command for command in steps.values())
    assert "HF_TOKEN" not in steps["engine"]


def test_preflight_stops_before_anything_runs(docker, monkeypatch):
    gtx = Gpu("NVIDIA GeForce GTX 1080", 6.1, 8 << 30)
    monkeypatch.setattr(preflight, "probe", lambda image, folder: Machine((gtx,), "590.44.01", "", True, 10**12, True))
    with pytest.raises(UserError, match=r"GTX 1080 has compute capability 6\.1"):
        build(docker)
    assert not (docker / "log").exists() and not list((docker / "out").iterdir())


GOLDEN = """\
engine: docker run --rm --init --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 -v WORK:/work \
nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3 trtllm-build --model_config /work/model.json --output_dir \
/work/engine --gemm_plugin auto --kv_cache_type paged --max_batch_size 256 --max_input_len 2047 --max_seq_len 2048 \
--max_num_tokens 8192 --max_beam_width 1 --workers 1"""


def test_dry_run_is_golden_and_does_nothing(docker):
    lines = plan_export("phi-2", "tensorrtllm", build=Build(cache=docker / "c", out=docker / "repo"))
    assert lines[0] == f"image: {images()[0].name} (TensorRT-LLM 1.2.1, TensorRT 10.14.1.48, CUDA 13.1)"
    told = dict(line.split(": ", 1) for line in lines)
    assert list(told) == ["image", "folder", "model.json", "probe", "parts", "engine", "hand-over",
                          *(f"fill-{part}" for part in PARTS), "repository", "serve"]  # fmt: skip
    work = told["folder"].removeprefix("mkdir -p ").removesuffix("/parts")
    assert f"engine: {told['engine']}".replace(work, "WORK") == GOLDEN
    assert f"-v {docker}/repo:/models:ro" in told["serve"]
    assert not (docker / "log").exists() and not (docker / "c").exists()


def test_every_printed_command_works_when_it_is_copied(docker):
    """The build by hand ends in the folder in which the export then finds it done, but for its own stamps."""
    lines = plan_export("phi-2", "tensorrtllm", build=Build(cache=docker / "a cache", out=docker / "out"))
    for name in ("folder", "model.json", "probe", "parts", "engine", "hand-over"):
        (command,) = (line.removeprefix(f"{name}: ") for line in lines if line.startswith(f"{name}: "))
        subprocess.run(["sh", "-eu", "-c", command], check=True)
    (work,) = (docker / "a cache").iterdir()
    assert json.loads((work / "model.json").read_text()) == checkpoint_config(PHI, "fp16")
    assert (work / "engine/rank0.engine").is_file() and (work / "parts/preprocessing/config.pbtxt").is_file()
    export_model("phi-2", "tensorrtllm", out=docker / "out", build=Build(cache=docker / "a cache"))
    assert list((docker / "a cache").iterdir()) == [work], "the export builds in the folder that was printed"


def test_dry_run_is_for_builds_only():
    with pytest.raises(UserError, match="--dry-run has nothing to show for vllm; it is for tensorrtllm"):
        plan_export("phi-2", "vllm")
