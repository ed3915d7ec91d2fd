"""A small random model of any causal type that transformers has, from its own default configuration made small.

network = small_network("qwen3_moe")     # 2 to 4 layers, 32 wide, weights on which a wrong mask shows
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trietune.model.base.few_layers import randomize
from trietune.model.base.load import auto_class

VOCABULARY = 120
# Shorter than nearly every sequence, so that a layer that forgets its window is noticed.
WINDOW = 5
LAYERS = 2

# The names that configurations give to one thing, and how large that thing is here.
SIZES: list[tuple[int, tuple[str, ...]]] = [
    (VOCABULARY, ("vocab_size", "vocab_size_per_layer_input")),
    (32, (
        "hidden_size", "n_embd", "d_model", "dim", "n_embed", "embedding_size", "emb_dim", "embed_dim",
        "lru_width", "word_embed_proj_dim", "attention_hidden_size",
    )),
    (64, (
        "intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size",
        "mlp_hidden_size", "shared_expert_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp",
        "dense_intermediate_size", "feed_forward_size", "block_ff_dim", "ffn_hidden_sizes",
    )),
    (16, ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size",
         "moe_shared_intermediate_size", "moe_latent_size", "q_lora_rank", "kv_lora_rank", "o_lora_rank")),
    (LAYERS, (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth",
    )),
    (4, (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
        "encoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
        "mamba_d_conv", "qk_rope_head_dim", "rotary_dim", "mamba_n_heads",
    )),
    (2, (
        "num_key_value_heads", "num_experts_per_tok", "moe_top_k", "moe_k", "num_experts_per_token",
        "num_codebooks", "top_k_experts", "moe_router_topk",
    )),
    (1, ("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace",
        "moe_num_shared_experts",
        "num_dense_layers", "moe_layer_start_index", "decoder_sparse_step", "num_nextn_predict_layers")),
    (8, ("head_dim", "global_head_dim", "qk_nope_head_dim", "v_head_dim", "linear_key_head_dim",
        "linear_value_head_dim",
        "d_kv", "index_head_dim", "attention_head_dim", "hidden_size_per_layer_input", "mamba_head_dim",
        "mamba_d_head")),
    (256, ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "max_target_positions")),
    (WINDOW, ("sliding_window", "attention_window_size", "window_size")),
]  # fmt: skip
# Without a number of experts a layer computes none, whatever else its configuration says of them.
_NAMED_BUT_NOT_GIVEN = ("num_experts_per_tok",)
SIZE_OF = {name: size for size, names in SIZES for name in names}
# What a type's parts must have in common, beside the table; found by trying to build them.
_MLA = {"head_dim": 4, "qk_head_dim": 12, "num_key_value_heads": 4}
OF_TYPE: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_ssm": 32},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "gemma3n_text": {"activation_sparsity_pattern": [0.0, 0.0], "num_kv_shared_layers": 0},
    "zaya": {"num_experts_per_tok": 1},
    "xlnet": {"d_head": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp_text": {"num_key_value_heads": 2, "num_attention_heads": 4},
    "dots1": {"moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1},
    "zamba2": {
        "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "mamba_d_state": 8, "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16]},
    "xlstm": {"embedding_dim": 32, "hidden_size": 32},
    "kimi_linear": _MLA | {"linear_attn_config": {"head_dim": 8, "num_heads": 4, "short_conv_kernel_size": 4}},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},

    "xmod": {"default_language": "en_XX"},
    "ministral": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "deepseek_v2": _MLA, "deepseek_v3": _MLA, "glm4_moe_lite": _MLA, "axk1": _MLA, "minicpm3": _MLA, "youtu": _MLA,
    "bailing_hybrid": _MLA, "longcat_flash": _MLA,
    "axk2": _MLA | {"index_head_dim": 8}, "deepseek_v32": _MLA, "glm_moe_dsa": _MLA,
}  # fmt: skip


def causal_types() -> list[str]:
    """Every type that `AutoModelForCausalLM` of the installed transformers builds."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(model_type: str, **changes: Any) -> Any:
    """The default configuration of `model_type`, made small. Raises whatever its class raises."""
    default = CONFIG_MAPPING[model_type]()
    return CONFIG_MAPPING[model_type](**_smaller(default.to_dict(), model_type) | changes)


def _smaller(given: dict[str, Any], model_type: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in given.items():
        if name in ("transformers_version", "model_type", "architectures", "dtype", "torch_dtype", "hybrid_layer_ids"):
            continue
        if isinstance(value, dict) and name.endswith("_config") and "model_type" in value:
            made[name] = _smaller(value, value["model_type"]) | {"model_type": value["model_type"]}
        elif name in SIZE_OF and value is not None and not isinstance(value, bool):
            made[name] = [SIZE_OF[name]] * LAYERS if isinstance(value, list | tuple) else SIZE_OF[name]
        elif name.endswith("_token_id") and isinstance(value, int):
            made[name] = {"pad": 0, "bos": 1, "eos": 2}.get(name.split("_")[0], 3)
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict) and "mrope_section" in value:
            pairs = int(8 * value.get("partial_rotary_factor", given.get("partial_rotary_factor") or 1.0)) // 2
            made[name] = value | {"mrope_section": [pairs - 2 * (pairs // 4), pairs // 4, pairs // 4]}
        elif name in _NAMED_BUT_NOT_GIVEN and value is None:
            made[name] = SIZE_OF[name]
        elif name in ("layer_types", "layers_block_type", "mlp_layer_types") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            made[name] = (kinds * LAYERS)[:LAYERS]
        elif name == "per_layer_config":
            made[name] = {key: value[key] for key in value if int(key) < LAYERS}
        else:
            made[name] = value
    if made.get("pad_token_id") is None:
        made["pad_token_id"] = 0
    if made.get("is_decoder") is False and not made.get("is_encoder_decoder"):
        made["is_decoder"] = True  # an encoder whose causal form this is
    if made.get("causal") is False:
        made["causal"] = True
    return made | OF_TYPE.get(model_type, {})


def small_network(model_type: str, *, seed: int = 20, **changes: Any) -> PreTrainedModel:
    """A network of `small_config`, in evaluation mode and fp32, its weights random and large."""
    torch.manual_seed(0)
    network: PreTrainedModel = auto_class(model_type).from_config(small_config(model_type, **changes)).float()
    randomize(network, seed)
    return network.eval()
