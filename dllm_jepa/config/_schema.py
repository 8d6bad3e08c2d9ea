"""The schemas of the recipes: their keys, in the order of the yaml files, and the rules across them.

A new recipe adds a `Schema`, from the groups of keys in `_keys.py` and its own.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from dllm_jepa.config import _eval_keys as eval_keys
from dllm_jepa.config import _eval_rules as eval_rules
from dllm_jepa.config import _float8_rules as float8_rules
from dllm_jepa.config import _keys as keys
from dllm_jepa.config import _lora_rules as lora_rules
from dllm_jepa.config import _optimizer_rules as optimizer_rules
from dllm_jepa.config import _rules as rules
from dllm_jepa.config._kinds import Key, Text

Rule = Callable[..., list[str]]


@dataclass(frozen=True)
class Schema:
    """The keys of a recipe and the rules across them.

    Args:
        keys: The keys, in the order of the yaml files.
        rules: Each returns problem lines; its parameters are named like the keys that it reads.
        launch_rules: The same, with a further parameter `launch`: how many processes and GPUs there are.
        warnings: The same as `rules`; what they return does not stop a run.
    """

    keys: tuple[Key, ...]
    rules: tuple[Rule, ...] = ()
    launch_rules: tuple[Rule, ...] = ()
    warnings: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a key that is declared twice."""
        names = [key.name for key in self.keys]
        if len(set(names)) != len(names):
            raise ValueError(f"declared twice: {sorted({name for name in names if names.count(name) > 1})}")

    @property
    def verbatim(self) -> frozenset[str]:
        """Names of the keys whose text on the command line is not yaml."""
        return frozenset(key.name for key in self.keys if isinstance(key.kind, Text) and key.kind.verbatim)


_RULES = (
    rules.jepa_parts_present,
    rules.one_jepa_schedule,
    rules.shuffling_has_targets,
    rules.one_fill,
    rules.micro_batch_holds_a_sequence,
    rules.fp32_compute_on_cpu,
    rules.checkpoint_dir_exists,
    rules.output_dir_is_no_file,
    rules.resume_exists,
    rules.exported_target_exists,
    optimizer_rules.stochastic_round_needs_bf16,
)

_LAUNCH_RULES = (
    rules.a_sequence_for_every_rank,
    rules.enough_gpus,
    rules.replicas_divide_ranks,
    optimizer_rules.stochastic_round_in_one_process,
    optimizer_rules.low_bit_optimizer_has_compiler,
)

TRAINING = Schema(
    keys=keys.OUTPUT
    + keys.TOKENIZER
    + keys.MODEL
    + keys.BASE
    + keys.JEPA
    + keys.TARGET_ENCODER
    + keys.JEPA_OPTIONS
    + keys.ANCHOR
    + keys.POOLING
    + keys.DATA
    + keys.LOSS
    + keys.OPTIMIZER
    + keys.OPTIMIZER_IN_BWD
    + keys.SCHEDULE
    + keys.LENGTH
    + keys.DTYPE
    + keys.LOOP
    + keys.CHECKPOINT
    + keys.LOGGING,
    rules=(
        *_RULES,
        lora_rules.whole_backbone_is_averaged,
        optimizer_rules.optimizer_in_bwd_is_legal,
        float8_rules.float8_on_gpu_in_bf16,
    ),
    launch_rules=(
        *_LAUNCH_RULES,
        optimizer_rules.low_bit_optimizer_on_sharded_bf16,
        rules.bf16_average_in_one_process,
        optimizer_rules.optimizer_in_bwd_in_one_process,
        float8_rules.float8_capability,
    ),
    warnings=(rules.small_rate_on_bf16_weights, float8_rules.float8_without_compile),
)

LORA = Schema(
    keys=keys.OUTPUT
    + keys.TOKENIZER
    + keys.LORA_MODEL
    + keys.BASE
    + keys.JEPA
    + keys.LORA_TARGET_ENCODER
    + keys.JEPA_OPTIONS
    + keys.POOLING
    + keys.DATA
    + keys.LOSS
    + keys.OPTIMIZER
    + keys.SCHEDULE
    + keys.LENGTH
    + keys.LORA_DTYPE
    + keys.LOOP
    + keys.CHECKPOINT
    + keys.LORA_EXPORT
    + keys.LOGGING,
    rules=(*_RULES, lora_rules.adapters_are_averaged, lora_rules.merged_with_an_export),
    launch_rules=(
        *_LAUNCH_RULES,
        lora_rules.quantized_dora_in_one_process,
        lora_rules.dora_magnitudes_in_fp32,
    ),
)

EVALUATION = Schema(
    keys=eval_keys.OUTPUT
    + eval_keys.RUN
    + eval_keys.MODEL
    + eval_keys.BASE
    + eval_keys.TASK
    + eval_keys.DECODING
    + eval_keys.BATCH,
    rules=(
        rules.output_dir_is_no_file,
        eval_rules.model_directory_exists,
        eval_rules.base_directory_exists,
        eval_rules.task_gets_what_it_takes,
    ),
    launch_rules=(rules.enough_gpus,),
)

GENERATION = Schema(
    keys=eval_keys.RUN
    + eval_keys.MODEL
    + eval_keys.PROMPTS
    + eval_keys.GENERATION_DECODING
    + eval_keys.BATCH
    + eval_keys.SHOW,
    rules=(
        eval_rules.model_directory_exists,
        eval_rules.one_source_of_prompts,
        eval_rules.new_files,
    ),
    launch_rules=(rules.enough_gpus, eval_rules.one_process),
)

SCHEMAS = {
    "dllm_jepa_full": TRAINING,
    "dllm_jepa_lora": LORA,
    "dllm_jepa_eval": EVALUATION,
    "dllm_jepa_generate": GENERATION,
}
"""The schema of every recipe, by its name."""


def schema_of(header: str) -> Schema:
    """The schema of a config: that of the recipe in the launch line of its header; without one, of full fine-tuning.

    Args:
        header: text of the yaml.
    """
    launch = re.search(r"^# Launch:.*?\b(dllm_jepa_\w+)\b", header, flags=re.MULTILINE)
    return SCHEMAS.get(launch[1], TRAINING) if launch else TRAINING
