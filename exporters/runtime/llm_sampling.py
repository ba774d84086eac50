"""Token choice for each request inside one continuous batch. Runs inside Triton; imports nothing of this project.

transformers' continuous batching chooses tokens in one way for the whole batch. Here the batch is always greedy
(argmax), and a request which asks for more gets its own row of logits changed first:
- `min_tokens`: the end tokens get -inf until so many tokens exist;
- sampling: after temperature, top_k and top_p, Gumbel noise is added. The argmax of logits plus Gumbel noise is an
  exact draw from their softmax, and the noise comes from the request's own seeded generator, so equal seeds draw alike
  whatever else is in the batch.
A batch without such requests pays for one dictionary look-up a step.
"""

from __future__ import annotations

import os

import torch
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList


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


class TokenRules(ContinuousBatchingLogitsProcessorList):
    """Takes the place of the manager's own list of logits processors."""

    def __init__(self, end_ids: list[int]) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self.end_ids = end_ids
        self.rules: dict[str, Rule] = {}  # by request id; set by the server's threads, read by the batch loop
        self._rows: list[tuple[int, Rule, bool]] = []

    def check_kwargs(self, kwargs: dict) -> None:
        """Rules are looked up by request id, so no keyword is ever passed through the manager."""

    def prepare_tensor_args(self, requests_in_batch, arg_storage):
        """Called before each forward pass with the requests in the order of the rows of logits."""
        self._rows = []
        if self.rules:
            tokens = [request.state for request in requests_in_batch if request.has_new_token]
            for row, state in enumerate(tokens):
                rule = self.rules.get(state.request_id)
                if rule is not None:
                    # initial_tokens grows when the manager evicts and requeues a request
                    done = len(state.initial_tokens) + len(state.generated_tokens) - rule.prompt_tokens
                    self._rows.append((row, rule, done < rule.min_tokens))
        return arg_storage

    def __call__(self, input_ids, scores, logits_processor_args):
        for row, rule, forbid_end in self._rows:
            if forbid_end:
                scores[row, self.end_ids] = -torch.inf
            if rule.generator is not None:
                scores[row] = rule.noisy(scores[row])
        return scores
