"""How far 8 bits move a model's logits at full size: the plain transformers model in bf16 and in 8 bit, one after the
other on one GPU, teacher-forced on the same random tokens.

    tritonmark export phi-3.5-moe --backend torch-eager --precision fp8 --reference 0 --out model_repository
    python benchmarks/gpu/quantised.py model_repository/phi-3.5-moe

Prints and saves, beside bf16: the deviation of the logits' error in that of the logits; the shares of positions whose
best token is the same, tied (see exporters/verify.py) and wrong, and the wrong of all but ties, which is what `export
--verify` allows; of a mixture the share of chosen experts that are others, in each layer. 8 bit is also measured with
activations left alone ("weights only"), which tells rounding from a faulty product. It says what tolerances are worth.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "exporters" / "runtime"), str(ROOT)]

from llm_quantised import ScaledExperts, ScaledLinear  # noqa: E402
from llm_settings import read_settings  # noqa: E402
from llm_weights import load_model  # noqa: E402

from exporters.reference import free_gpu  # noqa: E402
from exporters.verify import TOLERANCES  # noqa: E402

VOCABULARY = 2000  # of the shipped tokenizer: the ids that synthetic weights can tell apart


def outcome(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [N, T, VOCABULARY] on the host for `tokens` [N, T], and the experts chosen in each layer [N·T, k]."""
    chosen: dict[str, list[torch.Tensor]] = {}
    routers = {name: module for name, module in model.named_modules() if "Router" in type(module).__name__}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: chosen.setdefault(name, []).append(out[-1].cpu()))
        for name, module in routers.items()
    ]
    with torch.inference_mode():
        logits = torch.stack([model(row[None]).logits[0, :, :VOCABULARY].float().cpu() for row in tokens])
    for hook in hooks:
        hook.remove()
    return logits, [torch.cat(rows) for rows in chosen.values()]


def beside(plain: tuple, other: tuple, margin: float) -> dict:
    """The figures of this program; see its docstring."""
    (a, experts_a), (b, experts_b) = plain, other
    best_a, best_b = a.argmax(-1), b.argmax(-1)
    behind = (a.amax(-1) - a.gather(-1, best_b[..., None])[..., 0])[best_a != best_b]
    positions, wrong = best_a.numel(), int((behind >= margin).sum())
    same = positions - len(behind)
    others = [
        1 - (x[..., None] == y[..., None, :]).any(-1).float().mean().item()
        for x, y in zip(experts_a, experts_b, strict=True)
    ]
    return {
        "error": ((b - a).std() / a.std()).item(),
        "error_logits_std": (b - a).std().item(),
        "same": same / positions,
        "tied": 1 - (same + wrong) / positions,
        "wrong": wrong / positions,
        "wrong_of_compared": wrong / max(1, same + wrong),
        "margin": margin,
        "other_experts": [round(share, 4) for share in others],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a model exported in fp8 or int8")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", default="8,256", help="sequences and their length")
    options = parser.parse_args()
    version = options.model / "1"
    settings = read_settings(version, {})
    margin = TOLERANCES[settings["precision"]].margin
    count, length = map(int, options.tokens.split(","))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCABULARY, (count, length), generator=generator).to(options.device)

    started = time.perf_counter()
    say = lambda text: print(f"{time.perf_counter() - started:6.1f} s  {text}", flush=True)  # noqa: E731
    model = load_model(version / "weights", settings | {"precision": "bf16"}, options.device)
    plain = outcome(model, tokens)
    say(f"bf16: logits have a deviation of {plain[0].std().item():.2f}")
    del model
    free_gpu()
    model = load_model(version / "weights", settings, options.device)
    figures = {"model": settings["model"], "precision": settings["precision"], "positions": count * length}
    served = outcome(model, tokens)
    figures["as served"] = beside(plain, served, margin)
    say(f"as served: {json.dumps(figures['as served'])}")
    for module in model.modules():
        if isinstance(module, ScaledLinear | ScaledExperts):
            module._native = False
    figures["weights only"] = beside(plain, outcome(model, tokens), margin)
    say(f"weights only: {json.dumps(figures['weights only'])}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"quantised-{settings['model']}.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
