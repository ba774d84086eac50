"""`reference.jsonl`: what plain `model.generate` answers, so that a server that is fast but wrong is found out.

One line a prompt: `prompt`, `token_ids` (greedy, always `TOKENS` of them: end tokens don't end an answer, as in a load
test), their text as `output`, and for each token the next choices: `alternatives` ([id, by how much its logit was
lower]) and the smallest of these differences (`margins`). Where tokens are nearly tied, another order of adding up may
prefer another one, and is not wrong. `precision` is what was computed in: that of the export, but plain 16 bit for an
export in 8 bit, where that fits.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporters.errors import UserError
from exporters.layout import import_path
from exporters.weights import CORPUS

NAME = "reference.jsonl"
TOKENS = 32  # of each answer
ALTERNATIVES = 4  # of each token


def prompts(count: int, source: Path | None = None) -> list[str]:
    """`count` prompts: of a JSONL file (`text` or `prompt`), else the first sentences of the corpus. A UserError where
    there are fewer."""
    texts = read_prompts(source)[:count]
    if len(texts) < count:
        raise UserError(
            f"--reference {count} asks for more prompts than the {len(texts)} in"
            f" {source or 'the corpus'}; give --reference {len(texts)}, or more with --reference-prompts"
        )
    return texts


def read_prompts(source: Path | None) -> list[str]:
    """All prompts of `source`; see `prompts`."""
    if source is None:
        sentences = re.split(r"(?<=[.?!])\s+", CORPUS.read_text(encoding="utf-8"))
        return [text for text in sentences if text]
    try:
        lines = source.read_text(encoding="utf-8").split("\n")  # by \n alone: a text may hold other line separators
        rows = [json.loads(line) for line in lines if line.strip()]
        texts = [row["text"] if "text" in row else row["prompt"] for row in rows]
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError("a row without a text" if texts else "no rows")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read reference prompts from {source}: {error}; expected JSONL with `prompt`") from None
    return texts


def write_reference(
    version: Path, count: int, source: Path | None = None, clip: Mapping[str, int] | None = None
) -> None:
    """Answer `count` prompts with the weights of the `version` folder, one after the other, on the CPU; on the GPU
    where weights are drawn on load, because each kind of device draws others. A UserError where they do not fit.

    A video model's clips, which `clip` changes, are written by `exporters.video_reference`.
    """
    settings = json.loads((version / "settings.json").read_text(encoding="utf-8"))
    if settings.get("family") == "video":
        from exporters.video_reference import MAX_CLIPS, write_references

        _check_clip_prompts(version, settings, prompts(min(count, MAX_CLIPS), source))
        write_references(version, count, source, clip or {})
        return
    texts = prompts(count, source)
    import tokenizers
    import torch
    from transformers import GenerationConfig

    tokenizer = tokenizers.Tokenizer.from_file(str(version / "weights" / "tokenizer.json"))
    _check_lengths(texts, tokenizer, settings["max_context"] - TOKENS)
    model, precision = _plain_model(version, settings)
    plain = GenerationConfig(
        do_sample=False, max_new_tokens=TOKENS, eos_token_id=None, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    model.generation_config = plain
    with (version.parent / NAME).open("w", encoding="utf-8") as file, torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer.encode(text).ids], device=model.device)
            made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)
            answer = made.sequences[0, ids.shape[1] :]
            nearest = _alternatives(torch.cat(made.logits).float(), answer)
            row = {
                "prompt": text,
                "token_ids": answer.tolist(),
                "output": tokenizer.decode(answer.tolist()),
                "margins": [choices[0][1] for choices in nearest],
                "alternatives": nearest,
                "precision": precision,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    del model
    free_gpu()


def _check_clip_prompts(version: Path, settings: dict, texts: Sequence[str]) -> None:
    """The pipeline would cut what is too long, with a warning among others."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(version / "weights" / "tokenizer", local_files_only=True)
    most = settings["parts"]["transformer"]["config"]["max_text_seq_length"]
    for number, text in enumerate(texts, 1):
        if (tokens := len(tokenizer(text).input_ids)) > most:
            raise UserError(f"reference prompt {number} ({text[:30]!r}) has {tokens} tokens, a clip's at most {most}")


def _check_lengths(texts: Sequence[str], tokenizer: Any, most: int) -> None:
    for number, text in enumerate(texts, 1):
        if not 0 < (tokens := len(tokenizer.encode(text).ids)) <= most:
            raise UserError(
                f"reference prompt {number} ({text[:30]!r}) has {tokens} tokens; 1 to {most} leave room for an answer"
                f" of {TOKENS}: change --reference-prompts"
            )


def free_gpu() -> None:
    """Give unused GPU memory back to the driver: the server that `--verify` starts next needs it."""
    import torch

    gc.collect()  # a model's modules refer to each other
    torch.cuda.empty_cache()


def _alternatives(logits, chosen) -> list[list[list]]:
    """The `ALTERNATIVES` best tokens besides the `chosen` ones [T], from `logits` [T, vocabulary]: [id, difference]."""
    import torch

    best = logits.gather(1, chosen[:, None])
    others = logits.scatter(1, chosen[:, None], -torch.inf).topk(ALTERNATIVES)
    rows = zip(others.indices.tolist(), (best - others.values).tolist(), strict=True)
    return [[[token, round(less, 4)] for token, less in zip(ids, lower, strict=True)] for ids, lower in rows]


def _plain_model(version: Path, settings: dict):
    """The model, and its precision: without 8-bit weights if those of 16 bit fit on the device."""
    import torch

    with import_path():
        from llm_quantised import STORAGE
        from llm_weights import load_model
    on_gpu = settings["draw_on_load"] and settings["device"] != "cpu" and torch.cuda.is_available()
    as_served = settings["precision"]
    reasons = []
    for precision in ["bf16"] * (as_served in STORAGE) + [as_served]:
        try:
            wanted = settings | {"precision": precision, "tp": 1}
            return load_model(version / "weights", wanted, "cuda:0" if on_gpu else "cpu"), precision
        except ValueError as error:
            reasons.append(str(error))
    raise UserError(f"no reference answers: {reasons[-1]}; or export with --reference 0")
