"""The model repository around an engine: the front that clients talk to, the parts behind it, and how to launch them.

<out>/<name>/config.pbtxt     the front: an ensemble, written here
<out>/<name>/1/engine         the engine, one file a rank
<out>/<name>/1/weights        configuration and tokenizer
<out>/<name>/1/parts/...      preprocessing, tensorrt_llm, postprocessing and tensorrt_llm_bls: copied out of the image,
                              so that they fit its version, and their templates filled

`parts` is a model repository too: Triton gets both folders. tensorrt_llm_bls is NVIDIA's other front, which calls the
parts from Python; it is loaded only when somebody asks for it, so that it cannot keep the server from starting. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from string import Template

from exporters.config_pbtxt import ModelConfig, Step, Tensor, quote
from exporters.errors import UserError

PARTS = ("preprocessing", "tensorrt_llm", "postprocessing", "tensorrt_llm_bls")
ENGINE_MODEL = "tensorrt_llm"  # the one that every rank of a world loads
OTHER_FRONT = "tensorrt_llm_bls"
DIALECT = {"tritonmark.dialect": "tensorrtllm"}  # how a load test has to ask
KV_SHARE = 0.9  # of the memory that is free once the engine is loaded
SERVER_OPTIONS = [
    "--http-thread-count=32", "--metrics-config=histogram_latencies=true", "--metrics-interval-ms=1000",
    "--exit-timeout-secs=60",
]  # fmt: skip
STUB_TIMEOUT = "--backend-config=python,stub-timeout-seconds=1800"  # large models and cold disks take long to load
INSTANCES = 4  # of the tokenising parts, so that they don't limit the engine
_FILL_RESERVED = set(",:\\$\n\r\"'` ")


def front(name: str, max_batch_size: int) -> ModelConfig:
    """The ensemble. Of the engine's outputs it hands on the text, the token ids and the counts of both sides; a
    response carries the tokens that are new, and `num_output_tokens` says how many."""
    optional = {
        "min_tokens": "TYPE_INT32", "end_id": "TYPE_INT32", "pad_id": "TYPE_INT32", "top_k": "TYPE_INT32",
        "top_p": "TYPE_FP32", "temperature": "TYPE_FP32", "seed": "TYPE_UINT64", "stream": "TYPE_BOOL",
        "exclude_input_in_output": "TYPE_BOOL", "return_num_input_tokens": "TYPE_BOOL",
        "return_num_output_tokens": "TYPE_BOOL",
    }  # fmt: skip
    renamed = {"top_k": "runtime_top_k", "top_p": "runtime_top_p", "stream": "streaming"}
    straight = [key for key in optional if key not in ("end_id", "pad_id")]
    engine_inputs = {
        "input_ids": "_input_ids", "input_lengths": "_input_length", "request_output_len": "_output_length",
        "end_id": "_end_id", "pad_id": "_pad_id", **{renamed.get(key, key): key for key in straight},
    }  # fmt: skip
    return ModelConfig(
        name=name,
        backend="",
        max_batch_size=max_batch_size,
        inputs=(
            Tensor("text_input", "TYPE_STRING"),
            Tensor("max_tokens", "TYPE_INT32"),
            *(Tensor(key, kind, optional=True) for key, kind in optional.items()),
        ),
        outputs=(
            Tensor("text_output", "TYPE_STRING", (-1,)),
            Tensor("output_ids", "TYPE_INT32", (-1, -1)),
            Tensor("num_input_tokens", "TYPE_INT32"),
            Tensor("num_output_tokens", "TYPE_INT32"),
        ),
        steps=(
            Step(
                "preprocessing",
                {"QUERY": "text_input", "REQUEST_OUTPUT_LEN": "max_tokens", "END_ID": "end_id", "PAD_ID": "pad_id"},
                {
                    "INPUT_ID": "_input_ids", "REQUEST_INPUT_LEN": "_input_length",
                    "REQUEST_OUTPUT_LEN": "_output_length", "OUT_END_ID": "_end_id", "OUT_PAD_ID": "_pad_id",
                },
            ),
            Step(
                ENGINE_MODEL,
                engine_inputs,
                {
                    "output_ids": "output_ids", "sequence_length": "_sequence_length",
                    "num_input_tokens": "num_input_tokens", "num_output_tokens": "num_output_tokens",
                },
            ),
            Step(
                "postprocessing",
                {"TOKENS_BATCH": "output_ids", "SEQUENCE_LENGTH": "_sequence_length"},
                {"OUTPUT": "text_output"},
            ),
        ),
        parameters=DIALECT,
    )  # fmt: skip


def fillings(engine: str, tokenizer: str, max_batch_size: int) -> dict[str, dict[str, str]]:
    """What fills the template of each part, where it asks. Paths are the server's.

    Which part asks for which type, size or queue changes from image to image (tensorrt_llm_bls wants the type of the
    prompt table since about 25.12), so every part is offered all of those.
    """
    batch = str(max_batch_size)
    common = {
        "triton_max_batch_size": batch, "decoupled_mode": "True", "logits_datatype": "TYPE_FP32",
        "encoder_input_features_data_type": "TYPE_FP16", "prompt_embedding_table_data_type": "TYPE_FP16",
        "max_queue_delay_microseconds": "0", "max_queue_size": "0",
    }  # fmt: skip
    own = {
        "preprocessing": {
            "tokenizer_dir": tokenizer, "preprocessing_instance_count": str(INSTANCES), "add_special_tokens": "True",
        },
        "postprocessing": {
            "tokenizer_dir": tokenizer, "postprocessing_instance_count": str(INSTANCES), "skip_special_tokens": "True",
        },
        "tensorrt_llm": {
            "triton_backend": "tensorrtllm", "engine_dir": engine, "batching_strategy": "inflight_fused_batching",
            "kv_cache_free_gpu_mem_fraction": str(KV_SHARE), "enable_kv_cache_reuse": "False",
            "batch_scheduler_policy": "guaranteed_no_evict", "max_beam_width": "1", "exclude_input_in_output": "True",
        },
        "tensorrt_llm_bls": {
            "bls_instance_count": str(INSTANCES), "accumulate_tokens": "False", "tensorrt_llm_model_name": ENGINE_MODEL,
        },
    }  # fmt: skip
    return {part: common | values for part, values in own.items()}


def fill(part: str, template: str, values: Mapping[str, str]) -> str:
    """`template` with its `${key}`s filled, as NVIDIA's fill_template.py does; one that has no value and stands inside
    quotes stays, which Triton's parts read as unset.

    A UserError for a value that could be read as more than text, and for a key outside quotes that has no value: then
    Triton could not read the file. A key that this image's template does not ask for is left out.
    """
    for key, value in values.items():
        if not value or set(value) & _FILL_RESERVED:
            raise UserError(f"{key} is {value!r}, which cannot be written into config.pbtxt: use plain names and paths")
    text = Template(template).safe_substitute(values)
    if empty := re.search(r"[:\s\[]\$\{(\w+)\}", text):
        raise UserError(
            f"the image's template of {part} needs ${{{empty[1]}}}, which this version of tritonmark does not know:"
            " add it to fillings() in exporters/trtllm_repository.py, or use an older --image"
        )
    return text


def with_parameters(config: str, parameters: Mapping[str, str]) -> str:
    """The text of a config.pbtxt with string parameters added."""
    entries = [
        f"parameters {{ key: {quote(key)} value {{ string_value: {quote(value)} }} }}\n"
        for key, value in parameters.items()
    ]
    return config.rstrip("\n") + "\n" + "".join(entries)


def launch_llmapi(name: str, served_from: str) -> list[str]:
    """What starts Triton for the LLM API: plain, since `tensorrt_llm.LLM` starts its own workers."""
    load = ["--model-control-mode=explicit", f"--load-model={name}"]
    return ["tritonserver", f"--model-repository={served_from}", *load, *SERVER_OPTIONS, STUB_TIMEOUT]


def launch_command(name: str, served_from: str, world: int) -> list[str]:
    """What starts Triton inside the container, in the foreground: plain for one rank, by mpirun for more.

    Rank 0 serves; the others load only the engine. Each rank needs its own shared memory names.
    """
    root = PurePosixPath(served_from)
    repositories = [f"--model-repository={root}", f"--model-repository={root / name / '1' / 'parts'}"]
    common = ["--model-control-mode=explicit", "--disable-auto-complete-config"]

    def rank(number: int) -> list[str]:
        load = name if number == 0 else ENGINE_MODEL
        command = ["tritonserver", *repositories, *common, f"--load-model={load}"]
        if number == 0:
            command += [*SERVER_OPTIONS, STUB_TIMEOUT]
        else:
            command += ["--allow-http=false", "--allow-grpc=false", "--allow-metrics=false"]
        return [*command, f"--backend-config=python,shm-region-prefix-name=prefix{number}_"]

    if world == 1:
        return rank(0)
    command = ["mpirun", "--allow-run-as-root"]
    for number in range(world):
        command += [*([":"] if number else []), "-n", "1", *rank(number)]
    return command
