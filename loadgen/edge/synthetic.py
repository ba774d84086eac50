"""Prompts of exact token lengths for one tokenizer: a salt of a few tokens, then words, verified by encoding.

Adding words to a text rarely adds their token counts: a byte-pair encoder merges over seams, a special token may be put
in front. So each text is drawn from words whose cost was measured in context, encoded as the server will encode it, and
mended at its end until the count is exact. The body depends on seed and sample alone; the salt on key and sample too.

    texts = salted(tokenizer, bodies(tokenizer, [128, 64], seed=0), [128, 64], key="run 7")
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from loadgen.edge.errors import UserError

SALT_WORDS = 4  # of about a thousand: 40 bits
BLOCK_TOKENS = 16  # what vLLM's prefix cache hashes at once; prompts must differ within it
ATTEMPTS = 100  # a text; then the tokenizer can't spell that length
REDRAW_AFTER = 20  # mending a text more often than this leads nowhere
ENCODE_AT_ONCE = 256
_ANCHOR = "a"


def load_tokenizer(path: str) -> Any:
    """A `tokenizers.Tokenizer` that encodes as a server does: nothing cut, nothing padded. Raises UserError."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads don't survive Locust's fork
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise UserError("exact token lengths need tokenizers; install it with: pip install tokenizers") from None
    if not Path(path).is_file():
        raise UserError(f"--tokenizer {path}: no such file; give the model's tokenizer.json")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"--tokenizer {path} cannot be read ({error}); give the model's tokenizer.json") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, special tokens included, a part at a time so that an event loop gets its turn."""
    ids: list[list[int]] = []
    batch = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)  # without offsets, which nobody reads
    for start in range(0, len(texts), ENCODE_AT_ONCE):
        ids += [encoding.ids for encoding in batch(list(texts[start : start + ENCODE_AT_ONCE]))]
        time.sleep(0)
    return ids


class Words:
    """Words with their cost in tokens: `after` another word, and `first` in a text. `special` tokens come for free."""

    def __init__(self, tokenizer: Any, words: Sequence[str]) -> None:
        special, anchor = (len(ids) for ids in encode(tokenizer, ["", _ANCHOR]))
        self.special = special
        self.first = self._affordable(words, [len(ids) - special for ids in encode(tokenizer, words)])
        behind = encode(tokenizer, [f"{_ANCHOR} {word}" for word in words])
        self.after = self._affordable(words, [len(ids) - anchor for ids in behind])
        self._price = dict(zip(self.after[0].tolist(), self.after[1].tolist(), strict=True))
        # A few tokens where a word is one or two; more where words are spelt out, but always less than a block.
        self.salt = min(BLOCK_TOKENS - 1, SALT_WORDS * int(np.median(self.after[1])))

    @staticmethod
    def _affordable(words: Sequence[str], costs: Sequence[int]) -> tuple[Any, Any]:
        """Words and costs, cheapest first, so that what a remainder can pay for is a prefix."""
        array = np.asarray(costs)
        order = np.argsort(array, kind="stable")
        order = order[array[order] > 0]
        return np.asarray(words, dtype=object)[order], array[order]

    def fill(self, tokens: int, rng: random.Random, start: bool) -> str | None:
        """Words that cost `tokens` by the measured prices; None when the draw ended in a remainder nobody costs."""
        picked: list[str] = []
        while tokens > 0:
            words, costs = self.first if start and not picked else self.after
            fitting = int(np.searchsorted(costs, tokens, "right"))
            if not fitting:
                return None
            # Many at once while anything fits, then one by one.
            many = 1 if start and not picked else max(1, tokens // int(costs[-1]))
            for at in [int(rng.random() * fitting) for _ in range(many)]:
                picked.append(words[at])
                tokens -= int(costs[at])
        return " ".join(picked) if tokens == 0 else None

    def mend(self, text: str, over: int, rng: random.Random) -> str | None:
        """`text` with words taken off its end, or added, so that by the measured prices it loses `over` tokens."""
        words = text.split()
        while over > 0 and words:
            over -= self._price.get(words.pop(), 1)
        more = self.fill(-over, rng, start=False)
        return None if more is None else " ".join([*words, more] if more else words)


@lru_cache(maxsize=4)
def measured(tokenizer: Any, words: tuple[str, ...]) -> Words:
    return Words(tokenizer, words)


def vocabulary(texts: Sequence[str]) -> tuple[str, ...]:
    """The plain words of some texts, single letters and digits: what prompts are made of."""
    found = {word for text in texts for word in re.findall(r"\b[a-z]{2,12}\b", text)}
    return (*sorted(found), *"abcdefghijklmnopqrstuvwxyz0123456789")


def bodies(tokenizer: Any, words: tuple[str, ...], lengths: Sequence[int], seed: int) -> list[str]:
    """What follows each salt, so that both together have `lengths` tokens: a function of seed and index alone.

    Raises UserError for a length that the tokenizer's special tokens fill already, or that can't be hit.
    """
    prices = measured(tokenizer, words)
    (anchor,) = encode(tokenizer, [_ANCHOR])
    wanted = [int(length) - prices.special - _salt_tokens(int(length), prices) for length in lengths]
    drafts: dict[int, str] = {}
    over: dict[int, int] = {}

    def make(index: int, attempt: int) -> str | None:
        rng = _stream("body", seed, index, attempt)
        if index not in over or attempt % REDRAW_AFTER == 0:
            draft = prices.fill(wanted[index], rng, start=False)
        else:
            draft = prices.mend(drafts[index], over[index], rng)
        if draft is not None:
            drafts[index] = draft
        return draft

    def exact(index: int, ids: list[int]) -> bool:
        over[index] = len(ids) - len(anchor) - wanted[index]
        return over[index] == 0

    return _until_exact(tokenizer, lengths, make, lambda _, body: f"{_ANCHOR} {body}" if body else _ANCHOR, exact)


def salted(tokenizer: Any, words: tuple[str, ...], parts: Sequence[str], lengths: Sequence[int], key: str) -> list[str]:
    """The prompts: a salt from `key` and index in front of each of `parts`; exactly `lengths` tokens each.

    No two prompts have the same first 16 tokens after the special ones. Raises UserError where that can't be.
    """
    prices = measured(tokenizer, words)
    owners: dict[tuple[int, ...], int] = {}

    def make(index: int, attempt: int) -> str | None:
        tokens = _salt_tokens(int(lengths[index]), prices)
        return prices.fill(tokens, _stream("salt", key, index, attempt), start=True)

    def text(index: int, salt: str) -> str:
        return f"{salt} {parts[index]}" if parts[index] else salt

    def exact(index: int, ids: list[int]) -> bool:
        block = tuple(ids[: prices.special + BLOCK_TOKENS])
        return len(ids) == int(lengths[index]) and owners.setdefault(block, index) == index

    salts = _until_exact(tokenizer, lengths, make, text, exact)
    return [text(index, salt) for index, salt in enumerate(salts)]


def _until_exact(
    tokenizer: Any,
    lengths: Sequence[int],
    make: Callable[[int, int], str | None],
    whole: Callable[[int, str], str],
    exact: Callable[[int, list[int]], bool],
) -> list[str]:
    """`make(index, attempt)` for each index, again where its `whole` text does not encode to what is wanted."""
    found: dict[int, str] = {}
    open_ = list(range(len(lengths)))
    for attempt in range(ATTEMPTS):
        drafts = [(index, made) for index in open_ if (made := make(index, attempt)) is not None]
        for (index, made), ids in zip(drafts, encode(tokenizer, [whole(*d) for d in drafts]), strict=True):
            if exact(index, ids):
                found[index] = made
        open_ = [index for index in open_ if index not in found]
        if not open_:
            return [found[index] for index in range(len(lengths))]
    raise UserError(
        f"the tokenizer has no {len(lengths)} different prompts of the lengths asked for: sample {open_[0]} should "
        f"have {int(lengths[open_[0]])} tokens; ask for longer ones with --input-tokens"
    )


def _salt_tokens(length: int, prices: Words) -> int:
    room = length - prices.special
    if room < 1:
        raise UserError(
            f"--input-tokens asks for a prompt of {length} tokens, but the tokenizer adds {prices.special} of its own"
        )
    return min(prices.salt, room)


def _stream(*parts: object) -> random.Random:
    """A random stream of its own for these parts. Only its `random()` is used, which all Python versions keep equal."""
    return random.Random(int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()))
