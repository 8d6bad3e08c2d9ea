"""The full recipe in one process: variants by config alone, what it writes, and how it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dllm_jepa.config import read_config, recipe_config
from dllm_jepa.data import BatchPlan, TrainingBatches
from dllm_jepa.models import InitialWeights, load_hf, save_hf
from dllm_jepa.models.llada import llada
from dllm_jepa.models.tiny import tiny_tokenizer
from tests.launching import metrics, run_here, training_state

DREAM = ("model._component_=dllm_jepa.models.dream.dream", "model.num_kv_heads=2")
FIXED = (
    "view_sampler._component_=dllm_jepa.jepa.fixed_ratio_views",
    "~view_sampler.context_range",
    "~view_sampler.target_range",
)
SMALL_MODEL: dict[str, Any] = {
    "vocab_size": 512,
    "embed_dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "mlp_dim": 48,
    "max_seq_len": 256,
    "rope_base": 10_000.0,
}
PLAIN = ("jepa_weight=0", "predictor=null", "target_encoder=null")


def plain_diffusion_losses(config_file: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of a loop that has never heard of JEPA."""
    cfg: Any = recipe_config("dllm_jepa_full").check(read_config(config_file))
    tokenizer, model = cfg.tokenizer.build(), cfg.model.build()
    initial = InitialWeights(model, seed=cfg.seed)
    model.load_state_dict({name: initial.read(name) for name in model.state_dict()})
    given = {"tokenizer": tokenizer, "max_seq_len": cfg.max_seq_len, "shift_logits": False, "progress": False}
    dataset = cfg.dataset.build(**given)
    plan = BatchPlan(
        dataset.lengths,
        global_batch_size=cfg.global_batch_size,
        tokens_per_device=cfg.tokens_per_device,
        num_ranks=1,
        seed=cfg.seed,
    )
    ids = {"mask_id": tokenizer.mask_id, "pad_id": tokenizer.pad_id}
    batches = TrainingBatches(dataset, plan, cfg.view_sampler.build(), rank=0, seed=cfg.seed, **ids)
    optimizer = cfg.optimizer.build(model.parameters())
    scheduler = cfg.lr_scheduler.build(optimizer, num_training_steps=cfg.max_steps)
    steps = []
    for step in range(cfg.max_steps):
        (batch,) = batches.step(step)
        hidden = model(batch.context, attention_mask=batch.attention_mask)
        logits = model.logits(hidden, batch.masked_positions, attention_mask=batch.attention_mask)
        loss = F.cross_entropy(logits, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad_norm)
        optimizer.step()
        scheduler.step()
        steps.append((float(loss), float(norm)))
    return steps


def test_jepa_weight_zero_equals_a_loop_without_jepa(tmp_path: Path) -> None:
    rows = run_here(tmp_path / "run", *PLAIN, "checkpoint.every_n_steps=6")
    expected = plain_diffusion_losses(tmp_path / "run" / "config.yaml")
    assert [(row["loss"], row["grad_norm"]) for row in rows] == [pytest.approx(step, rel=1e-5) for step in expected]
    assert all(row["jepa_loss"] == 0 and row["loss"] == row["diffusion_loss"] for row in rows)
    parts = {name.split(".")[0] for name in training_state(tmp_path / "run", 6)}
    assert parts == {"trained", "optimizer", "monitor"}
    assert not any("predictor" in name for name in training_state(tmp_path / "run", 6))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        DREAM,
        (*DREAM, "packed=false", "tokens_per_device=300"),
        FIXED,
        (*FIXED, "view_sampler.context_ratio=0.1", "view_sampler.target_ratio=0.9", "loss_weight=mean"),
        ("loss_weight=inverse_ratio", "view_sampler.exact_count=true", "view_sampler.nested=true"),
        ("predictor._component_=dllm_jepa.jepa.mlp_predictor", "~predictor.num_layers"),
        ("predictor._component_=dllm_jepa.jepa.identity_predictor", "~predictor.num_layers"),
        ("predictor.num_layers=3", "pooled_layer_norm=false", "target_encoder.ema_decay=0"),
        ("model.tie_embeddings=true", "model.num_kv_heads=2"),
        ("clip_grad_norm=null", "lr_scheduler=null", "dataset.mask_prompt=true"),
    ],
)
def test_variants_by_config_alone(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    rows = run_here(tmp_path / "run", *overrides, "max_steps=3")
    for row in rows:
        assert row["loss"] == pytest.approx(row["diffusion_loss"] + row["jepa_loss"])
        assert 0 < row["jepa_loss"] < 2
        assert math.isfinite(row["grad_norm"])
        assert row["grad_norm"] > 0


@pytest.mark.parametrize(
    ("override", "on"),
    [("jepa_every=3", [0, 0, 1, 0, 0, 1]), ("jepa_ratio=0.5", [0, 1, 0, 1, 0, 1]), ("jepa_ratio=1.0", [1] * 6)],
)
def test_jepa_on_a_fraction_of_the_steps(tmp_path: Path, override: str, on: list[int]) -> None:
    rows = run_here(tmp_path / "run", override)
    assert [int(row["jepa_loss"] > 0) for row in rows] == on


def test_l2_anchor_penalizes_the_distance_to_the_start(tmp_path: Path) -> None:
    rows = run_here(tmp_path / "run", *PLAIN, "l2_anchor_weight=0.5", "checkpoint={every_n_steps: 1, keep_last: null}")
    assert rows[0]["loss"] == rows[0]["diffusion_loss"]
    for row in rows[1:]:
        state = training_state(tmp_path / "run", row["step"] - 1)
        weights = [value for name, value in state.items() if name.startswith("trained.model.")]
        base = [state[f"anchor.{position}"] for position in range(len(weights))]
        penalty = 0.5 * sum(float((w - b).double().square().sum()) for w, b in zip(weights, base, strict=True))
        assert row["loss"] - row["diffusion_loss"] == pytest.approx(penalty, rel=1e-3)
    assert run_here(tmp_path / "free", *PLAIN)[-1]["diffusion_loss"] != rows[-1]["diffusion_loss"]


def test_export_holds_the_trained_weights(tmp_path: Path) -> None:
    run_here(tmp_path / "run", "export=online", "checkpoint.every_n_steps=6")
    exported = load_hf(tmp_path / "run/hf").state_dict()
    state = training_state(tmp_path / "run", 6)
    assert all(torch.equal(weight, state[f"trained.model.{name}"]) for name, weight in exported.items())
    tokenizer = tiny_tokenizer(tmp_path / "run/hf")
    config = json.loads((tmp_path / "run/hf/config.json").read_text())
    assert config["mask_token_id"] == tokenizer.mask_id == tiny_tokenizer().mask_id
    assert config["eos_token_id"] == tokenizer.eos_id

    # A run that starts from the export and takes steps of rate zero writes the same weights, and copies its files.
    start = f"checkpoint_dir={tmp_path / 'run/hf'}"
    run_here(tmp_path / "next", start, "export=online", "optimizer.lr=0", "max_steps=1", "lr_scheduler=null")
    again = load_hf(tmp_path / "next/hf").state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in exported.items())
    assert (tmp_path / "next/hf/tokenizer.json").read_bytes() == (tmp_path / "run/hf/tokenizer.json").read_bytes()


def test_metrics_have_the_promised_keys(tmp_path: Path) -> None:
    rows = run_here(tmp_path / "run", "tokens_per_device=130")
    always = {"step", "epoch", "loss", "diffusion_loss", "jepa_loss", "grad_norm", "lr", "tokens", "masked_tokens"}
    always |= {"sequences", "micro_batches", "tokens_per_second", "step_seconds"}
    monitored = {"effective_rank", "cosine_diversity", "target_cosine", "monitor_rows"}
    for row in rows:
        assert always <= row.keys()
        assert (row["step"] % 2 == 0) == (monitored <= row.keys())
        assert row["sequences"] == 12
    assert [row["monitor_rows"] for row in rows if "monitor_rows" in row] == [24, 48, 72]
    assert [row["epoch"] for row in rows] == [0, 0, 0, 0, 0, 1]
    assert rows[1]["target_cosine"] == pytest.approx(1 - rows[1]["jepa_loss"])


def test_the_resolved_config_repeats_the_run(tmp_path: Path) -> None:
    first = run_here(tmp_path / "run", "max_steps=2")
    again = run_here(tmp_path / "again", base=["--config", str(tmp_path / "run/config.yaml")])
    assert [row["loss"] for row in again] == [row["loss"] for row in first]


def test_metric_loggers_of_torchtune(tmp_path: Path) -> None:
    where = tmp_path / "run"
    logger = "metric_logger={_component_: torchtune.training.metric_logging.%s, log_dir: %s, %s}"
    disk = logger % ("DiskLogger", tmp_path / "disk", "filename: log.txt")
    rows = run_here(where, disk, "log_every_n_steps=3")
    lines = (tmp_path / "disk/log.txt").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["Step 3", "Step 6"]
    assert f"loss:{rows[2]['loss']}" in lines[0]
    run_here(
        tmp_path / "other", logger % ("TensorBoardLogger", tmp_path / "board", "organize_logs: false"), "max_steps=1"
    )
    assert list((tmp_path / "board").glob("events*"))


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = {
    "gsm8k": {"question": "Ann has {n} hats and buys 2. How many?", "answer": "{n}+2 hats.\n#### {n}"},
    "nlrx": {"description": "lines with {n} digits", "regex": ".*[0-9]{{{n}}}.*"},
    "spider": {
        "db_id": "shop",
        "question": "How many items cost {n}?",
        "query": "SELECT count(*) FROM t WHERE c = {n}",
    },
    "django": {"annotation": "assign {n} to x.", "code": "x = {n}"},
}


@pytest.mark.parametrize(
    ("task", "family"), [("gsm8k", ()), ("gsm8k", DREAM), ("nlrx", ()), ("spider", DREAM), ("django", ())]
)
def test_every_task_trains(tmp_path: Path, task: str, family: tuple[str, ...]) -> None:
    rows = [{key: text.format(n=n) for key, text in ROWS[task].items()} for n in range(24)]
    source = jsonl(tmp_path / "train.jsonl", rows)
    dataset = f"{{_component_: dllm_jepa.data.{task}, source: {source}, template: chat}}"
    losses = run_here(
        tmp_path / "run", *family, *FIXED, f"dataset={dataset}", "max_steps=25", "optimizer.lr=1e-2", "loss_weight=mean"
    )
    assert sum(row["loss"] for row in losses[-5:]) < 0.7 * sum(row["loss"] for row in losses[:5])
    assert all(row["padding"] < 0.03 for row in losses)


def test_a_broken_loss_stops_before_the_update(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run_here(tmp_path / "run", "optimizer.lr=1e30", "lr_scheduler=null", "checkpoint.every_n_steps=1")
    assert exit_info.value.code == 1
    message = capsys.readouterr().err
    steps = len(metrics(tmp_path / "run"))
    assert f"error: step {steps + 1}: loss" in message
    assert f"Last good checkpoint: {tmp_path}/run/checkpoints/step_{steps:08d}" in message
    assert "Dataset indices of its batch: [" in message
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())[-1] == f"step_{steps:08d}"


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run_here(tmp_path / "run", "checkpoint.every_n_steps=2", "checkpoint.keep_last=2")
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["latest", "step_00000004", "step_00000006"]


def exits_with(capsys: pytest.CaptureFixture[str], output_dir: Path, *overrides: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        run_here(output_dir, *overrides)
    assert exit_info.value.code == 1
    message = capsys.readouterr().err
    assert message.count("error:") == 1
    return message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("model.vocab_size=100",), "set model.vocab_size to at least 508"),
        (("max_seq_len=300",), "max_seq_len=300 is over the model's context of 256 tokens"),
        (("global_batch_size=61",), "global_batch_size=61 is above the 60 sequences of the dataset"),
        (("max_seq_len=32", "tokens_per_device=32", "dataset.canvas_tokens=30"), "above max_seq_len 32"),
        (("checkpoint_dir={assets}/dream_tiny",), "model_type 'Dream', the configured model is of family 'llada'"),
        (("checkpoint_dir={assets}/llada_tiny",), "vocab_size is 320 in config.json, 512 in the configured model"),
        (("checkpoint_dir={assets}",), "has no config.json"),
        (("checkpoint_dir={other_mask}",), "mask_token_id is 7 in config.json, the tokenizer's mask token has id"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], expected: str
) -> None:
    paths = {"assets": Path(__file__).parents[1] / "assets", "other_mask": tmp_path / "other_mask"}
    save_hf(llada(**SMALL_MODEL), paths["other_mask"])
    config = paths["other_mask"] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"mask_token_id": 7}))
    message = exits_with(capsys, tmp_path / "run", *(override.format(**paths) for override in overrides))
    assert expected in message
    assert not (tmp_path / "run").exists()


def test_another_run_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_here(tmp_path / "run", "max_steps=1", "checkpoint.every_n_steps=1")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    message = exits_with(capsys, tmp_path / "run", "max_steps=1")
    assert "already holds a run" in message
    assert "resume=auto" in message
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_a_finished_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = ("checkpoint.every_n_steps=2", "lr_scheduler=null", "export=online")
    run_here(tmp_path / "run", *fixed, "max_steps=2")

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}

    before = files()
    run_here(tmp_path / "run", *fixed, "max_steps=2", "resume=auto")
    assert "holds a finished run of 2 steps: nothing to do" in capsys.readouterr().out
    message = exits_with(capsys, tmp_path / "run", *fixed, "max_steps=4", "resume=auto")
    assert "To go on to step 4" in message and f"mv {tmp_path}/run/hf {tmp_path}/run/hf_before" in message
    state = f"resume={tmp_path}/run/checkpoints/step_00000002"
    assert "To go on to step 4" in exits_with(capsys, tmp_path / "run", *fixed, state, "max_steps=4")
    assert files() == before
    (tmp_path / "run/hf").rename(tmp_path / "first")
    assert len(run_here(tmp_path / "run", *fixed, "max_steps=4", "resume=auto")) == 4
    assert (tmp_path / "run/hf").is_dir()


def test_a_start_that_failed_does_not_bar_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("dllm_jepa.training.materialize", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            run_here(tmp_path / "run", "max_steps=1")
    assert [row["step"] for row in run_here(tmp_path / "run", "max_steps=1")] == [1]


def test_bf16_weights_train_on_cpu_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_here(tmp_path / "run", "dtype=bf16", "optimizer.lr=1e-5", "max_steps=2")
    assert "warning" in capsys.readouterr().err
    expected = run_here(tmp_path / "fp32", "optimizer.lr=1e-5", "max_steps=2")
    assert [row["loss"] for row in rows] == [pytest.approx(row["loss"], rel=2e-2) for row in expected]


def test_later_training_states_are_not_mixed_with_a_new_branch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(tmp_path / "run", "checkpoint={every_n_steps: 2, keep_last: null}")
    message = exits_with(capsys, tmp_path / "run", f"resume={tmp_path}/run/checkpoints/step_00000002")
    assert "holds training states after" in message
    assert "step_00000004, step_00000006" in message


def test_a_component_where_the_yaml_has_null(tmp_path: Path) -> None:
    logger = "metric_logger=torchtune.training.metric_logging.StdoutLogger"
    assert len(run_here(tmp_path / "run", logger, "max_steps=1")) == 1
