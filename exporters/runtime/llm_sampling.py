"""Token choice for each request inside one continuous batch. Runs inside Triton; imports nothing of this project.

The batch is always greedy (argmax), and a request which asks for more gets its own row of logits changed first:
- `min_tokens`: the end tokens get -inf until so many tokens exist;
- sampling: after temperature, top_k and top_p, Gumbel noise is added. The argmax of logits plus Gumbel noise is an
  exact draw from their softmax, and the noise comes from the request's own seeded generator, so equal seeds draw alike
  whatever else is in the batch.
"""

from __future__ import annotations

import os

import torch


class Rule:
    """What one request wants beyond greedy decoding. Sizes in tokens; `temperature` 0 is greedy."""

    def __init__(self, prompt_tokens, min_tokens, temperature, top_k, top_p, seed, device) -> None:
        self.prompt_tokens = prompt_tokens
        self.min_tokens = min_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.generator = None
        if temperature > 0:
            self.generator = torch.Generator(device=device)
            seed = int.from_bytes(os.urandom(8), "little") if seed is None else seed
            self.generator.manual_seed(seed - 2**64 if seed >= 2**63 else seed)

    @classmethod
    def of(cls, prompt, prompt_tokens: int, device) -> Rule | None:
        """The rule of a `prompt` (llm_request.Prompt), or None where plain greedy decoding does."""
        min_tokens = 0 if prompt.ignore_eos else prompt.min_tokens  # with ignore_eos nothing ends the answer early
        if prompt.greedy and not min_tokens:
            return None
        temperature = 0.0 if prompt.greedy else prompt.temperature
        return cls(prompt_tokens, min_tokens, temperature, prompt.top_k, prompt.top_p, prompt.seed, device)

    def noisy(self, row: torch.Tensor) -> torch.Tensor:
        """`row` [vocabulary] of logits, filtered and with noise, ready for argmax."""
        row = row / self.temperature
        if 0 < self.top_k < row.numel():
            row = row.masked_fill(row < torch.topk(row, self.top_k).values[-1], -torch.inf)
        if self.top_p < 1:
            ordered, order = torch.sort(row, descending=True)
            shares = torch.softmax(ordered, dim=-1)
            beyond = shares.cumsum(dim=-1) - shares >= self.top_p  # the first token always stays
            row = row.index_fill(0, order[beyond], -torch.inf)
        uniform = torch.rand(row.shape, generator=self.generator, device=row.device, dtype=torch.float32)
        uniform = uniform.clamp_(1e-10, 1 - 1e-7)  # both logarithms stay finite
        return row - torch.log(-torch.log(uniform))
