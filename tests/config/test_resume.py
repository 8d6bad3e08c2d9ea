"""Which keys a resumed run may change: those that do not decide what its steps compute."""

from pathlib import Path

import pytest
import yaml
from dllm_jepa_full import Config

from dllm_jepa.config import MayChange, check_resume, has_mark, load_config
from dllm_jepa.errors import ConfigError

FIXED_SCHEDULE = ["lr_scheduler.num_training_steps=800"]


def tiny(*words: str) -> Config:
    return Config.check(load_config(["--config", "tiny", *words], Config))


def compared(tmp_path: Path, before: list[str], after: list[str]) -> list[str]:
    (tmp_path / "config.yaml").write_text(tiny(*before).to_yaml())
    return check_resume(tiny(*after), tmp_path / "config.yaml")


def test_an_unchanged_config_has_nothing_to_say(tmp_path: Path) -> None:
    assert compared(tmp_path, [], ["resume=auto", "resume_override=true"]) == []  # they are about this start alone


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("output_dir=runs/moved", 'output_dir: "runs/tiny" -> "runs/moved"'),
        ("checkpoint.async_save=true", "checkpoint.async_save: false -> true"),
        ("metric_logger=torchtune.training.metric_logging.StdoutLogger", "metric_logger: null -> {"),
        ("dataset={_component_: dllm_jepa.data.gsm8k, source: b.jsonl}", 'dataset.source: "a.jsonl" -> "b.jsonl"'),
    ],
)
def test_harmless_changes_pass_with_a_line_each(tmp_path: Path, word: str, line: str) -> None:
    before = ["dataset={_component_: dllm_jepa.data.gsm8k, source: a.jsonl}"]
    (said,) = compared(tmp_path, before, [*before, word])
    assert said.startswith(line)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("seed=1", "seed: 0 -> 1"),
        ("optimizer.lr=0.1", "optimizer.lr: 0.002 -> 0.1"),
        ("optimizer=torch.optim.Adam", 'optimizer._component_: "torch.optim.AdamW" -> "torch.optim.Adam"'),
        ("lr_scheduler=null", "lr_scheduler: {"),
        ("~optimizer.betas", 'optimizer.betas: [0.9, 0.98] -> "nothing"'),
        ("view_sampler.context_range=[0.0, 0.5]", "view_sampler.context_range: [0.0, 1.0] -> [0.0, 0.5]"),
    ],
)
def test_changes_of_the_run_are_refused_unless_they_are_meant(tmp_path: Path, word: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        compared(tmp_path, [], [word, "jepa_every=2", "log_every_n_steps=2"])
    message = str(error.value)
    assert message.count("\n  - ") == 2 and f"  - {line}" in message and "resume_override=true" in message
    said = compared(tmp_path, [], [word, "resume_override=true"])
    assert [one for one in said if one.startswith(line) and one.endswith("(resume_override)")]


@pytest.mark.parametrize("word", ["max_steps=900", "epochs=3"])
def test_more_steps_are_harmless_where_the_schedule_does_not_stretch(tmp_path: Path, word: str) -> None:
    with pytest.raises(ConfigError, match=word.split("=")[0]):
        compared(tmp_path, [], [word])
    assert len(compared(tmp_path, FIXED_SCHEDULE, [*FIXED_SCHEDULE, word])) == 1
    assert len(compared(tmp_path, ["lr_scheduler=null"], ["lr_scheduler=null", word])) == 1


def test_keys_of_other_versions(tmp_path: Path) -> None:
    """A key that the older one did not have counts with its default; one that is gone has changed."""
    old = yaml.safe_load(tiny().to_yaml())
    for key in ("resume_override", "export_dtype", "pooled_layer_norm"):
        del old[key]
    del old["checkpoint"]["async_save"]
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump(old))
    assert check_resume(tiny(), saved) == []
    with pytest.raises(ConfigError, match="pooled_layer_norm: true -> false"):
        check_resume(tiny("pooled_layer_norm=false"), saved)
    saved.write_text(yaml.safe_dump(old | {"smoothing": 0.1}))
    with pytest.raises(ConfigError, match='smoothing: 0.1 -> "nothing"'):
        check_resume(tiny(), saved)


def test_lists_of_a_key_of_ones_own_are_compared_as_yaml_has_them(tmp_path: Path) -> None:
    class Own(Config):
        betas: tuple[float, float] = (0.9, 0.95)
        folder: Path = Path("runs")

    cfg = Own.check(load_config(["--config", "tiny"], Own))
    for text in (cfg.to_yaml(), tiny().to_yaml()):
        (tmp_path / "config.yaml").write_text(text)
        assert check_resume(cfg, tmp_path / "config.yaml") == []


def test_a_key_may_change_only_if_its_class_says_so() -> None:
    """Every new key decides about the run until somebody has thought about it."""
    assert {name for name, field in Config.model_fields.items() if has_mark(field, MayChange)} == {
        "output_dir", "device", "checkpoint_dir", "monitor_every", "tokens_per_device", "packed", "compile",
        "enable_activation_checkpointing", "data_parallel_replicate_dim", "checkpoint", "resume", "resume_override",
        "export", "export_dtype", "export_merged", "metric_logger", "log_every_n_steps", "logits_chunk_tokens",
        "optimizer_in_bwd", "peak_tflops", "profiler",
    }  # fmt: skip
