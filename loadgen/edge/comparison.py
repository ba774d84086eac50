"""Accuracy mode: what kept answers come to against references, and the files that say so.

Two kinds of reference: token ids of `--reference` (what plain `model.generate` answers), and texts that the prompt file
has as `output`, `response` or `reference` (what a good answer looks like). Token ids belong to a prompt by its text and
not by the number of a line. Answers are read once, in groups: memory grows with the library, not with their length.

`accuracy.txt` has the form that MLPerf's evaluators print and the submission checker reads. It is written only when
every prompt was answered and has a reference answer; `why_no_scores` says what is in the way.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from loadgen.core.accuracy import agreement
from loadgen.core.reason import Reason
from loadgen.core.rouge import NAMES, Stem, rouge, sentences
from loadgen.core.scenario import Scenario
from loadgen.edge import accuracy
from loadgen.edge.errors import UserError
from loadgen.edge.mlperf_log import FILES, notice, whole_file, write_accuracy_logs
from loadgen.edge.samples import PromptLibrary
from loadgen.edge.store import Run

SCORES = "accuracy.txt"


def check(scenario: Scenario, prompts: list[str]) -> None:
    """Before the run: has the reference an answer to each of these prompts? Raises UserError."""
    if scenario.reference:
        if scenario.salt:
            raise UserError("--salt on changes the prompts, so no answer could equal the reference; leave it out")
        _expected_ids(scenario.reference, prompts)


def _expected_ids(path: str, prompts: list[str]) -> list[array[int]]:
    """The reference's token ids of each prompt, in the prompts' order."""
    known = accuracy.read_reference(Path(path))
    for number, prompt in enumerate(prompts, 1):
        if prompt not in known:
            start = prompt if len(prompt) <= 40 else prompt[:40] + "…"
            raise UserError(f"{path} has no answer to prompt {number} ({start!r}); make one with `export --reference`")
    return [known[prompt] for prompt in prompts]


def assess(folder: Path, scenario: Scenario) -> tuple[dict[str, Any], list[Reason]]:
    """`summary["accuracy"]` and the reasons it gives. A prompt without an answer counts as an empty answer.

    A reference that cannot be read any more is a reason as well: the answers are kept, `not_compared` says why.
    """
    accuracy.finish(folder)
    try:
        library = PromptLibrary(scenario.prompts, scenario)
        ids = _expected_ids(scenario.reference, library.texts) if scenario.reference else []
        texts = library.references
    except UserError as error:
        tally = _Tally([])
        for _ in tally.pairs(folder, []):
            pass
        why = Reason("accuracy", f"not compared: {error}", "a comparison", "put the file back and run again")
        return tally.facts() | {"not_compared": str(error)}, [why] if scenario.reference else []
    tally = _Tally(texts)
    pairs = tally.pairs(folder, ids)
    if ids:
        found = agreement(pairs)
    else:
        found = {}
        for _ in pairs:
            pass
    facts = tally.facts() | found
    return facts, _reasons(facts, scenario.min_agreement) if ids else []


class _Tally:
    """Counts over answers, and sums of ROUGE over those prompts that have a reference text."""

    def __init__(self, texts: list[str | None]) -> None:
        self.texts, self.stem = texts, _stemmer() if any(texts) else None
        self.answers = self.without_ids = self.tokens = self.characters = 0
        self.scores = np.zeros(len(NAMES))

    def pairs(self, folder: Path, ids: list[array[int]]) -> Iterator[tuple[list[int], array[int]]]:
        """Counts each prompt's first answer, and gives its token ids with those expected, where any are."""
        seen: set[int] = set()
        for row in accuracy.answers(folder):
            sample = row["sample"]
            if sample in seen:
                continue
            seen.add(sample)
            self._count(row["text"], row["token_ids"], self.texts[sample] if sample < len(self.texts) else None)
            if ids:
                yield row["token_ids"], ids[sample]
        for sample, expected in enumerate(ids):
            if sample not in seen:
                yield [], expected

    def _count(self, text: str, ids: list[int], reference: str | None) -> None:
        self.answers += 1
        self.without_ids += not ids
        self.tokens += len(ids)
        self.characters += len("\n".join(sentences(text)))  # as MLPerf's evaluators count gen_len
        if reference:
            scores = rouge(text, reference, self.stem)
            self.scores += [scores[name] for name in NAMES]

    def facts(self) -> dict[str, Any]:
        """JSON-ready. `rouge` holds means, as fractions, over the `samples` that have a reference text."""
        facts: dict[str, Any] = {"answers": self.answers, "without_ids": self.without_ids, "tokens": self.tokens,
                                 "characters": self.characters}  # fmt: skip
        if count := sum(map(bool, self.texts)):
            means = dict(zip(NAMES, (self.scores / count).tolist(), strict=True))
            facts["rouge"] = {"samples": count, **means}
        return facts


def _stemmer() -> Stem:
    """Porter's, as rouge_score has it. Imported late: NLTK takes a second."""
    from nltk.stem.porter import PorterStemmer

    stem: Stem = PorterStemmer().stem
    return stem


def _reasons(facts: dict[str, Any], least: float | None) -> list[Reason]:
    if facts["without_ids"]:
        seen = f"{facts['without_ids']} of {facts['answers']} answers without token ids"
        return [Reason("accuracy", seen, "token ids in each answer", "export again: return_token_ids must be honoured")]
    share = facts["token_agreement"]
    if least is None or share >= least:
        return []
    advice = f"first divergence at token {facts['divergence']['earliest']}: look for changed weights, precision, tokens"
    return [Reason("accuracy", f"token agreement {share:.2%}", f"≥ {least:.2%}", advice)]


def why_no_scores(run: Run) -> str | None:
    """Why `accuracy.txt` cannot be written for this run; None where it can."""
    seen, prompts = run.summary.get("accuracy"), run.scenario.library_size
    if not seen:
        return f"it is a {run.scenario.name} run: make one with `tritonmark run accuracy`"
    with_reference = seen.get("rouge", {}).get("samples", 0)
    if with_reference < prompts:
        which = f"{with_reference} of {prompts}" if with_reference else "none"
        return f"{which} of its prompts have a reference answer: --prompts FILE with `output` in each row"
    if seen["answers"] < prompts:
        return f"only {seen['answers']} of {prompts} prompts were answered"
    return None


def scores_text(run: Run) -> str:
    """The content of `accuracy.txt`: who wrote it and from what, and one line of figures, ROUGE in percent."""
    seen = run.summary["accuracy"]
    shown: dict[str, Any] = {name: f"{round(seen['rouge'][name] * 100, 4)}" for name in NAMES}
    shown |= {"gen_len": seen["characters"], "gen_num": seen["answers"]}
    if not seen["without_ids"]:
        shown |= {"gen_tok_len": seen["tokens"], "tokens_per_sample": round(seen["tokens"] / seen["answers"], 1)}
    return (f"# {notice()}: ROUGE with Porter's stemmer, as rouge_score; sentences of rougeLsum end at . ? or !\n"
            f"# run {run.folder.name}, references of {run.scenario.prompts}\n{shown}\n")  # fmt: skip


def write_files(run: Run) -> None:
    """LoadGen's files of an accuracy run and, where it can be, `accuracy.txt`, into the run's folder."""
    kept = ((a["seq"], a["sample"], array("i", a["token_ids"]).tobytes(), len(a["token_ids"]))
            for a in accuracy.answers(run.folder))  # fmt: skip
    unanswered = run.scenario.library_size - run.summary["accuracy"]["answers"]
    write_accuracy_logs(run, run.folder, kept, unanswered)
    if not why_no_scores(run):
        with whole_file(run.folder / SCORES) as file:
            file.write(scores_text(run))


def has_files(run: Run) -> bool:
    return all((run.folder / name).is_file() for name in FILES[:3])
