"""A model's two kinds of step on one device, each a single launch: prompts, and one token for every running sequence.
Runs inside Triton; imports nothing of this project. No clock, no thread, no queue: llm_slots.py decides what runs when.

What a sequence needs between steps stays on the device, by slot: its last token, its length, its table of pages. A step
therefore needs no answer of the step before it, and the host may launch ahead. On CUDA every step is captured as a CUDA
graph for a few batch sizes and prompt lengths. Layers are compiled (llm_compile.py), on a CPU for decode steps only.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence

import llm_paged
import numpy as np
import torch
from llm_compile import compile_head, compile_layers, compile_prompts
from llm_paged import PAGE

SHORTEST = 32  # tokens of the smallest prompt bucket
_RING = 4  # host buffers used in turn, more than steps in flight


def buckets(most: int) -> list[int]:
    """Batch sizes that get a graph: powers of two, and half-way steps from 32 on. The last one is `most`."""
    sizes = [size for power in range(12) for size in (2**power, 3 * 2 ** (power - 1) if power > 4 else 0)]
    return [*sorted(size for size in sizes if 0 < size < most), most]


def prompt_shapes(most_tokens: int, max_context: int) -> list[tuple[int, int]]:
    """(prompts, padded length) that get a graph: lengths double, and of each as many prompts as `most_tokens` allow."""
    lengths = [SHORTEST]
    while lengths[-1] < max_context:
        lengths.append(min(lengths[-1] * 2, max_context))
    return [
        (count, length)
        for length in lengths
        for count in (1, 2, 4, 8, 16, 32, 64)
        if count == 1 or count * length <= most_tokens
    ]


class Launched:
    """Tokens on their way to the host, one for each row."""

    def __init__(self, tokens: torch.Tensor, event) -> None:
        self._tokens, self._event = tokens, event

    def wait(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        return self._tokens.tolist()


class Steps:
    """`model` made to run up to `slots` sequences at once; slot number `slots` is scratch, like page 0."""

    def __init__(self, model, device: str, slots: int, max_context: int, prompt_tokens: int, compiled: bool) -> None:
        self.model, self.device, self.slots = model, torch.device(device), slots
        self.cuda = self.device.type == "cuda"
        self.table_pages = -(-max_context // PAGE)
        self.shapes = prompt_shapes(prompt_tokens, max_context)
        # One sequence alone would be a compile of its own; it pays off on CUDA only.
        self.batches = [size for size in buckets(slots) if size > 1 or self.cuda or slots == 1]
        llm_paged.install(model, max_context)
        integer = {"dtype": torch.int64, "device": self.device}
        self.tokens = torch.zeros(slots + 1, **integer)
        self.lengths = torch.zeros(slots + 1, **integer)
        self.tables = torch.zeros((slots + 1, self.table_pages), dtype=torch.int32, device=self.device)
        self.rows = torch.full((slots,), slots, **integer)
        self._span = torch.arange(max_context, **integer)
        largest = max(count * (length + 2 + self.table_pages) for count, length in self.shapes)
        self._packed = torch.zeros(largest, dtype=torch.int32, device=self.device)
        pinned = {"dtype": torch.int32, "pin_memory": self.cuda}
        self._sends = [torch.zeros(max(largest, slots), **pinned) for _ in range(_RING)]
        self._receives = [torch.zeros(slots, dtype=torch.int64, pin_memory=self.cuda) for _ in range(_RING)]
        self._turn = 0
        self._graphs: dict = {}
        self._pool = None
        self._side = torch.cuda.Stream() if self.cuda else None
        self._plain = [layer.forward for layer in model.model.layers]
        self._layers = {"prompts": self._plain, "decode": self._plain}
        self._head = self._choose
        if compiled:
            self._layers["decode"] = compile_layers(model, self.cuda)
            self._head = compile_head(self._choose, self.cuda)
            if self.cuda:  # on a CPU each start would pay for it
                self._layers["prompts"] = compile_prompts(model)

    # The steps themselves -------------------------------------------------------------------------------------------

    def _choose(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, vocabulary] and the likeliest tokens [B] of `hidden` [B, width]."""
        logits = self.model.lm_head(hidden)
        return logits, logits.argmax(-1)

    def _run_prompts(self, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        packed, cut = self._packed, count * length
        ids = packed[:cut].view(count, length).long()
        lengths, slots = packed[cut : cut + count].long(), packed[cut + count : cut + 2 * count].long()
        tables = packed[cut + 2 * count : cut + count * (2 + self.table_pages)].view(count, -1)
        self.tables[slots] = tables
        self.lengths[slots] = lengths
        span = self._span[:length]
        pages = tables.long()[:, span // PAGE] * (span < lengths[:, None])
        hidden = self.model.model(
            input_ids=ids,
            position_ids=span.expand(count, length),
            use_cache=False,
            pages=pages,
            places=(span % PAGE).repeat(count, 1),  # in memory: the compiler would tell strides of 0 apart
        ).last_hidden_state
        logits, tokens = self._choose(hidden[self._span[:count], lengths - 1])
        self.tokens[slots] = tokens
        return logits, tokens

    def _run_decode(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.rows[:count]
        positions = self.lengths[rows]
        hidden = self.model.model(
            input_ids=self.tokens[rows][:, None],
            position_ids=positions[:, None],
            use_cache=False,
            tables=self.tables[rows],
            positions=positions,
        ).last_hidden_state
        logits, tokens = self._head(hidden[:, 0])
        self.tokens[rows] = tokens
        self.lengths[rows] = torch.where(rows == self.slots, 0, positions + 1)
        return logits, tokens

    # Launching ------------------------------------------------------------------------------------------------------

    def prompts(self, batch: Sequence[tuple[int, list[int], list[int]]], choose: Callable | None = None) -> Launched:
        """Run new sequences: (slot, token ids, pages) each. They must fit one of `shapes`; see `fit`."""
        count, length = self.fit(max(len(ids) for _, ids, _ in batch), len(batch))
        sheet = np.zeros(count * (length + 2 + self.table_pages), dtype=np.int32)
        cut = count * length
        sheet[cut : cut + count] = 1
        sheet[cut + count : cut + 2 * count] = self.slots
        for row, (slot, ids, pages) in enumerate(batch):
            sheet[row * length : row * length + len(ids)] = ids
            sheet[cut + row] = len(ids)
            sheet[cut + count + row] = slot
            start = cut + 2 * count + row * self.table_pages
            sheet[start : start + len(pages)] = pages
        self._send(sheet, self._packed)
        logits, tokens = self._launch(("prompts", count, length))
        return self._finish(logits, tokens, [slot for slot, _, _ in batch], choose)

    def decode(self, slots: list[int], choose: Callable | None = None) -> Launched:
        """One more token for the sequences in `slots`."""
        count = next(size for size in self.batches if size >= len(slots))
        sheet = np.full(count, self.slots, dtype=np.int32)
        sheet[: len(slots)] = slots
        self._send(sheet, self.rows)
        logits, tokens = self._launch(("decode", count))
        return self._finish(logits, tokens, slots, choose)

    def fit(self, longest: int, count: int) -> tuple[int, int] | None:
        """The smallest of `shapes` for `count` prompts of up to `longest` tokens, or None."""
        length = min(size for _, size in self.shapes if size >= longest)
        return min(((n, size) for n, size in self.shapes if size == length and n >= count), default=None)

    def _send(self, sheet: np.ndarray, target: torch.Tensor) -> None:
        self._turn = (self._turn + 1) % _RING
        host = self._sends[self._turn][: len(sheet)]
        host.numpy()[:] = sheet
        target[: len(sheet)].copy_(host, non_blocking=True)

    def _launch(self, key: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.cuda:
            return self._step(key)
        graph, answer = self._graphs[key]
        graph.replay()
        return answer

    def _finish(self, logits, tokens, slots: list[int], choose: Callable | None) -> Launched:
        if choose is not None:
            for row, token in choose(logits):
                tokens[row] = token
                self.tokens[slots[row]] = token
        host = self._receives[self._turn][: len(slots)]
        host.copy_(tokens[: len(slots)], non_blocking=True)
        event = None
        if self.cuda:
            event = torch.cuda.Event()
            event.record()
        return Launched(host, event)

    # Making ready ---------------------------------------------------------------------------------------------------

    def step_bytes(self, tell: Callable[[str], None]) -> int:
        """Device memory, in bytes, that steps take beside weights and cache: what the largest prompts are measured
        to take, and the logits that every graph keeps. On CUDA only. Prompts run uncompiled here: it takes no less."""
        outputs = sum(self.batches) + sum(count for count, _ in self.shapes)
        logits = outputs * self.model.lm_head.out_features * self.model.lm_head.weight.dtype.itemsize
        return logits + max(self._run_alone(("prompts", *shape), tell) for shape in self._largest_shapes())

    def _largest_shapes(self) -> list[tuple[int, int]]:
        """Those with more than half of the most tokens: of each length at most one, that of the most prompts."""
        most = max(count * length for count, length in self.shapes)
        return [(count, length) for count, length in self.shapes if 2 * count * length > most]

    def _run_alone(self, job: tuple, tell: Callable[[str], None]) -> int:
        """Bytes that the allocator takes while `job` runs with nothing kept from before."""
        tell(f"measuring memory: {' '.join(map(str, job))}")
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._set_scratch(job)
        self._run_prompts(*job[1:])
        torch.cuda.synchronize()
        return torch.cuda.max_memory_reserved(self.device) - before

    def warm_up(self, tell: Callable[[str], None]) -> None:
        """Compile and capture every shape; `tell` gets a line before each part."""
        # Prompts all run before any is captured: the graphs' pool keeps the room of the largest, and a run beside it
        # would take as much again. Decode steps are captured one by one, each as it was just compiled.
        prompts = [("prompts", *shape) for shape in reversed(self.shapes)]
        groups: list[list[tuple]] = [*([("decode", n)] for n in reversed(self.batches)), prompts]
        if not self.cuda:  # nothing to capture; compiled code serves every size
            groups = [[("prompts", 1, SHORTEST)], [("decode", self.batches[0])]]
        count, numbers = sum(map(len, groups)), itertools.count(1)
        for group in groups:
            for job in group:
                tell(f"warming up {next(numbers)} of {count}: {' '.join(map(str, job))}")
                self._run_scratch(job)
            if self.cuda:
                self._graphs |= {job: self._capture(job) for job in group}
        self.tables.zero_()
        self.lengths.zero_()

    def _run_scratch(self, job: tuple) -> None:
        """Run `job` on the scratch slot: compiles what is to be compiled. Twice, on a stream of its own, as capturing
        asks for; always the same one, since the products' library keeps a work space for each stream it has seen."""
        self._set_scratch(job)
        if self._side is None:
            self._step(job)
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            for _ in range(2):
                self._step(job)
        torch.cuda.current_stream().wait_stream(self._side)

    def _capture(self, job: tuple):
        self._set_scratch(job)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            answer = self._step(job)
        self._pool = self._pool or graph.pool()
        return graph, answer

    def _set_scratch(self, job: tuple) -> None:
        self._packed.zero_()
        self._packed[job[1] * job[-1] :][: job[1]] = 1  # lengths of prompts

    def _step(self, job: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        with self._layers_for(job[0]):
            return (self._run_prompts if job[0] == "prompts" else self._run_decode)(*job[1:])

    @contextlib.contextmanager
    def _layers_for(self, kind: str):
        """Within the block the decoder layers are those for `kind`, compiled if any is."""
        layers = self.model.model.layers
        for layer, forward in zip(layers, self._layers[kind], strict=True):
            layer.forward = forward
        try:
            yield
        finally:
            for layer, forward in zip(layers, self._plain, strict=True):
                layer.forward = forward
