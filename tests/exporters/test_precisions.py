"""The torch-compile engine in each precision against plain transformers, by the rule that `--verify` has: what the
published figures of Llama and PhiMoE were measured with. Steps run uncompiled; test_engines_live.py compiles them."""

import importlib
import json
import threading
import types

import pytest
import tokenizers
import torch
import torch._dynamo

from exporters.export import export_model
from exporters.verify import TOLERANCES, compare, is_likely, read_reference


def served(runtime, monkeypatch, folder, rows):
    """The answers of a SlotEngine on the exported weights, with all requests in flight at once."""
    module = importlib.reload(runtime("llm_slots"))
    monkeypatch.setattr(module, "can_compile", lambda _: False)
    settings = json.loads((folder / "1" / "settings.json").read_text())
    encode = tokenizers.Tokenizer.from_file(str(folder / "1" / "weights" / "tokenizer.json")).encode
    answers, left, done = {number: [] for number in range(len(rows))}, set(range(len(rows))), threading.Event()

    def deliver(outputs, occupancy):
        for output in outputs:
            answers[output.request_id] += output.tokens
            if output.finished:
                left.discard(output.request_id)
        if not left:
            done.set()

    engine = module.SlotEngine(folder / "1" / "weights", settings, "cpu", deliver, lambda text: None)
    loop = threading.Thread(target=engine.run, daemon=True)
    loop.start()
    for number, row in enumerate(rows):
        fields = {"text_input": row["prompt"], "max_tokens": len(row["token_ids"]), "ignore_eos": True}
        prompt = runtime("llm_request").parse_prompt(fields, 8, settings["max_context"])
        engine.submit(number, encode(row["prompt"]).ids, prompt)
    assert done.wait(120)
    engine.stop()
    loop.join(10)
    return [answers[number] for number in range(len(rows))]


@pytest.mark.parametrize("name", ["phi-2-tiny", "llama-3-70b-tiny", "phi-3.5-moe-tiny"])
@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
def test_every_precision_agrees_with_plain_transformers(runtime, monkeypatch, tmp_path, name, precision):
    folder = export_model(name, "torch-compile", out=tmp_path, reference=16, precision=precision)
    rows, tolerance = read_reference(folder), TOLERANCES[precision]
    found = compare(rows, served(runtime, monkeypatch, folder, rows), tolerance.margin)
    allowed = tolerance.wrong_routed if "moe" in name else tolerance.wrong
    assert found.equal > 100 and is_likely(found.diverging, found.compared, allowed), found


@pytest.mark.parametrize("storage", [torch.int8, torch.float8_e4m3fn])
def test_experts_in_8_bit_are_compiled_once_however_tokens_are_shared_out(runtime, storage):
    module, draw = runtime("llm_quantised"), torch.Generator().manual_seed(0)
    experts = module.ScaledExperts(types.SimpleNamespace(num_experts=4, act_fn=torch.nn.functional.silu))
    for name, shape in (("gate_up_proj", (4, 48, 32)), ("down_proj", (4, 32, 24))):
        experts.put(name, *module.quantise(torch.randn(shape, generator=draw), storage))
    torch._dynamo.reset()
    compiled = torch.compile(experts, dynamic=True, fullgraph=True, backend="aot_eager")
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (7, 5, 9):
            hidden = torch.randn(tokens, 32, generator=draw)
            chosen = torch.randint(0, 4, (tokens, 2), generator=draw)
            shares = torch.rand(tokens, 2, generator=draw)
            torch.testing.assert_close(compiled(hidden, chosen, shares), experts(hidden, chosen, shares))
