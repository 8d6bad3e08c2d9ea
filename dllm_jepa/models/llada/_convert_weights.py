"""LLaDA's published names: of its weights, and of the keys of its config.json."""

from typing import Any

from dllm_jepa.models._sizes import TransformerSizes
from dllm_jepa.models.files._config_json import check_values, flag, positive_number, rope_base, whole_number

_LAYER_NAMES = {
    "attn.q_proj.weight": "q_proj.weight",
    "attn.k_proj.weight": "k_proj.weight",
    "attn.v_proj.weight": "v_proj.weight",
    "attn.output_proj.weight": "attn_out.weight",
    "mlp.w1.weight": "ff_proj.weight",  # the gate
    "mlp.w3.weight": "up_proj.weight",
    "mlp.w2.weight": "ff_out.weight",
    "sa_norm.scale": "attn_norm.weight",
    "mlp_norm.scale": "ff_norm.weight",
}

# Values of config.json that mean this architecture; the first is written.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "activation_type": ("silu",),
    "rope": (True,),
    "alibi": (False, None),
    "include_bias": (False, None),
    "include_qkv_bias": (False, None),
    "attention_layer_norm": (False, None),
    "scale_logits": (False, None),
    "input_emb_norm": (False, None),
    "multi_query_attention": (None, False),  # where false, the published class takes no grouped heads
}


def llada_hf_names(sizes: TransformerSizes) -> dict[str, str]:
    """Published weight name of every parameter, by our name. No weight is permuted or merged."""
    names = {"backbone.tok_embeddings.weight": "model.transformer.wte.weight"}
    for layer in range(sizes.num_layers):
        for ours, theirs in _LAYER_NAMES.items():
            names[f"backbone.layers.{layer}.{ours}"] = f"model.transformer.blocks.{layer}.{theirs}"
    names["backbone.norm.scale"] = "model.transformer.ln_f.weight"
    if not sizes.tie_embeddings:
        names["head.weight"] = "model.transformer.ff_out.weight"
    return names


def llada_sizes(config: dict[str, Any]) -> TransformerSizes:
    """Sizes from a published config.json.

    Raises:
        KeyError: if a key is missing.
        ValueError: if a key asks for an architecture that is not LLaDA's, or its value is of the wrong kind.
    """
    check_values(config, _ALLOWED, "LLaDA")
    # Null and absent mean what the published LLaDAConfig makes of them.
    vocab_size, embed_dim, num_heads = (whole_number(config, key) for key in ("vocab_size", "d_model", "n_heads"))
    return TransformerSizes(
        vocab_size=whole_number(config, "embedding_size", vocab_size),
        embed_dim=embed_dim,
        num_layers=whole_number(config, "n_layers"),
        num_heads=num_heads,
        num_kv_heads=whole_number(config, "n_kv_heads", num_heads),
        mlp_dim=whole_number(config, "mlp_hidden_size", whole_number(config, "mlp_ratio", 4) * embed_dim),
        max_seq_len=whole_number(config, "max_sequence_length"),
        rope_base=rope_base(config),
        norm_eps=positive_number(config, "rms_norm_eps"),
        tie_embeddings=flag(config, "weight_tying"),
    )


def llada_config(sizes: TransformerSizes) -> dict[str, Any]:
    """The published config.json keys for a model of these sizes."""
    return {
        **{key: values[0] for key, values in _ALLOWED.items()},
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm_with_affine": True,
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
            "AutoModel": "modeling_llada.LLaDAModelLM",
        },
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "d_model": sizes.embed_dim,
        "embedding_dropout": 0.0,
        "embedding_size": sizes.vocab_size,
        "flash_attention": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "layer_norm_with_affine": True,
        "max_sequence_length": sizes.max_seq_len,
        "mlp_hidden_size": sizes.mlp_dim,
        "mlp_ratio": 4,
        "model_type": "llada",
        "n_heads": sizes.num_heads,
        "n_kv_heads": sizes.num_kv_heads,
        "n_layers": sizes.num_layers,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": sizes.norm_eps,
        "rope_full_precision": True,
        "rope_theta": sizes.rope_base,
        "use_cache": False,
        "vocab_size": sizes.vocab_size,
        "weight_tying": sizes.tie_embeddings,
    }
