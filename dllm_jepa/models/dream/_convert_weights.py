"""Dream's published names: of its weights (Qwen2's), and of the keys of its config.json."""

from typing import Any

from dllm_jepa.models._sizes import TransformerSizes
from dllm_jepa.models.files._config_json import check_values, flag, positive_number, rope_base, whole_number

# The context the authors document; max_position_embeddings promises more than the model was trained on.
_DOCUMENTED_CONTEXT = 2048

_LAYER_NAMES = {
    "attn.q_proj.weight": "self_attn.q_proj.weight",
    "attn.q_proj.bias": "self_attn.q_proj.bias",
    "attn.k_proj.weight": "self_attn.k_proj.weight",
    "attn.k_proj.bias": "self_attn.k_proj.bias",
    "attn.v_proj.weight": "self_attn.v_proj.weight",
    "attn.v_proj.bias": "self_attn.v_proj.bias",
    "attn.output_proj.weight": "self_attn.o_proj.weight",
    "mlp.w1.weight": "mlp.gate_proj.weight",
    "mlp.w3.weight": "mlp.up_proj.weight",
    "mlp.w2.weight": "mlp.down_proj.weight",
    "sa_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
}

# Values of config.json that mean this architecture; the first is written.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),
}


def dream_hf_names(sizes: TransformerSizes) -> dict[str, str]:
    """Published weight name of every parameter, by our name. No weight is permuted or merged."""
    names = {"backbone.tok_embeddings.weight": "model.embed_tokens.weight"}
    for layer in range(sizes.num_layers):
        for ours, theirs in _LAYER_NAMES.items():
            names[f"backbone.layers.{layer}.{ours}"] = f"model.layers.{layer}.{theirs}"
    names["backbone.norm.scale"] = "model.norm.weight"
    if not sizes.tie_embeddings:
        names["head.weight"] = "lm_head.weight"
    return names


def dream_sizes(config: dict[str, Any]) -> TransformerSizes:
    """Sizes from a published config.json.

    Raises:
        KeyError: if a key is missing.
        ValueError: if a key asks for an architecture that is not Dream's, or its value is of the wrong kind.
    """
    check_values(config, _ALLOWED, "Dream")
    num_heads = whole_number(config, "num_attention_heads")
    return TransformerSizes(
        vocab_size=whole_number(config, "vocab_size"),
        embed_dim=whole_number(config, "hidden_size"),
        num_layers=whole_number(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=whole_number(config, "num_key_value_heads", num_heads),
        mlp_dim=whole_number(config, "intermediate_size"),
        max_seq_len=min(whole_number(config, "max_position_embeddings"), _DOCUMENTED_CONTEXT),
        rope_base=rope_base(config),
        norm_eps=positive_number(config, "rms_norm_eps"),
        tie_embeddings=flag(config, "tie_word_embeddings", False),
    )


def dream_config(sizes: TransformerSizes) -> dict[str, Any]:
    """The published config.json keys for a model of these sizes."""
    return {
        **{key: values[0] for key, values in _ALLOWED.items()},
        "architectures": ["DreamModel"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_dream.DreamConfig",
            "AutoModel": "modeling_dream.DreamModel",
        },
        "hidden_size": sizes.embed_dim,
        "initializer_range": 0.02,
        "intermediate_size": sizes.mlp_dim,
        "max_position_embeddings": sizes.max_seq_len,
        "max_window_layers": sizes.num_layers,
        "model_type": "Dream",
        "num_attention_heads": sizes.num_heads,
        "num_hidden_layers": sizes.num_layers,
        "num_key_value_heads": sizes.num_kv_heads,
        "rms_norm_eps": sizes.norm_eps,
        "rope_scaling": None,
        "rope_theta": sizes.rope_base,
        "sliding_window": None,
        "tie_word_embeddings": sizes.tie_embeddings,
        "use_cache": False,
        "vocab_size": sizes.vocab_size,
    }
