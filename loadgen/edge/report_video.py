"""What a report shows of a video run beside its figures: contact sheets of the first videos, and their stage times.

The sheets lie beside the run (`clips/`); the page carries them inside itself, as data.
"""

from __future__ import annotations

import base64
from html import escape

from loadgen.edge.clips import FOLDER, StoredClip, read_clips
from loadgen.edge.report_data import number
from loadgen.edge.store import Run

SHOWN_CLIPS = 4
PROMPT_CHARS = 200


def clip_lines(run: Run) -> list[str]:
    """One line a kept video, and one that says where the sheets are; none for other runs."""
    kept = _kept(run)
    lines = [f"video {clip.seq}: {stages(clip)}" for clip in kept]
    return [*lines, f"contact sheets in {run.folder / FOLDER}"] if kept else []


def stages(clip: StoredClip) -> str:
    """The server's own account: "text 0.02 s, 4 steps of 0.01 s, VAE 0.05 s, answer 0.01 s; peak memory 0.6 GB"."""
    facts = clip.facts
    count = facts.get("steps") or 0
    parts = [f"text {_s(facts.get('text_encode_s'))}"]
    if count and facts.get("denoise_s") is not None:
        parts.append(f"{count} steps of {_s(facts['denoise_s'] / count)}")
    parts += [f"VAE {_s(facts.get('vae_decode_s'))}", f"answer {_s(facts.get('output_s'))}"]
    if facts.get("queue_s"):
        parts.append(f"queued {_s(facts['queue_s'])}")
    memory = facts.get("peak_memory_bytes")
    work = facts.get("work", "exact")
    text = ", ".join(parts) + (f"; peak memory {number(memory / 1e9)} GB" if memory else "")
    return text if work == "exact" else f"{text}; OTHER WORK: {work}"


def clips_section(run: Run, name: str = "") -> str:
    """The sheets with their prompts as a part of the page; empty for other runs. `name` is HTML."""
    figures = []
    for clip in _kept(run):
        try:
            data = base64.b64encode(clip.sheet.read_bytes()).decode()
        except OSError:
            continue
        prompt = clip.prompt if len(clip.prompt) <= PROMPT_CHARS else clip.prompt[:PROMPT_CHARS] + " …"
        figures.append(
            f'<figure><img src="data:image/jpeg;base64,{data}" alt="frames of video {clip.seq}" style="max-width:100%">'
            f"<figcaption>{escape(prompt)}<br><small>{escape(stages(clip))}</small></figcaption></figure>"
        )
    if not figures:
        return ""
    small = "<small>up to 8 frames of the first videos, evenly spread; stage times by the server</small>"
    return f"<h2>{name}Videos {small}</h2>{''.join(figures)}"


def _kept(run: Run) -> list[StoredClip]:
    return read_clips(run.folder)[:SHOWN_CLIPS] if run.scenario.clip else []


def _s(value: float | None) -> str:
    return f"{number(value)} s"
