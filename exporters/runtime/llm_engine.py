"""The model and its batch loop, without any Triton. Runs beside model.py; imports nothing of this project.

The loop is transformers' own ContinuousBatchingManager (5.17 or later), on one thread that it starts itself. What is
added: weights from a seed, token choice for each request, stop at `max_context`, and results merged for each request.
"""

from __future__ import annotations

import dataclasses
import gc
import queue
import time
from collections.abc import Callable
from pathlib import Path

import torch
from llm_request import BadRequestError, Output, Prompt
from llm_sampling import Rule
from llm_weights import load_model
from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList

WARM_UP_PROMPTS = (8, 128, 512)  # tokens
WARM_UP_LIMIT_S = 300


def _batching_config(settings: dict) -> ContinuousBatchingConfig:
    """The manager's settings under the names that the installed transformers has."""
    page = settings["page_size"]
    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    wanted = {
        "page_size" if "page_size" in known else "block_size": page,  # renamed after 5.17
        "num_blocks": settings["kv_tokens"] // page or None,
        "max_batch_tokens": settings["max_batch_tokens"],
        "max_requests_per_batch": settings["max_sequences"],
        "max_memory_percent": settings["kv_memory_share"],
        "allow_block_sharing": False,  # shared prefixes would make repeated prompts look faster than they are
        "use_cuda_graph": False,  # this backend is the eager one
        "use_async_batching": False,  # token choice looks at the tokens of the step before
        "auto_switch_to_flash": False,
    }
    return ContinuousBatchingConfig(**{name: value for name, value in wanted.items() if name in known})


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


class Engine:
    """One model and its batch loop. `submit`, `cancel` and `results` may be called from different threads."""

    def __init__(self, folder: Path, settings: dict, device: str) -> None:
        if settings["threads"]:
            torch.set_num_threads(settings["threads"])
        self.end_ids = list(settings["end_token_ids"])
        self.leads = True  # there is no other instance on this engine
        self.device = device
        self.model = load_model(folder, settings, device).eval()
        self.model.requires_grad_(False)
        self.model.set_attn_implementation("sdpa")
        self._manager = self.model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1),
            continuous_batching_config=_batching_config(settings),
        )
        self._ranks = settings["tp"]
        self._sent: dict[str, int] = {}  # tokens handed on, by request
        self._rules = TokenRules(self.end_ids)
        self._manager.logit_processor = self._rules
        self._manager.start()
        if self._manager.is_tp_driver:
            self._warm_up()
        gc.collect()
        gc.freeze()  # weights and modules never become garbage; later collections skip them

    def submit(self, request_id: str, ids: list[int], prompt) -> bool:
        """Queue one request; False when the batch loop does not take any more."""
        rule = Rule.of(prompt, len(ids), self.device)
        if rule is not None and self._ranks > 1:
            raise BadRequestError("with tensor parallelism answers are greedy, and min_tokens needs ignore_eos")
        if rule is not None:
            self._rules.rules[request_id] = rule
        accepted = self._manager.add_request(
            ids, request_id=request_id, max_new_tokens=prompt.max_tokens, streaming=prompt.stream,
            eos_token_id=-1 if prompt.ignore_eos else self.end_ids,
        )  # fmt: skip
        return accepted is not None

    def cancel(self, request_id: str) -> None:
        """Take a request out of the batch before the next step; it yields no result."""
        self._manager.cancel_request(request_id)
        self._sent.pop(request_id, None)
        self._rules.rules.pop(request_id, None)

    def results(self, timeout_s: float) -> list:
        """One Output for each request that made progress. Blocks until there is one; empty after `timeout_s`, or when
        the loop has died.

        A slow reader gets several tokens at once, so it can catch up with a fast batch.
        """
        newest: dict = {}
        output = self._manager.get_result(timeout=timeout_s)
        waiting = self._manager.output_router.output_queue
        while output is not None:
            newest[output.request_id] = output
            if output.is_finished():
                self._rules.rules.pop(output.request_id, None)
            try:
                output = waiting.get_nowait()
            except queue.Empty:
                break
        return [self._fresh(output) for output in newest.values()]

    def _fresh(self, output) -> Output:
        """The manager's outputs hold all tokens so far; only what is new since the last one is handed on."""
        sent = self._sent.get(output.request_id, 0)
        if output.is_finished():
            self._sent.pop(output.request_id, None)
        else:
            self._sent[output.request_id] = len(output.generated_tokens)
        return Output(output.request_id, output.generated_tokens[sent:], output.is_finished(), output.error)

    def failure(self) -> str | None:
        """Why the batch loop is dead, or None while it lives."""
        error = self._manager.background_thread_status.fatal_error
        if error is not None:
            return f"the batch loop died: {type(error).__name__}: {error}"
        return None if self._manager.is_running() else "the batch loop has stopped"

    def occupancy(self) -> tuple[int, int, float]:
        """Sequences in the batch, sequences waiting for it, share of the KV cache in use (0 to 1)."""
        processor = self._manager.batch_processor
        if processor is None:
            return 0, 0, 0.0
        scheduler, cache = processor.scheduler, processor.cache
        waiting = len(scheduler.waiting_requests) + self._manager.input_queue.qsize()
        if hasattr(cache, "compute_free_capacity"):
            used = 1.0 - float(cache.compute_free_capacity())
        else:
            used = 1.0 - cache.get_num_free_blocks() / cache.num_blocks
        return len(scheduler.active_requests), waiting, max(used, 0.0)

    def stop(self, timeout_s: float) -> None:
        """End the batch loop; requests that are still in it fail."""
        self._manager.stop(block=True, timeout=timeout_s, hard_stop=True)

    def _warm_up(self) -> None:
        """Small requests one after the other, so that the first real one does not pay for first-time work: on an H100
        the first prompt of a new length class costs up to a second."""
        deadline = time.monotonic() + WARM_UP_LIMIT_S
        for length in WARM_UP_PROMPTS:
            self._manager.add_request([0] * length, request_id=f"warm-up-{length}", max_new_tokens=4, eos_token_id=-1)
            while (output := self._manager.get_result(timeout=1.0)) is None or not output.is_finished():
                if self.failure() or time.monotonic() > deadline:
                    raise RuntimeError(self.failure() or f"warming up took more than {WARM_UP_LIMIT_S} s")
            if output.error:
                raise RuntimeError(f"the first request failed: {output.error}")


class HostedEngine:
    """The same engine in a process of its own (llm_link.py), for a machine whose torch does not live with the old numpy
    that Triton's python stub needs."""

    def __init__(
        self, folder: Path, settings: dict, device: str, deliver: Callable, tell: Callable[[str], None]
    ) -> None:
        tell("loading weights and warming up")
        self._engine = Engine(folder, settings, device)
        self._deliver = deliver
        self._stopping = False
        self.cancel = self._engine.cancel

    def submit(self, request_id: str, ids: list[int], prompt: Prompt) -> None:
        try:
            taken = self._engine.submit(request_id, ids, prompt)
            reason = "the batch loop takes no more requests"
        except BadRequestError as error:
            taken, reason = False, str(error)
        if not taken:
            self._deliver([Output(request_id, [], True, reason)], self.occupancy())

    def occupancy(self) -> tuple[int, int, float]:
        return self._engine.occupancy()

    def stop(self) -> None:
        self._stopping = True

    def run(self) -> None:
        """Hand out what the batch loop makes, until `stop`."""
        while not self._stopping:
            if outputs := self._engine.results(timeout_s=0.2):
                self._deliver(outputs, self.occupancy())
            elif failure := self._engine.failure():
                raise RuntimeError(failure)
        self._engine.stop(timeout_s=5.0)
