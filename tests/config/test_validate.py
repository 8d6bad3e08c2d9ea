"""Every rule on a config has a test on its message; the components are stand-ins."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from dllm_jepa.config import (
    REQUIRED,
    TRAINING,
    Key,
    Launch,
    Number,
    Schema,
    problems,
    validate,
    warnings,
    with_defaults,
)
from dllm_jepa.errors import ConfigError

PARTS = """
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Optional
from torch.optim.lr_scheduler import LambdaLR

not_callable = 3

def tokenizer(path: str | Path, lower: bool = False): ...
def model(*, embed_dim: int, num_heads: int = 4):
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
def views(*, context_ratio: float = 0.2, target_ratio: float = 0.7, exact_count: bool = False):
    if not 0 < context_ratio < target_ratio < 1:
        raise ValueError(f"ratios must rise inside (0, 1), got {context_ratio} and {target_ratio}")
def ranged_views(*, bounds: tuple[float, float] = (0.0, 1.0), either: Sequence[float] | None = None): ...
def predictor(embed_dim: int, mlp_dim: int, *, num_layers: int = 1): ...
def target_encoder(backbone, *, ema_decay: float = 0.996): ...
def rows(*, tokenizer, max_seq_len: int, shift_logits: bool, progress: bool, source: str,
         too_long: Literal["truncate", "refuse"] = "truncate", limit: Optional[int] = None,
         eos_fill: int = 0, canvas_tokens: int | None = None): ...
def rows_for_another_recipe(*, tokenizer, source: str): ...
def schedule(optimizer, *, num_training_steps: int, warmup_ratio: float = 0.03):
    if not 0 <= warmup_ratio <= 1:
        raise ValueError(f"warmup_ratio must be in [0, 1], got {warmup_ratio}")
    return LambdaLR(optimizer, lambda step: 1.0)
class Logger:
    def __init__(self, log_dir: str, filename: str | None = None): ...
"""

BASE = """
output_dir: runs/x
device: cpu
tokenizer: {_component_: stand_in_parts.tokenizer, path: words.json}
model: {_component_: stand_in_parts.model, embed_dim: 8}
view_sampler: {_component_: stand_in_parts.views, context_ratio: 0.2}
predictor: {_component_: stand_in_parts.predictor, num_layers: 1}
target_encoder: {_component_: stand_in_parts.target_encoder, ema_decay: 0.99}
dataset: {_component_: stand_in_parts.rows, source: rows.jsonl}
max_seq_len: 64
global_batch_size: 8
tokens_per_device: 128
optimizer: {_component_: torch.optim.AdamW, lr: 0.001, betas: [0.9, 0.98]}
lr_scheduler: {_component_: stand_in_parts.schedule}
epochs: 1
metric_logger: {_component_: stand_in_parts.Logger, log_dir: logs, filename: log.txt}
"""


@pytest.fixture(autouse=True)
def _parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stand_in_parts.py").write_text(PARTS)
    (tmp_path / "broken_parts.py").write_text("import no_such_package\n")
    (tmp_path / "garbled_parts.py").write_text("def model(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)


def config(*overrides: str) -> DictConfig:
    cfg = OmegaConf.merge(OmegaConf.create(BASE), OmegaConf.from_dotlist(list(overrides)))
    assert isinstance(cfg, DictConfig)
    return cfg


def only(cfg: DictConfig, launch: Launch | None = None) -> str:
    """The one problem of a config."""
    (line,) = problems(cfg, TRAINING, launch)
    return line


def test_components_of_the_working_directory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "local_parts.py").write_text("def model(): ...\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    cfg = config()
    cfg.model = {"_component_": "local_parts.model"}
    assert only(cfg).startswith("model._component_: 'local_parts.model': no module named")
    monkeypatch.chdir(tmp_path / "project")
    assert problems(cfg) == []


def test_the_base_config_is_valid() -> None:
    assert problems(config(), TRAINING, Launch()) == []
    validate(config())


@pytest.mark.parametrize("key", ["output_dir", "tokenizer.path", "model.embed_dim", "optimizer.lr"])
def test_question_marks_must_be_set(key: str) -> None:
    cfg = config()
    OmegaConf.update(cfg, key, "???")
    assert only(cfg) == f"{key}: ??? must be set; write it into the yaml or give {key}=VALUE"


@pytest.mark.parametrize(
    "override, parts",
    [
        ("jepa_wieght=2", ["jepa_wieght: unknown key (value 2).", "Did you mean jepa_weight?"]),
        ("zzzz=1", ["zzzz: unknown key (value 1).", "The keys are: output_dir, seed,"]),
        ("checkpoint.every_n_step=5", ["checkpoint.every_n_step: unknown key (value 5). Did you mean every_n_steps?"]),
        ("checkpoint.keep_last=0", ["checkpoint.keep_last: 0 given, must be an integer >= 1 or null"]),
        ("checkpoint=3", ["checkpoint: 3 given, must be a mapping with the keys every_n_steps, keep_last"]),
        ("output_dir=3", ["output_dir: 3 given, must be a path"]),
        ("output_dir=${nowhere}", ["output_dir: cannot be resolved", "nowhere"]),
        ("output_dir=' '", ['output_dir: " " given, must be a path']),
        ("seed=-1", ["seed: -1 given, must be an integer in [0, 4294967295]"]),
        ("seed=1.5", ["seed: 1.5 given, must be an integer in [0, 4294967295]"]),
        ("seed=true", ["seed: true given, must be an integer in [0, 4294967295]"]),
        ("epochs=ten", ['epochs: "ten" given, must be an integer >= 1']),
        ("epochs=null", ["epochs: null given, must be an integer >= 1 ("]),
        ("device=gpu", ['device: "gpu" given, must be one of cpu, cuda']),
        ("jepa_weight=-0.5", ["jepa_weight: -0.5 given, must be a number >= 0"]),
        ("jepa_weight=.nan", ["jepa_weight: NaN given, must be a number >= 0"]),
        ("jepa_weight=.inf", ["jepa_weight: Infinity given, must be a number >= 0"]),
        ("l2_anchor_weight=-1", ["l2_anchor_weight: -1 given, must be a number >= 0"]),
        ("jepa_every=0", ["jepa_every: 0 given, must be an integer >= 1"]),
        ("jepa_ratio=0", ["jepa_ratio: 0 given, must be a number in (0, 1] or null"]),
        ("jepa_ratio=1.1", ["jepa_ratio: 1.1 given, must be a number in (0, 1] or null"]),
        ("monitor_every=-1", ["monitor_every: -1 given, must be an integer >= 0"]),
        ("max_seq_len=1", ["max_seq_len: 1 given, must be an integer >= 4"]),
        ("global_batch_size=0", ["global_batch_size: 0 given, must be an integer >= 1"]),
        ("loss_weight=sum", ['loss_weight: "sum" given, must be one of mean, inverse_ratio, token']),
        ("clip_grad_norm=0", ["clip_grad_norm: 0 given, must be a number > 0 or null"]),
        ("packed=1", ["packed: 1 given, must be true or false"]),
        ("dtype=fp16", ["dtype: fp16 is not offered:", "take bf16 or fp32"]),
        ("compute_dtype=fp16", ["compute_dtype: fp16 is not offered:", "take bf16 or fp32"]),
        ("optimizer=3", ["optimizer: 3 given", "`_component_: package.builder`"]),
        ("model=null", ["model: null given, must be a mapping with `_component_"]),
        # Components
        ("model._component_=nowhere.model", ["model._component_: 'nowhere.model': no module named 'nowhere'"]),
        ("model._component_=stand_in_parts.modell", ["stand_in_parts has no 'modell'. Did you mean model?"]),
        ("model._component_=torch.optimm.AdamW", ["torch has no 'optimm'. Did you mean optim?"]),
        ("model._component_=broken_parts.model", ["importing broken_parts fails", "no_such_package"]),
        ("model._component_=garbled_parts.model", ["importing garbled_parts fails: SyntaxError"]),
        ("model._component_=stand_in_parts.model.x", ["'stand_in_parts.model.x': stand_in_parts.model has no 'x'"]),
        ("model._component_=stand_in_parts.", ["is not a dotted path"]),
        ("model._component_=stand_in_parts.not_callable", ["is int, not something that can be called"]),
        (
            "model.embed_dims=8",
            ["model.embed_dims:", "Did you mean embed_dim?", "It takes: embed_dim, num_heads;", "~model.embed_dims"],
        ),
        ("model.embed_dim=eight", ['model.embed_dim: "eight" given, must be int']),
        ("model.embed_dim=8.5", ["model.embed_dim: 8.5 given, must be int"]),
        ("model.embed_dim=true", ["model.embed_dim: true given, must be int"]),
        ("model.embed_dim=9", ["model: embed_dim must be a multiple of num_heads, got 9 and 4"]),
        ("tokenizer.path=3", ["tokenizer.path: 3 given, must be str | pathlib.Path"]),
        ("tokenizer.lower=maybe", ['tokenizer.lower: "maybe" given, must be bool']),
        ("view_sampler.context_ratio=0.9", ["view_sampler: ratios must rise inside (0, 1), got 0.9 and 0.7"]),
        ("view_sampler.context_ratio=low", ['view_sampler.context_ratio: "low" given, must be float']),
        ("predictor.embed_dim=8", ["predictor.embed_dim: 8 given, but the recipe passes this one itself; remove it"]),
        ("predictor.num_layers=[1]", ["predictor.num_layers: [1] given, must be int"]),
        ("target_encoder.ema_decay=1.0", ["target_encoder.ema_decay: 1.0 given, must be a number in [0, 1)"]),
        ("target_encoder.ema_decay=-0.1", ["target_encoder.ema_decay: -0.1 given, must be a number in [0, 1)"]),
        ("dataset.too_long=drop", ['dataset.too_long: "drop" given, must be truncate or refuse']),
        ("dataset.limit=some", ['dataset.limit: "some" given, must be']),
        ("dataset.max_seq_len=8", ["dataset.max_seq_len: 8 given, but the recipe passes this one itself"]),
        ("dataset.eos_fill=-1", ["dataset.eos_fill: -1 given, must be an integer >= 0"]),
        ("dataset.canvas_tokens=0", ["dataset.canvas_tokens: 0 given, must be an integer >= 1"]),
        ("optimizer.lr=fast", ['optimizer.lr: "fast" given, must be float']),
        ("optimizer.lr=-1.0", ["optimizer: Invalid learning rate: -1.0"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas: [0.9] given, must be tuple"]),
        ("lr_scheduler.warmup_ratio=1.5", ["lr_scheduler: warmup_ratio must be in [0, 1], got 1.5"]),
        (
            "lr_scheduler._component_=torch.optim.lr_scheduler.ConstantLR",
            ["torch.optim.lr_scheduler.ConstantLR does not take 'num_training_steps', which the recipe passes"],
        ),
        ("metric_logger.file_name=x", ["metric_logger.file_name:", "Did you mean filename?"]),
    ],
)
def test_one_wrong_value_gives_one_line_that_says_what_to_do(override: str, parts: list[str]) -> None:
    line = only(config(override))
    for part in parts:
        assert part in line


def test_missing_keys_are_named_with_what_they_want() -> None:
    cfg = config()
    del cfg["global_batch_size"], cfg["dataset"]
    lines = problems(cfg)
    assert len(lines) == 2
    assert any(line.startswith("global_batch_size: missing") and "an integer >= 1" in line for line in lines)
    assert any(line.startswith("dataset: missing") and "_component_" in line for line in lines)


def test_a_missing_argument_of_a_component_is_named() -> None:
    cfg = config()
    del cfg.dataset["source"]
    assert only(cfg) == "dataset.source: missing; stand_in_parts.rows needs it"


def test_a_mapping_without_component_is_refused() -> None:
    cfg = config()
    del cfg.view_sampler["_component_"]
    assert only(cfg).startswith("view_sampler: ") and "`_component_: package.builder`" in only(cfg)


def test_a_component_that_the_recipe_cannot_call_is_refused() -> None:
    lines = problems(config("dataset._component_=stand_in_parts.rows_for_another_recipe"))
    assert [line.split(" ")[-5] for line in lines] == ["'max_seq_len',", "'shift_logits',", "'progress',"]
    assert all("which the recipe passes" in line for line in lines)


def test_positional_arguments_must_fit() -> None:
    cfg = config("target_encoder._component_=stand_in_parts.views")
    del cfg.target_encoder["ema_decay"]
    line = only(cfg)
    assert "stand_in_parts.views does not take what the recipe passes by position: backbone" in line


def test_num_layers_is_bounded_for_our_predictor_only() -> None:
    ours = "predictor._component_=dllm_jepa.jepa.transformer_predictor"
    assert only(config(ours, "predictor.num_layers=6")) == "predictor.num_layers: 6 given, must be an integer in [1, 5]"
    assert problems(config(ours, "predictor.num_layers=5")) == []
    assert problems(config("predictor.num_layers=6")) == []


def test_lists_stand_for_tuples_and_sequences() -> None:
    cfg = config()
    cfg.view_sampler = {"_component_": "stand_in_parts.ranged_views", "bounds": [0.1, 1], "either": [0.5]}
    assert problems(cfg) == []
    for name, value in [("bounds", [0.1]), ("either", ["a"]), ("either", 0.5)]:
        wrong = cfg.copy()
        wrong.view_sampler[name] = value
        assert only(wrong).startswith(f"view_sampler.{name}: {json.dumps(value)} given, must be")


def test_all_problems_are_listed_at_once() -> None:
    cfg = config("seed=-1", "jepa_wieght=1", "dtype=fp16", "model.embed_dims=8", "view_sampler.context_ratio=2.0")
    del cfg["epochs"]
    with pytest.raises(ConfigError) as error:
        validate(cfg)
    message = str(error.value)
    assert "6 problems" in message
    for key in ("seed:", "jepa_wieght:", "dtype:", "model.embed_dims:", "view_sampler:", "epochs:"):
        assert f"\n  - {key}" in message


def test_a_reference_to_a_missing_value_is_reported_once() -> None:
    cfg = config("tokenizer.path=${checkpoint_dir}")
    cfg.checkpoint_dir = "???"
    assert only(cfg).startswith("checkpoint_dir: ???")


# Rules across keys


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (["predictor=null"], ["predictor: null, but jepa_weight is 1.0", "or set jepa_weight: 0"]),
        (["target_encoder=null"], ["target_encoder: null, but jepa_weight is 1.0"]),
        (["jepa_every=2", "jepa_ratio=0.5"], ["jepa_every: 2 together with jepa_ratio: 0.5", "jepa_ratio: null"]),
        (["shuffle_targets=true", "jepa_weight=0"], ["shuffle_targets: true, but jepa_weight is 0"]),
        (["shuffle_targets=true", "global_batch_size=1"], ["needs two sequences", "global_batch_size is 1"]),
        (["dataset.eos_fill=3", "dataset.canvas_tokens=8"], ["dataset.eos_fill: 3 together with", "eos_fill: 0"]),
        (["tokens_per_device=63"], ["tokens_per_device: 63 is less than max_seq_len 64", "raise it to at least 64"]),
        (["compute_dtype=bf16"], ["compute_dtype: bf16 with device: cpu", "set compute_dtype: fp32"]),
        (["checkpoint_dir=nowhere"], ["checkpoint_dir: 'nowhere' is not a directory", "download", "null"]),
        (["output_dir=stand_in_parts.py"], ["output_dir: 'stand_in_parts.py' is a file; give a directory"]),
        (["resume=always"], ["resume: 'always' is neither never nor auto nor an existing path", "auto"]),
    ],
)
def test_rules_across_keys(overrides: list[str], parts: list[str]) -> None:
    line = only(config(*overrides))
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    "overrides",
    [
        ["jepa_weight=0", "predictor=null", "target_encoder=null"],
        ["jepa_weight=0"],
        ["l2_anchor_weight=1e-4", "jepa_weight=1"],
        ["jepa_every=4"],
        ["jepa_ratio=0.25"],
        ["jepa_ratio=1"],
        ["shuffle_targets=true", "global_batch_size=2"],
        ["tokens_per_device=64"],
        ["compute_dtype=bf16", "device=cuda"],
        ["checkpoint_dir=.", "output_dir=."],
        ["resume=auto"],
        ["resume=."],
        ["lr_scheduler=null", "metric_logger=null", "clip_grad_norm=null"],
        ["lr_scheduler.num_training_steps=7"],
        ["max_steps=1", "checkpoint.every_n_steps=1"],
        ["dataset.eos_fill=3", "dataset.canvas_tokens=null"],
        ["dataset.eos_fill=0", "dataset.canvas_tokens=8"],
    ],
)
def test_what_the_rules_allow(overrides: list[str]) -> None:
    assert problems(config(*overrides)) == []


def test_parts_of_the_target_branch_are_checked_even_when_it_is_off() -> None:
    assert only(config("jepa_weight=0", "predictor.num_layer=1")).startswith("predictor.num_layer:")


def test_a_rule_waits_until_its_keys_are_valid() -> None:
    assert only(config("max_seq_len=long")).startswith("max_seq_len:")


# Rules on the machine


@pytest.mark.parametrize(
    "overrides, launch, parts",
    [
        (["global_batch_size=3"], Launch(4, 4), ["global_batch_size: 3 is less than the 4 ranks", "at least 4"]),
        (["device=cuda"], Launch(1, 1, 0), ["device: cuda, but torch sees no CUDA GPU", "set device=cpu"]),
        (["device=cuda"], Launch(4, 4, 2), ["--nproc_per_node: 4 processes", "has 2 GPUs", "start at most 2"]),
        (
            ["data_parallel_replicate_dim=3"],
            Launch(4, 4),
            ["data_parallel_replicate_dim: 3 does not divide the 4 ranks"],
        ),
    ],
)
def test_rules_on_the_machine(overrides: list[str], launch: Launch, parts: list[str]) -> None:
    line = only(config(*overrides), launch)
    for part in parts:
        assert part in line


def test_what_the_rules_on_the_machine_allow() -> None:
    assert problems(config("device=cuda", "data_parallel_replicate_dim=2"), TRAINING, Launch(8, 4, 4)) == []
    assert problems(config("global_batch_size=4"), TRAINING, Launch(4, 4)) == []
    assert problems(config("device=cuda"), TRAINING, None) == []


def test_launch_reads_the_variables_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    launch = Launch.from_environment()
    assert (launch.world_size, launch.local_world_size) == (16, 8)


# Warnings


def test_small_rate_on_bf16_weights_is_warned_about_and_allowed() -> None:
    cfg = config("dtype=bf16", "optimizer.lr=1e-5")
    assert problems(cfg) == []
    (line,) = warnings(cfg)
    assert line.startswith("dtype: bf16 with optimizer.lr 1e-05") and "round-to-nearest" in line and "fp32" in line


@pytest.mark.parametrize(
    "overrides",
    [
        ["dtype=bf16", "optimizer.lr=1e-4"],
        ["dtype=fp32", "optimizer.lr=1e-5"],
        ["dtype=bf16", "optimizer.lr=1e-5", "optimizer.bf16_stochastic_round=true"],
    ],
)
def test_no_warning_without_reason(overrides: list[str]) -> None:
    assert warnings(config(*overrides)) == []


# Defaults and the saved file


def test_defaults_are_filled_in_the_schemas_order() -> None:
    filled = with_defaults(config())
    assert list(filled) == [key.name for key in TRAINING.keys]
    assert filled.jepa_every == 1 and filled.resume == "never" and filled.packed is True
    section = {"every_n_steps": None, "keep_last": None, "keep_every": None, "async_save": False, "directory": None}
    assert filled.checkpoint == section
    assert with_defaults(config("checkpoint.keep_last=2")).checkpoint == section | {"keep_last": 2}


def test_every_default_is_allowed_by_its_own_key() -> None:
    for key in TRAINING.keys:
        assert key.default is REQUIRED or key.allows(key.default), key.name
        assert key.doc and not key.doc.endswith("."), key.name


def test_the_saved_config_is_complete_and_runs_again(tmp_path: Path) -> None:
    cfg = with_defaults(config("tokenizer.path=${output_dir}/words.json"))
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    saved: dict[str, Any] = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert list(saved) == [key.name for key in TRAINING.keys]
    assert saved["tokenizer"]["path"] == "runs/x/words.json"
    again = OmegaConf.load(tmp_path / "config.yaml")
    assert isinstance(again, DictConfig)
    assert problems(again) == []


def test_another_recipe_has_its_own_schema() -> None:
    schema = Schema(keys=(Key("rank", Number(integer=True, low=1), "width of the adapters"),))
    assert problems(OmegaConf.create({"rank": 4}), schema) == []
    (line,) = problems(OmegaConf.create({"rank": 0}), schema)
    assert line == "rank: 0 given, must be an integer >= 1 (width of the adapters)"
    with pytest.raises(ValueError, match="declared twice"):
        Schema(keys=(*schema.keys, *schema.keys))
