"""vLLM exports: layout, engine arguments, and the python runtime against a fake vllm (for its protocol only)."""

import json
import subprocess
import sys
import types

import pytest
from google.protobuf import text_format

from exporters import layout
from exporters.catalogue import find_model
from exporters.errors import UserError
from exporters.export import export_model
from exporters.registry import Build, precisions_of

# Fields of vllm 0.20's AsyncEngineArgs that the export may use, as its vllm/engine/arg_utils.py names them.
ENGINE_ARGS = {
    "model", "tokenizer", "revision", "tokenizer_revision", "dtype", "seed", "max_model_len", "max_num_seqs",
    "tensor_parallel_size", "gpu_memory_utilization", "enable_prefix_caching", "disable_log_stats", "quantization",
    "load_format", "skip_tokenizer_init",
}  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    export_model("phi-2", "vllm", out=folder, name="native", precision="fp8", tp=2)
    export_model("phi-2", "vllm-python", out=folder, name="python", precision="fp8", tp=2)
    export_model("phi-2-tiny", "vllm-python", out=folder, name="tiny", reference=2)
    return folder


def config(folder):
    model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def test_layout_of_tritons_backend(out):
    parsed = config(out / "native")
    assert parsed.backend == "vllm" and parsed.instance_group[0].kind == parsed.instance_group[0].KIND_MODEL
    assert parsed.parameters["REPORT_CUSTOM_METRICS"].string_value == "true"
    assert parsed.parameters["tritonmark.dialect"].string_value == "vllm"
    assert parsed.parameters["tritonmark.tp"].string_value == "2"
    assert not (out / "native/1/model.py").exists() and (out / "native/1/weights/tokenizer.json").is_file()


def test_engine_arguments(out):
    arguments = json.loads((out / "native/1/model.json").read_text())
    assert set(arguments) <= ENGINE_ARGS
    assert arguments == arguments | {
        "model": "/models/native/1/weights", "tokenizer": "/models/native/1/weights", "dtype": "bfloat16",
        "quantization": "fp8", "load_format": "dummy", "tensor_parallel_size": 2, "enable_prefix_caching": False,
        "disable_log_stats": False, "max_model_len": 2048,
    }  # fmt: skip


def test_config_json_for_old_and_new_transformers(out):
    entries = json.loads((out / "native/1/weights/config.json").read_text())
    assert entries["architectures"] == ["PhiForCausalLM"] and entries["model_type"] == "phi"
    assert entries["torch_dtype"] == entries["dtype"] == "bfloat16"
    assert (entries["rope_theta"], entries["partial_rotary_factor"]) == (10000.0, 0.4)
    assert entries["rope_parameters"]["rope_theta"] == 10000.0
    about = json.loads((out / "native/1/weights/tokenizer_config.json").read_text())
    assert about["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_manifest_says_how(out):
    manifest = layout.read_manifest(out / "python")
    assert (manifest["backend"], manifest["tp"], manifest["quantisation"]) == ("vllm-python", 2, "fp8")
    assert manifest["weights"] == "synthetic" and manifest["image"] is None


def test_small_models_load_what_every_backend_loads(out):
    arguments = json.loads((out / "tiny/1/settings.json").read_text())["engine_arguments"]
    assert "load_format" not in arguments and (out / "tiny/1/weights/model.safetensors").is_file()
    assert len((out / "tiny/reference.jsonl").read_text().splitlines()) == 2


def test_no_reference_where_the_weights_are_elsewhere(tmp_path):
    told = []
    folder = export_model("phi-2", "vllm", out=tmp_path, reference=2, on_progress=told.append)
    assert not (folder / "reference.jsonl").exists() and any("no reference" in line for line in told)


def test_fp8_is_offered_beside_the_catalogue():
    assert precisions_of(find_model("phi-2"), "vllm") == ("bf16", "fp16", "fp32", "fp8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, "needs an NVIDIA GPU"),
        ({"precision": "int4-awq"}, "no precision 'int4-awq' for vllm"),
        ({"tp": 0}, "choose 1 or more"),
        ({"name": "a,b"}, "bad model name"),
        ({"name": "a;b"}, "bad model name"),
        ({"name": "$a"}, "bad model name"),
        ({"name": "../a"}, "bad model name"),
        ({"build": Build(served_from="models")}, "bad path 'models'"),
        ({"build": Build(served_from="/a/../b")}, "bad path"),
        ({"build": Build(served_from="/a b")}, "bad path"),
        ({"build": Build(served_from="/$HOME")}, "bad path"),
    ],
)
def test_bad_orders_leave_nothing(tmp_path, options, message):
    with pytest.raises(UserError, match=message) as caught:
        export_model("phi-2", "vllm", out=tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("config.pbtxt"))


FAKE_VLLM = '''
"""A fake of the parts of vllm 0.20 that vllm_engine.py touches. It counts upwards from the last prompt token."""
import asyncio, sys, types

class SamplingParams:
    def __init__(self, **fields):
        known = {"max_tokens", "min_tokens", "temperature", "top_k", "top_p", "seed", "ignore_eos", "stop_token_ids",
                 "detokenize", "output_kind"}
        assert set(fields) <= known, fields
        self.__dict__.update(fields)

class AsyncEngineArgs:
    def __init__(self, **fields):
        self.fields = fields

class StatLoggerBase:
    pass

class AsyncLLM:
    errored, dead_error = False, RuntimeError("the engine died")

    @classmethod
    def from_engine_args(cls, arguments, stat_loggers=None):
        asyncio.get_running_loop()
        assert arguments.fields["skip_tokenizer_init"] and arguments.fields["model"]
        made = cls()
        made.gauge = stat_loggers[0](None, 0)
        print("a library that prints", flush=True)
        return made

    async def generate(self, prompt, parameters, request_id):
        assert parameters.output_kind == "delta" and parameters.detokenize is False
        token = prompt["prompt_token_ids"][-1]
        if token == 13:
            raise ValueError("unlucky")
        if token == 14:
            self.errored = True
        try:
            for n in range(1, parameters.max_tokens + 1):
                self.gauge.record(types.SimpleNamespace(num_running_reqs=1, num_waiting_reqs=2, kv_cache_usage=0.5), None)
                await asyncio.sleep(0.002)
                token += 1
                ended = token in parameters.stop_token_ids and n > parameters.min_tokens
                finished = ended or n == parameters.max_tokens
                out = types.SimpleNamespace(token_ids=[token])
                yield types.SimpleNamespace(outputs=[out], finished=finished)
                if finished:
                    return
        except (asyncio.CancelledError, GeneratorExit):
            print("aborted", request_id, file=sys.stderr, flush=True)
            raise

    def shutdown(self):
        print("shut down", file=sys.stderr, flush=True)

def module(name, **content):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__dict__.update(content)

for name in ("vllm.engine", "vllm.v1", "vllm.v1.engine", "vllm.v1.metrics"):
    module(name)
module("vllm.engine.arg_utils", AsyncEngineArgs=AsyncEngineArgs)
module("vllm.sampling_params", SamplingParams=SamplingParams, RequestOutputKind=types.SimpleNamespace(DELTA="delta"))
module("vllm.v1.engine.async_llm", AsyncLLM=AsyncLLM)
module("vllm.v1.metrics.loggers", StatLoggerBase=StatLoggerBase)
'''
DRIVER = """
import json, sys, time
sys.path.insert(0, {folder!r})
from pathlib import Path
from llm_link import RemoteEngine
from llm_request import Prompt

settings = json.loads((Path({folder!r}) / "settings.json").read_text())
settings["end_token_ids"] = [50]
link = lambda: RemoteEngine(Path({folder!r}) / "weights", settings, "cuda", "test", print)
first, second = link(), link()
def prompt(**fields):
    return Prompt(**{{"text": "", "max_tokens": 5, "min_tokens": 0, "ignore_eos": True, "temperature": 0.0, "top_k": 0,
                     "top_p": 1.0, "seed": None, "stream": True, "return_token_ids": False, **fields}})
def answer(engine, wanted):
    got, error = {{}}, {{}}
    deadline = time.monotonic() + 20
    while wanted - set(error) and time.monotonic() < deadline and not engine.failure():
        for output in engine.results(0.5):
            got.setdefault(output.request_id, []).extend(output.tokens)
            if output.finished:
                error[output.request_id] = output.error
    return got, error
said = {{"leads": [first.leads, second.leads]}}
first.submit("gone", [100], prompt(max_tokens=100000))
while not first.results(0.5):
    assert not first.failure(), first.failure()
first.submit("a", [1, 7], prompt())
second.submit("b", [1, 20], prompt(max_tokens=3))
first.submit("stop", [1, 48], prompt(ignore_eos=False, max_tokens=9))
first.submit("late stop", [1, 48], prompt(ignore_eos=False, max_tokens=9, min_tokens=4))
first.submit("bad", [13], prompt())
first.cancel("gone")
said["first"] = answer(first, {{"a", "stop", "late stop", "bad"}})
said["second"] = answer(second, {{"b"}})
said["occupancy"] = first.occupancy()
if {die}:
    first.submit("death", [14], prompt(max_tokens=100000))
    answer(first, {{"death"}})
    said["failure"] = first.failure()
second.stop(5)
first.stop(5)
said["code"] = first._process.wait(10)
print(json.dumps(said))
"""


@pytest.fixture
def drive(out, tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text(FAKE_VLLM)
    (tmp_path / "t").mkdir()

    def run(die=False):
        code = DRIVER.format(folder=str(out / "tiny/1"), die=die)
        environment = {"PYTHONPATH": str(tmp_path), "TRITONMARK_ENGINE_PYTHON": sys.executable, "PATH": "/usr/bin:/bin",
                       "TMPDIR": str(tmp_path / "t")}  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    return run


def test_the_engine_process_speaks_vllm(drive):
    said, log = drive()
    assert said["leads"] == [True, False]
    got, errors = said["first"]
    assert got["a"] == [8, 9, 10, 11, 12] and said["second"][0] == {"b": [21, 22, 23]}
    assert got["stop"] == [49, 50], "an end token ends the answer and counts"
    assert got["late stop"] == [49, 50, 51, 52, 53, 54, 55, 56, 57], "min_tokens is handed on"
    assert errors["bad"] == "ValueError: unlucky" and errors["a"] is None
    assert "gone" not in errors and "aborted gone" in log
    assert said["occupancy"] == [1, 2, 0.5]
    assert said["code"] == 0 and "shut down" in log


def test_a_dead_engine_ends_its_process(drive):
    said, _ = drive(die=True)
    assert "the engine process has ended" in said["failure"]
    assert said["code"] == 1


def test_sampling_of_the_llm_api(runtime, monkeypatch):
    """TensorRT-LLM's SamplingParams, by the names of its 1.2 sources; a fake module takes them."""
    known = {"max_tokens", "min_tokens", "ignore_eos", "end_id", "pad_id", "stop_token_ids", "detokenize", "temperature",
             "top_k", "top_p", "seed"}  # fmt: skip
    module = types.ModuleType("tensorrt_llm")
    module.SamplingParams = lambda **fields: fields if set(fields) <= known else pytest.fail(str(fields))
    monkeypatch.setitem(sys.modules, "tensorrt_llm", module)
    prompt = runtime("llm_request").Prompt
    common = {"text": "", "max_tokens": 9, "stream": True, "return_token_ids": False}
    sampling = runtime("trtllm_engine").sampling
    fixed = sampling(
        prompt(**common, min_tokens=9, ignore_eos=True, temperature=0.0, top_k=0, top_p=1.0, seed=None), [2, 3]
    )
    assert fixed["end_id"] == -1 and fixed["top_k"] == 1 and fixed["stop_token_ids"] is None
    free = sampling(
        prompt(**common, min_tokens=4, ignore_eos=False, temperature=0.5, top_k=7, top_p=0.9, seed=5), [2, 3]
    )
    assert (free["end_id"], free["stop_token_ids"], free["min_tokens"]) == (2, [3], 4)
    assert (free["temperature"], free["top_k"], free["top_p"], free["seed"]) == (0.5, 7, 0.9, 5)
