"""vLLM behind an engine process. Runs inside that process; imports nothing of this project.

Written against vLLM 0.20: `AsyncLLM.generate`, `RequestOutputKind.DELTA`, `StatLoggerBase`. Text never passes through
vLLM: `skip_tokenizer_init` is set, and model.py encodes and decodes.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from async_engine import AsyncEngine, Made
from devices import dotted
from llm_request import Prompt

CAPABILITY = (7, 5)


class VllmEngine(AsyncEngine):
    """One AsyncLLM."""

    async def start(self, arguments: dict[str, Any]) -> None:
        """Inside the loop, because AsyncLLM starts its output task in the loop that runs."""
        _check_capability()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[_gauge(self)])

    async def generate(self, request_id: str, ids: list[int], prompt: Prompt) -> AsyncIterator[Made]:
        parameters = sampling(prompt, self.end_ids)
        async for output in self._llm.generate({"prompt_token_ids": ids}, parameters, request_id):
            made = output.outputs[0]
            yield list(made.token_ids), output.finished, getattr(made, "finish_reason", None)

    def failure(self) -> BaseException | None:
        return self._llm.dead_error if self._llm.errored else None

    def shut_down(self) -> None:
        self._llm.shutdown()


def _check_capability() -> None:
    """vLLM is asked, since torch would begin to use the GPU. A version without this module knows itself what it lacks;
    so does every one for bf16 and fp8."""
    with contextlib.suppress(ImportError):
        from vllm.platforms import current_platform

        found = current_platform.get_device_capability()
        if found is not None and tuple(found) < CAPABILITY:
            name = current_platform.get_device_name()
            raise ValueError(
                f"vLLM needs compute capability {dotted(CAPABILITY)}, {name} has {dotted(found)}; export torch-eager"
            )


def sampling(prompt: Prompt, end_ids: list[int]):
    """vLLM's SamplingParams. The end tokens are given as stop tokens, because without a tokenizer vLLM knows none; it
    counts a stop token as generated, as this project does, and `min_tokens` holds stop tokens back too."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    drawn = {} if prompt.greedy else {"top_k": prompt.top_k, "top_p": prompt.top_p, "seed": prompt.seed}
    return SamplingParams(
        max_tokens=prompt.max_tokens,
        min_tokens=0 if prompt.ignore_eos else prompt.min_tokens,
        temperature=0.0 if prompt.greedy else prompt.temperature,
        ignore_eos=prompt.ignore_eos,
        stop_token_ids=[] if prompt.ignore_eos else list(end_ids),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        **drawn,
    )


def _gauge(engine: VllmEngine):
    """A stat logger that keeps what `occupancy` reports: running, waiting, share of the KV cache in use."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Gauge(StatLoggerBase):
        def __init__(self, vllm_config, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats, iteration_stats, *_, **__) -> None:
            stats = scheduler_stats
            if stats is not None:
                engine.occupancy = stats.num_running_reqs, stats.num_waiting_reqs, float(stats.kv_cache_usage)

        def log_engine_initialized(self) -> None:
            pass

    return Gauge
