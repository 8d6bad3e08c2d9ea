"""Which keys a resumed run may change: those that do not decide what its steps compute."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dllm_jepa.config import LORA, TRAINING, check_resume, load_config, with_defaults
from dllm_jepa.errors import ConfigError

START = ["--config", "tiny"]
FIXED_SCHEDULE = ["lr_scheduler.num_training_steps=800"]


def compared(tmp_path: Path, before: list[str], after: list[str]) -> list[str]:
    saved = tmp_path / "config.yaml"
    OmegaConf.save(with_defaults(load_config([*START, *before])), saved, resolve=True)
    return check_resume(with_defaults(load_config([*START, *after])), saved)


def test_an_unchanged_config_has_nothing_to_say(tmp_path: Path) -> None:
    assert compared(tmp_path, [], []) == []
    assert compared(tmp_path, [], ["resume=auto", "resume_override=true"]) == []  # they are about this start alone


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("output_dir=runs/moved", 'output_dir: "runs/tiny" -> "runs/moved"'),
        ("checkpoint.every_n_steps=5", "checkpoint.every_n_steps: null -> 5"),
        ("checkpoint.async_save=true", "checkpoint.async_save: false -> true"),
        ("export=both", 'export: "online" -> "both"'),
        ("log_every_n_steps=7", "log_every_n_steps: 1 -> 7"),
        ("monitor_every=0", "monitor_every: 50 -> 0"),
        ("metric_logger=torchtune.training.metric_logging.StdoutLogger", "metric_logger: null -> {"),
        ("tokens_per_device=4096", "tokens_per_device: 8192 -> 4096"),
        ("packed=false", "packed: true -> false"),
        ("compile=true", "compile: false -> true"),
        ("enable_activation_checkpointing=true", "enable_activation_checkpointing: false -> true"),
        ("data_parallel_replicate_dim=2", "data_parallel_replicate_dim: 1 -> 2"),
        ("checkpoint_dir=elsewhere", 'checkpoint_dir: null -> "elsewhere"'),
        ("tokenizer.path=elsewhere", 'tokenizer.path: "nothing" -> "elsewhere"'),
        ("dataset.source=elsewhere.jsonl", 'dataset.source: "nothing" -> "elsewhere.jsonl"'),
    ],
)
def test_harmless_changes_pass_with_a_line_each(tmp_path: Path, override: str, line: str) -> None:
    (said,) = compared(tmp_path, [], [override])
    assert said.startswith(line)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed=1", "seed: 0 -> 1"),
        ("optimizer.lr=0.1", "optimizer.lr: 0.002 -> 0.1"),
        ("optimizer=torch.optim.Adam", 'optimizer._component_: "torch.optim.AdamW" -> "torch.optim.Adam"'),
        ("lr_scheduler=null", "lr_scheduler: {"),
        ("lr_scheduler.num_warmup_steps=3", "lr_scheduler.num_warmup_steps: 250 -> 3"),
        ("model.num_layers=2", "model.num_layers: 4 -> 2"),
        ("jepa_weight=2", "jepa_weight: 1.0 -> 2"),
        ("view_sampler.context_range=[0.0, 0.5]", "view_sampler.context_range: [0.0, 1.0] -> [0.0, 0.5]"),
        ("global_batch_size=32", "global_batch_size: 64 -> 32"),
        ("max_seq_len=100", "max_seq_len: 128 -> 100"),
        ("dataset.seed=1", "dataset.seed: 0 -> 1"),
        ("loss_weight=mean", 'loss_weight: "token" -> "mean"'),
        ("clip_grad_norm=2.0", "clip_grad_norm: 1.0 -> 2.0"),
        ("dtype=bf16", 'dtype: "fp32" -> "bf16"'),
        ("compute_dtype=bf16", 'compute_dtype: "fp32" -> "bf16"'),
        ("target_encoder.ema_decay=0.9", "target_encoder.ema_decay: 0.996 -> 0.9"),
        ("shuffle_targets=true", "shuffle_targets: false -> true"),
    ],
)
def test_changes_of_the_run_are_refused_unless_they_are_meant(tmp_path: Path, override: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        compared(tmp_path, [], [override, "log_every_n_steps=2"])
    assert f"  - {line}" in str(error.value)
    assert "log_every_n_steps" not in str(error.value)
    assert "resume_override=true" in str(error.value)
    said = compared(tmp_path, [], [override, "resume_override=true"])
    assert [one for one in said if one.startswith(line) and one.endswith("(resume_override)")]


def test_all_of_them_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        compared(tmp_path, [], ["seed=1", "jepa_every=2", "model.mlp_dim=64"])
    assert str(error.value).count("\n  - ") == 3


@pytest.mark.parametrize("key", ["max_steps=900", "epochs=3"])
def test_more_steps_are_harmless_where_the_schedule_does_not_stretch(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=key.split("=")[0]):
        compared(tmp_path, [], [key])
    assert len(compared(tmp_path, FIXED_SCHEDULE, [*FIXED_SCHEDULE, key])) == 1
    assert len(compared(tmp_path, ["lr_scheduler=null"], ["lr_scheduler=null", key])) == 1


def test_keys_that_an_older_version_did_not_have_count_with_their_defaults(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    old = with_defaults(load_config(START))
    for key in ("resume_override", "export_dtype", "pooled_layer_norm"):
        del old[key]
    OmegaConf.save(old, saved, resolve=True)
    assert check_resume(with_defaults(load_config(START)), saved) == []
    with pytest.raises(ConfigError, match="pooled_layer_norm: true -> false"):
        check_resume(with_defaults(load_config([*START, "pooled_layer_norm=false"])), saved)


def test_a_key_may_change_only_if_the_schema_says_so() -> None:
    """Every new key decides about the run until somebody has thought about it."""
    shared = {
        "output_dir", "device", "checkpoint_dir", "monitor_every", "tokens_per_device", "packed", "compile",
        "enable_activation_checkpointing", "data_parallel_replicate_dim", "checkpoint", "resume", "resume_override",
        "export", "export_dtype", "metric_logger", "log_every_n_steps", "logits_chunk_tokens",
        "peak_tflops", "profiler",
    }  # fmt: skip
    assert {key.name for key in TRAINING.keys if key.may_change} == shared | {"optimizer_in_bwd"}
    assert {key.name for key in LORA.keys if key.may_change} == shared | {"export_merged"}
