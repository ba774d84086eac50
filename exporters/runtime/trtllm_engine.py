"""TensorRT-LLM's LLM API behind an engine process. Runs inside that process; imports nothing of this project.

Written from the sources of TensorRT-LLM 1.0 to 1.3 (`LLM.generate_async`, `SamplingParams`, `CompletionOutput`); it has
not been run. NVIDIA's own python model for the LLM API takes neither `min_tokens` nor `ignore_eos` and counts no
tokens, so a load test needs this one.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

from async_engine import AsyncEngine, Made
from llm_request import Prompt

_MPI_JOB = ("OMPI_COMM_WORLD_", "OMPI_UNIVERSE_", "OMPI_MCA_orte_", "ORTE_", "PMIX_", "PMI_")


class TrtllmEngine(AsyncEngine):
    """One `tensorrt_llm.LLM` with the PyTorch backend."""

    async def start(self, arguments: dict[str, Any]) -> None:
        """The variables of an MPI job that Triton was started in would confuse the workers that LLM spawns."""
        for name in [name for name in os.environ if name.startswith(_MPI_JOB)]:
            del os.environ[name]
        from tensorrt_llm import LLM
        from tensorrt_llm.llmapi import KvCacheConfig

        arguments = dict(arguments)
        arguments["kv_cache_config"] = KvCacheConfig(**arguments["kv_cache_config"])
        self._llm = LLM(**arguments)

    async def generate(self, request_id: str, ids: list[int], prompt: Prompt) -> AsyncIterator[Made]:
        result = self._llm.generate_async(ids, sampling(prompt, self.end_ids), streaming=True)
        done, seen = False, 0
        try:
            async for output in result:
                made = output.outputs[0]
                tokens = made.token_ids  # all so far
                done = output.finished
                yield list(tokens[seen:]), done, getattr(made, "finish_reason", None)
                seen = len(tokens)
        finally:
            if not done:
                result.abort()

    def failure(self) -> BaseException | None:
        """The LLM API has no word for it; a dead engine fails each request with its own error."""
        return None

    def shut_down(self) -> None:
        self._llm.shutdown()


def sampling(prompt: Prompt, end_ids: list[int]):
    """TensorRT-LLM's SamplingParams. The end tokens must be given, because no tokenizer is loaded."""
    from tensorrt_llm import SamplingParams

    end_id = end_ids[0] if end_ids else -1
    drawn: dict[str, Any] = (
        {"top_k": 1} if prompt.greedy else {"temperature": prompt.temperature, "top_p": prompt.top_p}
    )
    if not prompt.greedy:
        drawn |= {"top_k": prompt.top_k, "seed": prompt.seed}
    return SamplingParams(
        max_tokens=prompt.max_tokens,
        min_tokens=None if prompt.ignore_eos else prompt.min_tokens or None,
        ignore_eos=prompt.ignore_eos,
        end_id=-1 if prompt.ignore_eos else end_id,
        pad_id=max(end_id, 0),
        stop_token_ids=None if prompt.ignore_eos else list(end_ids[1:]) or None,
        detokenize=False,
        **drawn,
    )
