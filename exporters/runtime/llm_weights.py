"""A language model's weights on its device: loaded, or drawn from a seed. Runs inside Triton and at export; imports
nothing of this project.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import transformers

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
UNREACHABLE = -1e4  # bias of the tokens that the tokenizer cannot spell; finite in fp16 too


def draw_weights(model: torch.nn.Module, seed: int, decodable: int) -> None:
    """Fill `model` with seeded random weights whose logits are spread like a trained model's.

    Linear layers get a standard deviation of 1/sqrt(inputs), those that write into the residual stream are divided by
    sqrt(2 layers), and the output layer gets 3/sqrt(inputs), so logits have a deviation of about 3. Ids from
    `decodable` on are made unreachable. Equal seeds give equal weights on one kind of device, not across kinds.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    depth = math.sqrt(2 * model.config.num_hidden_layers)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if name.endswith("bias"):
                weight.zero_()
            elif weight.ndim < 2:
                weight.fill_(1.0)
            else:
                inputs = weight.shape[1]
                spread = 1.0 if "embed" in name else 1 / math.sqrt(inputs)
                spread /= depth if name.endswith(("dense.weight", "fc2.weight", "o_proj.weight")) else 1
                spread *= 3 if name.startswith("lm_head") else 1
                weight.normal_(0.0, spread, generator=generator)
        if model.lm_head.bias is not None:
            model.lm_head.bias[decodable:] = UNREACHABLE


def load_model(folder: Path, settings: dict, device: str) -> torch.nn.Module:
    """The model on `device`: from safetensors in `folder`, or drawn there from the seed when there are none."""
    dtype = DTYPES[settings["precision"]]
    if not settings["draw_on_load"]:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        return model.to(device)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = getattr(transformers, settings["model_class"])(config)
    finally:
        torch.set_default_dtype(previous)
    draw_weights(model, settings["seed"], settings["decodable_tokens"])
    return model
