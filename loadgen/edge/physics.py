"""A sealed run beside its roofline: what the hardware would allow, what was measured, and everything assumed.

Only the summary is read. The streams that decode at one time are taken from it too, by Little's law: requests a second
x mean time from first token to the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from loadgen.core import roofline
from loadgen.core.roofline import Limit, LlmFacts, Machine, VideoFacts
from loadgen.core.scenario import Kind
from loadgen.edge import scenarios
from loadgen.edge.hardware_catalogue import BYTES, of_run
from loadgen.edge.store import Run


@dataclass(frozen=True)
class Work:
    """One kind of work of a run: its limit, what was measured (s), and the assumptions in words.

    `per_s` and `limit_per_s` are the same as rates of `unit`: tokens a second of all streams, or steps a second.
    """

    name: str
    unit: str
    measured_s: float
    limit: Limit
    per_s: float
    limit_per_s: float
    mbu: float
    mfu: float | None
    intensity: float
    assumed: str

    @property
    def share(self) -> float:
        """Of the limit that was reached, 0 to 1; above 1 something assumed is wrong."""
        return self.limit.seconds / self.measured_s


def facts_of(model: str) -> LlmFacts | VideoFacts | None:
    """A model's numbers from `models.toml`; None for a model that is not there."""
    known: Mapping[str, int] | None = scenarios.binding(model).get("facts")
    if known is None:
        return None
    return VideoFacts(**known) if "linear_parameters" in known else LlmFacts(**known)


def works(run: Run) -> list[Work]:
    """What can be set beside a limit; empty where the model, its precision or the hardware is unknown."""
    document = run.document
    precision = str(document.get("precision", ""))
    facts = facts_of(str((document.get("exported") or {}).get("model") or document.get("model") or ""))
    hardware = of_run(document)
    machine = hardware.machine(precision)
    if facts is None or machine is None or precision not in BYTES or not run.summary.get("completed"):
        return []
    if isinstance(facts, LlmFacts):
        found = _llm(run, facts, machine, precision, hardware.copies)
    else:
        found = _video(run, facts, machine, precision, hardware.copies)
    return [w for w in found if w is not None]


def _llm(run: Run, facts: LlmFacts, machine: Machine, precision: str, copies: int) -> list[Work | None]:
    summary, size = run.summary, BYTES[precision]
    done = summary["completed"]
    prompt, answer = summary["tokens_in"] / done, summary["tokens_out"] / done
    decode = _decode(run, facts, machine, size, prompt + answer / 2, copies)
    return [decode, _prefill(run, facts, machine, size, prompt)]


def _decode(run: Run, facts: LlmFacts, machine: Machine, size: float, context: float, copies: int) -> Work | None:
    summary = run.summary
    tpot, ttft, e2e = (summary.get(n, {}).get("mean") for n in ("tpot_ns", "ttft_ns", "e2e_ns"))
    if not tpot or ttft is None or e2e is None:
        return None
    streams = (summary["qps"] or 0.0) * (e2e - ttft) / 1e9
    if run.scenario.kind in (Kind.SINGLE_STREAM, Kind.CONCURRENCY):
        streams = min(streams, float(run.scenario.concurrency))
    working = min(float(copies), max(1.0, streams))  # fewer streams than copies leave some idle
    streams = max(1.0, streams / copies)
    kv = 4.0 if size == 4.0 else 2.0  # KV caches are kept in 16 bit, of fp32 models in 32
    found = roofline.decode_step(facts, machine, streams, context, size, kv)
    weights, cache = facts.weights_read(streams) * size, context * facts.kv_values_per_token * kv
    routed = f", with {streams:.3g} tokens on {facts.experts} experts, uniform routing" if facts.experts else ""
    per = "token" if streams == 1 else f"step of {streams:.3g} streams (mean, by Little's law)"
    assumed = (f"one pass over {amount(weights)} of weights per {per}{routed}{_spread(copies)}; KV of {context:.0f} "
               f"tokens mean ({amount(cache)} a stream); {_speed(machine, found)}")  # fmt: skip
    return _work("decode", "tokens/s", tpot / 1e9, found, machine, streams * working, assumed)


def _prefill(run: Run, facts: LlmFacts, machine: Machine, size: float, prompt: float) -> Work | None:
    """Only where a prompt never waits for another: elsewhere TTFT is mostly queue."""
    mean = run.summary.get("ttft_ns", {}).get("mean")
    if run.scenario.kind is not Kind.SINGLE_STREAM or not mean:
        return None
    found = roofline.prefill(facts, machine, prompt, size)
    weights = amount(facts.weights_read(prompt) * size)
    assumed = (f"one pass over {weights} of weights and {found.flops / 1e9:,.0f} GFLOP for {prompt:.0f} tokens, "
               f"nothing cached; {_speed(machine, found)}")  # fmt: skip
    return _work("prefill", "tokens/s", mean / 1e9, found, machine, prompt, assumed)


def _video(run: Run, facts: VideoFacts, machine: Machine, precision: str, copies: int) -> list[Work | None]:
    clip, measured = run.scenario.clip, run.summary.get("step_ns", {}).get("mean")
    if clip is None or not measured:
        return [None]
    guided = clip.guidance > 1
    found = roofline.denoising_step(facts, machine, clip.frames, clip.height, clip.width, BYTES[precision], guided)
    tokens = facts.tokens(clip.frames, clip.height, clip.width)
    assumed = (f"{found.flops / 1e12:,.3g} TFLOP a step: {tokens:,} tokens, {'two passes' if guided else 'one pass'}; "
               f"text encoder and VAE not counted; {_speed(machine, found)}")  # fmt: skip
    working = min(float(copies), max(1.0, (run.summary["qps"] or 0.0) * run.summary["e2e_ns"]["mean"] / 1e9))
    return [_work("denoising step", "steps/s", measured / 1e9, found, machine, working, assumed)]


def _work(name: str, unit: str, measured_s: float, found: Limit, machine: Machine, made: float, assumed: str) -> Work:
    return Work(
        name, unit, measured_s, found, made / measured_s, made / found.seconds,
        roofline.mbu(found.bytes, measured_s, machine), roofline.mfu(found.flops, measured_s, machine),
        found.flops / found.bytes, assumed,
    )  # fmt: skip


def _spread(copies: int) -> str:
    return f", spread evenly over {copies} copies of the model" if copies > 1 else ""


def _speed(machine: Machine, found: Limit) -> str:
    several = f" of {machine.gpus} GPUs together" if machine.gpus > 1 else ""
    if found.bound == "compute" and machine.flops_s:
        return f"{machine.flops_s / 1e12:,.4g} TFLOPS{several} {machine.source} ({machine.name})"
    return f"{machine.bandwidth_bytes_s / 1e9:,.0f} GB/s{several} {machine.source} ({machine.name})"


def amount(size: float) -> str:
    """ "5.30 GB", "62.9 MB"."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def lines(run: Run) -> list[str]:
    """A line for each work, for reports; empty where no limit is known."""
    out = []
    for w in works(run):
        mfu = f", MFU {w.mfu:.2%}" if w.mfu is not None else ""
        out.append(
            f"roofline: {w.name} measured {w.measured_s * 1e3:.4g} ms, limit {w.limit.seconds * 1e3:.4g} ms "
            f"({w.limit.bound} bound): {w.share:.1%} of the limit; MBU {w.mbu:.1%}{mfu}. Assumed: {w.assumed}"
        )
    return out


def as_json(run: Run) -> list[dict[str, Any]]:
    """The same as plain types."""
    return [asdict(w) | {"share": w.share} for w in works(run)]
