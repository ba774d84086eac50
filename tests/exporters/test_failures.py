"""What goes wrong in a served model reaches the one who has to know: errors of requests, of loading and of devices."""

import asyncio
import multiprocessing
import re
import sys
import threading
import time
import types

import pytest
import torch

TORCHS = (  # what torch 2.13 says
    "CUDA out of memory. Tried to allocate 2.64 GiB. GPU 0 has a total capacity of 79.18 GiB of which 1.31 GiB is free."
    " Including non-PyTorch memory, this process has 77.86 GiB memory in use. Of the allocated memory 75.80 GiB is"
    " allocated by PyTorch, and 1.38 GiB is reserved by PyTorch but unallocated."
)


@pytest.fixture
def output(runtime):
    return runtime("llm_request").Output


def test_the_link_keeps_the_error_of_a_request_that_made_tokens_before(runtime, output):
    link = runtime("llm_link")
    engine = object.__new__(link.RemoteEngine)
    engine._link, other = multiprocessing.Pipe()
    for made in (output("r", [5], False), output("r", [], True, "CUDA out of memory"), output("s", [1], False)):
        other.send(([made], (1, 0, 0.5)))
    assert engine.results(1.0) == [output("r", [5], True, "CUDA out of memory"), output("s", [1], False)]


def test_a_library_that_gives_a_request_up_is_an_error(runtime, output):
    """vLLM and TensorRT-LLM say so in the finish reason only."""
    module, delivered = runtime("async_engine"), []

    class Library(module.AsyncEngine):
        async def generate(self, request_id, ids, prompt):
            yield [5], False, None
            yield [6], True, prompt

    async def serve(reason):
        engine = object.__new__(Library)
        engine._loop, engine._made, engine._tasks, engine.occupancy = asyncio.get_running_loop(), {}, {}, (0, 0, 0.0)
        engine._deliver = lambda outputs, occupancy: delivered.extend(outputs)
        await engine._serve("r", [1], reason)
        await asyncio.sleep(0)

    for reason in ("abort", "length", None):
        asyncio.run(serve(reason))
    assert delivered == [
        output("r", [5, 6], True, "the engine gave the request up: abort"),
        output("r", [5, 6], True),
        output("r", [5, 6], True),
    ]


def test_a_request_that_the_engine_cannot_take_fails_alone(runtime, output, tmp_path):
    link = runtime("llm_link")
    guests = link._Guests(tmp_path)

    class Engine:
        stop = cancel = lambda self, *_: None

        def submit(self, request_id, ids):
            if not ids:
                raise RuntimeError("no room")
            guests.deliver([output(request_id, ids, True)], (0, 0, 0.0))

    threading.Thread(target=guests.serve, args=(Engine(),), daemon=True).start()
    connection = link._join(tmp_path)
    answers = []
    for order in (("submit", "bad", []), ("submit", "good", [7])):
        connection.send(order)
        answers += connection.recv()[0]
    assert answers == [output("bad", [], True, "RuntimeError: no room"), output("good", [7], True)]
    connection.close()


def test_an_engine_that_does_not_start_fails_all_who_wait_and_leaves_nothing(runtime, tmp_path, monkeypatch):
    link, starts, reasons = runtime("llm_link"), [], []
    monkeypatch.setattr(link.tempfile, "gettempdir", lambda: str(tmp_path))

    def start(*_):
        starts.append(1)
        time.sleep(0.5)  # until both others wait
        raise RuntimeError("no such model")

    def join():
        try:
            link.RemoteEngine(tmp_path, {"end_token_ids": []}, "cpu", "m", print)
        except RuntimeError as error:
            reasons.append(str(error))

    monkeypatch.setattr(link, "_start", start)
    threads = [threading.Thread(target=join) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert reasons == ["no such model"] * 3 and len(starts) == 1
    assert not list(tmp_path.iterdir())
    join()  # a later one tries again
    assert len(starts) == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("own", "inductor", "triton"),
    [
        ({}, "{cache}", "{cache}/triton"),
        ({"TORCHINDUCTOR_CACHE_DIR": "/tmp/torchinductor_x", "TRITON_CACHE_DIR": "/tmp/torchinductor_x/triton/0"},
         "{cache}", "{cache}/triton"),
        ({"TORCHINDUCTOR_CACHE_DIR": "/fast/disk"}, "/fast/disk", None),
        ({"TRITON_CACHE_DIR": "/fast/disk"}, "{cache}", "/fast/disk"),
    ],
)  # fmt: skip
def test_an_operator_s_folders_for_compiled_code_win(runtime, tmp_path, own, inductor, triton):
    variables = dict(own)
    cache = tmp_path / "compile-cache"
    assert runtime("devices").use_compile_cache(tmp_path, variables) == cache
    assert variables["TORCHINDUCTOR_CACHE_DIR"] == inductor.format(cache=cache)
    assert variables.get("TRITON_CACHE_DIR") == (triton and triton.format(cache=cache))


def test_the_engine_process_keeps_its_compiled_code_there_too(runtime, tmp_path, monkeypatch):
    link, given = runtime("llm_link"), {}
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/fast/disk")

    def popen(*_, env, **__):
        given.update(env)
        raise OSError("enough")

    monkeypatch.setattr(link.subprocess, "Popen", popen)
    with pytest.raises(OSError, match="enough"):
        link._start(tmp_path, tmp_path / "1" / "weights", {}, "cpu", print)
    assert given["TORCHINDUCTOR_CACHE_DIR"] == "/fast/disk"


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(7, 5)` is the compute capability that torch finds."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    return lambda *found: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: found)


@pytest.mark.parametrize(
    ("found", "precision", "compiled", "message"),
    [
        ((6, 1), "fp32", True, "torch-compile needs compute capability 7.0, Some GPU has 6.1; export torch-eager"),
        ((6, 1), "bf16", True, "torch-compile needs compute capability 7.0"),
        ((7, 5), "bf16", True, "torch-compile in bf16 needs compute capability 8.0, Some GPU has 7.5; export in fp16"),
        ((7, 5), "int8", True, "torch-compile in bf16 needs compute capability 8.0"),
        ((7, 5), "fp8", True, "fp8 needs compute capability 8.9"),
        ((8, 0), "fp8", False, "fp8 needs compute capability 8.9"),
        ((7, 0), "fp16", True, None),
        ((8, 0), "bf16", True, None),
        ((6, 1), "bf16", False, None),  # emulated
        ((9, 0), "fp8", True, None),
    ],
)
def test_what_a_gpu_is_too_old_for_is_said_before_weights_are_read(
    runtime, gpu, tmp_path, found, precision, compiled, message
):
    gpu(*found)
    weights = runtime("llm_weights")
    settings = {"precision": precision, "engine": "slots" if compiled else "batching"}
    with pytest.raises(ValueError, match=re.escape(message or "Unrecognized model")):
        weights.load_model(
            tmp_path, settings, "cuda:0"
        )  # without a message: the empty folder is the next to be refused


@pytest.mark.parametrize(
    ("found", "precision", "message"),
    [
        (
            (9, 0),
            "fp16",
            "torch-compile cannot capture experts in fp16 on a GPU; export in bf16 or fp8, or torch-eager",
        ),
        ((9, 0), "int8", "torch-compile cannot capture experts in int8"),
        ((8, 9), "fp8", "torch-compile of experts needs compute capability 9.0, Some GPU has 8.9; export torch-eager"),
        ((8, 0), "bf16", "torch-compile of experts needs compute capability 9.0, Some GPU has 8.0; export torch-eager"),
        ((9, 0), "fp8", None),
        ((9, 0), "bf16", None),
    ],
)
def test_experts_that_cannot_be_captured_are_refused(runtime, gpu, found, precision, message):
    gpu(*found)
    check, experts = runtime("llm_weights")._check_experts, torch.nn.ParameterList([torch.empty(4, 2, 2)])
    check(torch.nn.Linear(2, 2), precision, "cuda:0")
    check(experts, precision, "cpu")
    if message is None:
        return check(experts, precision, "cuda:0")
    with pytest.raises(ValueError, match=re.escape(message)):
        check(experts, precision, "cuda:0")
    return None


def test_a_compiled_video_model_asks_for_the_same(runtime, gpu, tmp_path):
    engine = runtime("video_engine")
    gpu(7, 5)
    with pytest.raises(ValueError, match=r"torch-compile in bf16 needs compute capability 8\.0"):
        engine.Engine(tmp_path, {"transformer_mode": "compile", "precision": "bf16"}, "cuda:0")


@pytest.mark.parametrize("found", [(7, 0), (7, 5), None])
def test_vllm_on_an_older_gpu(runtime, monkeypatch, found):
    platform = types.SimpleNamespace(get_device_capability=lambda: found, get_device_name=lambda: "Tesla V100")
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", types.SimpleNamespace(current_platform=platform))
    check = runtime("vllm_engine")._check_capability
    if found != (7, 0):
        return check()
    with pytest.raises(
        ValueError, match=r"vLLM needs compute capability 7\.5, Tesla V100 has 7\.0; export torch-eager"
    ):
        check()
    return None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError(TORCHS),
            r"\(2\.64 GiB more were asked for, 1\.31 GiB of 79\.18 GiB were free\); take a",
        ),
        (RuntimeError(f"the batch loop died: OutOfMemoryError: {TORCHS}"), r"2\.64 GiB more were asked for"),
        (
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"),
            "while the model was loaded and warmed up;",
        ),
        (RuntimeError("something else"), "^something else$"),
    ],
)
def test_out_of_memory_is_one_line_that_says_what_to_do(runtime, error, message):
    with pytest.raises(RuntimeError, match=message) as caught, runtime("devices").memory_explained("num_frames"):
        raise error
    told = str(caught.value)
    assert told == "something else" or ("\n" not in told and "set a smaller num_frames in config.pbtxt" in told)


def test_an_engine_process_says_in_one_line_that_memory_ran_out(runtime, tmp_path, monkeypatch):
    """The real process, whose engine is another module of the same name."""
    link = runtime("llm_link")
    monkeypatch.setattr(link.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, types\n"
        "def engine(*_, **__):\n"
        "    import torch\n"
        f"    raise torch.OutOfMemoryError({TORCHS!r})\n"
        "sys.modules['llm_slots'] = types.SimpleNamespace(SlotEngine=engine)\n"
    )
    settings = {"engine": "slots", "tp": 1, "end_token_ids": []}
    with pytest.raises(RuntimeError, match=r"1\.31 GiB of 79\.18 GiB were free\); take a smaller precision") as caught:
        link.RemoteEngine(tmp_path / "1" / "weights", settings, "cpu", "m", print)
    assert "max_context" in str(caught.value)


@pytest.fixture
def model_file(runtime, fake_triton):
    """`model_file(name)` is `llm_model` or `video_model`, imported with Triton faked."""
    names = ("triton_model", "llm_model", "video_model")

    def forget():
        for name in names:
            sys.modules.pop(name, None)

    forget()
    yield runtime
    forget()


def test_models_say_in_one_line_that_memory_ran_out(model_file, monkeypatch, tmp_path):
    def engine(*_, **__):
        raise torch.OutOfMemoryError(TORCHS)

    monkeypatch.setitem(sys.modules, "llm_engine", types.SimpleNamespace(Engine=engine))
    monkeypatch.delenv("TRITONMARK_ENGINE_PYTHON", raising=False)
    with pytest.raises(RuntimeError, match=r"GPU memory ran out .* set a smaller max_context.* in config\.pbtxt$"):
        model_file("llm_model")._engine(tmp_path, {"engine": "batching", "tp": 1}, "cuda:0", "m")

    video, settings = model_file("video_model"), {"device": "cuda:0", "precision": "fp32"}
    monkeypatch.setattr(video, "read_settings", lambda *_: settings)
    monkeypatch.setattr(video, "Engine", lambda *_: types.SimpleNamespace(warm_up=engine))  # as CogVideoX-5b in fp32
    monkeypatch.setattr(video, "use_compile_cache", lambda _: None)
    with pytest.raises(
        RuntimeError, match=r"GPU memory ran out .* set a smaller num_frames, height or width in config"
    ):
        video.TritonPythonModel().initialize({"model_config": "{}", "model_name": "m"})
