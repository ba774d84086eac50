"""Rows of a video run → its figures and the checks of its verdict.

A clip's responses are: one after text encoding, one after each denoising step, one with the frames. In `Rows` they are
the chunks of a row: `chunk_tokens` is 0 for all but the last, which carries the number of frames.
"""

from __future__ import annotations

import numpy as np

from loadgen.core.reason import Reason
from loadgen.core.record import Bool, Int64, Rows
from loadgen.core.scenario import Clip

FEWEST = 3  # responses of a clip of one step


def step_gaps(rows: Rows) -> Int64:
    """Time of each denoising step as the client saw it: from the response before to the step's own, in ns, pooled over
    completed rows. The response after text encoding starts the first; the frames' response is no step."""
    if not len(rows.chunk_ns):
        return np.empty(0, dtype=np.int64)
    row = np.repeat(np.arange(len(rows)), np.diff(rows.chunk_offsets))
    keep = (row[1:] == row[:-1]) & rows.ok[row[1:]] & (rows.chunk_tokens[1:] == 0)
    return np.asarray(np.diff(rows.chunk_ns)[keep])


def denoise(rows: Rows) -> Int64:
    """From the response after text encoding to that of the last step, in ns; one value a completed row."""
    some = _whole(rows)
    return np.asarray(rows.chunk_ns[_last(rows, some) - 1] - rows.chunk_ns[rows.chunk_offsets[:-1][some]])


def decode(rows: Rows) -> Int64:
    """From the last step's response to the frames': VAE decoding, and making and sending the answer, in ns."""
    last = _last(rows, _whole(rows))
    return np.asarray(rows.chunk_ns[last] - rows.chunk_ns[last - 1])


def mean_step(rows: Rows) -> tuple[Bool, Int64]:
    """Which rows are whole clips, and the mean time of a step of each of those, in ns."""
    some = _whole(rows)
    return some, denoise(rows) // np.maximum(np.diff(rows.chunk_offsets)[some] - 2, 1)


def steps(rows: Rows) -> int:
    """Denoising steps of completed rows."""
    return len(step_gaps(rows))


def _whole(rows: Rows) -> Bool:
    return np.asarray(rows.ok & (np.diff(rows.chunk_offsets) >= FEWEST))


def _last(rows: Rows, some: Bool) -> Int64:
    return np.asarray(rows.chunk_offsets[1:][some] - 1)


def frame_reasons(rows: Rows, steps_seen: int, clip: Clip) -> list[Reason]:
    """Frame truth: as many frames and steps as were asked for, by the server's count; anything else is other work."""
    ok, reasons = rows.ok, []
    other = int((ok & (rows.tokens_out != rows.asked_out)).sum())
    if other:
        seen = f"{other} videos with another number of frames than asked for"
        advice = "unequal work is not comparable: export the model again, or correct --clip"
        reasons.append(Reason("frames_differ", seen, f"{clip.frames} frames each", advice))
    expected = int(ok.sum()) * clip.steps
    if steps_seen != expected:
        seen = f"{steps_seen} denoising steps in {int(ok.sum())} videos"
        advice = "the model must answer after each step: export it again"
        reasons.append(Reason("steps_differ", seen, f"{clip.steps} each, {expected} in all", advice))
    return reasons
