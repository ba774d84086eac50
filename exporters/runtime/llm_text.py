"""Token ids to text, a piece at a time. Runs inside Triton beside model.py; imports nothing of this project.

A character may be spread over several tokens (a byte-level tokenizer cuts an emoji into up to four), so a piece that
ends in the middle of one is held back until the rest has come. The pieces, joined, equal the text decoded at once.
"""

from __future__ import annotations

REPLACEMENT = "\ufffd"  # what an incomplete or invalid UTF-8 sequence decodes to, one for each sequence


class TextStream:
    """Incremental decoder for one answer. `tokenizer` is a `tokenizers.Tokenizer`."""

    __slots__ = ("_held", "_ids", "_sent", "_start", "_tokenizer")

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # the window that is decoded begins at this token ...
        self._held = 0  # ... the tokens before this one are its context: all of their text was sent ...
        self._sent = ""  # ... and this much of the window's text was sent, the context's included

    def push(self, ids: list[int], last: bool = False) -> str:
        """The text that `ids` add. With `last` nothing is held back, and a cut character becomes U+FFFD."""
        self._ids += ids
        text = self._tokenizer.decode(self._ids[self._start :], skip_special_tokens=True)
        complete = text[:-1] if text.endswith(REPLACEMENT) and not last else text
        piece = complete[len(self._sent) :]
        if complete is text:
            # One earlier piece stays as context: some decoders drop the space in front of the first token.
            self._start, self._held = self._held, len(self._ids)
            self._sent = self._tokenizer.decode(self._ids[self._start :], skip_special_tokens=True)
        elif piece:
            self._sent = complete
        return piece
