"""What physics allows: the least time of a decoding step, a prefill or a video on a GPU, and how near a run came.

A step can be no faster than its bytes take through the memory, nor than its operations take at the peak (Williams,
Waterman and Patterson, CACM 2009). Bytes of a decoding step with B streams of mean context c: every weight once, of a
mixture of experts those that B tokens are expected to touch, 1 − (1 − k/E)^B of them with uniform routing, and the KV
cache of all streams. Caches between memory and cores, activations and communication between GPUs are left out, so the
limit is optimistic: a share of it is never flattered.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """The GPUs that serve one model together. `source` says where bandwidth and peak are from."""

    name: str
    bandwidth_bytes_s: float
    flops_s: float | None
    source: str
    gpus: int = 1


@dataclass(frozen=True)
class LlmFacts:
    """A language model, in numbers (not bytes). `read_parameters` are read for every token whatever it is: all but the
    input embedding and the experts. `attention_flops` is per token and per token of its context.
    """

    parameters: int
    read_parameters: int
    kv_values_per_token: int
    attention_flops: int
    expert_parameters: int = 0
    experts: int = 0
    experts_per_token: int = 0

    def weights_read(self, tokens: float) -> float:
        """Weights (a number) that one pass over `tokens` tokens is expected to read."""
        if not self.experts:
            return float(self.read_parameters)
        touched: float = 1 - (1 - self.experts_per_token / self.experts) ** tokens
        return self.read_parameters + self.expert_parameters * touched

    @property
    def head_parameters(self) -> int:
        """The output layer, as large as the input embedding."""
        return self.parameters - self.read_parameters - self.expert_parameters

    def token_flops(self, context: float) -> float:
        """Operations of one token: 2 for each active weight, and attention over its context."""
        active = self.read_parameters + self.expert_parameters * self.experts_per_token / max(self.experts, 1)
        return 2 * active + self.attention_flops * context


@dataclass(frozen=True)
class VideoFacts:
    """A diffusion transformer. `linear_parameters` are applied to every token, `attention_flops` is per pair of tokens;
    a patch is `patch` latents wide and high, a latent `spatial` pixels wide and high and `temporal` frames long.
    """

    linear_parameters: int
    parameters: int
    attention_flops: int
    text_tokens: int
    spatial: int = 8
    temporal: int = 4
    patch: int = 2

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Tokens of one clip with its text: 17,776 for 49 frames of 480 x 720."""
        side = self.spatial * self.patch
        return ((frames - 1) // self.temporal + 1) * (height // side) * (width // side) + self.text_tokens

    def step_flops(self, tokens: int, guided: bool = True) -> float:
        """One denoising step; with classifier-free guidance it has two passes."""
        one = 2.0 * self.linear_parameters * tokens + float(self.attention_flops) * tokens**2
        return one * (2 if guided else 1)


@dataclass(frozen=True)
class Limit:
    """The least time of a piece of work. `bound` is what sets it: "memory", or "compute"."""

    seconds: float
    bytes: float
    flops: float
    bound: str


def limit(amount_bytes: float, flops: float, machine: Machine) -> Limit:
    """The larger of the time for the bytes and, where the peak is known, the time for the operations."""
    memory = amount_bytes / machine.bandwidth_bytes_s
    compute = flops / machine.flops_s if machine.flops_s else 0.0
    return Limit(max(memory, compute), amount_bytes, flops, "memory" if memory >= compute else "compute")


def decode_step(
    facts: LlmFacts, machine: Machine, streams: float, context: float, weight_bytes: float, kv_bytes: float = 2.0
) -> Limit:
    """One token for each of `streams` streams whose mean context is `context` tokens; bytes are those of one value."""
    moved = facts.weights_read(streams) * weight_bytes + streams * context * facts.kv_values_per_token * kv_bytes
    return limit(moved, streams * facts.token_flops(context), machine)


def prefill(facts: LlmFacts, machine: Machine, tokens: float, weight_bytes: float) -> Limit:
    """All tokens of one prompt: the mean context of causal attention is half of it, and only one token needs logits."""
    flops = tokens * facts.token_flops(tokens / 2) - 2 * (tokens - 1) * facts.head_parameters
    return limit(facts.weights_read(tokens) * weight_bytes, flops, machine)


def denoising_step(
    facts: VideoFacts, machine: Machine, frames: int, height: int, width: int, weight_bytes: float, guided: bool = True
) -> Limit:
    """One step of one clip."""
    tokens = facts.tokens(frames, height, width)
    return limit(facts.parameters * weight_bytes, facts.step_flops(tokens, guided), machine)


def mbu(amount_bytes: float, seconds: float, machine: Machine) -> float:
    """Model bandwidth utilisation: needed bytes per second, of what the memory could move."""
    return amount_bytes / seconds / machine.bandwidth_bytes_s


def mfu(flops: float, seconds: float, machine: Machine) -> float | None:
    """Model FLOPs utilisation: needed operations per second, of the peak. None where the peak is unknown."""
    return flops / seconds / machine.flops_s if machine.flops_s else None


def balance(machine: Machine, weight_bytes: float) -> float | None:
    """Streams at which decoding turns from memory bound to compute bound, KV left out: peak x bytes / (2 bandwidth)."""
    return machine.flops_s * weight_bytes / (2 * machine.bandwidth_bytes_s) if machine.flops_s else None
