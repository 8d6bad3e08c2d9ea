"""What a training config may hold, key by key: one line for each problem, and what it says; builders are stand-ins."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from dllm_jepa_full import Config

from dllm_jepa.config import Launch, load_config

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
def views(*, context_ratio: float = 0.2, target_ratio: float = 0.7):
    if not 0 < context_ratio < target_ratio < 1:
        raise ValueError(f"ratios must rise inside (0, 1), got {context_ratio} and {target_ratio}")
def ranged_views(*, bounds: tuple[float, float] = (0.0, 1.0), either: Sequence[float] | None = None): ...
def predictor(embed_dim: int, mlp_dim: int, *, num_layers: int = 1): ...
def target_encoder(model, copy_backbone, *, ema_decay: float = 0.996): ...
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
    (tmp_path / "base.yaml").write_text(BASE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("stand_in_parts", "local_parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)


def problems(*words: str, launch: Launch | None = None) -> list[str]:
    return Config.problems(load_config(["--config", "base.yaml", *words], Config), launch)


def only(*words: str, launch: Launch | None = None) -> str:
    """The one problem of a config."""
    (line,) = problems(*words, launch=launch)
    return line


def test_the_base_config_is_valid() -> None:
    assert problems(launch=Launch()) == []


def test_builders_of_the_working_directory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "local_parts.py").write_text("def model(): ...\n")
    (tmp_path / "project" / "base.yaml").write_text(BASE)
    words = ("model={_component_: local_parts.model}",)
    assert only(*words).startswith("model._component_: 'local_parts.model': no module named")
    monkeypatch.chdir(tmp_path / "project")
    assert problems(*words) == []


@pytest.mark.parametrize("key", ["output_dir", "tokenizer._component_", "model.embed_dim"])
def test_question_marks_must_be_set(key: str) -> None:
    assert only(f"{key}=???") == f"{key}: ??? must be set; write it into the yaml or give {key}=VALUE"
    assert only("tokenizer.path=${checkpoint_dir}", "checkpoint_dir=???").startswith("checkpoint_dir: ???")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("jepa_wieght=2", ["jepa_wieght: unknown key (value 2).", "Did you mean jepa_weight?"]),
        ("zzzz=1", ["zzzz: unknown key (value 1).", "The keys are: output_dir, seed,"]),
        ("checkpoint.every_n_step=5", ["checkpoint.every_n_step: unknown key (value 5). Did you mean every_n_steps?"]),
        ("checkpoint.zzzz=5", ["checkpoint.zzzz: unknown key (value 5). The keys are: every_n_steps, keep_last"]),
        ("checkpoint.seed=5", ["checkpoint.seed: unknown key (value 5)."]),  # is one elsewhere
        ("checkpoint.keep_last=0", ["checkpoint.keep_last: 0 given, must be an integer >= 1 or null (newest"]),
        ("checkpoint=3", ["checkpoint: 3 given, must be a mapping with the keys every_n_steps, keep_last"]),
        ("output_dir=3", ["output_dir: 3 given, must be a path (folder"]),
        ("output_dir='\" \"'", ['output_dir: " " given, must be a path']),
        ("seed=true", ["seed: true given, must be an integer in [0, 4294967295]"]),
        ("epochs=1.5", ["epochs: 1.5 given, must be an integer >= 1 ("]),
        ("device=gpu", ['device: "gpu" given, must be one of cpu, cuda']),
        ("jepa_weight=.nan", ["jepa_weight: NaN given, must be a number >= 0"]),
        ("jepa_ratio=1.1", ["jepa_ratio: 1.1 given, must be a number in (0, 1] or null"]),
        ("packed=1", ["packed: 1 given, must be true or false"]),
        ("dtype=fp16", ["dtype: fp16 is not offered:", "take bf16 or fp32"]),
        ("export_dtype=half", ["export_dtype: half is not offered:", "take bf16 or fp32"]),
        # Components
        ("model=null", ["model: null given, must be a mapping with `_component_"]),
        ("view_sampler='{x: 1}'", ["view_sampler: {", "`_component_: package.builder`"]),
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
        ("model.embed_dim=eight", ['model.embed_dim: "eight" given, must be an integer']),
        ("model.embed_dim=9", ["model: embed_dim must be a multiple of num_heads, got 9 and 4"]),
        ("tokenizer.path=3", ["tokenizer.path: 3 given, must be a text or a path"]),
        ("view_sampler.context_ratio=0.9", ["view_sampler: ratios must rise inside (0, 1), got 0.9 and 0.7"]),
        ("predictor.embed_dim=8", ["predictor.embed_dim: 8 given, but the recipe passes this one itself; remove it"]),
        ("predictor.num_layers=[1]", ["predictor.num_layers: [1] given, must be an integer"]),
        ("dataset.too_long=drop", ['dataset.too_long: "drop" given, must be one of truncate, refuse']),
        ("dataset.limit=some", ['dataset.limit: "some" given, must be an integer or null']),
        ("~dataset.source", ["dataset.source: missing; stand_in_parts.rows needs it"]),
        ("optimizer.lr=-1.0", ["optimizer: Invalid learning rate: -1.0"]),
        (
            "lr_scheduler._component_=torch.optim.lr_scheduler.ConstantLR",
            ["torch.optim.lr_scheduler.ConstantLR does not take 'num_training_steps', which the recipe passes"],
        ),
        (
            "target_encoder='{_component_: stand_in_parts.views}'",
            ["stand_in_parts.views does not take what the recipe passes by position: model, copy_backbone"],
        ),
        ("metric_logger.file_name=x", ["metric_logger.file_name:", "Did you mean filename?"]),
        # Across keys
        ("predictor=null", ["predictor: null, but jepa_weight is 1.0", "or set jepa_weight: 0"]),
        ("target_encoder=null", ["target_encoder: null, but jepa_weight is 1.0"]),
        ("tokens_per_device=63", ["tokens_per_device: 63 is less than max_seq_len 64", "raise it to at least 64"]),
        ("compute_dtype=bf16", ["compute_dtype: bf16 with device: cpu", "set compute_dtype: fp32"]),
        ("checkpoint_dir=nowhere", ["checkpoint_dir: 'nowhere' is not a directory", "download", "null"]),
        ("output_dir=stand_in_parts.py", ["output_dir: 'stand_in_parts.py' is a file; give a directory"]),
        ("output_dir=stand_in_parts.py/x", ["stand_in_parts.py' is a file; choose another folder"]),
        ("resume=always", ["resume: 'always' is neither never nor auto nor an existing path", "auto"]),
        ("jepa_every=2 jepa_ratio=0.5", ["jepa_every: 2 together with jepa_ratio: 0.5", "jepa_ratio: null"]),
        ("shuffle_targets=true jepa_weight=0", ["shuffle_targets: true, but jepa_weight is 0"]),
        ("shuffle_targets=true global_batch_size=1", ["needs two sequences", "global_batch_size is 1"]),
        ("export=both jepa_weight=0", ["export: both, but jepa_weight is 0", "export: online or null"]),
        ("dataset.eos_fill=3 dataset.canvas_tokens=8", ["dataset.eos_fill: 3 together with", "eos_fill: 0"]),
        # A rule waits until its keys are valid.
        ("max_seq_len=long", ["max_seq_len:"]),
    ],
)
def test_one_mistake_gives_one_line_that_says_what_to_do(words: str, parts: list[str]) -> None:
    line = only(*shlex.split(words))
    assert [part for part in parts if part not in line] == []


@pytest.mark.parametrize(
    "words",
    [
        ["jepa_weight=0", "predictor=null", "target_encoder=null"],
        ["jepa_every=4", "tokens_per_device=64", "resume=auto", "dataset.eos_fill=3", "dataset.canvas_tokens=null"],
        ["jepa_ratio=1", "shuffle_targets=true", "global_batch_size=2", "compute_dtype=bf16", "device=cuda"],
        ["checkpoint_dir=.", "output_dir=.", "resume=.", "dataset.eos_fill=0", "dataset.canvas_tokens=8"],
        ["lr_scheduler=null", "metric_logger=null", "clip_grad_norm=null"],
        ["view_sampler={_component_: stand_in_parts.ranged_views, bounds: [0.1, 1], either: [0.5]}"],
    ],
)
def test_what_the_rules_allow(words: list[str]) -> None:
    assert problems(*words) == []


@pytest.mark.parametrize(("name", "value"), [("bounds", [0.1]), ("either", ["a"]), ("either", 0.5)])
def test_lists_of_a_builder_are_checked_inside(name: str, value: object) -> None:
    word = f"view_sampler={{_component_: stand_in_parts.ranged_views, {name}: {json.dumps(value)}}}"
    assert only(word).startswith(f"view_sampler.{name}: {json.dumps(value)} given, must be a list")


def test_a_component_that_the_recipe_cannot_call_is_refused() -> None:
    lines = problems("dataset._component_=stand_in_parts.rows_for_another_recipe")
    passed = ("max_seq_len", "shift_logits", "progress")
    for line, name in zip(lines, passed, strict=True):
        assert line.endswith(f"does not take {name!r}, which the recipe passes")


def test_missing_keys_are_named_with_what_they_want() -> None:
    dataset, size = problems("~global_batch_size", "~dataset")
    assert dataset.startswith("dataset: missing (") and "give a mapping with `_component_: package.builder`" in dataset
    assert size.startswith("global_batch_size: missing (") and "give an integer >= 1" in size


def test_all_problems_are_listed_at_once() -> None:
    words = ("seed=-1", "jepa_wieght=1", "dtype=fp16", "model.embed_dims=8", "view_sampler.context_ratio=2.0")
    lines = problems(*words, "~epochs", "zzzz=1", "qqqq=2", "lr=1e-5")
    keys = {"seed", "jepa_wieght", "dtype", "model.embed_dims", "view_sampler", "epochs", "zzzz", "qqqq", "lr"}
    assert {line.partition(":")[0] for line in lines} == keys and len(lines) == len(keys)
    assert sum("The keys are" in line for line in lines) == 1


# Rules on the machine


@pytest.mark.parametrize(
    "word, launch, parts",
    [
        ("global_batch_size=3", Launch(4, 4), ["global_batch_size: 3 is less than the 4 ranks", "at least 4"]),
        ("device=cuda", Launch(1, 1, 0), ["device: cuda, but torch sees no CUDA GPU", "set device=cpu"]),
        ("device=cuda", Launch(4, 4, 2), ["--nproc_per_node: 4 processes", "has 2 GPUs", "start at most 2"]),
        ("data_parallel_replicate_dim=3", Launch(4, 4), ["_dim: 3 does not divide the 4 ranks"]),
    ],
)
def test_rules_on_the_machine(word: str, launch: Launch, parts: list[str]) -> None:
    line = only(word, launch=launch)
    assert [part for part in parts if part not in line] == []
    assert problems(word) == []  # where the launch is not known
    assert problems("device=cuda", "data_parallel_replicate_dim=2", launch=Launch(8, 4, 4)) == []
    assert problems("global_batch_size=4", launch=Launch(4, 4)) == []


def test_launch_reads_the_variables_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    launch = Launch.from_environment()
    assert (launch.world_size, launch.local_world_size) == (16, 8)


# Words of other frameworks, and of other recipes


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("lr=1e-5", "optimizer.lr"),
        ("batch_size=4", "global_batch_size (sequences per step, over all ranks) and tokens_per_device"),
        ("report_to=wandb", "metric_logger"),
        ("warmup_ratio=0.1", "lr_scheduler.warmup_ratio"),
    ],
)
def test_words_of_other_frameworks_name_the_key_that_is_meant(word: str, key: str) -> None:
    line = only(word)
    assert line.startswith(f"{word.partition('=')[0]}: unknown key (value ") and f"; here it is {key}" in line
    assert "The keys are" not in line


def test_a_key_of_another_recipe_is_named_as_such() -> None:
    assert only("eval_steps=10").endswith("there is no key: evaluate with the recipe dllm_jepa_eval")
    assert only("num_shots=4").startswith("num_shots: a key of dllm_jepa_eval, not of this recipe; remove what")
    assert only("num_shots=4", "base_dir=x").startswith("num_shots, base_dir: keys of dllm_jepa_eval, not of")
    assert "here it is optimizer.lr" in only("lr=1")
    assert only("part=target").startswith("part: a key of dllm_jepa_eval and dllm_jepa_generate, not of this recipe")


# Defaults and the saved file


def test_every_key_is_documented_and_its_default_allowed() -> None:
    cfg = Config.check(load_config(["--config", "base.yaml"], Config))
    assert Config.problems(yaml.safe_load(cfg.to_yaml())) == []
    assert cfg.jepa_every == 1 and cfg.packed is True and cfg.checkpoint.keep_last is None
    sections = (Config, type(cfg.checkpoint))
    keys = {name: field.description or "" for section in sections for name, field in section.model_fields.items()}
    assert [name for name, text in keys.items() if name != "checkpoint" and (not text or text.endswith("."))] == []


def test_the_saved_config_is_complete_and_makes_the_same_run(tmp_path: Path) -> None:
    words = ["--config", "base.yaml", "tokenizer.path=${output_dir}/words.json", "checkpoint.keep_last=2"]
    cfg = Config.check(load_config(words, Config))
    (tmp_path / "config.yaml").write_text(cfg.to_yaml())
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert list(saved) == list(Config.model_fields)
    assert saved["tokenizer"] == {"_component_": "stand_in_parts.tokenizer", "path": "runs/x/words.json"}
    assert saved["checkpoint"]["keep_last"] == 2 and saved["checkpoint"]["async_save"] is False
    assert Config.check(load_config(["--config", "config.yaml"], Config)) == cfg
