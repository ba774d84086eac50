"""`reference.jsonl`: what plain `model.generate` answers, so that a server that is fast but wrong is found out.

One line a prompt: `prompt`, `token_ids` (greedy, always `TOKENS` of them: end tokens don't end an answer, as in a load
test) and their text as `output`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from exporters.errors import UserError
from exporters.weights import CORPUS, import_path

NAME = "reference.jsonl"
TOKENS = 32  # of each answer
RUNTIME = Path(__file__).with_name("runtime")


def prompts(count: int, source: Path | None = None) -> list[str]:
    """`count` prompts: of a JSONL file (`text` or `prompt`), else the first sentences of the corpus."""
    if source is None:
        sentences = re.split(r"(?<=[.?!])\s+", CORPUS.read_text(encoding="utf-8"))
        return [text for text in sentences if text][:count]
    try:
        lines = source.read_text(encoding="utf-8").split("\n")  # by \n alone: a text may hold other line separators
        rows = [json.loads(line) for line in lines if line.strip()]
        texts = [row["text"] if "text" in row else row["prompt"] for row in rows[:count]]
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError("a row without a text" if texts else "no rows")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read reference prompts from {source}: {error}; expected JSONL with `prompt`") from None
    return texts


def write_reference(version: Path, count: int, source: Path | None = None) -> None:
    """Answer `count` prompts with the weights of the `version` folder, on the CPU, one after the other.

    A video model's clips are written by `exporters.video_reference`.
    """
    settings = json.loads((version / "settings.json").read_text(encoding="utf-8"))
    if settings.get("family") == "video":
        from exporters.video_reference import write_references

        return write_references(version, count, source)
    texts = prompts(count, source)
    import tokenizers
    import torch
    from transformers import GenerationConfig

    with import_path(RUNTIME):
        from llm_weights import load_model
    model = load_model(version / "weights", settings, "cpu").eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(version / "weights" / "tokenizer.json"))
    plain = GenerationConfig(do_sample=False, max_new_tokens=TOKENS, eos_token_id=None, pad_token_id=0)
    model.generation_config = plain
    with (version.parent / NAME).open("w", encoding="utf-8") as file, torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer.encode(text).ids])
            answer = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)
            answer = answer[0, ids.shape[1] :].tolist()
            row = {"prompt": text, "token_ids": answer, "output": tokenizer.decode(answer)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
