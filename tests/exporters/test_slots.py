"""The torch-compile engine on the CPU: paged cache and scheduling against transformers' own `generate`, and the socket
between instances and engine process. Steps run uncompiled here; test_engines_live.py runs the compiled ones."""

import importlib
import json
import threading
import time

import pytest
import torch
import torch._dynamo
import transformers

PROMPTS = [[7, 8, 9], list(range(1, 41)), [5] * 33, [3, 1, 4, 1, 5, 9, 2, 6], list(range(90, 60, -1))]
SETTINGS = {
    "threads": 1, "end_token_ids": [0], "max_sequences": 4, "max_context": 128, "max_batch_tokens": 96,
    "kv_tokens": 640, "kv_memory_share": 0.5,
}  # fmt: skip


def small(kind):
    shared = dict(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(1)
    if kind == "phi":
        model = transformers.PhiForCausalLM(transformers.PhiConfig(**shared | {"num_key_value_heads": 4}))
    elif kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared))
    else:
        model = transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**shared, num_local_experts=4))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)  # so that answers depend on the prompt
    return model.eval()


class Running:
    """A SlotEngine on its thread, and what it delivered."""

    def __init__(self, module, model, settings):
        module.load_model = lambda *_: model
        module.can_compile = lambda _: False
        self.tokens, self.finished = {}, set()
        self.changed = threading.Condition()
        self.engine = module.SlotEngine(None, settings, "cpu", self.deliver, lambda text: None)
        self.thread = threading.Thread(target=self.engine.run, daemon=True)
        self.thread.start()

    def deliver(self, outputs, occupancy):
        with self.changed:
            for output in outputs:
                self.tokens.setdefault(output.request_id, []).extend(output.tokens)
                if output.finished:
                    self.finished.add(output.request_id)
            self.changed.notify_all()

    def wait(self, *names):
        with self.changed:
            assert self.changed.wait_for(lambda: self.finished >= set(names), timeout=60), self.finished

    def close(self):
        self.engine.stop()
        self.thread.join(10)


@pytest.fixture
def slots(runtime):
    """`slots(kind, **settings)` is a running engine, and `ask(**fields)` a request for it."""
    module = importlib.reload(runtime("llm_slots"))
    opened = []

    def start(kind="phi", **settings):
        model = small(kind)
        reference = small(kind)
        opened.append(Running(module, model, SETTINGS | settings))
        return opened[-1], reference

    yield start
    for running in opened:
        running.close()


@pytest.fixture
def ask(runtime):
    parse = runtime("llm_request").parse_prompt
    return lambda **fields: parse({"text_input": "-", "ignore_eos": True, **fields}, 8, 128)


def plain(model, ids, count, end=None):
    config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=count, eos_token_id=end, pad_token_id=0, use_cache=True
    )
    inputs = torch.tensor([ids])
    return model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)[
        0, len(ids) :
    ].tolist()


@pytest.mark.parametrize("kind", ["phi", "llama", "phimoe"])
def test_answers_equal_generate_with_more_requests_than_slots(slots, ask, kind):
    running, reference = slots(kind)
    for number, ids in enumerate(PROMPTS * 2):
        running.engine.submit(number, ids, ask(max_tokens=20 + number))
    running.wait(*range(10))
    for number, ids in enumerate(PROMPTS * 2):
        assert running.tokens[number] == plain(reference, ids, 20 + number), number
    assert running.engine.occupancy() == (0, 0, 0.0)


def test_an_end_token_ends_the_answer_and_gives_the_room_back(slots, ask):
    running, reference = slots()
    ids = PROMPTS[1]
    answer = plain(reference, ids, 30)
    end = answer[9]
    running.engine._end_ids = {end}
    stop = answer.index(end) + 1
    running.engine.submit("ends", ids, ask(max_tokens=30, ignore_eos=False))
    running.engine.submit("goes on", ids, ask(max_tokens=30))
    running.engine.submit("at least", ids, ask(max_tokens=30, ignore_eos=False, min_tokens=stop + 5))
    running.wait("ends", "goes on", "at least")
    assert running.tokens["ends"] == answer[:stop]
    assert running.tokens["goes on"] == answer
    assert len(running.tokens["at least"]) >= stop + 5
    assert end not in running.tokens["at least"][: stop + 4]
    assert running.engine.occupancy() == (0, 0, 0.0)


def test_a_seed_draws_alike_whatever_else_is_in_the_batch(slots, ask):
    running, _ = slots()
    wish = dict(max_tokens=12, temperature=1.5, top_k=20, seed=7)
    running.engine.submit("alone", PROMPTS[0], ask(**wish))
    running.wait("alone")
    for number in range(3):
        running.engine.submit(number, PROMPTS[number + 1], ask(max_tokens=25))
    running.engine.submit("crowded", PROMPTS[0], ask(**wish))
    running.engine.submit("other", PROMPTS[0], ask(**wish | {"seed": 8}))
    running.wait("crowded", "other", 0, 1, 2)
    assert running.tokens["alone"] == running.tokens["crowded"] != running.tokens["other"]


def test_a_cancelled_request_leaves_the_batch(slots, ask):
    running, reference = slots()
    running.engine.submit("gone", PROMPTS[0], ask(max_tokens=100))
    with running.changed:
        assert running.changed.wait_for(lambda: "gone" in running.tokens, timeout=30)
    running.engine.cancel("gone")
    running.engine.submit("next", PROMPTS[1], ask(max_tokens=10))
    running.wait("next")
    deadline = time.monotonic() + 10
    while running.engine.occupancy() != (0, 0, 0.0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running.engine.occupancy() == (0, 0, 0.0)
    assert len(running.tokens["gone"]) < 100 and "gone" not in running.finished
    assert running.tokens["next"] == plain(reference, PROMPTS[1], 10)


def test_one_token_answers_and_a_full_context(slots, ask):
    running, reference = slots()
    running.engine.submit("one", PROMPTS[0], ask(max_tokens=1))
    long = [index % 90 + 1 for index in range(100)]
    running.engine.submit("full", long, ask(max_tokens=28))
    running.wait("one", "full")
    assert running.tokens["one"] == plain(reference, PROMPTS[0], 1)
    assert running.tokens["full"] == plain(reference, long, 28)


def test_an_engine_works_on_the_gpu_that_it_was_given(runtime, monkeypatch):
    """Streams and graphs are made on the current device, which is the first one of a process."""
    module, chosen = importlib.reload(runtime("llm_slots")), []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("too early") if not chosen else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.SlotEngine(None, SETTINGS, "cuda:1", None, lambda text: None)
    assert chosen == ["cuda:1"]


def test_a_cache_on_the_cpu_needs_a_size(slots):
    with pytest.raises(ValueError, match="kv_tokens must be set on a CPU"):
        slots(kv_tokens=0)


@pytest.mark.parametrize(("free", "tokens"), [(1_500_000, 2087), (800_000, 994), (221_920, None)])
def test_the_cache_leaves_the_room_that_prompts_were_measured_to_take(runtime, monkeypatch, free, tokens):
    """A token takes 2 (keys, values) x 2 layers x 2 heads x 8 numbers x 4 bytes."""
    module = runtime("llm_slots")
    steps, said = runtime("llm_steps").Steps(small("llama"), "cpu", 4, 128, 96, compiled=False), []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80 << 30))
    monkeypatch.setattr(steps, "cuda", True)
    monkeypatch.setattr(steps, "step_bytes", lambda tell: 163_840)
    settings = SETTINGS | {"kv_tokens": 0, "kv_memory_share": 0.4}
    if tokens is None:
        with pytest.raises(ValueError, match="room for 90 tokens"):
            module._count_pages(steps, settings, said.append)
        return
    assert tokens == int((free - 163_840) * 0.4) // 256
    assert module._count_pages(steps, settings, said.append) == -(-tokens // module.PAGE) + 1
    assert said == [f"cache of {tokens} tokens; 0.0 GiB are left for the longest prompts"]


def test_what_prompts_take_is_measured_on_the_largest_of_each_length(runtime, monkeypatch):
    steps = runtime("llm_steps").Steps(small("llama"), "cpu", 4, 128, 128, compiled=False)
    assert steps.shapes == [(1, 32), (2, 32), (4, 32), (1, 64), (2, 64), (1, 128)]
    ran, run, said = [], steps._run_prompts, []
    monkeypatch.setattr(steps, "_run_prompts", lambda *shape: (ran.append(shape), run(*shape)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 1000 + 5000 * ran[-1][1])
    logits = (sum(steps.batches) + 1 + 2 + 4 + 1 + 2 + 1) * 128 * 4
    assert steps.step_bytes(said.append) == 5000 * 128 + logits
    assert ran == [(4, 32), (2, 64), (1, 128)]
    assert said == [f"measuring memory: prompts {count} {length}" for count, length in ran]


def test_buckets_and_shapes_cover_everything(runtime):
    steps = runtime("llm_steps")
    assert steps.buckets(6) == [1, 2, 4, 6]
    assert steps.buckets(100) == [1, 2, 4, 8, 16, 32, 48, 64, 96, 100]
    shapes = steps.prompt_shapes(256, 1000)
    assert max(length for _, length in shapes) == 1000
    assert all(count == 1 or count * length <= 256 for count, length in shapes)
    assert (8, 32) in shapes and (1, 1000) in shapes


def test_no_prompt_runs_beside_the_pool_of_captured_prompts(runtime, monkeypatch):
    """The order on CUDA, which cannot run here: decode steps one by one, then all prompts, then their graphs."""
    steps = runtime("llm_steps").Steps(small("llama"), "cpu", 4, 128, 96, compiled=False)
    done = []
    monkeypatch.setattr(steps, "cuda", True)
    monkeypatch.setattr(steps, "_run_scratch", lambda job: done.append(("run", job)))
    monkeypatch.setattr(steps, "_capture", lambda job: done.append(("capture", job)))
    steps.warm_up(lambda text: None)
    decode, prompts = (
        [("decode", n) for n in reversed(steps.batches)],
        [("prompts", *s) for s in reversed(steps.shapes)],
    )
    expected = [(kind, job) for job in decode for kind in ("run", "capture")]
    assert done == expected + [(kind, job) for kind in ("run", "capture") for job in prompts]
    assert set(steps._graphs) == {*decode, *prompts}


def prompt_rows(lengths):
    """(slot, token ids, pages) for prompts of these lengths in slots 0, 1, ..., with four pages each."""
    pages = [list(range(1 + 4 * slot, 5 + 4 * slot)) for slot in range(len(lengths))]
    return [(slot, [(slot + i) % 90 for i in range(n)], pages[slot]) for slot, n in enumerate(lengths)]


@pytest.mark.parametrize("kind", ["phi", "llama", "phimoe"])
def test_prompts_of_all_shapes_are_compiled_twice_and_choose_the_same_tokens(runtime, kind):
    """What CUDA runs, with a compiler that only traces: inductor would take half a minute here."""
    steps = runtime("llm_steps").Steps(small(kind), "cpu", 4, 128, 128, compiled=False)
    compiled = runtime("llm_compile").compile_prompts(steps.model, backend="aot_eager")
    runtime("llm_paged").give_pages(steps.model, 17)
    batches = [[7], [9, 40], [20, 30, 31], [33, 60], [100], [5, 6, 7, 8]]
    answers = []
    torch._dynamo.reset()
    twice = torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True)
    with torch.inference_mode(), twice:
        for layers in (steps._plain, compiled):
            steps._layers["prompts"] = layers
            answers.append([steps.prompts(prompt_rows(lengths)).wait()[:] for lengths in batches])
    assert answers[0] == answers[1]


@pytest.fixture(params=["torch-compile"])
def engine_process(request, runtime, tmp_path, monkeypatch):
    """`connect()` is a model instance's link to one engine process on phi-2-tiny; the first one starts it."""
    from exporters.export import export_model

    folder = export_model("phi-2-tiny", request.param, out=tmp_path)
    link = runtime("llm_link")
    monkeypatch.setenv("CXX", "no-compiler")  # uncompiled steps start at once
    monkeypatch.setattr(link.tempfile, "gettempdir", lambda: str(tmp_path))
    settings = json.loads((folder / "1" / "settings.json").read_text())
    opened, said = [], []

    def connect():
        opened.append(link.RemoteEngine(folder / "1" / "weights", settings, "cpu", "m", said.append))
        return opened[-1]

    connect.said = said
    yield connect
    for engine in opened:
        engine.stop(10)


def collect(engine, name, count):
    tokens = []
    deadline = time.monotonic() + 30
    while len(tokens) < count and time.monotonic() < deadline and not engine.failure():
        tokens += [token for output in engine.results(1.0) if output.request_id == name for token in output.tokens]
    return tokens


@pytest.mark.parametrize("engine_process", ["torch-compile", "torch-eager"], indirect=True)
def test_two_instances_share_one_engine_which_ends_with_the_last(engine_process, ask, tmp_path):
    first, second = engine_process(), engine_process()
    assert first.leads and not second.leads
    assert engine_process.said
    assert first.submit("a", [1, 2, 3], ask(max_tokens=9)) and second.submit("b", [1, 2, 3], ask(max_tokens=9))
    answer = collect(first, "a", 9)
    assert len(answer) == 9 and answer == collect(second, "b", 9)
    second.stop(1)
    assert first.submit("c", [1, 2, 3], ask(max_tokens=2)) and len(collect(first, "c", 2)) == 2
    first.stop(20)
    assert first._process.poll() == 0
    assert not list(tmp_path.glob("tritonmark-*"))


def test_a_killed_engine_is_a_failure_with_a_reason_and_leaves_nothing(engine_process, ask, tmp_path):
    engine = engine_process()
    engine._process.kill()
    assert collect(engine, "x", 1) == []
    assert "engine process has ended" in engine.failure()
    engine.stop(10)
    assert not list(tmp_path.glob("tritonmark-*"))


def test_a_broken_export_says_why(runtime, tmp_path, monkeypatch):
    link = runtime("llm_link")
    monkeypatch.setattr(link.tempfile, "gettempdir", lambda: str(tmp_path))
    settings = SETTINGS | {"draw_on_load": False, "precision": "fp32", "seed": 0, "engine": "slots"}
    with pytest.raises(RuntimeError, match=r"engine process ended with code 1: .*nowhere"):
        link.RemoteEngine(tmp_path / "nowhere", settings, "cpu", "m", lambda text: None)
    assert not list(tmp_path.glob("tritonmark-*"))
