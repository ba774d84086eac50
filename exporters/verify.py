"""Does an exported model answer as the plain model does? It is served by the real Triton and asked its reference.

Language models: greedy answers are compared up to their first difference with `reference.jsonl`. After it the two are
answers to different texts, so nothing more is compared. A difference is a tie where the reference's own logits were so
near that rounding decides (`Tolerance.margin`) and the served token is one of the reference's next choices; every other
one counts. So every token that is compared has the reference's own tokens before it.
Video models: the frames of the reference clips, by PSNR (see `video_reference.py`).
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters import layout, reference
from exporters.errors import UserError
from exporters.registry import Order
from exporters.server import TritonServer
from exporters.vllm import loads_drawn_weights

AT_ONCE = 8  # requests in flight, so that batches of different lengths are tested too
TIMEOUT_S = 600.0
UNLIKELY = 0.01
CONTAINERS = ("vllm", "tensorrtllm", "tensorrtllm-llmapi")


@dataclass(frozen=True)
class Tolerance:
    """`margin`: logits that are nearer than this are a tie; those of synthetic weights have a deviation of 3.
    `wrong`: the share of compared tokens that may differ without one; `wrong_routed` of a mixture, where two experts
    that nearly tie are exchanged by rounding, and then all logits move."""

    margin: float
    wrong: float = 0.0
    wrong_routed: float = 0.0


# By precision of the served model. Measured on the tiny models: the largest error of a logit was 1e-5 in fp32, 0.08 in
# bf16, 0.13 in int8 and 0.50 in fp8 (weights only: a GPU rounds activations too). A wrong model has 0.9 wrong.
TOLERANCES = {
    "fp32": Tolerance(0.001),
    "fp16": Tolerance(0.05, 0.002, 0.02),
    "bf16": Tolerance(0.25, 0.002, 0.03),
    "int8": Tolerance(0.4, 0.01, 0.05),
    "fp8": Tolerance(1.0, 0.02, 0.15),
}


@dataclass(frozen=True)
class Agreement:
    """What was found. `compared` tokens up to the first difference of each answer, ties left out, of which `equal` are;
    `worst` says where the clearest difference is."""

    answers: int
    compared: int
    equal: int
    ties: int
    diverging: int
    worst: str

    @property
    def share(self) -> float:
        """Token agreement, 0 to 1."""
        return self.equal / self.compared if self.compared else 0.0


@dataclass(frozen=True)
class Outcome:
    """`line` says in one line what agreed, or what did not."""

    passed: bool
    line: str


def compare(rows: Sequence[dict[str, Any]], answers: Sequence[Sequence[int]], margin: float) -> Agreement:
    """The `answers` (token ids) to the prompts of the reference `rows`. Raises ValueError on unequal counts."""
    compared = equal = ties = diverging = 0
    clearest, worst = -1.0, ""
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True), 1):
        expected = row["token_ids"]
        at = next((k for k, token in enumerate(expected) if k >= len(answer) or answer[k] != token), None)
        equal += len(expected) if at is None else at
        compared += len(expected) if at is None else at
        if at is None and len(answer) == len(expected):
            continue
        lead, near = _lead(row, answer, at)
        if near and lead < margin:
            ties += 1
            continue
        compared, diverging = compared + 1, diverging + 1
        if lead > clearest:
            clearest, worst = lead, f"answer {number} {_difference(row, answer, at)}"
    return Agreement(len(rows), compared, equal, ties, diverging, worst)


def _lead(row: dict[str, Any], answer: Sequence[int], at: int | None) -> tuple[float, bool]:
    """By how much the reference's token `at` led over the answer's, in logits, and whether that is known: of a token
    beyond the stored alternatives only the least possible lead is."""
    if at is None or at >= len(answer):
        return float("inf"), False  # too long or too short
    nearest = dict(row["alternatives"][at])
    return nearest.get(answer[at], max(nearest.values())), answer[at] in nearest


def _difference(row: dict[str, Any], answer: Sequence[int], at: int | None) -> str:
    expected = row["token_ids"]
    if at is None or at >= len(answer):
        return f"has {len(answer)} tokens instead of {len(expected)}"
    return f"at token {at + 1}: {answer[at]} instead of {expected[at]}, which led by {_lead(row, answer, at)[0]:.2f}"


def is_likely(wrong: int, compared: int, allowed: float) -> bool:
    """Whether a model whose tokens are wrong at the rate `allowed` gives so many `wrong` ones of `compared` in more
    than one check of a hundred: a few answers that part early compare few tokens, of which one is a large share."""
    return chance(wrong, compared, allowed) > UNLIKELY


def chance(wrong: int, compared: int, allowed: float) -> float:
    """In what share of checks at least so many are `wrong`, at the rate `allowed`."""
    from scipy.special import bdtrc

    return float(bdtrc(wrong - 1, compared, allowed))


def check_verifiable(order: Order, answers: int) -> None:
    """A UserError where what `order` makes could not be verified, so that nothing is exported in vain."""
    elsewhere = order.backend in CONTAINERS or (order.backend == "vllm-python" and not loads_drawn_weights(order))
    if elsewhere:
        raise UserError(
            f"--verify: {order.backend} runs in its own container, or has no weights in the export to compare with, so"
            f" {order.model.name} cannot be verified here; leave it out, and use `tritonmark run accuracy`"
        )
    if not answers:
        raise UserError(
            "--verify compares with reference answers, and --reference 0 stores none; leave one of them out"
        )


def verify_export(folder: Path, on_progress: Callable[[str], None] | None = None) -> Outcome:
    """Serve the exported model in `folder` and compare. A UserError where there is no reference, or where the embedded
    server lacks the backend."""
    manifest = layout.read_manifest(folder)
    if 'backend: "python"' not in (folder / "config.pbtxt").read_text(encoding="utf-8"):
        raise UserError(
            f"{manifest['backend']} runs in its own container, so it cannot be verified here; serve it there and use"
            " `tritonmark run accuracy`"
        )
    with TritonServer(folder.parent, models=[folder.name], on_progress=on_progress) as server:
        return check_served(folder, server.http_url)


def check_served(folder: Path, url: str) -> Outcome:
    """Compare the exported model in `folder`, which a Triton at `url` serves already."""
    manifest = layout.read_manifest(folder)
    check = _check_video if manifest["family"] == "video" else _check_answers
    return check(folder, manifest, url)


def read_reference(folder: Path) -> list[dict[str, Any]]:
    """The rows of `reference.jsonl`, with margins; or a UserError."""
    path = folder / reference.NAME
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError:
        rows = []
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); export the model again with --force") from None
    if not rows:
        raise UserError(f"{folder} has no reference answers; export it with --reference 16")
    if not all("alternatives" in row for row in rows):
        raise UserError(f"{path} is of an older version, without alternatives; export the model again with --force")
    return rows


def _check_answers(folder: Path, manifest: dict[str, Any], url: str) -> Outcome:
    rows = read_reference(folder)
    config = json.loads((folder / "1" / "weights" / "config.json").read_text(encoding="utf-8"))
    precision = manifest["precision"]
    tolerance = TOLERANCES[precision]
    allowed = tolerance.wrong_routed if "num_local_experts" in config else tolerance.wrong
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda row: _ask(url, folder.name, row), rows))
    found = compare(rows, answers, tolerance.margin)
    passed = is_likely(found.diverging, found.compared, allowed) and found.equal > 0
    detail = f"; the clearest, {found.worst} (a tie is below {tolerance.margin})" if found.worst else ""
    often = f", which gives so many in {chance(found.diverging, found.compared, allowed):.0%} of checks"
    return Outcome(
        passed,
        f"{folder.name} {'agrees' if passed else 'does not agree'} with its {rows[0]['precision']} reference:"
        f" {found.diverging} of {found.compared} tokens wrong"
        f" ({allowed:.1%} accepted in {precision}{often if found.diverging else ''}),"
        f" {found.ties} ties in {found.answers} answers{detail}",
    )


def _ask(url: str, model: str, row: dict[str, Any]) -> list[int]:
    """The greedy answer of the served model, as token ids."""
    fields = {"text_input": row["prompt"], "max_tokens": len(row["token_ids"]), "ignore_eos": True}
    responses = _post(url, model, fields | {"return_token_ids": True, "stream": False})
    ids = [response.get("output_ids", []) for response in responses]
    return [int(token) for part in ids for token in (part if isinstance(part, list) else [part])]


def _post(url: str, model: str, fields: dict[str, Any]) -> list[dict[str, Any]]:
    """All responses of one request; an error that the server reports is a UserError."""
    request = urllib.request.Request(f"{url}/v2/models/{model}/generate_stream", json.dumps(fields).encode())
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            body = reply.read()
    except urllib.error.HTTPError as error:
        body = error.read()
    except OSError as error:
        raise UserError(f"the served {model} did not answer: {error}") from None
    events = [event.removeprefix(b"data:") for event in body.split(b"\n\n") if event.strip()]
    responses = [json.loads(event) for event in events]
    if failed := [response["error"] for response in responses if "error" in response]:
        raise UserError(f"the served {model} refused a reference prompt: {failed[0]}")
    return responses


def _check_video(folder: Path, manifest: dict[str, Any], url: str) -> Outcome:
    import numpy as np

    from exporters.video_reference import MIN_PSNR_DB, prompt_distance, read_references, video_agreement

    least = MIN_PSNR_DB[manifest["precision"]]
    worst = float("inf")
    references = read_references(folder)
    for clip in references:
        answer = _post(url, folder.name, clip.request | {"output": "tensor", "stream": False})[-1]
        frames = np.array(answer["frames"], dtype=np.uint8)
        if frames.size != clip.frames.size:
            return Outcome(False, f"{folder.name} made {frames.size} values, the reference has {clip.frames.size}")
        worst = min(worst, video_agreement(clip.frames, frames.reshape(clip.frames.shape)))
    verb = "agrees" if worst >= least else "does not agree"
    line = f"{folder.name} {verb} with its {len(references)} reference clips: PSNR {worst:.1f} dB at worst"
    other = prompt_distance(references)
    scale = f"; another prompt with the same seed gives {other:.1f} dB" if other > float("-inf") else ""
    return Outcome(worst >= least, f"{line} (at least {least:.0f} dB in {manifest['precision']}{scale})")
