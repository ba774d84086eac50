"""TensorRT-LLM exports: the table, the steps, the repository, resuming. Docker is replaced by a script that makes files;
nothing here shows that NVIDIA's container does what the sources say."""

import dataclasses
import itertools
import json
import os
import stat
from pathlib import Path

import pytest
from google.protobuf import text_format

from exporters import layout, preflight, trtllm_plan
from exporters.catalogue import find_model
from exporters.config_pbtxt import render
from exporters.errors import UserError
from exporters.export import export_model, plan_export
from exporters.preflight import Gpu, Machine
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
FACTORS = [1.0 + n / 64 for n in range(64)]
PHI = find_model("phi-2")
PHIMOE = dataclasses.replace(
    PHI, name="phimoe", model_class="PhimoeForCausalLM", parameters=41_873_153_344,
    config={
        "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "attention_bias": True, "num_local_experts": 16,
        "num_experts_per_tok": 2, "router_jitter_noise": 0.01, "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS, "short_mscale": 1.24,
                         "long_mscale": 1.24},
    },
)  # fmt: skip
LLAMA = dataclasses.replace(
    PHI, name="llama", model_class="LlamaForCausalLM", parameters=70_553_706_496, gated=True,
    config={
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    },
)  # fmt: skip
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
        ((ENGINES, "PhiForCausalLM", None, "image; rm -rf /"), "bad image name"),
        ((ENGINES, "PhiForCausalLM", None, "--privileged"), "bad image name"),
        ((ENGINES, "PhiForCausalLM", None, "a b"), "bad image name"),
    ],
)
def test_why_there_is_no_image(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        pick(*arguments)
    assert "\n" not in str(caught.value)


def test_precisions_by_model():
    assert precisions_of(PHI, "tensorrtllm") == ("fp16", "bf16", "int8", "int4")
    assert precisions_of(PHIMOE, "tensorrtllm") == ("bf16", "fp16", "fp8", "int8")
    assert "nvfp4" in precisions_of(LLAMA, "tensorrtllm") and "int4-awq" in precisions_of(LLAMA, "tensorrtllm")
    assert precisions_of(PHI, "tensorrtllm-llmapi") == () and precisions_of(LLAMA, "tensorrtllm-llmapi")
    for entry in table("models").values():
        assert set(entry["engine"]) <= set(table("precisions")) & set(preflight.BYTES)


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
            assert command[0] in ("cp", "chown")
            continue
        flags = [word for word in command if word.startswith("--")]
        assert set(flags) <= FLAGS[program] and len(set(flags)) == len(flags)
        for flag, value in itertools.pairwise(command):
            assert value in CHOICES.get(flag, {value}), flag
        seen += 1
    assert seen == (1 if weights == "synthetic" else 2)


def test_random_weights_need_no_download_and_no_checkpoint():
    assert [step.name for step in steps_of(order())] == ["engine", "parts", "hand-over"]
    command = container_command(steps_of(order(tp=2))[0])
    assert command[:3] == ("trtllm-build", "--model_config", "/work/model.json")
    assert steps_of(order(tp=2))[0].makes == ("engine/config.json", "engine/rank0.engine", "engine/rank1.engine")


def test_hub_weights_are_fetched_by_revision():
    fetch = steps_of(order(weights="hub"))[0]
    assert fetch.command[1:5] == ("download", "microsoft/phi-2", "--revision", PHI.revision)


def test_local_weights_are_mounted_read_only(tmp_path):
    checkpoint = steps_of(order(weights=str(tmp_path)))[0]
    assert f"{tmp_path}:/hf:ro" in checkpoint.command
    assert container_command(checkpoint)[2:4] == ("--model_dir", "/hf")


def test_experts_and_stages():
    command = container_command(steps_of(order(PHIMOE, "bf16", "hub", tp=4, ep=2))[1])
    assert command[-4:] == ("--moe_tp_size", "2", "--moe_ep_size", "2")
    assert checkpoint_config(PHIMOE, "bf16", tp=4, ep=2)["mapping"] == {
        "world_size": 4, "tp_size": 4, "pp_size": 1, "moe_tp_size": 2, "moe_ep_size": 2}  # fmt: skip
    assert len(steps_of(order(LLAMA, "bf16", tp=2, pp=2))[0].makes) == 5


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (order(pp=2), "no pipeline parallelism"),
        (order(ep=2, tp=2), "no experts"),
        (order(PHIMOE, "bf16", tp=2, ep=4), "must divide --tp"),
        (order(PHIMOE, "fp8", "hub", tp=2, ep=2), "quantize.py has no flag"),
        (order(tp=3), "num_attention_heads is 32"),
        (order(LLAMA, "bf16", pp=3), "must divide the 80 layers"),
        (order(weights="/a b"), "bad path"),
        (order(weights="/a:/etc"), "bad path"),
        (order(weights="/a$(reboot)"), "bad path"),
        (order(weights="/a;b"), "bad path"),
    ],
)
def test_what_cannot_be_spread_or_mounted(wanted, message):
    with pytest.raises(UserError, match=message):
        steps_of(wanted)


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
    assert len(config["longrope_scaling_short_factors"]) == 64 and config["longrope_long_mscale"] == 1.24
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
    assert set(values) <= MANDATORY[part] | OPTIONAL[part]


TEMPLATE = """\
name: "x"
backend: "${triton_backend}"
max_batch_size: ${triton_max_batch_size}
model_transaction_policy { decoupled: ${decoupled_mode} }
parameters { key: "gpt_model_path" value { string_value: "${engine_dir}" } }
parameters { key: "decoding_mode" value { string_value: "${decoding_mode}" } }
"""
VALUES = {"triton_backend": "tensorrtllm", "triton_max_batch_size": "64", "decoupled_mode": "True", "engine_dir": "/e"}


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
        ({**VALUES, "other": "1"}, r"has no \$\{other\}"),
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
    assert two[:4] == ["mpirun", "--allow-run-as-root", "-n", "1"] and two.count(":") == 1
    rank1 = two[two.index(":") + 1 :]
    assert rank1[:2] == ["-n", "1"] and "--load-model=tensorrt_llm" in rank1
    assert "--backend-config=python,shm-region-prefix-name=prefix1_" in rank1


def test_llmapi_of_llama(tmp_path):
    arguments = llmapi_arguments(dataclasses.replace(order(LLAMA, "bf16", tp=2), backend="tensorrtllm-llmapi"), 8192)
    assert arguments["load_format"] == "dummy" and arguments["tensor_parallel_size"] == 2 and arguments["model"] == ""
    assert arguments["kv_cache_config"] == {"free_gpu_memory_fraction": 0.9, "enable_block_reuse": False}
    with pytest.raises(UserError, match="has no path for phi-2"):
        export_model("phi-2", "tensorrtllm-llmapi", out=tmp_path / "out")


# The whole export, with docker replaced.

FAKE_DOCKER = """#!/bin/sh
echo "$@" >> "$LOG"
for word in "$@"; do case "$word" in *:/work) work="${word%:/work}";; esac; done
case "$*" in
  *trtllm-build*)
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
    for key, value in {"PATH": f"{binary.parent}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"), "BREAK": "",
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
    assert any("step 1/3 engine" in line for line in told)
    runs = (docker / "log").read_text().count("\n")
    told.clear()
    build(docker, force=True, on_progress=told.append)
    assert (docker / "log").read_text().count("\n") == runs, "finished steps are not run again"
    assert sum("done before" in line for line in told) == 3


def test_a_failed_step_leaves_nothing_in_the_repository_and_goes_on_later(docker, monkeypatch):
    monkeypatch.setenv("BREAK", "1")
    with pytest.raises(
        UserError, match=r"step 1/3 engine failed with code 3: out of memory.*goes on from here"
    ) as caught:
        build(docker)
    assert "\n" not in str(caught.value) and not list((docker / "out").iterdir())
    monkeypatch.setenv("BREAK", "")
    assert build(docker).is_dir()


def test_a_lost_output_is_made_again_with_all_after_it(docker):
    build(docker)
    next((docker / "cache").rglob("rank0.engine")).unlink()
    before = (docker / "log").read_text().count("\n")
    build(docker, force=True)
    assert (docker / "log").read_text().count("\n") == before + 3


def test_preflight_stops_before_anything_runs(docker, monkeypatch):
    gtx = Gpu("NVIDIA GeForce GTX 1080", 6.1, 8 << 30)
    monkeypatch.setattr(preflight, "probe", lambda image, folder: Machine((gtx,), "590.44.01", "", True, 10**12, True))
    with pytest.raises(UserError, match=r"GTX 1080 has compute capability 6\.1"):
        build(docker)
    assert not (docker / "log").exists() and not list((docker / "out").iterdir())


GOLDEN = """\
image: nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3 (TensorRT-LLM 1.2.1, TensorRT 10.14.1.48, CUDA 13.1)
engine: docker run --rm --init --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 -v /c/WORK:/work \
nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3 trtllm-build --model_config /work/model.json --output_dir \
/work/engine --gemm_plugin auto --kv_cache_type paged --max_batch_size 256 --max_input_len 2047 --max_seq_len 2048 \
--max_num_tokens 8192 --max_beam_width 1 --workers 1"""


def test_dry_run_is_golden_and_does_nothing(docker):
    lines = plan_export("phi-2", "tensorrtllm", build=Build(cache=Path("/c")))
    assert "\n".join(lines[:2]) == GOLDEN
    names = [line.split(":")[0] for line in lines]
    assert names == ["image", "engine", "parts", "hand-over", *(f"fill-{part}" for part in PARTS), "serve"]
    assert not (docker / "log").exists()


def test_dry_run_is_for_builds_only():
    with pytest.raises(UserError, match="--dry-run has nothing to show for vllm; it is for tensorrtllm"):
        plan_export("phi-2", "vllm")
