"""The checkpoint `config.json` of TensorRT-LLM, from which `trtllm-build --model_config` makes an engine with random
weights: the exact architecture without any download. Pure.

Keys as TensorRT-LLM 1.2 writes them itself in `convert_checkpoint.py` (its PhiConfig, Phi3Config, LLaMAConfig).
"""

from __future__ import annotations

from typing import Any

from exporters.catalogue import Model
from exporters.trtllm_images import table

SPARSE_MIXER = 2  # MoeConfig.ExpertScaleNormalizationMode
QUANTISATION_KEYS = ("quant_algo", "group_size", "has_zero_point", "pre_quant_scale")


def checkpoint_config(model: Model, precision: str, tp: int = 1, pp: int = 1, ep: int = 1) -> dict[str, Any]:
    """The configuration of `model` in `precision`, shared among `tp` × `pp` GPUs. `ep` of each `tp` GPUs split the
    experts, the rest split each expert."""
    made, known, config = table("precisions")[precision], table("models")[model.model_class], model.config
    quantisation = {key: made[key] for key in QUANTISATION_KEYS if key in made}
    if "kv_quant_algo" in made:
        quantisation["kv_cache_quant_algo"] = made["kv_quant_algo"]
    mapping = {"world_size": tp * pp, "tp_size": tp, "pp_size": pp}
    if known["experts"]:
        mapping |= {"moe_tp_size": tp // ep, "moe_ep_size": ep}
    return {
        "architecture": known["architecture"],
        "dtype": made["dtype"],
        "logits_dtype": "float32",
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_key_value_heads"],
        "norm_epsilon": config.get("rms_norm_eps", config.get("layer_norm_eps", 1e-5)),
        "mapping": mapping,
        "quantization": quantisation,
        **_FAMILIES[model.model_class](config),
    }


def _phi(config: Any) -> dict[str, Any]:
    return {
        "hidden_act": config["hidden_act"],
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": config["rope_theta"],
        "rotary_pct": config["partial_rotary_factor"],
        "rotary_scaling": None,
    }


def _phimoe(config: Any) -> dict[str, Any]:
    rope = config["rope_parameters"]
    return {
        "hidden_act": "swiglu",
        "attention_bias": config["attention_bias"],
        "rotary_base": rope["rope_theta"],
        "rotary_pct": 1.0,
        "rotary_scaling": None,
        "tie_word_embeddings": False,
        "moe": {
            "num_experts": config["num_local_experts"],
            "top_k": config["num_experts_per_tok"],
            "normalization_mode": SPARSE_MIXER,
            "sparse_mixer_epsilon": config["router_jitter_noise"],
        },
        "position_embedding_type": "long_rope",
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "longrope_scaling_short_factors": list(rope["short_factor"]),
        "longrope_scaling_long_factors": list(rope["long_factor"]),
        "longrope_short_mscale": rope["short_mscale"],
        "longrope_long_mscale": rope["long_mscale"],
    }


def _llama(config: Any) -> dict[str, Any]:
    return {
        "hidden_act": config["hidden_act"],
        "head_size": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": config["rope_theta"],
        "rotary_scaling": None,
        "attn_bias": False,
        "mlp_bias": False,
    }


_FAMILIES = {"PhiForCausalLM": _phi, "PhimoeForCausalLM": _phimoe, "LlamaForCausalLM": _llama}
