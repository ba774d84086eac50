"""How one request reads in the words of the model that serves it. Pure.

All ask for the same work: greedy, exactly so many tokens, streamed, counted by the server. A model tells its dialect by
the parameter `tritonmark.dialect` of its configuration; Triton's own vLLM backend is known by its name.

| dialect | who speaks it | counts |
|---|---|---|
| native | this project's python models | new tokens in each response, the totals in the last |
| vllm | Triton's vLLM backend | new tokens in each response; no total, so there is no second count to compare with |
| tensorrtllm | Triton's TensorRT-LLM backend behind its ensemble | as vllm |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

NATIVE, VLLM, TENSORRTLLM = "native", "vllm", "tensorrtllm"
DIALECTS = (NATIVE, VLLM, TENSORRTLLM)
_COUNTED = {"return_num_input_tokens": True, "return_num_output_tokens": True}


def dialect_of(backend: str, parameters: Mapping[str, str]) -> str:
    """The dialect of a model, from its configuration's `backend` and `parameters`; `native` where neither tells."""
    named = parameters.get("tritonmark.dialect", "")
    if named in DIALECTS:
        return named
    return VLLM if backend == "vllm" else NATIVE


def request_fields(dialect: str, tokens: int, token_ids: bool) -> dict[str, Any]:
    """Everything of the JSON body but `id` and `text_input`. With `token_ids` the answer's ids are asked for too,
    which vLLM's backend cannot give and the TensorRT-LLM front always does."""
    if dialect == VLLM:
        # Triton turns unknown keys into request parameters, which older versions refuse for floats: one JSON tensor
        sampling = {"max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
        return {
            "stream": True,
            "exclude_input_in_output": True,
            **_COUNTED,
            "sampling_parameters": json.dumps(sampling),
        }
    if dialect == TENSORRTLLM:
        return {"max_tokens": tokens, "min_tokens": tokens, "top_k": 1, "stream": True, **_COUNTED}
    fields = {"max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True, "temperature": 0.0, "stream": True}
    return fields | ({"return_token_ids": True} if token_ids else {})
