"""Continuous batching over captured steps: who runs, in which slot, on which pages. Runs inside Triton's engine process
(llm_link.py); imports nothing of this project.

One thread owns the device. In each turn it admits waiting requests (first come, first served; a request gets a slot and
all pages that it can ever need, so nothing is evicted later), launches one step for every running sequence, and only
then waits for the tokens of the launch before. So the device never waits for the host, and a sequence that ends with an
end token has one token computed in vain.
"""

from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

import llm_paged
import torch
from llm_compile import can_compile
from llm_paged import PAGE
from llm_request import Output, Prompt
from llm_sampling import Rule
from llm_steps import Launched, Steps
from llm_weights import load_model


class Sequence:
    """One request from its arrival to its last token."""

    __slots__ = ("done", "ids", "landed", "launched", "pages", "prompt", "request_id", "rule", "slot")

    def __init__(self, request_id, ids: list[int], prompt: Prompt, rule: Rule | None) -> None:
        self.request_id, self.ids, self.prompt, self.rule = request_id, ids, prompt, rule
        self.pages: list[int] = []
        self.slot = -1
        self.launched = 0  # tokens computed or being computed
        self.landed = 0  # tokens handed out
        self.done = False


class SlotEngine:
    """One model and its batch loop. `deliver(outputs, occupancy)` is called on the loop's thread after each step;
    `submit` and `cancel` may be called from any thread."""

    def __init__(
        self, folder: Path, settings: dict, device: str, deliver: Callable, tell: Callable[[str], None]
    ) -> None:
        if settings["threads"]:
            torch.set_num_threads(settings["threads"])
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)  # streams, events and graphs are made on the current one
        self._end_ids = set(settings["end_token_ids"])
        self._device = device
        self._deliver = deliver
        tell("loading weights")
        model = load_model(folder, settings, device).eval()
        model.requires_grad_(False)
        slots, context = settings["max_sequences"], settings["max_context"]
        compiled = can_compile(device)
        if not compiled:
            tell("steps run uncompiled: no C++ compiler (g++) or no Python.h (python3-dev) was found")
        with torch.inference_mode():
            self._steps = Steps(model, device, slots, context, settings["max_batch_tokens"], compiled)
            self._pages = _count_pages(self._steps, settings, tell)
            llm_paged.give_pages(model, self._pages)
            self._steps.warm_up(tell)
            if self._steps.cuda:
                tell(f"{torch.cuda.mem_get_info(self._steps.device)[0] / 2**30:.1f} GiB of the device stay free")
        self._free_pages = list(range(self._pages - 1, 0, -1))  # page 0 is scratch
        self._free_slots = list(range(slots - 1, -1, -1))
        self._waiting: deque[Sequence] = deque()
        self._active: dict[Sequence, None] = {}  # a set that keeps its order
        self._flights: deque[tuple[Launched, list[Sequence]]] = deque()
        self._known: dict = {}
        self._news = threading.Condition()
        self._stopping = False
        gc.collect()
        gc.freeze()  # weights and modules never become garbage; later collections skip them

    def submit(self, request_id, ids: list[int], prompt: Prompt) -> None:
        rule = Rule.of(prompt, len(ids), self._device)
        with self._news:
            sequence = self._known[request_id] = Sequence(request_id, ids, prompt, rule)
            self._waiting.append(sequence)
            self._news.notify()

    def cancel(self, request_id) -> None:
        """Take a request out before the next step; it yields no further output."""
        with self._news:
            sequence = self._known.pop(request_id, None)
            if sequence is not None:
                sequence.done = True
                self._news.notify()

    def stop(self) -> None:
        with self._news:
            self._stopping = True
            self._news.notify()

    def run(self) -> None:
        """The batch loop, until `stop`."""
        with torch.inference_mode():
            while True:
                with self._news:
                    self._news.wait_for(lambda: self._waiting or self._active or self._flights or self._stopping)
                    if self._stopping:
                        return
                    batch = self._admit()
                self._turn(batch)

    def occupancy(self) -> tuple[int, int, float]:
        """Sequences in the batch, sequences waiting for it, share of the KV cache in use (0 to 1)."""
        used = 1 - len(self._free_pages) / (self._pages - 1)
        return len(self._active), len(self._waiting), used

    def _admit(self) -> list[Sequence]:
        """Requests for one step of prompts, taken off the queue with a slot and pages for each."""
        batch: list[Sequence] = []
        longest = 0
        while self._waiting and self._free_slots:
            sequence = self._waiting[0]
            if sequence.done:
                self._waiting.popleft()
                continue
            longest = max(longest, len(sequence.ids))
            pages = -(-(len(sequence.ids) + sequence.prompt.max_tokens) // PAGE)
            if pages > len(self._free_pages) or (batch and self._steps.fit(longest, len(batch) + 1) is None):
                break
            self._waiting.popleft()
            sequence.slot = self._free_slots.pop()
            sequence.pages = [self._free_pages.pop() for _ in range(pages)]
            batch.append(sequence)
        return batch

    def _turn(self, batch: list[Sequence]) -> None:
        before = len(self._flights)
        if batch:
            rows = [(sequence.slot, sequence.ids, sequence.pages) for sequence in batch]
            self._active.update(dict.fromkeys(batch))
            self._fly(batch, lambda choose: self._steps.prompts(rows, choose))
        for sequence in [one for one in self._active if one.done]:  # cancelled meanwhile
            self._release(sequence)
        if self._active:
            running = list(self._active)
            slots = [sequence.slot for sequence in running]
            self._fly(running, lambda choose: self._steps.decode(slots, choose))
        ahead = 1 if len(self._flights) > before else 0  # one step may be in flight while the host works
        while len(self._flights) > ahead:
            self._land(*self._flights.popleft())

    def _fly(self, sequences: list[Sequence], launch: Callable) -> None:
        ruled = [(row, one) for row, one in enumerate(sequences) if one.rule is not None]
        choose = (lambda logits: [(row, self._choice(logits[row], one)) for row, one in ruled]) if ruled else None
        self._flights.append((launch(choose), sequences))
        for sequence in sequences:
            sequence.launched += 1
            if sequence.launched == sequence.prompt.max_tokens:
                self._release(sequence)  # what runs later on the device may reuse its slot and pages

    def _choice(self, row: torch.Tensor, sequence: Sequence) -> torch.Tensor:
        """The token for a request that is not plain greedy, from its `row` [vocabulary] of logits."""
        row = row.float()
        if sequence.launched < sequence.rule.min_tokens:
            row[list(self._end_ids)] = -torch.inf
        if sequence.rule.generator is not None:
            row = sequence.rule.noisy(row)
        return row.argmax()

    def _release(self, sequence: Sequence) -> None:
        if sequence in self._active:
            del self._active[sequence]
            self._free_slots.append(sequence.slot)
            self._free_pages += sequence.pages

    def _land(self, flight: Launched, sequences: list[Sequence]) -> None:
        """Read a launch's tokens and hand them out."""
        outputs = []
        for sequence, token in zip(sequences, flight.wait(), strict=True):
            if sequence.done:
                continue
            sequence.landed += 1
            ended = token in self._end_ids and not sequence.prompt.ignore_eos
            if ended or sequence.landed == sequence.prompt.max_tokens:
                sequence.done = True
                self._known.pop(sequence.request_id, None)
                self._release(sequence)
            outputs.append(Output(sequence.request_id, [token], sequence.done))
        self._deliver(outputs, self.occupancy())


def _count_pages(steps: Steps, settings: dict, tell: Callable[[str], None]) -> int:
    """Pages of the cache, scratch included: from `kv_tokens`, or the share of the memory that steps leave free."""
    tokens = settings["kv_tokens"]
    if not tokens:
        if not steps.cuda:
            raise ValueError("config.pbtxt: parameter kv_tokens must be set on a CPU")
        taken = steps.step_bytes(tell)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(steps.device)
        free = max(0, free - taken)
        size = llm_paged.token_bytes(steps.model.config, steps.model.model.embed_tokens.weight.dtype)
        tokens = int(free * settings["kv_memory_share"]) // size
        tell(f"cache of {tokens} tokens; {taken / 2**30:.1f} GiB are left for the longest prompts")
        if tokens < settings["max_context"]:
            raise ValueError(
                f"{free / 2**30:.1f} GiB are free after the weights and the longest prompt: room for {tokens} tokens of"
                f" KV cache, but one sequence may have {settings['max_context']}; take a larger GPU, a smaller"
                " precision or a shorter max_context in config.pbtxt"
            )
    return -(-tokens // PAGE) + 1
