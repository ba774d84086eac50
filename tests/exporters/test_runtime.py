"""The files that run inside Triton, tested outside it: imports, text, requests, and the end of the batch loop."""

import ast
import json
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import exporters

RUNTIME = sorted((Path(exporters.__file__).parent / "runtime").glob("*.py"))
ALLOWED = {"numpy", "torch", "transformers", "tokenizers", "triton_python_backend_utils", "diffusers", "av", "PIL", "vllm",
           "tensorrt_llm", "torchao", "torch_tensorrt", "triton", "safetensors"}  # fmt: skip
FULL = {"text_input": "hi", "max_tokens": 4}


@pytest.mark.parametrize("path", RUNTIME, ids=lambda path: path.name)
def test_imports_nothing_of_the_project(path):
    roots = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add(node.module.split(".")[0])
    siblings = {path.stem for path in RUNTIME}
    assert roots <= ALLOWED | siblings | set(sys.stdlib_module_names)


@pytest.fixture(scope="session")
def tokenizer(repository):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(repository / "phi-2-tiny/1/weights/tokenizer.json"))


@settings(max_examples=200)
@given(ids=st.lists(st.integers(0, 2047), min_size=1, max_size=60), sizes=st.lists(st.integers(1, 5), min_size=60))
def test_pieces_join_to_the_whole(runtime, tokenizer, ids, sizes):
    stream, pieces, start = runtime("llm_text").TextStream(tokenizer), [], 0
    for size in sizes:
        if start < len(ids):
            pieces.append(stream.push(ids[start : start + size], last=start + size >= len(ids)))
            start += size
    assert "".join(pieces) == tokenizer.decode(ids)


def test_a_split_character_is_held_back(runtime, tokenizer):
    ids = tokenizer.encode("a🙂b").ids
    stream = runtime("llm_text").TextStream(tokenizer)
    pieces = [stream.push([token]) for token in ids]
    assert "".join(pieces) == "a🙂b"
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(ids) > 3


def test_a_cut_character_is_replaced_at_the_end(runtime, tokenizer):
    first = tokenizer.encode("🙂").ids[0]
    stream = runtime("llm_text").TextStream(tokenizer)
    assert stream.push([first]) == ""
    assert stream.push([], last=True) == "\ufffd"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "text_input is missing"),
        ({"text_input": b""}, "text_input is missing or empty"),
        ({"text_input": b"\xff"}, "not UTF-8"),
        ({**FULL, "max_tokens": 0}, "at least 1"),
        ({**FULL, "max_tokens": 2048}, "share a context"),
        ({**FULL, "max_tokens": "4"}, "must be of type int"),
        ({**FULL, "max_tokens": True}, "must be of type int"),
        ({**FULL, "max_tokens": 1.5}, "must be of type int"),
        ({**FULL, "min_tokens": 5}, "min_tokens is 5"),
        ({**FULL, "min_tokens": -1}, "min_tokens is -1"),
        ({**FULL, "temperature": -0.1}, "temperature"),
        ({**FULL, "temperature": float("nan")}, "temperature"),
        ({**FULL, "top_k": -1}, "top_k"),
        ({**FULL, "top_p": 0.0}, "top_p"),
        ({**FULL, "top_k": 5}, "need a temperature"),
        ({**FULL, "seed": -1}, "seed"),
        ({**FULL, "stream": 1}, "must be of type bool"),
        ({**FULL, "return_token_ids": "yes"}, "must be of type bool"),
    ],
)
def test_bad_requests(runtime, fields, message):
    module = runtime("llm_request")
    with pytest.raises(module.BadRequestError, match=message):
        module.parse_prompt(fields, 64, 2048)


def test_tensors_win_over_parameters(runtime, fake_request):
    module = runtime("llm_request")
    request = fake_request({"max_tokens": 3, "ignore_eos": True, "unknown": 1}, text_input="hé", max_tokens=7)
    prompt = module.parse_prompt(runtime("request_fields").read_request(request, module.KINDS), 64, 2048)
    assert (prompt.text, prompt.max_tokens, prompt.ignore_eos, prompt.stream) == ("hé", 7, True, False)


def test_overrides_of_settings(runtime, repository):
    read = runtime("llm_settings").read_settings
    folder = repository / "phi-2-tiny/1"
    assert read(folder, {"threads": "2", "other": "x"})["threads"] == 2
    with pytest.raises(ValueError, match="parameter threads is 'two', not a int"):
        read(folder, {"threads": "two"})
    with pytest.raises(ValueError, match="kv_tokens is 64"):
        read(folder, {"kv_tokens": "64"})


@pytest.fixture
def model(runtime, fake_triton, repository, monkeypatch):
    """The real model.py on the real engine, with Triton faked."""
    monkeypatch.delitem(sys.modules, "llm_model", raising=False)
    module = runtime("llm_model")
    monkeypatch.setattr(module, "__file__", str(repository / "phi-2-tiny/1/model.py"))
    served = module.TritonPythonModel()
    served.initialize(
        {
            "model_config": json.dumps({"parameters": {"kv_tokens": {"string_value": "4096"}}}),
            "model_name": "m",
            "model_instance_name": "m_0_0",
            "model_version": "1",
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
        }
    )
    yield served
    served.finalize()
    sys.modules.pop("llm_model", None)


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def values(response):
    return {tensor.name(): tensor.as_numpy()[0] for tensor in response.tensors}


def test_min_tokens_and_end_tokens(model, fake_request):
    """With every token an end token, only min_tokens and ignore_eos keep an answer alive."""
    everything = list(range(2048))
    model.engine.end_ids[:] = everything[:-1]
    model.engine._rules.end_ids = everything[:-1]
    plain = fake_request(text_input="a", max_tokens=9)
    longer = fake_request(text_input="a", max_tokens=9, min_tokens=5)
    ignoring = fake_request(text_input="a", max_tokens=9, ignore_eos=True)
    requests = [plain, longer, ignoring]
    model.execute(requests)
    wait_for(lambda: all(request.sender.final == 1 for request in requests))
    first, second, third = (values(request.sender.responses[-1]) for request in requests)
    assert (first["total_output_tokens"], first["finish_reason"]) == (1, b"stop")
    assert (second["total_output_tokens"], second["finish_reason"]) == (6, b"stop")
    assert (third["total_output_tokens"], third["num_input_tokens"]) == (9, 1)


def test_a_full_cache_does_not_end_the_loop(model, fake_request):
    """40 requests that together need four times the KV cache all get their tokens."""
    requests = [fake_request(text_input=f"number {i} " * 20, max_tokens=300, ignore_eos=True) for i in range(40)]
    model.execute(requests)
    wait_for(lambda: all(request.sender.final == 1 for request in requests), seconds=60)
    assert {values(request.sender.responses[-1])["total_output_tokens"] for request in requests} == {300}


def test_cancelled_request_leaves_the_batch(model, fake_request):
    request = fake_request(text_input="a", max_tokens=2000, ignore_eos=True, stream=True)
    model.execute([request])
    wait_for(lambda: request.sender.responses)
    request.sender.cancelled = True
    wait_for(lambda: request.sender.final == 1)
    assert values(request.sender.responses[-1])["finish_reason"] == b"cancelled"
    wait_for(lambda: model.engine.occupancy() == (0, 0, 0.0))


def test_the_death_of_the_loop_fails_everything(model, fake_request, monkeypatch):
    open_request = fake_request(text_input="a", max_tokens=2000, ignore_eos=True, stream=True)
    model.execute([open_request])
    wait_for(lambda: open_request.sender.responses)

    def explode(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.engine.model, "forward", explode)
    wait_for(lambda: open_request.sender.final == 1)
    assert "out of memory" in open_request.sender.responses[-1].error.message
    wait_for(lambda: not model.is_ready())
    late = fake_request(text_input="a", max_tokens=2)
    model.execute([late])
    assert late.sender.final == 1
    assert late.sender.responses[-1].error.code == "UNAVAILABLE"


def test_finalize_fails_what_it_cannot_finish(model, fake_request, monkeypatch):
    monkeypatch.setattr(sys.modules["llm_model"], "DRAIN_S", 0.1)
    request = fake_request(text_input="a", max_tokens=2000, ignore_eos=True)
    model.execute([request])
    model.finalize()
    assert request.sender.final == 1
    assert request.sender.responses[-1].error
    late = fake_request(text_input="a")
    model.execute([late])
    assert late.sender.responses[-1].error.code == "UNAVAILABLE"


def test_bad_request_is_answered_not_raised(model, fake_request):
    request = fake_request(max_tokens=3)
    model.execute([request])
    assert request.sender.responses[-1].error.code == "INVALID_ARG"


@pytest.fixture
def made_by_hand(model, fake_request, monkeypatch, runtime):
    """`made_by_hand(stream)` is a request that no batch loop serves, and what hands `(tokens, finished, error)` out."""
    monkeypatch.setattr(model.engine, "submit", lambda *_: True)
    output = runtime("llm_request").Output

    def make(stream):
        request = fake_request(text_input="a", max_tokens=9, stream=stream, return_token_ids=True)
        model.execute([request])
        (request_id,) = model._open
        return request.sender, lambda *made: model._send(output(request_id, *made))

    return make


def ids(response):
    return next((list(t.as_numpy()) for t in response.tensors if t.name() == "output_ids"), [])


def test_a_request_that_fails_midway_gets_its_tokens_and_then_the_error(made_by_hand):
    sender, hand_out = made_by_hand(stream=True)
    hand_out([5], False)
    hand_out([6, 7], True, "CUDA out of memory")
    assert [ids(response) for response in sender.responses] == [[5], [6, 7], []]
    assert [r.error and r.error.message for r in sender.responses] == [None, None, "CUDA out of memory"]
    assert sender.final == 1 and "finish_reason" not in values(sender.responses[1])


def test_without_stream_there_is_one_response_however_tokens_come(made_by_hand):
    sender, hand_out = made_by_hand(stream=False)
    hand_out([5], False)
    hand_out([6], True)
    (response,) = sender.responses
    assert ids(response) == [5, 6] and values(response)["finish_reason"] == b"length"
    sender, hand_out = made_by_hand(stream=False)
    hand_out([5], False)
    hand_out([6], True, "CUDA out of memory")
    (response,) = sender.responses
    assert response.error.message == "CUDA out of memory" and sender.final == 1
