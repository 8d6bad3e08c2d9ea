"""Configs of both recipes against their schemas: what belongs to the other one, and what a launch cannot do.

The packaged configs and the package's own builders, not stand-ins.
"""

import pytest

from dllm_jepa.config import LORA, SCHEMAS, TRAINING, Launch, Schema, find_configs, load_config, problems, schema_of

ONE, TWO = Launch(), Launch(2, 2, 0)
TWO_GPUS = Launch(2, 2, 2)
FULL_CONFIG, LORA_CONFIG = ("--config", "tiny"), ("--config", "tiny_lora")
WHOLE_AVERAGE = "dllm_jepa.jepa.ema_target_encoder"
ADAPTER_AVERAGE = "dllm_jepa.jepa.ema_adapter_target_encoder"
WIDE = ("model.embed_dim=256", "model.mlp_dim=256", "model.quantize_base=true")
LORA_ARGUMENTS = ("lora_attn_modules", "apply_lora_to_mlp", "lora_rank", "lora_alpha", "lora_dropout", "use_dora")
PLAIN_BUILDER = (
    "model._component_=dllm_jepa.models.llada.llada",
    *(f"~model.{name}" for name in (*LORA_ARGUMENTS, "quantize_base")),
)
LORA_BUILDER = (
    "model._component_=dllm_jepa.models.llada.lora_llada",
    "model.lora_attn_modules=[q_proj]",
)


def found(schema: Schema, *overrides: str, launch: Launch = ONE) -> list[str]:
    base = LORA_CONFIG if schema is LORA else FULL_CONFIG
    return problems(load_config([*base, *overrides]), schema, launch)


@pytest.mark.parametrize("launch", [ONE, TWO])
@pytest.mark.parametrize("schema", [TRAINING, LORA], ids=["full", "lora"])
def test_the_unchanged_configs_have_no_problem(schema: Schema, launch: Launch) -> None:
    assert found(schema, launch=launch) == []


@pytest.mark.parametrize(
    ("schema", "overrides", "launch", "parts"),
    [
        pytest.param(
            TRAINING,
            LORA_BUILDER,
            ONE,
            ("model: dllm_jepa.models.llada.lora_llada builds a frozen (or quantized) base", "recipe dllm_jepa_lora"),
            id="lora builder in the full recipe",
        ),
        pytest.param(
            LORA,
            PLAIN_BUILDER,
            ONE,
            ("model: dllm_jepa.models.llada.llada builds no adapters", "recipe dllm_jepa_full"),
            id="plain builder in the lora recipe",
        ),
        pytest.param(
            LORA,
            ("model.lora_attn_modules=[q_proj,query]",),
            ONE,
            ("model: lora_attn_modules: no module query; there are q_proj, k_proj, v_proj, output_proj",),
            id="unknown module",
        ),
        pytest.param(
            LORA,
            ("model.lora_attn_modules=[q_proj,q_proj]",),
            ONE,
            ("model: lora_attn_modules names a module twice",),
            id="a module twice",
        ),
        pytest.param(
            LORA,
            ("model.lora_attn_modules=[]", "model.apply_lora_to_mlp=false"),
            ONE,
            ("model: no adapters", "apply_lora_to_mlp: true"),
            id="no modules",
        ),
        pytest.param(LORA, ("model.lora_rank=0",), ONE, ("lora_rank must be at least 1, got 0",), id="rank 0"),
        pytest.param(LORA, ("model.lora_alpha=0.0",), ONE, ("lora_alpha must be above 0",), id="alpha 0"),
        pytest.param(
            LORA, ("model.lora_dropout=1.0",), ONE, ("lora_dropout must be in [0, 1), got 1.0",), id="dropout 1"
        ),
        pytest.param(
            LORA,
            ("model.quantize_base=true", "model.mlp_dim=100"),
            ONE,
            ("quantize_base: layer 0 has 12800 weights in mlp.w1", "multiple of 16384"),
            id="a layer that NF4 cannot hold",
        ),
        pytest.param(
            TRAINING,
            (f"target_encoder._component_={ADAPTER_AVERAGE}",),
            ONE,
            (f"target_encoder._component_: {ADAPTER_AVERAGE}, but all weights are trained; take {WHOLE_AVERAGE}",),
            id="average of adapters in the full recipe",
        ),
        pytest.param(
            LORA,
            (f"target_encoder._component_={WHOLE_AVERAGE}",),
            ONE,
            (f"target_encoder._component_: {WHOLE_AVERAGE}, but only adapters are trained; take {ADAPTER_AVERAGE}",),
            id="average of a backbone in the lora recipe",
        ),
        pytest.param(
            LORA,
            (*WIDE, "model.use_dora=true"),
            TWO,
            ("model.use_dora: true with quantize_base: true on 2 processes", "start one process"),
            id="qdora on two ranks",
        ),
        pytest.param(
            LORA,
            ("model.use_dora=true", "device=cuda", "compute_dtype=bf16"),
            TWO_GPUS,
            ("model.use_dora: true with compute_dtype: bf16 on 2 processes", "start one process"),
            id="dora in bf16 on two ranks",
        ),
        pytest.param(
            LORA,
            ("export_merged=true", "export=null"),
            ONE,
            ("export_merged: true, but export is null", "set export: online"),
            id="nothing to merge",
        ),
        pytest.param(
            LORA,
            ("optimizer={_component_: torchao.optim.CPUOffloadOptimizer}",),
            ONE,
            ("optimizer._component_: torchao.optim.CPUOffloadOptimizer is not offered",),
            id="offloaded optimizer",
        ),
        pytest.param(
            TRAINING,
            ("optimizer._component_=torchao.optim.AdamW8bit", "dtype=bf16"),
            TWO,
            ("optimizer._component_: torchao.optim.AdamW8bit with dtype: bf16 on 2 processes",),
            id="low-bit optimizer on sharded bf16",
        ),
        pytest.param(
            TRAINING,
            ("target_encoder.dtype=bf16",),
            TWO,
            ("target_encoder.dtype: bf16 on 2 processes", "set target_encoder.dtype: fp32"),
            id="bf16 average on two ranks",
        ),
        pytest.param(
            TRAINING,
            ("optimizer_in_bwd=true", "clip_grad_norm=null"),
            TWO,
            ("optimizer_in_bwd: true on 2 processes",),
            id="step in the backward pass on two ranks",
        ),
        pytest.param(
            LORA,
            ("dtype=bf16",),
            ONE,
            ("dtype: bf16 is not offered: adapters and predictor are small",),
            id="bf16 adapters",
        ),
        pytest.param(
            LORA,
            ("l2_anchor_weight=0.1",),
            ONE,
            ("l2_anchor_weight: a key of the recipe dllm_jepa_full",),
            id="anchor in lora",
        ),
        pytest.param(
            LORA,
            ("optimizer_in_bwd=true",),
            ONE,
            ("optimizer_in_bwd: a key of the recipe dllm_jepa_full",),
            id="step in backward in lora",
        ),
        pytest.param(
            TRAINING,
            ("export_merged=true",),
            ONE,
            ("export_merged: a key of the recipe dllm_jepa_lora",),
            id="merged export in full",
        ),
    ],
)
def test_a_problem_is_one_line(
    schema: Schema, overrides: tuple[str, ...], launch: Launch, parts: tuple[str, ...]
) -> None:
    (line,) = found(schema, *overrides, launch=launch)
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("schema", "overrides", "launch"),
    [
        pytest.param(LORA, (*WIDE, "model.use_dora=true"), ONE, id="qdora in one process"),
        pytest.param(LORA, WIDE, TWO, id="qlora on two ranks"),
        pytest.param(LORA, ("model.use_dora=true",), TWO, id="dora on two ranks"),
        pytest.param(LORA, ("device=cuda", "compute_dtype=bf16"), TWO_GPUS, id="lora in bf16 on two ranks"),
        pytest.param(LORA, ("optimizer._component_=torchao.optim.AdamW8bit",), TWO, id="low-bit optimizer in lora"),
        pytest.param(
            TRAINING,
            ("optimizer._component_=torchao.optim.AdamW8bit", "dtype=bf16", "target_encoder.dtype=bf16"),
            ONE,
            id="bf16 in one process",
        ),
        pytest.param(TRAINING, ("optimizer._component_=torchao.optim.AdamW8bit",), TWO, id="low-bit state of fp32"),
        pytest.param(TRAINING, ("optimizer_in_bwd=true", "clip_grad_norm=null"), ONE, id="step in the backward pass"),
        pytest.param(
            LORA, ("jepa_weight=0", "predictor=null", "target_encoder=null"), TWO, id="adapters without a target"
        ),
    ],
)
def test_what_is_next_to_a_refusal_is_allowed(schema: Schema, overrides: tuple[str, ...], launch: Launch) -> None:
    assert found(schema, *overrides, launch=launch) == []


def test_problems_are_listed_together() -> None:
    overrides = (
        *WIDE,
        "model.use_dora=true",
        "dtype=bf16",
        f"target_encoder._component_={WHOLE_AVERAGE}",
        "export_merged=perhaps",
        "optimizer.betas=0.9",
    )
    lines = found(LORA, *overrides, launch=TWO)
    starts = ("export_merged:", "dtype:", "optimizer.betas:", "target_encoder._component_:", "model.use_dora:")
    assert len(lines) == len(starts)
    for start in starts:
        assert len([line for line in lines if line.startswith(start)]) == 1, start


def test_the_launch_line_says_which_schema() -> None:
    line = "# Launch:    tune run {} --config x"
    assert schema_of(line.format("dllm_jepa_lora")) is LORA
    assert schema_of(line.format("--nproc_per_node 8 dllm_jepa_lora")) is LORA
    assert schema_of(line.format("dllm_jepa_full")) is TRAINING
    assert schema_of(line.format("my_recipe")) is TRAINING
    assert schema_of("model: dllm_jepa_lora") is TRAINING
    assert schema_of("# Launch dllm_jepa_lora like this:\n" + line.format("dllm_jepa_full")) is TRAINING
    assert schema_of("# Title\n#\n" + line.format("dllm_jepa_lora") + "\nmodel: dllm_jepa_full") is LORA


def test_every_packaged_config_has_the_keys_of_its_recipe() -> None:
    """Its top-level keys are those of the schema that its launch line names, and of no other one."""
    seen = set()
    for name, path in find_configs().items():
        text = path.read_text()
        schema = schema_of(text)
        (recipe,) = (recipe for recipe, its_schema in SCHEMAS.items() if its_schema is schema)
        seen.add(recipe)
        assert recipe in text, name
        assert set(load_config(["--config", str(path)])) <= {key.name for key in schema.keys}, name
        assert ("lora_rank" in text) == (schema is LORA), name
    assert seen == set(SCHEMAS)
