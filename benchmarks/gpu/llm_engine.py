"""The torch-compile engine of a language model on one GPU, without Triton and without a client.

    tritonmark export phi-2 --backend torch-compile --out model_repository
    python benchmarks/gpu/llm_engine.py model_repository/phi-2 --out build/gpu

Prints and saves: start-up, agreement with plain transformers, tokens/s of one sequence, of many at once, in steady
decode, time to first token at idle, memory. Needs torch, transformers and tokenizers; the weights are what the export
says (synthetic ones are drawn on the GPU).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "exporters" / "runtime"), str(ROOT)]

from llm_request import parse_prompt  # noqa: E402
from llm_settings import read_settings  # noqa: E402
from llm_slots import SlotEngine  # noqa: E402

from exporters.verify import TOLERANCES  # noqa: E402


class Load:
    """Requests in, arrival times of their tokens out."""

    def __init__(self, version: Path, device: str, overrides: dict) -> None:
        self.settings = read_settings(version, {}) | overrides
        self.times: dict[int, list[float]] = {}
        self.tokens: dict[int, list[int]] = {}
        self._open = 0
        self._next = 0
        self._idle = threading.Condition()
        started = time.perf_counter()
        say = lambda text: print(f"  {time.perf_counter() - started:6.1f} s  {text}", flush=True)  # noqa: E731
        self.engine = SlotEngine(version / "weights", self.settings, device, self._deliver, say)
        self.start_s = time.perf_counter() - started
        threading.Thread(target=self.engine.run, daemon=True).start()

    def _deliver(self, outputs, _occupancy) -> None:
        now = time.perf_counter()
        ended = 0
        for output in outputs:
            self.times[output.request_id] += [now] * len(output.tokens)
            self.tokens[output.request_id] += output.tokens
            ended += output.finished
        if ended:
            with self._idle:
                self._open -= ended
                self._idle.notify()

    def send(self, ids: list[int], tokens: int) -> int:
        number = self._next
        self._next += 1
        self.times[number], self.tokens[number] = [time.perf_counter()], []
        with self._idle:
            self._open += 1
        fields = {"text_input": "-", "max_tokens": tokens, "ignore_eos": True}
        self.engine.submit(number, ids, parse_prompt(fields, 1, self.settings["max_context"]))
        return number

    def wait(self) -> None:
        with self._idle:
            self._idle.wait_for(lambda: self._open == 0)


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 2000, (length,), generator=generator).tolist()


def alone(load: Load, tokens_in: int, tokens_out: int, repeats: int) -> dict:
    first, decode = [], []
    for repeat in range(repeats):
        number = load.send(prompt(tokens_in, repeat), tokens_out)
        load.wait()
        sent, *times = load.times[number]
        first.append((times[0] - sent) * 1e3)
        decode.append((len(times) - 1) / (times[-1] - times[0]))
    return {"ttft_ms": statistics.median(first), "decode_tokens_per_s": statistics.median(decode)}


def together(load: Load, count: int, tokens_in: int, tokens_out: int) -> dict:
    """`count` requests at once; steady is the rate between the last first token and the first last one."""
    started = time.perf_counter()
    numbers = [load.send(prompt(tokens_in, 1000 + n), tokens_out) for n in range(count)]
    load.wait()
    times = [load.times[n][1:] for n in numbers]
    begin, end = max(row[0] for row in times), min(row[-1] for row in times)
    steady = sum(begin < t <= end for row in times for t in row) / (end - begin) if end > begin else None
    return {
        "tokens_per_s": count * tokens_out / (max(row[-1] for row in times) - started),
        "steady_tokens_per_s": steady,
        "last_first_token_s": begin - started,
    }


def agreement(load: Load, version: Path, device: str, precision: str, count: int = 4, tokens: int = 32) -> dict:
    """The engine's tokens beside those of the plain transformers model in `precision`, after the same tokens (teacher
    forcing): the share that is the same, and the share that is wrong by the rule of `export --verify`, because the
    plain model's choice is better by more than the margin."""
    from llm_weights import load_model

    prompts = [prompt(40 + 37 * n, n) for n in range(count)]
    numbers = [load.send(ids, tokens) for ids in prompts]
    load.wait()
    model = load_model(version / "weights", load.settings | {"precision": precision}, device).eval()
    margin = TOLERANCES[load.settings["precision"]].margin
    same = wrong = 0
    with torch.inference_mode():
        for ids, number in zip(prompts, numbers, strict=True):
            answer = torch.tensor(load.tokens[number], device=device)
            whole = torch.cat([torch.tensor(ids, device=device), answer])[None]
            logits = model(whole).logits[0, len(ids) - 1 : -1].float()
            behind = logits.amax(-1) - logits.gather(-1, answer[:, None])[:, 0]
            same += int((behind == 0).sum())
            wrong += int((behind > margin).sum())
    total = count * tokens
    return {"with": precision, "tokens": total, "same": same / total, "wrong": wrong / total, "margin": margin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="an exported model")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--many", default="8,64,256")
    parser.add_argument("--tokens", default="128,128", help="prompt and answer")
    parser.add_argument("--settings", default="{}", help="JSON that overrides settings.json")
    parser.add_argument("--agreement", metavar="PRECISION", help="compare with the plain model in that precision, such "
                        "as bf16; both must fit, so mind kv_tokens in --settings")  # fmt: skip
    arguments = parser.parse_args()
    version = arguments.model / "1"
    tokens_in, tokens_out = map(int, arguments.tokens.split(","))
    load = Load(version, arguments.device, json.loads(arguments.settings))
    figures: dict = {
        "model": load.settings["model"],
        "precision": load.settings["precision"],
        "torch": torch.__version__,
    }
    figures["start_s"] = load.start_s
    if torch.cuda.is_available():
        figures["gpu"] = torch.cuda.get_device_name()
        figures["memory_bytes"] = torch.cuda.max_memory_reserved()
    figures["alone"] = alone(load, tokens_in, 2 * tokens_out, 5)
    print(json.dumps(figures), flush=True)
    for count in map(int, arguments.many.split(",")):
        runs = [together(load, count, tokens_in, tokens_out) for _ in range(2)]
        figures[f"at_once_{count}"] = max(runs, key=lambda run: run["tokens_per_s"])
        print(count, json.dumps(figures[f"at_once_{count}"]), flush=True)
    if arguments.agreement:
        figures["agreement"] = agreement(load, version, arguments.device, arguments.agreement)
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = arguments.out / f"llm_engine-{arguments.model.name}.json"
    target.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2), f"\nsaved {target}")


if __name__ == "__main__":
    main()
